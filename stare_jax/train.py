"""Training: the state, the optimiser, and one compiled update per phase.

  TrainState        step int32[], params, opt; donated to every update
  make_optimizer    AdamW with clipping, warm-up and decay; the host may scale the learning rate between updates
  make_update       (params, batch) -> (Mean, {name: Mean}) becomes (state, batch) -> (state, metrics)
  make_preference_update   the exact two-pass gradient (METHOD: Exactness under micro-batching)
  make_log_prob, make_loss the same forward passes without an update
  fetch             the door up: metrics as floats, or a NonFiniteError that names the source

A `Mean` (losses.ops) is anything with float32[] `total` and `weight` and a `value()`. Its weight counts valid elements
and does not depend on the parameters. Gradients of `total` are summed over micro-batches and divided once by the summed
weight, so the result does not depend on how the batch was cut.

A non-finite loss, gradient or step changes nothing: parameters, optimiser and step counter are kept on the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from stare_jax import sharding
from stare_jax.train_optimizer import hyperparams, learning_rate_scale, make_optimizer, set_learning_rate_scale
from stare_jax.train_state import (
  Trainable,
  TrainState,
  abstract_state,
  full_precision,
  init_state,
  join,
  join_state,
  new_state,
  split,
  split_state,
  state_shardings,
)

__all__ = [
  "TrainState", "abstract_state", "init_state", "join", "join_state", "learning_rate_scale", "make_optimizer",
  "new_state", "set_learning_rate_scale", "split", "split_state", "state_shardings",
]  # fmt: skip

TINY = float(np.finfo(np.float32).tiny)

LossFn = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]


class NonFiniteError(FloatingPointError):
  """An update was refused because its loss, gradient or step is NaN or infinite; nothing was changed."""


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


class Update:
  """A compiled (state, batch) -> (state, metrics). `traces` counts how often it was traced.

  What is trained is donated; frozen parameters go in by reference and are the same arrays in the state that comes out.
  `function` is (state of the trained parameters, frozen parameters, batch) -> (state, metrics).
  """

  def __init__(
    self, function: Callable[..., Any], mesh: Mesh | None, param_axes: sharding.ParamAxes | None,
    trainable: Trainable | None = None,
  ):  # fmt: skip
    self.traces = 0
    self._mesh, self._param_axes, self._trainable = mesh, param_axes, trainable
    self._compiled = None if mesh is not None else jax.jit(self._counted(function), donate_argnums=0)
    self._function = function

  def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(state: TrainState, frozen: Any, batch: Any) -> Any:
      self.traces += 1  # runs while tracing only
      with sharding.activations(self._mesh):
        return function(state, frozen, batch)

    return counted

  def _build(self, state: TrainState) -> Any:
    """Pins the shardings of what comes out to the rules, so that the second call sees what the first one saw."""
    places = state_shardings(state, self._mesh, self._param_axes)
    out = (places, sharding.replicated(self._mesh))
    options = sharding.compiler_options(self._mesh)
    function = self._counted(self._function)
    self._compiled = jax.jit(function, donate_argnums=0, out_shardings=out, compiler_options=options)
    return self._compiled

  def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    own, frozen = split_state(state, self._trainable)
    own, metrics = (self._compiled or self._build(own))(own, frozen, batch)
    return join_state(own, frozen), metrics

  def trace(self, state: TrainState, batch: Any) -> Any:
    """As `jax.jit(...).trace`: for reading the program."""
    own, frozen = split_state(state, self._trainable)
    return (self._compiled or self._build(own)).trace(own, frozen, batch)

  def lower(self, state: TrainState, batch: Any) -> Any:
    """As `jax.jit(...).lower`: for reading the compiled program and its memory."""
    return self.trace(state, batch).lower()


# The update -------------------------------------------------------------------------------------------------


def _loss_mean(loss: Any, metrics: Mapping[str, Any]) -> Any:
  """The loss as a Mean: as returned, or where a kernel returned its value, the Mean that it left in its metrics."""
  loss = loss if hasattr(loss, "weight") else metrics.get("loss")
  if not hasattr(loss, "weight"):
    raise TypeError("the loss function returned no Mean; expected (Mean, {name: Mean}), or a Mean under 'loss'")
  return loss


def _values(metrics: Mapping[str, Any]) -> dict[str, jax.Array]:
  """{name: Mean} -> {name: float32[]}."""
  if wrong := [name for name, m in metrics.items() if not hasattr(m, "weight")]:
    raise TypeError(f"metrics {wrong}: expected a Mean (total, weight) each, so that shards and micro-batches add")
  return {name: m.value().astype(jnp.float32) for name, m in metrics.items()}


def _apply(
  tx: optax.GradientTransformation, state: TrainState, grads: Any, loss: jax.Array, metrics: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimiser step, refused on the device where the loss, the gradient or the step is not finite."""
  squares = jnp.stack([jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)])
  bad = ~jnp.isfinite(squares)  # a leaf's sum of squares is finite only where all of the leaf is
  grad_norm = jnp.sqrt(jnp.sum(squares))
  updates, opt = tx.update(grads, state.opt, full_precision(state.params))
  update_norm = optax.tree.norm(updates)
  finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)
  params = optax.apply_updates(state.params, updates)
  new = dataclasses.replace(state, step=state.step + 1, params=params, opt=opt)
  state = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
  rates = hyperparams(opt)
  more = {"learning_rate": rates["learning_rate"] * rates["scale"]} if "scale" in rates else {}
  flags = {
    "_finite": finite,
    "_bad_gradients": jnp.sum(bad),
    "_first_bad_gradient": jnp.where(jnp.any(bad), jnp.argmax(bad), -1),
  }
  out = {**metrics, "loss": loss, "grad_norm": grad_norm, "update_norm": update_norm, **more, **flags}
  return state, {name: jnp.asarray(x, jnp.float32) for name, x in out.items()}


