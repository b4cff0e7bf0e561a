"""The exact gradient of a preference loss with the memory of one micro-batch of steps (METHOD: Preference).

A stage mean couples all its steps, so losses of micro-batches do not add. But the loss depends on the parameters only
through the steps' log-ratios, so its gradient is sum_t c_t grad log pi(a_t|o_t) with c = d loss / d log_ratio.

  one pass    Every term of the loss compares the two episodes of one pair, and the weight of its mean is data, so c of
              a pair follows from the log-ratios of that pair. Micro-batches hold whole pairs, hence each can be judged
              and pulled back as soon as its forward pass is done.
  two passes  Where a pair does not fit: forward without gradient, then c, then forward and backward.

Which it is follows from shapes alone, so an update is traced once. In both, steps that no loss or metric looks at are
never evaluated: those of a stage without a pair, of pairs of sign 0, of padding.

Axes: B pairs, T steps, A action tokens, N rows of a micro-batch, M micro-batches at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from stare_jax import sharding

LogProbFn = Callable[[Any, Any, Any], jax.Array]
Kernel = Callable[[jax.Array, "PreferenceBatch"], tuple[Any, Mapping[str, Any]]]


class PreferenceBatch(NamedTuple):
  """Pairs of episodes as padded steps; row b and row B + b are the two episodes of pair b.

  Attributes:
    obs: tree of [2B, T, ...], what the policy sees at each step.
    tokens: int32[2B, T, A].
    valid: bool[2B, T]; padded steps are never evaluated and get no gradient.
    ref_log_prob: float32[2B, T], nats, summed over the action's tokens.
    pairs: what the kernel needs beside: stage_id int32[2B, T], cost float32[2B, K], sign int8[B, K] ...
  """

  obs: Any
  tokens: Any
  valid: Any
  ref_log_prob: Any
  pairs: Any


def loss_mean(loss: Any, metrics: Mapping[str, Any]) -> Any:
  """The loss as a Mean: as returned, or where a kernel returned its value, the Mean that it left in its metrics."""
  loss = loss if hasattr(loss, "weight") else metrics.get("loss")
  if not hasattr(loss, "weight"):
    raise TypeError("the loss function returned no Mean; expected (Mean, {name: Mean}), or a Mean under 'loss'")
  return loss


def preference_gradient(
  log_prob_fn: LogProbFn, kernel: Kernel, params: Any, batch: PreferenceBatch, *, micro_batch: int,
  mesh: Mesh | None = None,
) -> tuple[Any, jax.Array, Mapping[str, Any]]:  # fmt: skip
  """(exact gradient, loss float32[], {name: Mean}).

  log_prob_fn: (params, obs [N, ...], tokens int32[N, A]) -> float32[N, A].
  kernel: (log_ratio float32[2B, T], batch) -> (Mean, {name: Mean}); a kernel of losses/ does. Each of its terms depends
    on the log-ratios of one pair, and the weights of its means on none. Log-ratios that it ignores are 0.
  micro_batch: steps; a pair of full length fits from 2 T on.
  """
  check_micro_batch(micro_batch, mesh)

  def judge(log_ratio: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    mean, metrics = kernel(log_ratio, batch)
    value = loss_mean(mean, metrics).value()
    return value, (value, dict(metrics))

  compared = compared_steps(kernel, batch)
  if one_pass(batch.valid.shape, micro_batch):
    grads, log_ratio = _in_one_pass(log_prob_fn, judge, params, batch, compared, micro_batch, mesh)
    return grads, *judge(log_ratio)[1]
  data = (batch.obs, batch.tokens)
  log_prob = _forward(log_prob_fn, params, data, compared, micro_batch, mesh)
  cotangent, told = jax.grad(judge, has_aux=True)(jnp.where(compared, log_prob - batch.ref_log_prob, 0.0))
  return _backward(log_prob_fn, params, data, jnp.where(compared, cotangent, 0.0), micro_batch, mesh), *told


def one_pass(shape: tuple[int, ...], micro_batch: int) -> bool:
  """Whether a pair of full length fits into a micro-batch. shape: (2B, T)."""
  return 2 * shape[1] <= micro_batch


def most_trips(shape: tuple[int, int], micro_batch: int) -> int:
  """Micro-batches, in each pass, of a batch whose every step is valid and compared. shape: (2B, T)."""
  rows, steps = shape
  if one_pass(shape, micro_batch):
    return math.ceil(rows // 2 / (micro_batch // (2 * steps)))
  return math.ceil(rows * steps / micro_batch)


def compared_steps(kernel: Kernel, batch: PreferenceBatch) -> jax.Array:
  """bool[2B, T]: the steps on which the loss or a metric depends.

  Asked of the kernel itself, as derivatives where all log-ratios are 0. What is compared shows even where a loss is
  flat, by its metrics `chosen` and `rejected`, which are linear in the log-ratios.
  """

  def outputs(log_ratio: jax.Array) -> jax.Array:
    mean, metrics = kernel(log_ratio, batch)
    means = [loss_mean(mean, metrics), *(m for m in metrics.values() if hasattr(m, "weight"))]
    return jnp.stack([m.total for m in means])

  slopes = jax.jacrev(outputs)(jnp.zeros(batch.valid.shape, jnp.float32))
  return batch.valid & jnp.any(slopes != 0, axis=0)


# Micro-batches of steps -------------------------------------------------------------------------------------


class Steps(NamedTuple):
  """The steps of a padded batch in the order of their micro-batches; the unwanted ones come last, in none.

    rows: tree of [2B * T, ...].   order: int32[2B * T].
    start: int32[M + 1], where in `order` each micro-batch begins and ends.   trips: int32[], micro-batches in use.

  A micro-batch takes its steps wherever they lie, and so its images travel between devices: a few milliseconds, against
  devices that would wait until the one with the longest episodes is done.
  """

  rows: Any
  order: jax.Array
  start: jax.Array
  trips: jax.Array


def in_order(rows: Any, wanted: jax.Array, size: int) -> Steps:
  """Micro-batches of the next `size` wanted steps. rows: tree of [2B, T, ...]. wanted: bool[2B, T]."""
  count = jnp.sum(wanted, dtype=jnp.int32)
  start = jnp.minimum(size * jnp.arange(-(-wanted.size // size) + 1, dtype=jnp.int32), count)
  order = jnp.argsort(~wanted.ravel(), stable=True).astype(jnp.int32)
  return Steps(_flat(rows), order, start, -(-count // size))


def whole_pairs(rows: Any, wanted: jax.Array, size: int) -> Steps:
  """Micro-batches of pairs, each with all its wanted steps: the longest pair first, into the first one with room.

  256 pairs of 30 to 160 steps take 24.3 micro-batches of 1024, where cutting pairs would need 24.2 (means of 300 draws;
  never more than one above), and 25.5 in their given order. If all have 160 steps: 43, six pairs in each, for 40.
  rows, wanted: as `in_order`.
  """
  half = len(wanted) // 2
  steps = jnp.sum(wanted, axis=1, dtype=jnp.int32)
  length = steps[:half] + steps[half:]

  def first_fit(load: jax.Array, more: jax.Array) -> tuple[jax.Array, jax.Array]:
    at = jnp.argmax(load + more <= size)
    return load.at[at].add(more), at

  longest = jnp.argsort(-length)
  load, at = jax.lax.scan(first_fit, jnp.zeros(half, jnp.int32), length[longest])
  number = jnp.zeros(half, jnp.int32).at[longest].set(at.astype(jnp.int32))
  key = jnp.where(wanted, jnp.concatenate([number, number])[:, None], half)
  order = jnp.argsort(key.ravel(), stable=True).astype(jnp.int32)
  start = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(load, dtype=jnp.int32)])
  return Steps(_flat(rows), order, start, jnp.sum(load > 0, dtype=jnp.int32))


def _flat(rows: Any) -> Any:
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def _micro_batch(
  steps: Steps, number: jax.Array | int, size: int, mesh: Mesh | None
) -> tuple[Any, jax.Array, jax.Array]:
  """Rows [N = size, ...] of one micro-batch, their index int32[N] and whether they are wanted bool[N].

  Places behind the last wanted step repeat a wanted one, where there is any: what lies in the padding is not looked at.
  """
  at = steps.start[number] + jnp.arange(size, dtype=jnp.int32)
  real = at < steps.start[number + 1]
  index = jnp.where(real, steps.order[jnp.minimum(at, len(steps.order) - 1)], steps.order[0])

  def take(x: jax.Array) -> jax.Array:
    x = x[index]
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh))

  return jax.tree.map(take, steps.rows), index, real


def check_micro_batch(micro_batch: int, mesh: Mesh | None) -> None:
  """Every device gets the same share of a micro-batch."""
  shards = sharding.batch_shards(mesh)
  if micro_batch < 1 or micro_batch % shards:
    raise ValueError(
      f"micro_batch is {micro_batch} steps, which do not divide over {shards} devices (data x fsdp); "
      f"make it a positive multiple of {shards}"
    )


# The passes -------------------------------------------------------------------------------------------------


def _log_prob(log_prob_fn: LogProbFn, params: Any, obs: Any, tokens: jax.Array) -> jax.Array:
  """float32[N], summed over the action's tokens."""
  return jnp.sum(log_prob_fn(params, obs, tokens), axis=-1, dtype=jnp.float32)


