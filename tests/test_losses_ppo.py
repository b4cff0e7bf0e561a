"""losses/ppo.py: advantages by their definition, the clipped objective as a loop, what must and must not learn."""

from __future__ import annotations

import functools

import chex
import inspecting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from stare_jax.losses import ops, ppo

SEEDS = (0, 1, 2)
N, T, A = 8, 9, 3
DISCOUNT, LAM = 0.9, 0.8
seeds = pytest.mark.parametrize("seed", SEEDS)
eager_and_jit = pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])
ratios = pytest.mark.parametrize("ratio", ["action", "token"])
gae = functools.partial(ppo.gae, discount=DISCOUNT, lam=LAM)


def rollout(seed: int):
  """Rows of several episodes: reward, value, next_value, terminated, truncated, valid; NaN wherever none is read."""
  rng = np.random.default_rng(seed)
  reward, value, next_value = (rng.normal(size=(4, T)).astype(np.float32) for _ in range(3))
  ends = rng.random((4, T)) < 0.3
  terminated = ends & (rng.random((4, T)) < 0.5)
  valid = np.ones((4, T), bool)
  valid[1, 6:], valid[2, 3] = False, False  # a short row, and a discarded step
  reward, value = np.where(valid, reward, np.nan), np.where(valid, value, np.nan)
  next_value = np.where(valid & ~terminated, next_value, np.nan)
  return reward, value, next_value, terminated, ends & ~terminated, valid


def advantage_by_definition(reward, value, next_value, terminated, truncated, valid, discount=DISCOUNT, lam=LAM):
  """A_t = sum_l (discount lam)^l delta_{t+l}, over the steps of the same episode; Python floats."""
  out = np.zeros(reward.shape)
  for n, t in np.ndindex(*reward.shape):
    for i in range(t, reward.shape[1]):
      if not valid[n, i]:
        break
      after = 0.0 if terminated[n, i] else next_value[n, i]
      out[n, t] += (discount * lam) ** (i - t) * (reward[n, i] + discount * after - value[n, i])
      if terminated[n, i] or truncated[n, i]:
        break
  return out