def _cut(batch: Any, micro_batches: int, mesh: Mesh | None) -> Any:
  """[N, ...] -> [micro_batches, N / micro_batches, ...]; scalars are repeated.

  Where the rows are spread over devices, micro-batch m takes rows m, m + M, ... so that every device keeps its own.
  """
  shards = sharding.batch_shards(mesh)

  def cut(path: Any, x: Any) -> jax.Array:
    if jnp.ndim(x) == 0:
      return jnp.broadcast_to(x, (micro_batches,))
    if x.shape[0] % (micro_batches * shards):
      raise ValueError(
        f"batch: {sharding.path_name(path) or 'array'} {tuple(x.shape)} has {x.shape[0]} rows, which do not divide "
        f"into {micro_batches} micro-batches on {shards} devices; make it a multiple of {micro_batches * shards}"
      )
    if shards == 1:
      return x.reshape(micro_batches, -1, *x.shape[1:])
    x = x.reshape(-1, micro_batches, *x.shape[1:]).swapaxes(0, 1)
    return jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh, lead=1))

  return jax.tree_util.tree_map_with_path(cut, batch)


def _gradients(loss_fn: LossFn, params: Any, batch: Any, micro_batches: int, mesh: Mesh | None) -> tuple[Any, Any, Any]:
  """(gradient of the mean loss, loss Mean, {name: Mean}) of the whole batch."""

  def one(rows: Any) -> tuple[Any, tuple[Any, Any]]:
    def total(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
      loss, metrics = loss_fn(params, rows)
      loss = _loss_mean(loss, metrics)
      return loss.total, (loss, dict(metrics))

    grads, means = jax.grad(total, has_aux=True)(params)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads), means

  if micro_batches == 1:
    grads, (loss, metrics) = one(batch)
  else:

    def body(total: Any, rows: Any) -> tuple[Any, Any]:
      grads, means = one(rows)
      return jax.tree.map(jnp.add, total, grads), means

    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
    grads, means = jax.lax.scan(body, zeros, _cut(batch, micro_batches, mesh))
    loss, metrics = jax.tree.map(lambda x: jnp.sum(x, axis=0), means)
  weight = jnp.maximum(loss.weight, TINY)
  return jax.tree.map(lambda g: g / weight, grads), loss, metrics


