"""Training: the state, the optimiser, and one compiled update per phase.

  TrainState        step int32[], params, opt; donated to every update
  make_optimizer    AdamW with clipping, warm-up and decay; the host may scale the learning rate between updates
  make_update       (params, batch) -> (Mean, {name: Mean}) becomes (state, batch) -> (state, metrics)
  make_preference_update   the same for pairs, by the exact gradient of `train_preference`
  fetch             the door up: metrics as floats, or a NonFiniteError that names the source

A `Mean` (losses.ops) is anything with float32[] `total` and `weight` and a `value()`. Its weight counts valid elements
and does not depend on the parameters. Gradients of `total` are summed over micro-batches and divided once by the summed
weight, so the result does not depend on how the batch was cut.

A non-finite loss, gradient or step changes nothing: parameters, optimiser and step counter are kept on the device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from stare_jax import sharding
from stare_jax.train_optimizer import (
  hyperparams,
  learning_rate_scale,
  make_optimizer,
  restart_moments,
  set_learning_rate_scale,
)
from stare_jax.train_preference import (
  Kernel,
  LogProbFn,
  PreferenceBatch,
  check_micro_batch,
  loss_mean,
  most_trips,
  preference_gradient,
)
from stare_jax.train_state import (
  Trainable,
  TrainState,
  abstract_state,
  full_precision,
  join,
  join_state,
  new_state,
  split,
  split_state,
  state_shardings,
)

__all__ = [
  "PreferenceBatch", "TrainState", "abstract_state", "join", "join_state", "learning_rate_scale", "make_optimizer",
  "most_trips", "new_state", "preference_gradient", "restart_moments", "set_learning_rate_scale", "split",
  "split_state", "state_shardings",
]  # fmt: skip

TINY = float(np.finfo(np.float32).tiny)

LossFn = Callable[[Any, Any], tuple[Any, Mapping[str, Any]]]


class NonFiniteError(FloatingPointError):
  """An update was refused because its loss, gradient or step is NaN or infinite; nothing was changed."""


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
    self._function, self._compiled = function, None

  def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(state: TrainState, frozen: Any, batch: Any) -> Any:
      self.traces += 1  # runs while tracing only
      with sharding.activations(self._mesh):
        return function(state, frozen, batch)

    return counted

  def _build(self, state: TrainState) -> Any:
    """Pins the shardings of what comes out to the rules, so that the second call sees what the first one saw."""
    where = {}
    if self._mesh is not None:
      places = state_shardings(state, self._mesh, self._param_axes)
      where = {"out_shardings": (places, sharding.replicated(self._mesh))}
    options = sharding.compiler_options(self._mesh)
    self._compiled = jax.jit(self._counted(self._function), donate_argnums=0, compiler_options=options, **where)
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
      loss = loss_mean(loss, metrics)
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


def make_preference_update(
  log_prob_fn: LogProbFn,
  kernel: Kernel,
  tx: optax.GradientTransformation,
  *,
  micro_batch: int,
  mesh: Mesh | None = None,
  param_axes: sharding.ParamAxes | None = None,
  trainable: Trainable | None = None,
) -> Update:
  """(state, PreferenceBatch) -> (state, metrics), as `make_update`; see `preference_gradient` for the arguments."""
  check_micro_batch(micro_batch, mesh)

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
