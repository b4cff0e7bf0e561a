"""losses/preference.py: TPO and StA-TPO against their equations as loops, and the two-pass gradient."""

from __future__ import annotations

import functools

import chex
import inspecting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from stare_jax.losses import preference

SEEDS = (0, 1, 2)
B, T, K = 4, 12, 3
BETA, COST_WEIGHT = 0.7, 1.3
seeds = pytest.mark.parametrize("seed", SEEDS)
eager_and_jit = pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
stage_tpo = functools.partial(preference.stage_tpo, beta=BETA, cost_weight=COST_WEIGHT)


def draw(seed: int):
  """B pairs of episodes of unequal length that reach unequally far; costs are NaN for a stage without steps."""
  rng = np.random.default_rng(seed)
  stage_id = np.full((2 * B, T), -1, np.int32)
  for e in range(2 * B):
    length, reached = rng.integers(K, T + 1), rng.integers(1, K + 1)
    stage_id[e, :length] = np.sort(rng.permutation(np.resize(np.arange(reached), length)))
  log_ratio = rng.normal(size=(2 * B, T)).astype(np.float32)
  has_steps = (stage_id[..., None] == np.arange(K)).any(1)
  cost = np.where(has_steps, rng.random((2 * B, K)), np.nan).astype(np.float32)
  sign = rng.integers(-1, 2, (B, K)).astype(np.int8)
  sign[0] = 1, -1, 1  # the preferred episode may differ from stage to stage
  return log_ratio, stage_id, cost, sign


def margins(log_ratio, stage_id, cost, sign, beta=BETA, cost_weight=COST_WEIGHT) -> dict[tuple[int, int], float]:
  """{(b, k): beta (q_hat of the preferred - q_hat of the other)} of the pairs that exist: the equations, as a loop."""
  out = {}
  for b, k in np.ndindex(*sign.shape):
    winner, loser = (b, len(sign) + b) if sign[b, k] > 0 else (len(sign) + b, b)
    q_hat = []
    for e in (winner, loser):
      steps = [float(log_ratio[e, t]) for t in range(log_ratio.shape[1]) if stage_id[e, t] == k]
      q_hat.append(np.mean(steps) - cost_weight * cost[e, k] if steps else None)
    if sign[b, k] and None not in q_hat:
      out[b, k] = beta * (q_hat[0] - q_hat[1])
  return out


# The equations -------------------------------------------------------------------------------------------------