def make_update(
  loss_fn: LossFn,
  tx: optax.GradientTransformation,
  *,
  mesh: Mesh | None = None,
  param_axes: sharding.ParamAxes | None = None,
  micro_batches: int = 1,
  trainable: Trainable | None = None,
) -> Update:
  """(state, batch) -> (state, metrics {name: float32[]}); compiled once, state donated.

  loss_fn: (params, batch) -> (Mean, {name: Mean}), or (float32[], {"loss": Mean, ...}) as kernels do.
  batch: a tree of [N, ...] arrays, and of scalars, which every micro-batch sees.
  metrics: the loss_fn's own, loss, grad_norm (before clipping), update_norm, learning_rate; read them with `fetch`.
  trainable: by the path of a parameter; the others get no gradient, no moments and no copy. None trains all.
  """
  if micro_batches < 1:
    raise ValueError(f"micro_batches is {micro_batches}; expected at least 1")

  def update(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, dict[str, jax.Array]]:
    whole = lambda params, rows: loss_fn(join(params, frozen), rows)
    grads, loss, metrics = _gradients(whole, state.params, batch, micro_batches, mesh)
    return _apply(tx, state, grads, loss.value(), _values(metrics))

  return Update(update, mesh, param_axes, trainable)


def make_loss(loss_fn: LossFn) -> Callable[[Any, Any], dict[str, Any]]:
  """Compiled (params, batch) -> {"loss": Mean, name: Mean}, for validation; add batches with `mean_values`."""

  def evaluate(params: Any, batch: Any) -> dict[str, Any]:
    loss, metrics = loss_fn(params, batch)
    return {**metrics, "loss": _loss_mean(loss, metrics)}

  return jax.jit(evaluate)


def mean_values(batches: Iterable[Mapping[str, Any]]) -> dict[str, float]:
  """The exact mean of each metric over several batches of `make_loss`: summed totals over summed weights."""
  sums: dict[str, list[float]] = {}
  for metrics in jax.device_get(list(batches)):
    for name, m in metrics.items():
      entry = sums.setdefault(name, [0.0, 0.0])
      entry[0] += float(m.total)
      entry[1] += float(m.weight)
  return {name: total / max(weight, TINY) for name, (total, weight) in sums.items()}


# Preference: the exact two-pass gradient --------------------------------------------------------------------


class _Steps(NamedTuple):
  """The steps of a padded batch, the wanted ones first, so that the others are never evaluated.

    rows: tree of [2B * T, ...].   order: int32[2B * T].   count: int32[], how many are wanted.

  A micro-batch takes the next wanted steps wherever they lie, and so its images travel between devices: a few
  milliseconds, against devices that would wait until the one with the longest episodes is done.
  """

  rows: Any
  order: jax.Array
  count: jax.Array


def _steps(rows: Any, wanted: jax.Array) -> _Steps:
  """rows: tree of [2B, T, ...]. wanted: bool[2B, T]."""
  flat = lambda x: x.reshape(-1, *x.shape[2:])
  order = jnp.argsort(~flat(wanted), stable=True).astype(jnp.int32)
  return _Steps(jax.tree.map(flat, rows), order, jnp.sum(wanted, dtype=jnp.int32))


def _micro_batch(steps: _Steps, number: jax.Array, size: int, mesh: Mesh | None) -> tuple[Any, jax.Array, jax.Array]:
  """Rows [size, ...] of one micro-batch, their index int32[size] and whether they are wanted bool[size].

  Places behind the last wanted step repeat the first one: what lies in the padding is never looked at.
  """
  at = number * size + jnp.arange(size)
  real = at < steps.count
  index = jnp.where(real, steps.order[jnp.minimum(at, len(steps.order) - 1)], steps.order[0])

  def take(x: jax.Array) -> jax.Array:
    x = x[index]
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding.batch_sharding(mesh))

  return jax.tree.map(take, steps.rows), index, real


def _trips(steps: _Steps, size: int) -> jax.Array:
  return (steps.count + size - 1) // size


