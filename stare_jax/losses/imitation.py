"""Imitation: cross-entropy on the action tokens of demonstrations."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stare_jax.losses import ops
from stare_jax.losses.ops import Array, Mean


def soft_targets(tokens: Array, num_bins: int, sigma: float) -> Array:
  """A Gaussian over the neighbouring bins, discretised and renormalised at the edges.

      w_v = exp(-(v - token)^2 / (2 sigma^2)) / sum_u exp(-(u - token)^2 / (2 sigma^2))

  Action bins are ordered, which a one-hot target does not say: the next bin is nearly as good.

    tokens: int32[..., A]. sigma: in bins; 0 is one-hot.
  Returns: float32[..., A, V].
  """
  if sigma < 0:
    raise ValueError(f"smoothing_sigma is {sigma}; expected a width in bins >= 0 (0 is a one-hot target)")
  if sigma == 0:
    return jax.nn.one_hot(tokens, num_bins, dtype=jnp.float32)
  distance = (jnp.arange(num_bins, dtype=jnp.int32) - tokens[..., None]).astype(jnp.float32)
  return jax.nn.softmax(-0.5 * jnp.square(distance / sigma), axis=-1)


def cross_entropy(
  logits: Array, tokens: Array, valid: Array, *, smoothing_sigma: float = 0.0
) -> tuple[Array, dict[str, Mean]]:
  """Cross-entropy to demonstrated action tokens, the mean over the valid ones.

      loss = sum_na valid * -sum_v w_v(token) log softmax(logits)_v / sum_na valid

    logits: float32[N, A, V], raw; the temperature is 1.
    tokens: int32[N, A], bins in [0, V).
    valid: bool[N, A]; False for padded steps and for action dimensions that never vary.
    smoothing_sigma: width of the Gaussian targets in bins; 0 is the plain cross-entropy.
  Returns: loss float32[], metrics {loss, nll, accuracy, l1}. nll is of the demonstrated token alone, since
    soft targets keep the loss above their entropy; accuracy and l1, in bins, are of the likeliest bin.
  """
  sizes = ops.check(logits=(logits, "NAV", jnp.float32), tokens=(tokens, "NA", jnp.int32), valid=(valid, "NA", bool))
  logits = jnp.where(valid[..., None], logits, 0.0)
  tokens = jnp.where(valid, tokens, 0)
  log_prob = ops.log_softmax(logits)
  targets = soft_targets(tokens, sizes["V"], smoothing_sigma)
  # A bin the target gives nothing may be impossible (logit -inf), and 0 * -inf is NaN.
  loss = Mean.of(-jnp.sum(targets * jnp.where(targets > 0, log_prob, 0.0), axis=-1), valid)
  error = jnp.abs(jnp.argmax(logits, axis=-1) - tokens)
  return loss.value(), {
    "loss": loss,
    "nll": Mean.of(-ops.token_log_prob(logits, tokens), valid),
    "accuracy": Mean.of(error == 0, valid),
    "l1": Mean.of(error, valid),
  }