@eager_and_jit
@seeds
def test_stage_tpo_is_the_equation(seed, jit):
  batch = draw(seed)
  loss, metrics = jit(stage_tpo)(*batch)
  want = np.array(list(margins(*batch).values()))
  assert metrics["loss"].weight == len(want) > 0
  np.testing.assert_allclose(loss, np.log1p(np.exp(-want)).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["margin"].value(), want.mean(), rtol=1e-5, atol=1e-6)
  q_gap = np.array(list(margins(*batch[:2], np.zeros_like(batch[2]), batch[3], beta=1.0).values()))
  np.testing.assert_allclose(metrics["accuracy"].value(), (q_gap > 0).mean(), rtol=1e-6)
  chosen, rejected, gap = (metrics[name].value() for name in ("chosen", "rejected", "cost_gap"))
  np.testing.assert_allclose(chosen - rejected, q_gap.mean(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(BETA * (chosen - rejected + gap), want.mean(), rtol=1e-4, atol=1e-6)
  for k in range(K):
    exist = sum(stage == k for _, stage in margins(*batch))
    np.testing.assert_allclose(metrics[f"pairs_{k + 1}"].value(), exist / B, rtol=1e-6)


@eager_and_jit
@seeds
def test_the_chosen_weight_adds_the_likelihood_of_the_preferred(seed, jit):
  log_ratio, stage_id, cost, sign = batch = draw(seed)
  plain, _ = stage_tpo(*batch)
  loss, metrics = jit(functools.partial(stage_tpo, chosen_weight=0.4))(*batch)
  q = [
    np.mean([log_ratio[b if sign[b, k] > 0 else B + b, t] for t in range(T)
             if stage_id[b if sign[b, k] > 0 else B + b, t] == k])
    for b, k in margins(*batch)
  ]  # fmt: skip
  np.testing.assert_allclose(loss, plain - 0.4 * np.mean(q), rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(metrics["chosen"].value(), np.mean(q), rtol=1e-4, atol=1e-6)


@eager_and_jit
@seeds
def test_tpo_is_the_equation(seed, jit):
  log_ratio, stage_id, _, sign = draw(seed)
  valid = stage_id >= 0
  loss, metrics = jit(functools.partial(preference.tpo, beta=BETA))(log_ratio, valid, sign[:, 0])
  whole, free = np.where(valid, 0, -1), np.zeros((2 * B, 1))
  want = np.array(list(margins(log_ratio, whole, free, sign[:, :1]).values()))
  np.testing.assert_allclose(loss, np.log1p(np.exp(-want)).mean(), rtol=1e-5)
  assert metrics["loss"].weight == len(want) > 0


@seeds
def test_tpo_is_stage_tpo_of_one_stage_without_cost(seed):
  log_ratio, stage_id, cost, sign = draw(seed)
  one_stage = np.where(stage_id >= 0, 0, -1).astype(np.int32)
  trajectory = lambda x: preference.tpo(x, stage_id >= 0, sign[:, 0], beta=BETA)[0]
  stage = lambda x: preference.stage_tpo(x, one_stage, cost[:, :1], sign[:, :1], beta=BETA, cost_weight=0.0)[0]
  chex.assert_trees_all_equal(jax.value_and_grad(trajectory)(log_ratio), jax.value_and_grad(stage)(log_ratio))


def test_the_smaller_cost_widens_the_margin_of_the_preferred():
  """q_hat = q - lambda * cost: at q = 0 the margin is beta * lambda * (cost of the other - cost of the preferred)."""
  zero, stage_id = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.int32)
  cost = np.array([[0.2], [0.5]], np.float32)  # the first episode is the better one
  loss, metrics = stage_tpo(zero, stage_id, cost, np.array([[1]], np.int8))
  np.testing.assert_allclose(metrics["margin"].value(), BETA * COST_WEIGHT * 0.3, rtol=1e-6)
  assert loss < np.log(2) < stage_tpo(zero, stage_id, cost, np.array([[-1]], np.int8))[0]


# Invariances ---------------------------------------------------------------------------------------------------


def test_padding_is_inert():
  """Two more steps, one more stage and one more pair that do not exist, all NaN: same loss, zero gradient there."""
  log_ratio, stage_id, cost, sign = draw(0)
  pairs = lambda x: x.reshape(2, -1, x.shape[-1])  # [2, B, ...]: a pair is added to both halves
  more = lambda x, fill: np.pad(pairs(x), ((0, 0), (0, 1), (0, 0)), constant_values=fill).reshape(-1, x.shape[-1])
  wider = lambda x, n, fill: np.pad(x, ((0, 0), (0, n)), constant_values=fill)
  padded = (
    wider(more(log_ratio, np.nan), 2, np.nan),
    wider(more(stage_id, 0), 2, -1),  # the steps of the pair that does not exist do look real
    wider(more(cost, np.nan), 1, np.nan),
    np.pad(sign, ((0, 1), (0, 1))),
  )
  padded[0][:, :T][padded[1][:, :T] < 0] = np.nan
  value_and_grad = jax.jit(jax.value_and_grad(stage_tpo, has_aux=True))
  (loss, metrics), grad = value_and_grad(*padded)
  (want, want_metrics), want_grad = value_and_grad(log_ratio, stage_id, cost, sign)
  np.testing.assert_allclose(loss, want, rtol=1e-6)
  shared = set(want_metrics) - {f"pairs_{k + 1}" for k in range(K)}  # a share of the batch, which has grown
  chex.assert_trees_all_close({n: metrics[n] for n in shared}, {n: want_metrics[n] for n in shared}, rtol=1e-6)
  grad = np.asarray(grad).reshape(2, B + 1, T + 2)
  assert np.isfinite(grad).all() and not grad[:, B].any() and not grad[:, :, T:].any()
  np.testing.assert_allclose(grad[:, :B, :T].reshape(2 * B, T), want_grad, atol=1e-7)


@seeds
def test_order_of_pairs_and_of_steps_does_not_matter(seed):
  batch, rng = draw(seed), np.random.default_rng(seed)
  order = rng.permutation(B)
  rows = np.concatenate([order, B + order])
  log_ratio, stage_id, cost, sign = (x[order] if len(x) == B else x[rows] for x in batch)
  steps = rng.permutation(T)
  chex.assert_trees_all_close(
    stage_tpo(*batch), stage_tpo(log_ratio[:, steps], stage_id[:, steps], cost, sign), rtol=1e-5, atol=1e-6
  )


@seeds
def test_first_and_second_are_only_names(seed):
  """Swapping the episodes of every pair: with the sign swapped nothing changes, without it the margin is negated."""
  log_ratio, stage_id, cost, sign = draw(seed)
  swapped = [np.roll(x, B, axis=0) for x in (log_ratio, stage_id, cost)]
  chex.assert_trees_all_close(stage_tpo(*swapped, -sign), stage_tpo(log_ratio, stage_id, cost, sign), rtol=1e-6)
  margin, against = (stage_tpo(*x, sign)[1]["margin"] for x in ((log_ratio, stage_id, cost), swapped))
  np.testing.assert_allclose(margin.total, -against.total, rtol=1e-5)


def test_micro_batches_of_pairs_add_to_the_whole():
  batch = draw(0)
  whole = stage_tpo(*batch)[1]
  at = lambda i: [np.r_[i : i + 2] if len(x) == B else np.r_[i : i + 2, B + i : B + i + 2] for x in batch]
  halves = [stage_tpo(*(x[rows] for x, rows in zip(batch, at(i)))) for i in (0, 2)]
  chex.assert_trees_all_close({n: halves[0][1][n] + halves[1][1][n] for n in whole}, whole, rtol=1e-5, atol=1e-6)


def test_no_pair_at_all_is_a_loss_of_zero_with_zero_gradient():
  log_ratio, stage_id, cost, sign = draw(0)
  loss, grad = jax.value_and_grad(lambda x: stage_tpo(x, stage_id, cost, np.zeros_like(sign))[0])(log_ratio)
  assert loss == 0 and not np.any(grad)


def test_a_missing_cost_of_a_pair_that_exists_is_loud():
  log_ratio, stage_id, cost, sign = draw(0)
  (b, k), *_ = margins(log_ratio, stage_id, cost, sign)
  cost[b, k] = np.nan
  assert np.isnan(stage_tpo(log_ratio, stage_id, cost, sign)[0])


# Gradients -----------------------------------------------------------------------------------------------------


@seeds
def test_closed_form_gradient(seed):
  """dL/dlog_ratio = -+ beta sigmoid(-margin) / (pairs * T_k), minus for the preferred episode."""
  log_ratio, stage_id, cost, sign = draw(seed)
  exist = margins(log_ratio, stage_id, cost, sign)
  want = np.zeros((2 * B, T))
  for (b, k), margin in exist.items():
    for e, side in ((b, -sign[b, k]), (B + b, sign[b, k])):
      member = stage_id[e] == k
      want[e, member] += side * BETA / (1 + np.exp(margin)) / (len(exist) * member.sum())
  c = jax.grad(stage_tpo, has_aux=True)(log_ratio, stage_id, cost, sign)[0]
  np.testing.assert_allclose(c, want, rtol=1e-4, atol=1e-7)
  loss = jax.jit(lambda x: stage_tpo(x, stage_id, cost, sign)[0])
  check_grads(loss, (log_ratio,), order=1, modes=["rev"], eps=1e-2, atol=2e-3)


@pytest.mark.parametrize("chunk", [1, 6, 32])
def test_two_passes_in_chunks_give_the_one_shot_gradient(chunk):
  """Through a small nonlinear policy: the memory is that of a chunk, the gradient that of the whole loss."""
  _, stage_id, cost, sign = draw(1)
  rng = np.random.default_rng(1)
  shape = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  params, obs, reference = {"a": shape(5, 8), "b": shape(8)}, shape(2 * B * T, 5), shape(2 * B, T)
  log_prob = jax.jit(lambda p, o: jax.nn.log_sigmoid(jnp.tanh(o @ p["a"]) @ p["b"]))
  pull = jax.jit(lambda p, o, c: jax.vjp(lambda p: log_prob(p, o), p)[1](c)[0])
  data = (stage_id, cost, sign)

  def one_shot(p):
    return stage_tpo(log_prob(p, obs).reshape(2 * B, T) - reference, *data)[0]

  cuts = range(0, 2 * B * T, chunk)
  first = jnp.concatenate([log_prob(params, obs[i : i + chunk]) for i in cuts]).reshape(2 * B, T)
  (loss, _), c = jax.value_and_grad(stage_tpo, has_aux=True)(first - reference, *data)
  grads = jax.tree.map(jnp.zeros_like, params)
  for i in cuts:
    grads = jax.tree.map(jnp.add, grads, pull(params, obs[i : i + chunk], c.reshape(-1)[i : i + chunk]))
  want_loss, want = jax.value_and_grad(one_shot)(params)
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  chex.assert_trees_all_close(grads, want, rtol=1e-4, atol=1e-6)
  assert max(np.abs(g).max() for g in jax.tree.leaves(want)) > 1e-3  # not a comparison of zeros


# Baselines and ablations ----------------------------------------------------------------------------------------


def window_margins(log_ratio, valid, sign, beta, window) -> list[float]:
  """beta (s_i of the preferred - s_i of the other) of every window that both episodes have, as a loop."""
  out = []
  for b in np.flatnonzero(sign):
    winner, loser = (b, len(sign) + b) if sign[b] > 0 else (len(sign) + b, b)
    for i in range(log_ratio.shape[1] - window + 1):
      steps = range(i, i + window)
      if all(valid[e, t] for e in (winner, loser) for t in steps):
        out.append(beta * sum(float(log_ratio[winner, t]) - float(log_ratio[loser, t]) for t in steps))
  return out


@eager_and_jit
@seeds
def test_window_tpo_is_the_equation(seed, jit):
  log_ratio, stage_id, _, sign = draw(seed)
  valid, sign = stage_id >= 0, sign[:, 0]
  log_ratio = np.where(valid, log_ratio, np.nan).astype(np.float32)  # what does not exist is not read
  loss, metrics = jit(functools.partial(preference.window_tpo, beta=BETA, window=3))(log_ratio, valid, sign)
  want = np.array(window_margins(log_ratio, valid, sign, BETA, 3))
  assert metrics["loss"].weight == len(want) > 0
  np.testing.assert_allclose(loss, np.log1p(np.exp(-want)).mean(), rtol=1e-5)
  np.testing.assert_allclose(metrics["margin"].value(), want.mean(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(metrics["accuracy"].value(), (want > 0).mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics["windows"].value(), len(want) / np.count_nonzero(sign), rtol=1e-6)
  gradient = jax.grad(lambda x: preference.window_tpo(x, valid, sign, beta=BETA, window=3)[0])(log_ratio)
  assert np.isfinite(gradient).all() and not gradient[~valid].any()


def test_a_window_as_long_as_the_episodes_is_tpo_of_their_sums():
  log_ratio = np.random.default_rng(0).normal(size=(2 * B, 8)).astype(np.float32)
  valid, sign = np.ones((2 * B, 8), bool), np.array([1, -1, 1, -1], np.int8)
  windows, _ = preference.window_tpo(log_ratio, valid, sign, beta=0.1)
  whole, _ = preference.tpo(log_ratio, valid, sign, beta=0.8)  # a mean over 8 steps, so 8 times the weight
  np.testing.assert_allclose(windows, whole, rtol=1e-5)


def test_an_episode_too_short_for_a_window_has_no_part():
  log_ratio, stage_id, _, _ = draw(0)
  loss, metrics = preference.window_tpo(log_ratio, stage_id >= 0, np.ones(B, np.int8), beta=0.1, window=T)
  whole = (stage_id >= 0).all(1)
  assert metrics["loss"].weight == np.count_nonzero(whole[:B] & whole[B:])
  with pytest.raises(ValueError, match="windows of 13; expected 8 episodes and a window of 1 to 12 steps"):
    preference.window_tpo(log_ratio, stage_id >= 0, np.ones(B, np.int8), beta=0.1, window=T + 1)


@eager_and_jit
@seeds
def test_without_gating_a_stage_that_one_never_reached_counts_as_nothing_done(seed, jit):
  log_ratio, stage_id, cost, sign = batch = draw(seed)
  stage_id[0] = np.minimum(stage_id[0], 0)  # never left its first stage, and its rival has been in the last
  stage_id[B, -1], cost[0, 1:], cost[B, -1] = K - 1, np.nan, 0.3
  want = []
  for b, k in np.ndindex(*sign.shape):
    winner, loser = (b, B + b) if sign[b, k] > 0 else (B + b, b)
    steps = [log_ratio[e][stage_id[e] == k] for e in (winner, loser)]
    if sign[b, k] and (len(steps[0]) or len(steps[1])):
      q_hat = [float(np.mean(x)) - COST_WEIGHT * cost[e, k] if len(x) else 0.0
               for e, x in zip((winner, loser), steps, strict=True)]  # fmt: skip
      want.append(BETA * (q_hat[0] - q_hat[1]))
  loss, metrics = jit(functools.partial(stage_tpo, gating=False))(*batch)
  assert metrics["loss"].weight == len(want) > len(margins(*batch))
  np.testing.assert_allclose(loss, np.log1p(np.exp(-np.array(want))).mean(), rtol=1e-5)


# Loudness and traces -------------------------------------------------------------------------------------------


def test_wrong_dtypes_and_shapes_are_refused():
  log_ratio, stage_id, cost, sign = draw(0)
  for wrong in (
    (log_ratio.astype(jnp.bfloat16), stage_id, cost, sign),
    (log_ratio, stage_id.astype(np.float32), cost, sign),
    (log_ratio, stage_id, cost, sign.astype(np.int32)),
    (log_ratio, stage_id[:, 1:], cost, sign),
    (log_ratio, stage_id, cost[:, 1:], sign),
  ):
    with pytest.raises(AssertionError, match="expected"):
      stage_tpo(*wrong)
  with pytest.raises(ValueError, match="8 episodes for 3 pairs; expected 6"):
    stage_tpo(log_ratio, stage_id, cost, sign[1:])


def test_stage_tpo_traces_once_and_only_stage_means_travel():
  kernel = jax.value_and_grad(stage_tpo, has_aux=True)
  inspecting.assert_pure(kernel, *draw(0))
  traced = inspecting.Traced(kernel)
  for seed in SEEDS:
    traced(*draw(seed))
  assert traced.count == 1
  # Rows b and B + b lie on different devices, so their [B, K] means must meet; the steps [2B, T] must not.
  moved = inspecting.collectives(inspecting.hlo(kernel, *inspecting.shard(inspecting.data_mesh(2), draw(0))))
  assert moved and max(moved.values()) <= 2 * B * K < B * T