def _forward(log_prob_fn: Any, params: Any, batch: Any, valid: jax.Array, size: int, mesh: Mesh | None) -> jax.Array:
  """Pass 1, without gradient: float32[2B, T], log-prob of each valid step's action, 0 in the padding."""
  steps = _steps(batch, valid)

  def body(number: jax.Array, out: jax.Array) -> jax.Array:
    (obs, tokens), index, real = _micro_batch(steps, number, size, mesh)
    log_prob = jnp.sum(log_prob_fn(params, obs, tokens), axis=-1, dtype=jnp.float32)
    return out.at[jnp.where(real, index, out.size)].set(log_prob, mode="drop")

  out = jax.lax.fori_loop(0, _trips(steps, size), body, jnp.zeros(valid.size, jnp.float32))
  return out.reshape(valid.shape)


def _backward(log_prob_fn: Any, params: Any, batch: Any, cotangent: jax.Array, size: int, mesh: Mesh | None) -> Any:
  """Pass 2: sum_t c_t grad log pi(a_t|o_t), float32, over the steps with c_t != 0."""
  steps = _steps((*batch, cotangent), cotangent != 0)

  def body(number: jax.Array, total: Any) -> Any:
    (obs, tokens, c), _, real = _micro_batch(steps, number, size, mesh)
    c = jnp.where(real, c, 0.0)
    run = lambda params: jnp.sum(log_prob_fn(params, obs, tokens), axis=-1, dtype=jnp.float32)
    (grads,) = jax.vjp(run, params)[1](c)
    return jax.tree.map(lambda t, g: t + g.astype(jnp.float32), total, grads)

  zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
  return jax.lax.fori_loop(0, _trips(steps, size), body, zeros)


def _whole(
  log_prob_fn: Any, params: Any, batch: Any, valid: jax.Array, size: int, mesh: Mesh | None
) -> tuple[jax.Array, Callable[[jax.Array], Any]]:
  """What `_forward` returns, and `_backward` as a function of the cotangent, for steps that are one micro-batch."""
  (obs, tokens), index, real = _micro_batch(_steps(batch, valid), jnp.int32(0), size, mesh)
  run = lambda params: jnp.sum(log_prob_fn(params, obs, tokens), axis=-1, dtype=jnp.float32)
  log_prob, pull_back = jax.vjp(run, params)

  def gradient(cotangent: jax.Array) -> Any:
    (grads,) = pull_back(jnp.where(real, cotangent.ravel()[index], 0.0))
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads)

  out = jnp.zeros(valid.size, jnp.float32).at[jnp.where(real, index, valid.size)].set(log_prob, mode="drop")
  return out.reshape(valid.shape), gradient


def _check_micro_batch(micro_batch: int, mesh: Mesh | None) -> None:
  """Every device gets the same share of a micro-batch."""
  shards = sharding.batch_shards(mesh)
  if micro_batch < 1 or micro_batch % shards:
    raise ValueError(
      f"micro_batch is {micro_batch} steps, which do not divide over {shards} devices (data x fsdp); "
      f"make it a positive multiple of {shards}"
    )


def make_log_prob(
  log_prob_fn: Callable[[Any, Any, Any], jax.Array], *, micro_batch: int, mesh: Mesh | None = None
) -> Callable[[Any, Any, Any, Any], jax.Array]:
  """Compiled (params, obs [2B, T, ...], tokens int32[2B, T, A], valid bool[2B, T]) -> float32[2B, T].

  Reference log-probs, once per dataset: summed over the action's tokens, 0 where not valid.
  """
  _check_micro_batch(micro_batch, mesh)

  def log_prob(params: Any, obs: Any, tokens: Any, valid: jax.Array) -> jax.Array:
    with sharding.activations(mesh):
      return _forward(log_prob_fn, params, (obs, tokens), valid, micro_batch, mesh)

  return jax.jit(log_prob, compiler_options=sharding.compiler_options(mesh))


