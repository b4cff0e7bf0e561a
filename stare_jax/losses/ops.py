"""What the loss kernels share: means kept as sums, token log-probabilities, reductions over stages.

Axes: N flat steps, B episodes or pairs, T steps, K stages, A action tokens, V action bins.
All arithmetic is float32. A value under a False mask is never read: it may be NaN, and its gradient is
exactly zero, because every operation replaces it *before* anything nonlinear is done (`where` after the fact
hides NaN from the value but not from the gradient, where 0 * NaN is NaN).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
  """A mean kept as its two sums, so that shards, micro-batches and hosts add exactly.

  `a + b` pools the samples of both; `value()` divides, once, at the end. An empty mean has the value 0.

  Attributes:
    total: float32[], sum of weight * sample.
    weight: float32[], sum of weights; a constant of the data, not differentiated.
  """

  total: Array
  weight: Array

  @classmethod
  def of(cls, x: Array, valid: Array) -> Mean:
    """The mean of `x` where `valid`; both of one shape. Masked entries may be NaN."""
    chex.assert_equal_shape([x, valid])
    total = jnp.sum(jnp.where(valid, x, 0), dtype=jnp.float32)
    return cls(total=total, weight=jnp.sum(valid, dtype=jnp.float32))

  def value(self) -> Array:
    """float32[]."""
    return self.total / jnp.where(self.weight > 0, self.weight, 1.0)

  def __add__(self, other: Mean) -> Mean:
    return Mean(total=self.total + other.total, weight=self.weight + other.weight)


def check(**arrays: tuple[Array, str, Any]) -> dict[str, int]:
  """Checks shapes and dtypes, and names what is wrong.

      check(logits=(logits, "NAV", jnp.float32), tokens=(tokens, "NA", jnp.int32))

  A letter is an axis; it gets its size where it first appears, and every later use must agree. Dtypes are
  exact: an integer reward or a bfloat16 log-probability is an error, not a silent rounding.

  Returns: the size of each axis.
  """
  sizes: dict[str, int] = {}
  for name, (array, axes, dtype) in arrays.items():
    known = ", ".join(f"{axis}={sizes[axis]}" for axis in axes if axis in sizes) or "any sizes"
    expected = f"{name}: expected {jnp.dtype(dtype).name}[{', '.join(axes)}] with {known}"
    chex.assert_type(array, dtype, custom_message=expected)
    chex.assert_rank(array, len(axes), custom_message=expected)
    sizes = dict(zip(axes, array.shape, strict=True)) | sizes
    chex.assert_shape(array, tuple(sizes[axis] for axis in axes), custom_message=expected)
  return sizes


def log_softmax(logits: Array, temperature: float | Array = 1.0) -> Array:
  """float32[..., V] log-probabilities at the temperature (> 0) that sampled, or will sample, the tokens."""
  chex.assert_type(logits, jnp.float32)
  return jax.nn.log_softmax(logits / temperature, axis=-1)


def token_log_prob(logits: Array, tokens: Array, temperature: float | Array = 1.0) -> Array:
  """log pi(token) in nats.

    logits: float32[..., A, V], raw.
    tokens: int32[..., A], bins in [0, V).
    temperature: > 0; the one that sampled the tokens, or the ratio to the rollout does not start at one.
  Returns: float32[..., A].
  """
  chex.assert_type([logits, tokens], [jnp.float32, jnp.int32])
  chex.assert_equal_shape_prefix([logits, tokens], tokens.ndim)
  return jnp.take_along_axis(log_softmax(logits, temperature), tokens[..., None], axis=-1)[..., 0]


def entropy(logits: Array, temperature: float | Array = 1.0) -> Array:
  """-sum_v p_v log p_v in nats: float32[..., A, V] -> float32[..., A]; a logit of -inf adds nothing."""
  log_prob = log_softmax(logits, temperature)
  possible = log_prob > -jnp.inf  # 0 * -inf is NaN
  return -jnp.sum(jnp.exp(log_prob) * jnp.where(possible, log_prob, 0.0), axis=-1)


def stage_sum(x: Array, stage_id: Array, num_stages: int) -> Array:
  """The sum of `x` over the steps of each stage: float32[..., T], int32[..., T] -> float32[..., K].

  A stage id outside [0, K), such as the -1 of padding, belongs to no stage. Written as a masked reduction
  rather than a scatter: XLA fuses it, and each episode stays on its own device.
  """
  chex.assert_equal_shape([x, stage_id])
  chex.assert_type([x, stage_id], [jnp.float32, jnp.int32])
  member = stage_id[..., None] == jnp.arange(num_stages, dtype=jnp.int32)
  return jnp.sum(jnp.where(member, x[..., None], 0.0), axis=-2)


def stage_mean(x: Array, stage_id: Array, num_stages: int) -> tuple[Array, Array]:
  """The mean over the steps of each stage (0 where it has none) and T_k, how many: float32[..., K]."""
  steps = stage_sum(jnp.ones_like(x), stage_id, num_stages)
  return stage_sum(x, stage_id, num_stages) / jnp.maximum(steps, 1.0), steps


def standardize(x: Array, valid: Array) -> Array:
  """(x - mean) / (std + 1e-8) over the valid entries, 0 elsewhere; float32 and bool of one shape."""
  chex.assert_type([x, valid], [jnp.float32, bool])
  mean = lambda samples: Mean.of(samples, valid).value()
  centred = jnp.where(valid, x, 0.0) - mean(x)
  std = jnp.sqrt(mean(jnp.square(centred)))
  return jnp.where(valid, centred / (std + 1e-8), 0.0)
