"""Interaction: advantages, and the PPO objective (PPO, StA-PPO).

StA-PPO is this objective on shaped rewards (Eq. Shape): the shaping is done on the host, where the
simulator's state is, and nothing here knows of stages.

Axes: N environments or flat steps, T steps, A action tokens.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from stare_jax.losses import ops
from stare_jax.losses.ops import Array, Mean


@jax.jit
def gae(
  reward: Array,
  value: Array,
  next_value: Array,
  terminated: Array,
  truncated: Array,
  valid: Array,
  *,
  discount: float,
  lam: float,
) -> tuple[Array, Array]:
  """Generalised advantage estimation over rows that may hold several episodes one after another.

      delta_t = r_t + discount * (1 - terminated_t) * V(o_{t+1}) - V(o_t)
      A_t     = delta_t + discount * lam * (1 - terminated_t - truncated_t) * A_{t+1}

  A termination has nothing after it. A truncation has, but we did not see it: it bootstraps with `next_value`
  and cuts the sum; the end of the row is one. Nothing flows from an episode into the one before it.

    reward: float32[N, T], r or the shaped r'.
    value: float32[N, T], V(o_t).
    next_value: float32[N, T], V(o_{t+1}) of the *same* episode: at a truncation the value of its last
      observation, not of the one after the automatic reset. Not read where terminated.
    terminated, truncated: bool[N, T], how the episode ended *after* step t; where both, it terminated.
    valid: bool[N, T]; False is padding (or a discarded step), which gets 0 and cuts like a truncation.
  Returns: advantage, returns = advantage + value; float32[N, T] both, 0 where not valid.
  """
  ops.check(
    reward=(reward, "NT", jnp.float32),
    value=(value, "NT", jnp.float32),
    next_value=(next_value, "NT", jnp.float32),
    terminated=(terminated, "NT", bool),
    truncated=(truncated, "NT", bool),
    valid=(valid, "NT", bool),
  )
  bootstrap = jnp.where(valid & ~terminated, next_value, 0.0)
  reward, value = jnp.where(valid, reward, 0.0), jnp.where(valid, value, 0.0)
  delta = reward + discount * bootstrap - value
  decay = discount * (lam * (valid & ~terminated & ~truncated).astype(jnp.float32))

  def back(later: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
    delta_t, decay_t = step
    advantage = delta_t + decay_t * later
    return advantage, advantage

  _, advantage = jax.lax.scan(back, jnp.zeros_like(delta[:, 0]), (delta.T, decay.T), reverse=True)
  return advantage.T, advantage.T + value


def policy_loss(
  log_prob: Array,
  old_log_prob: Array,
  advantage: Array,
  valid: Array,
  *,
  clip: float,
  clip_high: float | None = None,
  ratio: str = "action",
) -> tuple[Array, dict[str, Mean]]:
  """The clipped surrogate.

      r    = exp(log_prob - old_log_prob)
      loss = mean over valid n of -min(r A, clamp(r, 1 - clip, 1 + clip_high) A)

  With ratio="action" the log-probabilities are first summed over the tokens, so an action is trusted or
  clipped as a whole; with "token" each token has its own ratio and its own clip, and the surrogates are
  summed. At r = 1 the gradient of both is the policy gradient -A grad log pi(a|o), so the two share a
  learning rate.

    log_prob, old_log_prob: float32[N, A], nats, at one temperature. advantage: float32[N]. valid: bool[N].
    clip_high: the upper range where it differs from `clip`.
  Returns: loss float32[], metrics {loss, ratio, clip_fraction, kl}: kl is the k3 estimate of KL(old || new)
    per action, r - 1 - log r, never negative; ratio is exactly 1 before the first update if the rollout and
    the update agree.
  """
  ops.check(
    log_prob=(log_prob, "NA", jnp.float32),
    old_log_prob=(old_log_prob, "NA", jnp.float32),
    advantage=(advantage, "N", jnp.float32),
    valid=(valid, "N", bool),
  )
  if ratio not in ("action", "token"):
    raise ValueError(f"ratio is {ratio!r}; expected 'action' (one per action) or 'token' (one per token)")
  high = clip if clip_high is None else clip_high
  log_ratio = jnp.where(valid[:, None], log_prob - jax.lax.stop_gradient(old_log_prob), 0.0)
  advantage = jax.lax.stop_gradient(jnp.where(valid, advantage, 0.0))[:, None]
  per_action = jnp.sum(log_ratio, axis=-1, keepdims=True)
  r = jnp.exp(log_ratio if ratio == "token" else per_action)  # [N, A] or [N, 1]
  surrogate = jnp.minimum(r * advantage, jnp.clip(r, 1.0 - clip, 1.0 + high) * advantage)
  loss = Mean.of(-jnp.sum(surrogate, axis=-1), valid)
  return loss.value(), {
    "loss": loss,
    "ratio": Mean.of(jnp.mean(r, axis=-1), valid),
    "clip_fraction": Mean.of(jnp.mean((r < 1.0 - clip) | (r > 1.0 + high), axis=-1), valid),
    "kl": Mean.of(k3(per_action[:, 0]), valid),
  }


def k3(log_ratio: Array) -> Array:
  """exp(x) - 1 - x of x = log q - log p: at samples of p, an estimate of KL(p || q), never negative."""
  return jnp.expm1(log_ratio) - log_ratio


def value_loss(
  value: Array,
  old_value: Array,
  returns: Array,
  valid: Array,
  *,
  clip: float | None = None,
  huber_delta: float | None = None,
) -> tuple[Array, dict[str, Mean]]:
  """Half the squared error of the value, or its Huber loss, optionally clipped about the old value.

      loss = mean over valid n of max(l(V - R), l(V_old + clamp(V - V_old, -clip, clip) - R))
      l(e) = e^2 / 2, or with huber_delta  |e| <= delta ? e^2 / 2 : delta (|e| - delta / 2)

    value, old_value, returns: float32[N], in units of return. valid: bool[N]. clip: None is the plain loss.
  Returns: loss float32[], metrics {loss, value, return, return_square, residual, residual_square}; the last
    four are what `explained_variance` needs, the residual being that of the old value, which made the
    advantages.
  """
  ops.check(
    value=(value, "N", jnp.float32),
    old_value=(old_value, "N", jnp.float32),
    returns=(returns, "N", jnp.float32),
    valid=(valid, "N", bool),
  )
  value = jnp.where(valid, value, 0.0)
  old_value = jax.lax.stop_gradient(jnp.where(valid, old_value, 0.0))
  returns = jax.lax.stop_gradient(jnp.where(valid, returns, 0.0))
  penalty = optax.l2_loss if huber_delta is None else lambda x, y: optax.huber_loss(x, y, delta=huber_delta)
  error = penalty(value, returns)
  if clip is not None:
    error = jnp.maximum(error, penalty(old_value + jnp.clip(value - old_value, -clip, clip), returns))
  loss, residual = Mean.of(error, valid), returns - old_value
  return loss.value(), {
    "loss": loss,
    "value": Mean.of(value, valid),
    "return": Mean.of(returns, valid),
    "return_square": Mean.of(jnp.square(returns), valid),
    "residual": Mean.of(residual, valid),
    "residual_square": Mean.of(jnp.square(residual), valid),
  }


def explained_variance(metrics: Mapping[str, float | Array | Mean]) -> Array:
  """1 - Var(R - V) / Var(R), from the pooled metrics of `value_loss` as Means or as their values.

  A ratio of variances does not average over minibatches; its four sums do. 0 where R is constant.
  """
  names = ("return", "return_square", "residual", "residual_square")
  values = (metrics[name] for name in names)
  mean, square, residual, residual_square = (x.value() if isinstance(x, Mean) else x for x in values)
  variance = square - mean**2
  unexplained = (residual_square - residual**2) / jnp.where(variance > 0, variance, 1.0)
  return jnp.where(variance > 0, 1.0 - unexplained, 0.0)


def objective(
  log_prob: Array,
  old_log_prob: Array,
  advantage: Array,
  value: Array,
  old_value: Array,
  returns: Array,
  entropy: Array,
  valid: Array,
  ref_log_prob: Array | None = None,
  *,
  clip: float,
  clip_high: float | None = None,
  value_clip: float | None = None,
  huber_delta: float | None = None,
  policy_weight: float = 1.0,
  value_weight: float = 0.5,
  entropy_weight: float = 0.0,
  kl_weight: float = 0.0,
  ratio: str = "action",
) -> tuple[Array, dict[str, Mean]]:
  """PPO, every term a mean over the same valid steps.

      loss = policy_weight * policy + value_weight * value - entropy_weight * H + kl_weight * k3(log pi_ref - log pi)

  The penalty's expected gradient on the policy's own samples is that of KL(pi_ref || pi).

    log_prob, old_log_prob: float32[N, A], nats, at one temperature.
    advantage: float32[N]; normalise it over the whole rollout (`ops.standardize`), not over each minibatch.
    value, old_value, returns: float32[N]. entropy: float32[N], nats per action. valid: bool[N].
    ref_log_prob: float32[N, A] of the frozen policy, or None.
    clip, clip_high, ratio: see `policy_loss`. value_clip, huber_delta: see `value_loss`.
  Only log_prob, value and entropy carry gradients.
  Returns: loss float32[], metrics {loss, policy_loss, value_loss, entropy, ref_kl (with a reference)} and the
    others of `policy_loss` and `value_loss`.
  """
  if kl_weight and ref_log_prob is None:
    raise ValueError(f"kl_weight is {kl_weight} without a ref_log_prob; give one, or set kl_weight to 0")
  ops.check(valid=(valid, "N", bool), entropy=(entropy, "N", jnp.float32))
  _, policy = policy_loss(log_prob, old_log_prob, advantage, valid, clip=clip, clip_high=clip_high, ratio=ratio)
  _, critic = value_loss(value, old_value, returns, valid, clip=value_clip, huber_delta=huber_delta)
  metrics = policy | critic | {"policy_loss": policy["loss"], "value_loss": critic["loss"]}
  metrics["entropy"] = Mean.of(entropy, valid)
  total = policy_weight * metrics["policy_loss"].total + value_weight * metrics["value_loss"].total
  total = total - entropy_weight * metrics["entropy"].total
  if ref_log_prob is not None:
    metrics["ref_kl"] = reference_kl(log_prob, ref_log_prob, valid)
    total = total + kl_weight * metrics["ref_kl"].total
  metrics["loss"] = Mean(total=total, weight=metrics["policy_loss"].weight)
  return metrics["loss"].value(), metrics


def reference_kl(log_prob: Array, ref_log_prob: Array, valid: Array) -> Mean:
  """The k3 estimate of KL(pi || pi_ref) in nats per action, at actions sampled from pi.

  log_prob, ref_log_prob: float32[N, A], nats; the second carries no gradient. valid: bool[N].
  """
  ops.check(
    log_prob=(log_prob, "NA", jnp.float32),
    ref_log_prob=(ref_log_prob, "NA", jnp.float32),
    valid=(valid, "N", bool),
  )
  gap = jnp.where(valid[:, None], jax.lax.stop_gradient(ref_log_prob) - log_prob, 0.0)
  return Mean.of(k3(jnp.sum(gap, axis=-1)), valid)