def preference_gradient(
  log_prob_fn: Callable[[Any, Any, Any], jax.Array],
  kernel: Callable[[jax.Array, PreferenceBatch], tuple[Any, Mapping[str, Any]]],
  params: Any,
  batch: PreferenceBatch,
  *,
  micro_batch: int,
  mesh: Mesh | None = None,
) -> tuple[Any, jax.Array, Mapping[str, Any]]:
  """(exact gradient, loss float32[], {name: Mean}) with the memory of one micro-batch of steps (see METHOD).

  Where one micro-batch holds all steps its forward pass serves both passes, and is not computed again.

  log_prob_fn: (params, obs [N, ...], tokens int32[N, A]) -> float32[N, A].
  kernel: (log_ratio float32[2B, T], batch) -> (Mean, {name: Mean}); a kernel of losses/ does.
  """
  _check_micro_batch(micro_batch, mesh)
  data, valid = (batch.obs, batch.tokens), batch.valid
  if micro_batch >= valid.size:
    log_prob, pull_back = _whole(log_prob_fn, params, data, valid, micro_batch, mesh)
  else:
    log_prob = _forward(log_prob_fn, params, data, valid, micro_batch, mesh)
    pull_back = lambda c: _backward(log_prob_fn, params, data, c, micro_batch, mesh)
  log_ratio = jnp.where(valid, log_prob - batch.ref_log_prob, 0.0)

  def loss(log_ratio: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    mean, metrics = kernel(log_ratio, batch)
    value = _loss_mean(mean, metrics).value()
    return value, (value, dict(metrics))

  cotangent, (value, metrics) = jax.grad(loss, has_aux=True)(log_ratio)
  cotangent = jnp.where(valid, cotangent, 0.0)
  return pull_back(cotangent), value, metrics


def make_preference_update(
  log_prob_fn: Callable[[Any, Any, Any], jax.Array],
  kernel: Callable[[jax.Array, PreferenceBatch], tuple[Any, Mapping[str, Any]]],
  tx: optax.GradientTransformation,
  *,
  micro_batch: int,
  mesh: Mesh | None = None,
  param_axes: sharding.ParamAxes | None = None,
  trainable: Trainable | None = None,
) -> Update:
  """(state, PreferenceBatch) -> (state, metrics), as `make_update`; see `preference_gradient` for the arguments."""
  _check_micro_batch(micro_batch, mesh)

  def update(state: TrainState, frozen: Any, batch: PreferenceBatch) -> tuple[TrainState, dict[str, jax.Array]]:
    whole = lambda params, obs, tokens: log_prob_fn(join(params, frozen), obs, tokens)
    grads, loss, metrics = preference_gradient(whole, kernel, state.params, batch, micro_batch=micro_batch, mesh=mesh)
    return _apply(tx, state, grads, loss, _values(metrics))

  return Update(update, mesh, param_axes, trainable)


# The door up ------------------------------------------------------------------------------------------------


def check_finite(metrics: Mapping[str, float], params: Any, trainable: Trainable | None = None) -> None:
  """Raises NonFiniteError where the update behind these host-side metrics was refused.

  params: the parameter tree (or its shapes), of which `trainable` are trained: names the gradient at fault.
  """
  if metrics.get("_finite", 1.0) == 1.0:
    return
  terms = [name for name, x in metrics.items() if not math.isfinite(x) and name not in ("grad_norm", "update_norm")]
  terms.sort(key="loss".__eq__)  # the sum of the others comes last
  trained, _ = split(params, trainable)
  paths = [sharding.path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(trained)]
  count, first = int(metrics["_bad_gradients"]), int(metrics["_first_bad_gradient"])
  if terms:
    source = f"loss terms not finite: {', '.join(f'{name} = {metrics[name]}' for name in terms)}"
  elif count:
    source = f"gradient not finite in {count} of {len(paths)} parameters, first {paths[first]}"
  else:
    source = f"step not finite (grad_norm {metrics['grad_norm']:.3g}, update_norm {metrics['update_norm']:.3g})"
  raise NonFiniteError(
    f"update refused: {source}. Parameters and optimiser are as before this batch. Look at the data of that term, or "
    f"lower the learning rate in a new --workdir that starts from this one's checkpoint (--config.init_from); the same "
    f"command again continues from the last checkpoint and would meet the same update"
  )


def fetch(
  metrics: Mapping[str, jax.Array], params: Any, trainable: Trainable | None = None
) -> dict[str, float]:
  """The door up: an update's metrics as floats, in one transfer; raises NonFiniteError if it was refused."""
  host = {name: float(x) for name, x in jax.device_get(dict(metrics)).items()}
  check_finite(host, params, trainable)
  return {name: x for name, x in host.items() if not name.startswith("_")}
