"""The state of training, and its two parts: what is trained, and the frozen rest.

A part is the same tree with None in place of the other part's leaves, so a path means the same leaf in all three.
Gradients, moments, accumulators and checkpoints of a part have no entry for what is not in it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from stare_jax import sharding

Trainable = Callable[[str], bool]  # by the path of a parameter, "lora/llm/head/a"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "params", "opt", "critic"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class TrainState:
  """What a phase carries from update to update, and a checkpoint holds.

  step: int32[], the updates applied (refused ones do not count). opt: the optimiser's, of the trained parameters.
  critic: of the simulator's state (train_critic), where there is one; replicated, and passed through by every update
  here.
  """

  step: jax.Array
  params: Any
  opt: Any
  critic: Any = None


# What is trained, and the frozen rest -------------------------------------------------------------------------


def split(tree: Any, trainable: Trainable | None) -> tuple[Any, Any]:
  """(trained, frozen): the same tree twice, with None for the leaves of the other part.

    trainable: asked once for each tree of the same structure; None: everything is trained.
  Raises: ValueError if nothing would be trained.
  """
  leaves, structure = jax.tree.flatten(tree)
  picked = _picked(structure, trainable)
  if leaves and not any(picked):
    raise ValueError("nothing to train: trainable is False for every parameter")
  part = lambda mine: structure.unflatten(x if own is mine else None for x, own in zip(leaves, picked, strict=True))
  return part(True), part(False)


@functools.lru_cache(maxsize=16)  # every update asks, and looking at the paths of 7B's leaves takes milliseconds
def _picked(structure: jax.tree_util.PyTreeDef, trainable: Trainable | None) -> tuple[bool, ...]:
  """Of each leaf, whether it is trained."""
  paths, _ = jax.tree_util.tree_flatten_with_path(structure.unflatten(range(structure.num_leaves)))
  return tuple(trainable is None or bool(trainable(sharding.path_name(path))) for path, _ in paths)


def join(trained: Any, frozen: Any) -> Any:
  """The inverse of `split`."""
  return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def split_state(state: TrainState, trainable: Trainable | None) -> tuple[TrainState, Any]:
  """The state of what is trained, and the frozen parameters."""
  trained, frozen = split(state.params, trainable)
  return dataclasses.replace(state, params=trained), frozen


def join_state(state: TrainState, frozen: Any) -> TrainState:
  return dataclasses.replace(state, params=join(state.params, frozen))


# The state ----------------------------------------------------------------------------------------------------


def full_precision(params: Any) -> Any:
  """Parameters as the optimiser sees them: float32, so that its moments are float32 under bfloat16 weights too."""
  return jax.tree.map(lambda p: p.astype(jnp.float32), params)


def _new(params: Any, tx: optax.GradientTransformation, critic: Any, trainable: Trainable | None) -> TrainState:
  opt = tx.init(full_precision(split(params, trainable)[0]))
  return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt=opt, critic=critic)


def state_shardings(state: TrainState, mesh: Mesh, param_axes: sharding.ParamAxes | None = None) -> TrainState:
  """A NamedSharding for every leaf of a state (arrays or ShapeDtypeStructs); moments follow their parameter."""
  places = sharding.shardings(state.params, param_axes, mesh)
  opt = sharding.like_params(state.opt, state.params, places, mesh)
  critic = jax.tree.map(lambda _: sharding.replicated(mesh), state.critic)
  return TrainState(step=sharding.replicated(mesh), params=places, opt=opt, critic=critic)


def abstract_state(
  params: Any, tx: optax.GradientTransformation, *, mesh: Mesh | None = None, param_axes: Any = None,
  critic: Any = None, trainable: Trainable | None = None,
) -> TrainState:  # fmt: skip
  """Shapes, dtypes and (with a mesh) shardings of the state of `params`: what checkpoint.restore fills."""
  shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), (params, critic))
  state = jax.eval_shape(lambda p, c: _new(p, tx, c, trainable), *shapes)
  if mesh is None:
    one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
  places = state_shardings(state, mesh, param_axes)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)


def new_state(
  params: Any,
  tx: optax.GradientTransformation,
  *,
  mesh: Mesh | None = None,
  param_axes: sharding.ParamAxes | None = None,
  critic: Any = None,
  trainable: Trainable | None = None,
) -> TrainState:
  """Step 0 of a phase that starts from `params` (device arrays).

  Copies what is trained, so that a reference may keep its own; frozen parameters are shared with it.
  """
  build = lambda params, critic: _new(jax.tree.map(lambda p: jnp.array(p, copy=True), params), tx, critic, None)
  params, frozen = split(params, trainable)
  if mesh is None:
    return join_state(jax.jit(build)(params, critic), frozen)
  places = state_shardings(jax.eval_shape(build, params, critic), mesh, param_axes)
  critic = sharding.place(critic, places.critic)
  state = jax.jit(build, out_shardings=places)(sharding.place(params, places.params), critic)
  return join_state(state, sharding.place(frozen, sharding.shardings(frozen, param_axes, mesh)))