# Advantages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("disable_jit", [False, True])
@seeds
def test_gae_is_its_definition(seed, disable_jit):
  batch = rollout(seed)
  with jax.disable_jit(disable_jit):
    advantage, returns = gae(*batch)
  want = advantage_by_definition(*batch)
  np.testing.assert_allclose(advantage, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(returns, np.where(batch[-1], want + batch[1], 0), rtol=1e-4, atol=1e-5)


@seeds
def test_gae_limits(seed):
  """lam = 0 is the one-step error; lam = 1 makes returns the discounted sum, bootstrapped where it was cut."""
  reward, value, next_value, terminated, truncated, valid = batch = rollout(seed)
  delta = reward + DISCOUNT * np.where(terminated, 0, next_value) - value
  one_step, _ = ppo.gae(*batch, discount=DISCOUNT, lam=0.0)
  np.testing.assert_allclose(one_step, np.where(valid, delta, 0), rtol=1e-5, atol=1e-6)
  last = truncated | ~np.pad(valid[:, 1:], ((0, 0), (0, 1)))  # where the sum is cut without an end
  # With V(o_{t+1}) = V(o_t of the next step) inside an episode, lam = 1 telescopes; make it so.
  inner = np.where(last, next_value, np.roll(value, -1, axis=1)).astype(np.float32)
  _, returns = ppo.gae(reward, value, inner, terminated, truncated, valid, discount=DISCOUNT, lam=1.0)
  for n, t in zip(*np.nonzero(valid)):
    total, weight = 0.0, 1.0
    for i in range(t, T):
      total, weight = total + weight * reward[n, i], weight * DISCOUNT
      if terminated[n, i] or last[n, i]:
        total += 0.0 if terminated[n, i] else weight * next_value[n, i]
        break
    np.testing.assert_allclose(returns[n, t], total, rtol=1e-4, atol=1e-5)


def test_truncation_bootstraps_and_termination_does_not():
  ones, no = np.ones((1, 1), np.float32), np.zeros((1, 1), bool)
  ended = lambda terminated, truncated: float(gae(ones, 0 * ones, 5 * ones, terminated, truncated, ~no)[0][0, 0])
  assert ended(~no, no) == 1.0
  assert ended(no, ~no) == ended(no, no) == pytest.approx(1 + DISCOUNT * 5)  # a row's end is a truncation
  assert ended(~no, ~no) == 1.0  # success on the last step of the time limit


@seeds
def test_episodes_in_one_row_are_episodes_in_two_rows(seed):
  """Auto-reset: nothing leaks over the boundary, whichever way the first episode ended."""
  rng = np.random.default_rng(seed)
  reward, value, next_value = (rng.normal(size=(2, 5)).astype(np.float32) for _ in range(3))
  no, valid = np.zeros((2, 5), bool), np.ones((2, 5), bool)
  for how in ("terminated", "truncated"):
    ends = {"terminated": no.copy(), "truncated": no.copy()}
    ends[how][0, -1] = True
    batch = reward, value, next_value, ends["terminated"], ends["truncated"], valid
    chex.assert_trees_all_close(
      [x.reshape(1, 10) for x in gae(*batch)], list(gae(*(x.reshape(1, 10) for x in batch))), rtol=1e-5
    )


@seeds
def test_potential_shaping_leaves_advantages_alone(seed):
  """Eq. Shape with Phi(terminal) = 0: rewards and values shift together, the advantage does not move at all."""
  reward, value, next_value, terminated, truncated, valid = rollout(seed)
  rng = np.random.default_rng(seed)
  now, after = rng.normal(size=(2, 4, T)).astype(np.float32)
  shaped = reward + np.float32(DISCOUNT) * np.where(terminated, 0, after) - now
  plain, _ = gae(reward, value, next_value, terminated, truncated, valid)
  moved, _ = gae(shaped, value - now, next_value - after, terminated, truncated, valid)
  np.testing.assert_allclose(moved, plain, rtol=1e-4, atol=1e-5)


def test_gae_refuses_integer_rewards_and_wrong_shapes():
  reward, *rest = rollout(0)
  with pytest.raises(AssertionError, match="reward: expected float32"):
    gae(np.zeros_like(reward, np.int32), *rest)
  with pytest.raises(AssertionError, match="value: expected"):
    gae(reward[:, 1:], *rest)


# The objective, as a loop --------------------------------------------------------------------------------------


def steps(seed: int) -> dict[str, np.ndarray]:
  """A batch for `objective`; NaN where not valid, ratios well on both sides of the clip."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape, scale=1.0: rng.normal(size=shape).astype(np.float32) * np.float32(scale)
  old = draw(N, A) - 2
  batch = dict(log_prob=old + draw(N, A, scale=0.3), old_log_prob=old, advantage=draw(N), value=draw(N))
  batch |= dict(old_value=batch["value"] + draw(N, scale=0.3), returns=draw(N), entropy=np.abs(draw(N)))
  batch |= dict(valid=rng.random(N) < 0.8, ref_log_prob=old + draw(N, A, scale=0.1))
  batch["valid"][:2] = True, False
  for name, x in batch.items():
    if name != "valid":
      x[~batch["valid"]] = np.nan
  return batch


HYPER = dict(clip=0.2, clip_high=0.3, value_clip=0.1, huber_delta=0.8, policy_weight=1.7, value_weight=0.7)
HYPER |= dict(entropy_weight=0.05, kl_weight=0.4)


def objective(batch, **changes):
  return ppo.objective(**batch, **(HYPER | changes))


def objective_loop(
  b, ratio, clip, clip_high, value_clip, huber_delta, policy_weight, value_weight, entropy_weight, kl_weight
):  # fmt: skip
  """Every term as a Python loop over valid steps; returns their means."""
  rows = []
  huber = lambda e: e**2 / 2 if abs(e) <= huber_delta else huber_delta * (abs(e) - huber_delta / 2)
  for n in np.flatnonzero(b["valid"]):
    log_ratio = (b["log_prob"] - b["old_log_prob"]).astype(np.float64)[n]
    r = np.exp(log_ratio if ratio == "token" else log_ratio.sum(keepdims=True))
    adv, v, old = b["advantage"][n], b["value"][n], b["old_value"][n]
    near = old + np.clip(v - old, -value_clip, value_clip)
    ref = (b["ref_log_prob"] - b["log_prob"]).astype(np.float64)[n].sum()
    rows.append(
      {
        "policy_loss": -sum(min(x * adv, np.clip(x, 1 - clip, 1 + clip_high) * adv) for x in r),
        "value_loss": max(huber(v - b["returns"][n]), huber(near - b["returns"][n])),
        "entropy": b["entropy"][n],
        "kl": np.exp(log_ratio.sum()) - 1 - log_ratio.sum(),
        "ref_kl": np.exp(ref) - 1 - ref,
        "ratio": r.mean(),
        "clip_fraction": np.mean([x < 1 - clip or x > 1 + clip_high for x in r]),
      }
    )
  mean = {name: np.mean([row[name] for row in rows]) for name in rows[0]}
  mean["loss"] = policy_weight * mean["policy_loss"] + value_weight * mean["value_loss"]
  mean["loss"] -= entropy_weight * mean["entropy"]
  mean["loss"] += kl_weight * mean["ref_kl"]
  return mean


@eager_and_jit
@ratios
@seeds
def test_objective_is_a_loop_over_steps(seed, ratio, jit):
  batch = steps(seed)
  loss, metrics = jit(functools.partial(objective, ratio=ratio))(batch)
  want = objective_loop(batch, ratio, **HYPER)
  np.testing.assert_allclose(loss, want["loss"], rtol=1e-4)
  for name, value in want.items():
    np.testing.assert_allclose(metrics[name].value(), value, rtol=1e-4, atol=1e-6, err_msg=name)
  assert 0 < want["clip_fraction"] < 1


@seeds
def test_plain_value_loss_is_half_the_squared_error(seed):
  b = steps(seed)
  loss, _ = ppo.value_loss(b["value"], b["old_value"], b["returns"], b["valid"])
  np.testing.assert_allclose(loss, np.nanmean((b["value"] - b["returns"]) ** 2) / 2, rtol=1e-5)


# What learns ---------------------------------------------------------------------------------------------------


@ratios
def test_first_pass_is_the_policy_gradient(ratio):
  """At ratio 1, whatever the clip: d loss / d log_prob = -A / n for every token, and nothing is clipped."""
  batch = steps(0)
  args = batch["old_log_prob"], batch["advantage"], batch["valid"]
  loss = lambda x: ppo.policy_loss(x, *args, clip=0.2, ratio=ratio)
  (_, metrics), grad = jax.value_and_grad(loss, has_aux=True)(batch["old_log_prob"])
  want = np.where(batch["valid"], -batch["advantage"] / batch["valid"].sum(), 0)
  np.testing.assert_allclose(grad, np.repeat(want[:, None], A, axis=1), rtol=1e-6)
  assert metrics["ratio"].value() == 1 and metrics["kl"].value() == 0 and metrics["clip_fraction"].value() == 0


def test_a_clipped_action_learns_only_in_the_direction_back():
  """Too likely and good, or too unlikely and bad: no gradient. The other two: the full one."""
  log_prob = jnp.log(jnp.array([[1.5], [0.5], [1.5], [0.5]]))
  advantage, valid = jnp.array([1.0, -1.0, -1.0, 1.0]), jnp.ones(4, bool)
  grad = jax.grad(lambda x: ppo.policy_loss(x, jnp.zeros((4, 1)), advantage, valid, clip=0.2)[0])(log_prob)
  np.testing.assert_allclose(grad[:, 0] * 4, [0, 0, 1.5, -0.5], rtol=1e-6)


@ratios
def test_only_log_prob_value_and_entropy_carry_gradients_and_none_where_not_valid(ratio):
  batch = steps(0)
  valid = batch["valid"]
  learn = {name: x for name, x in batch.items() if name != "valid"}
  grads = jax.jit(jax.grad(lambda x: objective(x | {"valid": valid}, ratio=ratio)[0]))(learn)
  for name, grad in grads.items():
    assert np.isfinite(grad).all() and not np.any(grad[~valid]), name
    assert np.any(grad) == (name in ("log_prob", "value", "entropy")), name


@ratios
def test_gradients_are_numerically_right(ratio):
  """Away from the kinks of the clips: the seed's ratios and values are further from them than eps."""
  batch = {name: x[steps(0)["valid"]] for name, x in steps(0).items()}
  loss = lambda lp, v, h: objective(batch | dict(log_prob=lp, value=v, entropy=h), ratio=ratio)[0]
  args = batch["log_prob"], batch["value"], batch["entropy"]
  check_grads(jax.jit(loss), args, order=1, modes=["rev"], eps=1e-3, atol=1e-2, rtol=1e-2)


def test_k3_is_exact_in_expectation_and_pulls_to_the_reference():
  """Over all actions of a categorical: E_p[k3] = KL(p || q), and the penalty's gradient is that of KL(ref || pi)."""
  rng = np.random.default_rng(0)
  logits, ref = jnp.asarray(rng.normal(size=(2, 7)), jnp.float32)
  log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref)
  p, q = jnp.exp(log_p), jnp.exp(log_q)
  np.testing.assert_allclose(jnp.sum(p * ppo.k3(log_q - log_p)), jnp.sum(p * (log_p - log_q)), rtol=1e-5)
  sampled = lambda x: jnp.sum(p * ppo.k3(log_q - jax.nn.log_softmax(x)))  # p: the samples do not move
  forward = lambda x: jnp.sum(q * (log_q - jax.nn.log_softmax(x)))
  np.testing.assert_allclose(jax.grad(sampled)(logits), jax.grad(forward)(logits), atol=1e-6)
  assert np.all(ppo.k3(jnp.linspace(-5, 5, 101)) >= 0)


