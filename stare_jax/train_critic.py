"""A critic of the simulator's state: a small network on what the policy never sees (Pinto et al. 2018, asymmetric
actor-critic).

It only serves advantages, so it is needed where training is, and nowhere else. Against the value head on the policy's
hidden state it is fitted apart, in many cheap passes per rollout, and leaves the policy's features to the policy.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stare_jax.train import NonFiniteError
from stare_jax.train_optimizer import like

WIDTH, DEPTH = 128, 2
LIMIT = 5.0  # standard deviations at which a feature saturates
MIN_SCALE = 1e-3  # of a feature that did not vary in the first rollout


class Critic(NamedTuple):
  """params: [(weight, bias), ...]; opt: Adam's; mean, scale: float32[F], of the features of the first rollout."""

  params: list[tuple[jax.Array, jax.Array]]
  opt: Any
  mean: jax.Array
  scale: jax.Array


def _optimizer(learning_rate: float) -> optax.GradientTransformation:
  return optax.adam(learning_rate)


def init(key: jax.Array, features: int) -> Critic:
  """Zero everywhere: the last layer starts at 0, so that Phi alone is the baseline until something is known."""
  sizes = [features] + [WIDTH] * DEPTH + [1]
  keys = jax.random.split(key, DEPTH + 1)
  draw = lambda key, m, n: jax.random.normal(key, (m, n)) / np.sqrt(m) if n > 1 else jnp.zeros((m, n))
  params = [(draw(k, m, n), jnp.zeros(n)) for k, m, n in zip(keys, sizes, sizes[1:], strict=False)]
  return Critic(params, _optimizer(0.0).init(params), jnp.zeros(features), jnp.ones(features))


def _forward(params: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
  for weight, bias in params[:-1]:
    x = jnp.tanh(x @ weight + bias)
  weight, bias = params[-1]
  return (x @ weight + bias)[..., 0]


def _scaled(critic: Critic, x: jax.Array) -> jax.Array:
  return jnp.clip((x - critic.mean) / critic.scale, -LIMIT, LIMIT)


@jax.jit
def values(critic: Critic, features: jax.Array) -> jax.Array:
  """float32[N, F] -> float32[N], in units of return."""
  return _forward(critic.params, _scaled(critic, features))


def calibrate(critic: Critic, features: np.ndarray) -> Critic:
  """Takes mean and scale from the first rollout's features, float32[N, F]."""
  return critic._replace(
    mean=like(features.mean(0), critic.mean), scale=like(features.std(0) + MIN_SCALE, critic.scale)
  )


@functools.partial(jax.jit, static_argnames="learning_rate", donate_argnums=0)
def _fit(critic: Critic, features: jax.Array, returns: jax.Array, order: jax.Array, learning_rate: float) -> Any:
  x = _scaled(critic, features)

  def loss(params: Any, rows: jax.Array) -> jax.Array:
    return jnp.mean(optax.l2_loss(_forward(params, x[rows]), returns[rows]))

  def step(state: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], jax.Array]:
    params, opt = state
    value, grads = jax.value_and_grad(loss)(params, rows)
    updates, opt = _optimizer(learning_rate).update(grads, opt, params)
    return (optax.apply_updates(params, updates), opt), value

  (params, opt), losses = jax.lax.scan(step, (critic.params, critic.opt), order)
  sound = functools.reduce(jnp.logical_and, (jnp.isfinite(x).all() for x in jax.tree.leaves(params)))
  return critic._replace(params=params, opt=opt), jnp.where(sound, jnp.mean(losses), jnp.nan)


def fit(
  critic: Critic, features: np.ndarray, returns: np.ndarray, *,
  epochs: int, batch: int, learning_rate: float, rng: np.random.Generator,
) -> Critic:  # fmt: skip
  """`epochs` passes of Adam over one rollout, in minibatches of `batch` rows; the critic passed in is donated.

    features: float32[N, F]. returns: float32[N]. batch: must divide N.

  Raises: NonFiniteError if a loss or the outcome is NaN or infinite; the last checkpoint has the critic of before.
  """
  order = np.concatenate([rng.permutation(len(returns)).reshape(-1, batch) for _ in range(epochs)])
  critic, loss = _fit(critic, features, returns, order.astype(np.int32), learning_rate)
  if not np.isfinite(loss):
    sources = {"signals": features, "returns": returns}
    bad = [name for name, x in sources.items() if not np.isfinite(x).all()] or [f"its learning rate {learning_rate:g}"]
    where = " and ".join(bad)
    raise NonFiniteError(
      f"the critic's fit is not finite: look at {where}. The last checkpoint is intact, and the same command again "
      f"would meet the same data: lower interaction.critic_hp.learning_rate in a new --workdir that starts from this "
      f"one's checkpoint (--config.init_from)"
    )
  return critic