def _zeros(params: Any) -> Any:
  return jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)


def _add(total: Any, grads: Any) -> Any:
  return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)


def _in_one_pass(
  log_prob_fn: LogProbFn, judge: Callable, params: Any, batch: PreferenceBatch, compared: jax.Array, size: int,
  mesh: Mesh | None,
) -> tuple[Any, jax.Array]:  # fmt: skip
  """(gradient, log_ratio float32[2B, T]): each micro-batch forward, judged, backward.

  It is judged among the pairs so far, the others at log-ratio 0: they count in the weight of the mean and nowhere else.
  Where one micro-batch holds all steps there is neither loop nor sum.
  """
  size, several = min(size, compared.size), size < compared.size
  rows = (batch.obs, batch.tokens, batch.ref_log_prob)
  steps = (whole_pairs if several else in_order)(rows, compared, size)

  def part(number: jax.Array | int, log_ratio: jax.Array) -> tuple[Any, jax.Array]:
    (obs, tokens, reference), index, real = _micro_batch(steps, number, size, mesh)
    log_prob, pull_back = jax.vjp(lambda params: _log_prob(log_prob_fn, params, obs, tokens), params)
    log_ratio = log_ratio.at[jnp.where(real, index, log_ratio.size)].set(log_prob - reference, mode="drop")
    cotangent, _ = jax.grad(judge, has_aux=True)(log_ratio.reshape(compared.shape))
    return pull_back(jnp.where(real, cotangent.ravel()[index], 0.0))[0], log_ratio

  def body(number: jax.Array, carry: tuple[Any, jax.Array]) -> tuple[Any, jax.Array]:
    grads, log_ratio = part(number, carry[1])
    return _add(carry[0], grads), log_ratio

  none = jnp.zeros(compared.size, jnp.float32)
  if several:
    grads, log_ratio = jax.lax.fori_loop(0, steps.trips, body, (_zeros(params), none))
  else:
    grads, log_ratio = part(0, none)
    grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  return grads, log_ratio.reshape(compared.shape)