# Sums ----------------------------------------------------------------------------------------------------------


def pooled(batch, rows) -> dict[str, ops.Mean]:
  kernel = jax.jit(objective)
  parts = [kernel({name: x[r] for name, x in batch.items()})[1] for r in rows]
  return functools.reduce(lambda a, b: {name: a[name] + b[name] for name in a}, parts)


@seeds
def test_micro_batches_in_any_order_add_to_the_whole(seed):
  batch, order = steps(seed), np.random.default_rng(seed).permutation(N)
  chex.assert_trees_all_close(pooled(batch, np.split(order, 4)), objective(batch)[1], rtol=1e-4, atol=1e-5)


@seeds
def test_explained_variance_from_minibatches_is_that_of_the_whole(seed):
  batch = steps(seed)
  returns, old = (batch[name][batch["valid"]] for name in ("returns", "old_value"))
  want = 1 - np.var(returns - old) / np.var(returns)
  metrics = pooled(batch, np.split(np.arange(N), 4))
  np.testing.assert_allclose(ppo.explained_variance(metrics), want, rtol=1e-4, atol=1e-5)
  floats = {name: float(mean.value()) for name, mean in metrics.items()}
  np.testing.assert_allclose(ppo.explained_variance(floats), want, rtol=1e-4, atol=1e-5)


