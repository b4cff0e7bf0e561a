"""What the phases compile: from a policy and a phase's section of the config to its optimiser and its update.

`pipeline` runs these; `compile` asks what they would cost on a machine that is not here. Both build them here, so that
what was judged is what runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from stare_jax import losses, policies, train
from stare_jax.losses import ops, ppo


class Program(NamedTuple):
  """A phase's optimiser, for the state that the update takes, and its update."""

  tx: optax.GradientTransformation
  update: train.Update


def optimizer(c: Any, total: int) -> optax.GradientTransformation:
  return train.make_optimizer(total_steps=total, **c.optimiser)


def imitation(policy: policies.Policy, c: Any, mesh: Mesh | None, param_axes: Any) -> Program:
  """SFT; a batch is {obs: Obs [N, ...], tokens: int32[N, A]}. c: config.imitation."""
  tx = optimizer(c, c.updates)
  loss_fn = imitation_loss(policy, c)
  where = dict(mesh=mesh, param_axes=param_axes, trainable=policy.trainable)
  return Program(tx, train.make_update(loss_fn, tx, micro_batches=c.micro_batches, **where))


def imitation_loss(policy: policies.Policy, c: Any) -> Callable:
  kernel, free = losses.get(c.loss), np.array(policy.free)

  def loss_fn(params, batch):
    logits = policy.apply(params, batch["obs"], batch["tokens"]).logits
    _, metrics = kernel(logits, batch["tokens"], jnp.broadcast_to(free, batch["tokens"].shape), **c.hp)
    return metrics["loss"], metrics

  return loss_fn


# How each preference kernel is called: (log_ratio, batch, preference.hp) -> (loss, metrics).
PREFERENCE_LOSSES: dict[str, Callable[[jax.Array, train.PreferenceBatch, Any], tuple]] = {
  "tpo": lambda log_ratio, batch, hp: losses.get("tpo")(log_ratio, batch.valid, batch.pairs["overall"], beta=hp.beta),
  "window_tpo": lambda log_ratio, batch, hp: losses.get("window_tpo")(
    log_ratio, batch.valid, batch.pairs["overall"], beta=hp.beta
  ),
  "stage_tpo": lambda log_ratio, batch, hp: losses.get("stage_tpo")(
    log_ratio, batch.pairs["stage_id"], batch.pairs["cost"], batch.pairs["sign"], **hp
  ),
}


def preference(policy: policies.Policy, c: Any, mesh: Mesh | None, param_axes: Any) -> Program:
  """TPO or StA-TPO by the exact gradient; a batch is a `train.PreferenceBatch`. c: config.preference."""

  def log_prob(params, obs, tokens):
    return ops.token_log_prob(policy.apply(params, obs, tokens).logits, tokens, c.temperature)

  kernel = functools.partial(PREFERENCE_LOSSES[c.loss], hp=c.hp)
  tx = optimizer(c, c.updates)
  where = dict(mesh=mesh, param_axes=param_axes, trainable=policy.trainable)
  return Program(tx, train.make_preference_update(log_prob, kernel, tx, micro_batch=c.micro_batch, **where))


def interaction(policy: policies.Policy, c: Any, mesh: Mesh | None, param_axes: Any) -> Program:
  """PPO; a batch is what `pipeline_interaction.advantages` makes, and obs. c: config.interaction."""
  tx = optimizer(c, c.iterations)
  loss_fn = ppo_loss(policy, c)
  where = dict(mesh=mesh, param_axes=param_axes, trainable=policy.trainable)
  return Program(tx, train.make_update(loss_fn, tx, micro_batches=c.micro_batches, **where))


def ppo_loss(policy: policies.Policy, c: Any) -> Callable:
  """The PPO objective on the policy's forward pass; a critic of the state is fitted elsewhere, and shown here."""
  hp = {name: value for name, value in c.hp.items() if name not in ("discount", "lam")}

  def loss_fn(params, batch):
    out = policy.apply(params, batch["obs"], batch["tokens"])
    value = out.value if c.critic == "policy" else batch["value"]
    log_prob = ops.token_log_prob(out.logits, batch["tokens"], c.temperature)
    entropy = ops.entropy(out.logits, c.temperature).sum(-1)
    _, metrics = ppo.objective(
      log_prob, batch["log_prob"], batch["advantage"], value, batch["value"], batch["returns"], entropy,
      batch["valid"], batch.get("ref_log_prob"), **hp,
    )  # fmt: skip
    return metrics["loss"], metrics

  return loss_fn