def _forward(
  log_prob_fn: LogProbFn, params: Any, data: Any, wanted: jax.Array, size: int, mesh: Mesh | None
) -> jax.Array:
  """Without gradient: float32[2B, T], log-prob of each wanted step's action, 0 elsewhere. data: (obs, tokens)."""
  steps = in_order(data, wanted, size)

  def body(number: jax.Array, out: jax.Array) -> jax.Array:
    rows, index, real = _micro_batch(steps, number, size, mesh)
    return out.at[jnp.where(real, index, out.size)].set(_log_prob(log_prob_fn, params, *rows), mode="drop")

  out = jax.lax.fori_loop(0, steps.trips, body, jnp.zeros(wanted.size, jnp.float32))
  return out.reshape(wanted.shape)


def _backward(
  log_prob_fn: LogProbFn, params: Any, data: Any, cotangent: jax.Array, size: int, mesh: Mesh | None
) -> Any:
  """sum_t c_t grad log pi(a_t|o_t), float32, over the steps with c_t != 0."""
  steps = in_order((*data, cotangent), cotangent != 0, size)

  def body(number: jax.Array, total: Any) -> Any:
    (obs, tokens, c), _, real = _micro_batch(steps, number, size, mesh)
    _, pull_back = jax.vjp(lambda params: _log_prob(log_prob_fn, params, obs, tokens), params)
    return _add(total, pull_back(jnp.where(real, c, 0.0))[0])

  return jax.lax.fori_loop(0, steps.trips, body, _zeros(params))