def test_explained_variance_limits():
  value = jnp.arange(4.0)
  of = lambda old, returns: ppo.explained_variance(ppo.value_loss(value, old, returns, jnp.ones(4, bool))[1])
  assert of(value, value) == 1.0
  assert of(jnp.zeros(4), value) == 0.0
  assert of(value, jnp.full(4, 0.5)) == 0.0  # nothing to explain


# Loudness and traces -------------------------------------------------------------------------------------------


def test_wrong_input_is_refused():
  batch = steps(0)
  for name, wrong in (
    ("log_prob", batch["log_prob"].astype(jnp.bfloat16)),
    ("old_log_prob", batch["old_log_prob"][:, :1]),  # would broadcast: the peers' policy loss times seven
    ("advantage", batch["advantage"][:, None]),
    ("returns", np.zeros(N, np.int32)),
    ("entropy", batch["log_prob"]),
    ("valid", batch["valid"].astype(np.float32)),
    ("ref_log_prob", batch["ref_log_prob"][1:]),
  ):
    with pytest.raises(AssertionError, match=f"{name}: expected"):
      objective(batch | {name: wrong})
  with pytest.raises(ValueError, match="'sequence'; expected 'action'"):
    objective(batch, ratio="sequence")
  with pytest.raises(ValueError, match="kl_weight is 0.4 without a ref_log_prob"):
    objective(batch | {"ref_log_prob": None})
  assert "ref_kl" not in objective(batch | {"ref_log_prob": None}, kl_weight=0.0)[1]


def test_one_trace_no_host_and_no_gathering():
  value_and_grad = lambda b: jax.value_and_grad(lambda x: objective(b | {"log_prob": x})[0])(b["log_prob"])
  mesh = inspecting.data_mesh(2)
  for kernel, draw in ((value_and_grad, lambda seed: (steps(seed),)), (gae, rollout)):
    inspecting.assert_pure(kernel, *draw(0))
    traced = inspecting.Traced(kernel)
    for seed in SEEDS:
      traced(*draw(seed))
    assert traced.count == 1
    moved = inspecting.collectives(inspecting.hlo(kernel, *inspecting.shard(mesh, draw(0))))
    assert set(moved) <= {"all-reduce"} and max(moved.values(), default=1) == 1  # the sums, nothing else
