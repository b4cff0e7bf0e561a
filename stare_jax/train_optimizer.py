"""The optimiser: AdamW behind a schedule whose rate the host may scale between updates, without a retrace."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stare_jax import sharding

VALUE_HEAD = r"value(_head)?(/.*)?"  # paths of the value head; attention's own "value" weights lie deeper
# Besides vectors: what a stack of layers makes matrices of (biases, norms, LayerScale), and what is looked up or added.
NO_DECAY = r"(.*/)?(bias|scale\d?|position|prefix|embed/table)"


def make_schedule(
  learning_rate: float, *, warmup_steps: int, total_steps: int | None, schedule: str
) -> Callable[[jax.Array], jax.Array]:
  """Linear warm-up, then constant, or a cosine from `learning_rate` to 0 at `total_steps`."""
  if schedule not in ("cosine", "constant"):
    raise ValueError(f"schedule: {schedule!r} is not one of 'cosine', 'constant'")
  if schedule == "cosine" and (total_steps is None or total_steps <= warmup_steps):
    raise ValueError(f"schedule 'cosine': total_steps is {total_steps}; it must exceed warmup_steps = {warmup_steps}")

  def rate(count: jax.Array) -> jax.Array:
    count = jnp.asarray(count, jnp.float32)
    warm = jnp.minimum(1.0, (count + 1) / max(warmup_steps, 1))  # the first update moves already
    if schedule == "constant":
      return learning_rate * warm
    progress = jnp.clip((count - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
    return learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * progress))

  return rate


def make_optimizer(
  *,
  learning_rate: float,
  warmup_steps: int = 0,
  total_steps: int | None = None,
  schedule: str = "constant",
  weight_decay: float = 0.0,
  clip_norm: float | None = 1.0,
  betas: tuple[float, float] = (0.9, 0.999),
  eps: float = 1e-8,
  value_lr_scale: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW on float32 moments: clip by global norm, Adam, decoupled weight decay on kernels (`NO_DECAY`), learning
  rate.

  The step of a parameter is `schedule(count) * scale * part`, where part is `value_lr_scale` for paths that match
  `VALUE_HEAD` and `policy_scale` for the others. `scale` and `policy_scale` (1 at first) live in the optimiser's state,
  where `set_learning_rate_scale` changes them without a retrace: a KL-adaptive step, or a warm-up of the critic alone.
  """
  rate = make_schedule(
    learning_rate, warmup_steps=warmup_steps, total_steps=total_steps, schedule=schedule
  )
  is_value = lambda path: re.fullmatch(VALUE_HEAD, sharding.path_name(path)) is not None
  decays = lambda path, x: np.ndim(x) > 1 and re.fullmatch(NO_DECAY, sharding.path_name(path)) is None

  @functools.partial(optax.inject_hyperparams, hyperparam_dtype=jnp.float32)
  def scaled(learning_rate: Any, scale: Any, policy_scale: Any) -> optax.GradientTransformation:
    def step(updates: Any, _: Any) -> Any:
      if value_lr_scale != 1 and not any(is_value(path) for path, _ in jax.tree_util.tree_leaves_with_path(updates)):
        raise ValueError(f"value_lr_scale {value_lr_scale}: no parameter matches {VALUE_HEAD!r}")
      part = lambda path: value_lr_scale if is_value(path) else policy_scale
      return jax.tree_util.tree_map_with_path(lambda path, u: -learning_rate * scale * part(path) * u, updates)

    return optax.stateless(step)

  return optax.chain(
    optax.identity() if clip_norm is None else optax.clip_by_global_norm(clip_norm),
    optax.scale_by_adam(*betas, eps=eps),
    optax.add_decayed_weights(weight_decay, mask=lambda p: jax.tree_util.tree_map_with_path(decays, p))
    if weight_decay
    else optax.identity(),
    scaled(learning_rate=rate, scale=1.0, policy_scale=1.0),
  )


def _is_injected(x: Any) -> bool:
  return hasattr(x, "hyperparams") and hasattr(x, "_replace")


def hyperparams(opt: Any) -> dict[str, jax.Array]:
  found = [x for x in jax.tree.leaves(opt, is_leaf=_is_injected) if _is_injected(x)]
  return found[0].hyperparams if found else {}


def learning_rate_scale(state: Any) -> float:
  """The factor that `set_learning_rate_scale` set; 1 at first."""
  return float(jax.device_get(hyperparams(state.opt)["scale"]))


def set_learning_rate_scale(state: Any, scale: float | None = None, *, policy_scale: float | None = None) -> Any:
  """The state with its learning rate multiplied by `scale` from here on (not cumulative); no retrace.

  policy_scale: the same for every parameter but the value head's; 0 trains the critic alone.
  """
  new = {name: x for name, x in (("scale", scale), ("policy_scale", policy_scale)) if x is not None}
  if "scale" not in hyperparams(state.opt):
    raise ValueError("set_learning_rate_scale: this optimiser was not made by make_optimizer")

  def change(x: Any) -> Any:
    if not _is_injected(x):
      return x
    moved = {name: like(v, x.hyperparams[name]) for name, v in new.items()}
    return x._replace(hyperparams={**x.hyperparams, **moved})

  return dataclasses.replace(state, opt=jax.tree.map(change, state.opt, is_leaf=_is_injected))


def restart_moments(state: Any) -> Any:
  """The state with Adam's moments and their counter at zero, as when training began; donates what it replaces.

  For the end of a critic's warm-up: the moments of the policy remember gradients that it was kept from following.
  """
  is_adam = lambda x: isinstance(x, optax.ScaleByAdamState)
  zeros = lambda x: jax.tree.map(jnp.zeros_like, x) if is_adam(x) else x
  restarted = lambda opt: jax.tree.map(zeros, opt, is_leaf=is_adam)
  places = jax.tree.map(lambda x: x.sharding, state.opt)
  where = {"out_shardings": places} if all(x.committed for x in jax.tree.leaves(state.opt)) else {}  # as `like` has it
  return dataclasses.replace(state, opt=jax.jit(restarted, donate_argnums=0, **where)(state.opt))


def like(value: float | np.ndarray, x: jax.Array) -> jax.Array:
  """`value` with the dtype and place of x; an uncommitted array stays so, or the update would compile again."""
  value = np.asarray(value, x.dtype)
  return jax.device_put(value, x.sharding) if x.committed else jax.device_put(value)
