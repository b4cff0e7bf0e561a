"""Preference: TPO, StA-TPO and GRAPE's windows between two episodes of one start.

A batch of B pairs is stacked as 2B episodes: row b is the first episode of pair b and row B + b the second.
`sign` says which is preferred: +1 the first, -1 the second, 0 that there is no pair. It belongs to a stage as
well as to a pair, because one episode may reach sooner and the other place better.

Axes: B pairs, E = 2B episodes, T steps, K stages.

The kernels see the parameters only through `log_ratio`, so their gradient is sum_et c[e,t] grad log pi(a_et|o_et) with
c = d loss / d log_ratio: `train.make_preference_update` adds it up in micro-batches. It relies on two things: a term
compares the two episodes of one pair, and the weight of a mean is data.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stare_jax.losses import ops
from stare_jax.losses.ops import Array, Mean


def stage_tpo(
  log_ratio: Array,
  stage_id: Array,
  cost: Array,
  sign: Array,
  *,
  beta: float,
  cost_weight: float,
  chosen_weight: float = 0.0,
  gating: bool = True,
) -> tuple[Array, dict[str, Mean]]:
  """Stage-aware trajectory preference (Eq. StA-TPO).

      q[e,k]  = 1/T_k sum_{t in k} log pi(a_t|o_t) - log pi_ref(a_t|o_t)
      q_hat   = q - cost_weight * cost
      loss    = mean over existing (b,k) of -log sigmoid(beta * (q_hat of the preferred - q_hat of the other))
                                            - chosen_weight * q of the preferred

    log_ratio: float32[E, T], nats per action (summed over its tokens); rows b and B + b are pair b.
    stage_id: int32[E, T], 0-based; -1 is padding.
    cost: float32[E, K], unitless stage costs; NaN where the stage has no steps.
    sign: int8[B, K]. A stage in which either episode has no steps is no pair, whatever the sign; see `gating`.
    beta: 1/nats. cost_weight: the paper's lambda, nats per unit of cost.
    chosen_weight: 1/nats, 0 in the paper. A preference alone is content to push the other episode down; this term is
      the likelihood of what was preferred, and holds it up.
    gating: False compares a stage that one of the two never reached as well; there it did nothing, and its q and cost
      count as 0, so that what is left is to make the other's actions more likely (an ablation).
  Returns: loss float32[], metrics over the existing (pair, stage): loss, margin (the sigmoid's argument),
    accuracy (q alone, without the costs, ranks the pair rightly; a tie is wrong), chosen and rejected (their
    q, nats), cost_gap (what the costs add to the gap, nats), and pairs_1 .. pairs_K, the share of the B pairs
    that exist per stage.
  """
  sizes = ops.check(
    log_ratio=(log_ratio, "ET", jnp.float32),
    stage_id=(stage_id, "ET", jnp.int32),
    cost=(cost, "EK", jnp.float32),
    sign=(sign, "BK", jnp.int8),
  )
  if sizes["E"] != 2 * sizes["B"]:
    raise ValueError(
      f"log_ratio has {sizes['E']} episodes for {sizes['B']} pairs; expected {2 * sizes['B']}:"
      " stack the first episode of every pair, then the second of every pair"
    )
  q, steps = ops.stage_mean(log_ratio, stage_id, sizes["K"])
  (q_a, q_b), (steps_a, steps_b), (cost_a, cost_b) = (jnp.split(x, 2) for x in (q, steps, cost))
  both = (steps_a > 0) & (steps_b > 0)
  exists = (sign != 0) & (both if gating else (steps_a > 0) | (steps_b > 0))
  chosen, rejected = jnp.where(sign > 0, q_a, q_b), jnp.where(sign > 0, q_b, q_a)
  cost_a, cost_b = jnp.where(steps_a > 0, cost_a, 0.0), jnp.where(steps_b > 0, cost_b, 0.0)
  cost_gap = cost_weight * jnp.where(sign > 0, cost_b - cost_a, cost_a - cost_b)
  # Masked before log_sigmoid: what does not exist must not reach the gradient.
  margin = jnp.where(exists, beta * (chosen - rejected + cost_gap), 0.0)
  loss = Mean.of(-jax.nn.log_sigmoid(margin) - chosen_weight * jnp.where(exists, chosen, 0.0), exists)
  return loss.value(), {
    "loss": loss,
    **_compared(margin, chosen, rejected, exists),
    "cost_gap": Mean.of(cost_gap, exists),
  } | {f"pairs_{k + 1}": Mean.of(column, jnp.ones_like(column)) for k, column in enumerate(exists.T)}


def tpo(log_ratio: Array, valid: Array, sign: Array, *, beta: float) -> tuple[Array, dict[str, Mean]]:
  """Trajectory preference (Eq. TPO), which is StA-TPO with one stage, the whole episode, and no cost.

      q[e]  = 1/T sum_t log pi(a_t|o_t) - log pi_ref(a_t|o_t)
      loss  = mean over existing b of -log sigmoid(beta * (q of the preferred - q of the other))

    log_ratio: float32[E, T], nats per action. valid: bool[E, T]. sign: int8[B]. beta: 1/nats.
  Returns: as `stage_tpo` with K = 1.
  """
  sizes = ops.check(log_ratio=(log_ratio, "ET", jnp.float32), valid=(valid, "ET", bool), sign=(sign, "B", jnp.int8))
  whole = jnp.where(valid, 0, -1).astype(jnp.int32)
  no_cost = jnp.zeros((sizes["E"], 1), jnp.float32)
  return stage_tpo(log_ratio, whole, no_cost, sign[:, None], beta=beta, cost_weight=0.0)


def window_tpo(
  log_ratio: Array, valid: Array, sign: Array, *, beta: float, window: int = 8
) -> tuple[Array, dict[str, Mean]]:
  """Preference between windows of two trajectories, as GRAPE's code has it.

      s[e,i] = sum_{t=i}^{i+window-1} log pi(a_t|o_t) - log pi_ref(a_t|o_t)            a sum, where TPO has a mean
      loss   = mean over existing (b,i) of -log sigmoid(beta * (s_i of the preferred - s_i of the other))

  Windows slide by one step and are matched by their number, whatever the two episodes do there; a window that either
  episode is too short for does not exist.

    log_ratio: float32[E, T], nats per action. valid: bool[E, T], True up to the episode's end. sign: int8[B].
    beta: 1/nats. window: steps, at most T.
  Returns: loss float32[], metrics over the existing (pair, window): loss, margin, accuracy, chosen and rejected (their
    s, nats); and windows, how many a pair has in the mean.
  """
  sizes = ops.check(log_ratio=(log_ratio, "ET", jnp.float32), valid=(valid, "ET", bool), sign=(sign, "B", jnp.int8))
  if sizes["E"] != 2 * sizes["B"] or not 1 <= window <= sizes["T"]:
    raise ValueError(
      f"log_ratio has {sizes['E']} episodes of {sizes['T']} steps for {sizes['B']} pairs and windows of {window}; "
      f"expected {2 * sizes['B']} episodes and a window of 1 to {sizes['T']} steps"
    )
  last = sizes["T"] - window + 1
  slide = lambda x: sum(x[:, j : j + last] for j in range(window))  # exact, where differences of cumulated sums are not
  (s_a, s_b) = jnp.split(slide(jnp.where(valid, log_ratio, 0.0)), 2)
  whole_a, whole_b = jnp.split(slide(valid.astype(jnp.int32)) == window, 2)
  exists = (sign != 0)[:, None] & whole_a & whole_b
  first = (sign > 0)[:, None]
  chosen, rejected = jnp.where(first, s_a, s_b), jnp.where(first, s_b, s_a)
  margin = jnp.where(exists, beta * (chosen - rejected), 0.0)
  loss = Mean.of(-jax.nn.log_sigmoid(margin), exists)
  windows = Mean.of(exists.sum(1).astype(jnp.float32), sign != 0)
  return loss.value(), {"loss": loss, **_compared(margin, chosen, rejected, exists), "windows": windows}


def _compared(margin: Array, chosen: Array, rejected: Array, exists: Array) -> dict[str, Mean]:
  """What all preference losses tell of the comparisons that exist; arrays of one shape."""
  return {
    "margin": Mean.of(margin, exists),
    "accuracy": Mean.of(chosen > rejected, exists),
    "chosen": Mean.of(chosen, exists),
    "rejected": Mean.of(rejected, exists),
  }
