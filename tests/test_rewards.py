"""What a step pays, for every kind of reward, on episodes made by hand and against loops."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import ml_collections
import numpy as np
import pytest

from benchmarks import stage_rewards
from stare_jax.episode import SIGNAL_SIZE, SIGNALS, Episode, StagedEpisode, pack_signals
from stare_jax.losses import ops
from stare_jax.pipeline_interaction import FEW, advantages, by_stage, with_success_reward
from stare_jax.pipeline_rewards import levels, raw, rewards, stage_of


def settings(reward: str, **changes) -> ml_collections.ConfigDict:
  c = dict(reward=reward, offset=0.5, terminal="zero", bootstrap=True, success_reward=2.0, standardise="all")
  return ml_collections.ConfigDict(c | dict(hp=dict(discount=0.9, lam=0.8)) | changes)


def staged(stage_id, completed_at, *, terminated: bool = False, seed: int = 0) -> StagedEpisode:
  rng, steps = np.random.default_rng(seed), len(stage_id)
  episode = Episode(
    task="pick_cube", seed=0, instruction="pick", images=np.zeros((steps, 4, 4, 3), np.uint8),
    signals=np.zeros((steps + 1, SIGNAL_SIZE), np.float32), actions=np.zeros((steps, 7), np.float32),
    tokens=np.zeros((steps, 7), np.int32), log_prob=np.zeros((steps, 7), np.float32),
    value=rng.normal(size=steps).astype(np.float32), last_value=0.0 if terminated else 1.5, terminated=terminated,
  )  # fmt: skip
  zeros, potential = np.zeros(steps, np.float32), rng.random(steps + 1).astype(np.float32)
  return StagedEpisode(episode, np.array(stage_id, np.int32), np.array(completed_at, np.int32),
                       np.zeros(len(completed_at), np.float32), potential, zeros)  # fmt: skip


def with_flags(grasped, success) -> np.ndarray:
  """float32[T+1, S] with these two signals."""
  zeros = {name: np.zeros((len(grasped), *shape), np.float32) for name, shape in SIGNALS.items()}
  flags = {"grasped": np.array(grasped, np.float32), "success": np.array(success, np.float32)}
  return pack_signals(zeros | flags)


def level_loop(grasped, success) -> list[float]:
  """RL4VLA's level state by state: flags that stay once they were set, and a success that does not."""
  ever, held, row, before, out = False, False, 0, 0.0, []
  for is_grasped, is_success in zip(grasped[1:], success[1:], strict=True):
    row = row + 1 if is_grasped else 0
    ever, held = ever or is_grasped, held or row >= 5
    level = 0.1 * ever + 0.1 * held + 1.0 * (is_success and ever)
    out.append(level - before)
    before = level
  return out


@pytest.mark.parametrize("seed", range(5))
def test_levels_equal_a_loop(seed):
  rng = np.random.default_rng(seed)
  grasped, success = rng.random(40) < 0.8, rng.random(40) < 0.2
  found = levels(with_flags(grasped, success))
  np.testing.assert_allclose(found, level_loop(grasped, success), atol=1e-6)
  assert found.dtype == np.float32


def test_levels_by_hand():
  grasped, success = [1, 0, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 1, 0, 1]
  # The start's own grasp and a success before any grasp are nothing; the fifth step of holding is the second level.
  np.testing.assert_allclose(levels(with_flags(grasped, success)), [0, 0.1, 0, 0, 0, 0.1, 1, -1, 1], atol=1e-6)


def test_a_milestone_is_an_equal_part_of_the_success_reward():
  c = settings("milestones", success_reward=3.0)
  np.testing.assert_allclose(raw(staged([0, 0, 1, 1, 2], [2, 4, -1]), c), [0, 1, 0, 1, 0])
  np.testing.assert_allclose(raw(staged([0, 0, 1], [1, 3, 3], terminated=True), c), [1, 0, 2])  # two on one step
  np.testing.assert_allclose(raw(staged([0, 0], [-1, -1, -1], terminated=True), c), [0, 3])  # a success is all of them
  np.testing.assert_array_equal(rewards(staged([0, 1], [1, -1]), c), raw(staged([0, 1], [1, -1]), c))  # not shaped


def test_without_progress_only_completed_stages_are_shaped():
  c, item = settings("stages"), staged([0, 0, 1, 2], [2, 3, 4], terminated=True)
  np.testing.assert_array_equal(stage_of(item), [0, 0, 1, 2, 2])
  phi = 0.5 * np.array([0, 0, 1, 2, 0.0])  # zero where it ends
  want = np.array([0, 0, 0, 2.0]) + 0.9 * phi[1:] - phi[:-1]
  np.testing.assert_allclose(rewards(item, c), want, atol=1e-6)
  assert stage_of(staged([0, 1], [1, -1, -1]))[-1] == 1
  progress = dataclasses.replace(item, potential=item.potential + 7)
  np.testing.assert_array_equal(rewards(progress, c), rewards(item, c))


def test_shaped_milestones_are_paid_for_good_and_progress_is_lent():
  c, item = settings("shaped_milestones", success_reward=3.0), staged([0, 0, 1, 2], [2, 3, 4], terminated=True)
  inside = item.potential - 0.5 * stage_of(item)  # without the jumps from stage to stage, whatever the offset is
  lent = 0.9 * np.append(inside[1:-1], 0) - inside[:-1]
  milestones = raw(item, settings("milestones", success_reward=3.0))
  np.testing.assert_allclose(rewards(item, c), milestones + lent, atol=1e-6)
  going_on = staged([0, 0, 1, 2], [2, 3, -1])
  assert rewards(going_on, c)[-1] == pytest.approx(0.9 * inside[-1] - inside[-2], abs=1e-6)


@pytest.mark.parametrize("offset", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("reward", ["potential", "shaped_milestones"])
def test_a_success_pays_more_than_it_ends(reward, offset):
  """Else a critic that knows nothing yet would learn to avoid the last step, or the last step of a stage."""
  c = with_success_reward(settings(reward, offset=offset, success_reward=0.0), num_stages=4)
  item, highest = staged([0, 1, 2, 3], [1, 2, 3, 4], terminated=True), np.float32(1 / (1 + np.exp(-1)))
  item = dataclasses.replace(item, potential=offset * stage_of(item) + highest)
  last = rewards(item, c)[-1]
  assert last > 0.25 if reward == "shaped_milestones" or offset == 0.5 else last > 0


@pytest.mark.parametrize("reward", ["success", "potential"])
def test_a_shaped_reward_telescopes_to_the_plain_one(reward):
  c, item = settings(reward), staged([0, 0, 1], [2, 3], terminated=True)
  total = float(rewards(item, c) @ 0.9 ** np.arange(3))
  assert total == pytest.approx(2.0 * 0.9**2 - (reward == "potential") * item.potential[0], abs=1e-5)


@pytest.mark.parametrize("bootstrap", [True, False])
def test_without_bootstrap_nothing_is_worth_anything_after_the_time_limit(bootstrap):
  rows = [[staged([0] * 6, [-1, -1], seed=seed)] for seed in range(3)]
  c = settings("levels", bootstrap=bootstrap)
  data = advantages(rows, c)
  returns, advantage = [], []
  for (item,) in rows:
    value, later = item.episode.value, 0.0
    for t in reversed(range(6)):
      after = value[t + 1] if t < 5 else 1.5 * bootstrap
      later = 0.9 * after - value[t] + 0.9 * 0.8 * later
      advantage.append(later)
      returns.append(later + value[t])
  flip = lambda x: np.array(x).reshape(3, 6)[:, ::-1].reshape(-1)
  np.testing.assert_allclose(data["returns"], flip(returns), rtol=1e-4, atol=1e-5)
  want = ops.standardize(flip(advantage).astype(np.float32), np.ones(18, bool))
  np.testing.assert_allclose(data["advantage"], want, rtol=1e-4, atol=1e-5)


def test_advantages_of_a_stage_by_themselves():
  """A loop over stages; one of few steps counts with all, and a stage's own scale and mean are gone."""
  rng = np.random.default_rng(0)
  stage = rng.choice(4, size=(10, 30), p=[0.5, 0.3, 0.19, 0.01])
  advantage = (rng.normal(size=stage.shape) * 10.0**stage + stage).astype(np.float32)
  found, counts = by_stage(advantage, stage), np.bincount(stage.ravel())
  pooled = (advantage - advantage.mean()) / advantage.std()
  assert 0 < counts[3] < FEW <= counts[:3].min()
  for k in range(3):
    of = advantage[stage == k]
    np.testing.assert_allclose(found[stage == k], (of - of.mean()) / of.std(), rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(found[stage == 3], pooled[stage == 3], rtol=1e-4)
  np.testing.assert_allclose(by_stage(advantage, 0 * stage), pooled, rtol=1e-4, atol=1e-6)


def test_the_rows_of_a_rollout_know_their_stages():
  two = lambda seed: [staged([0] * 20 + [1] * 20, [20, -1], seed=seed), staged([0] * 10, [-1, -1], seed=seed + 1)]
  rows = [two(0), two(2)]
  together, apart = (advantages(rows, settings("success", standardise=how)) for how in ("all", "stage"))
  stage = np.concatenate([item.stage_id for row in rows for item in row])
  np.testing.assert_allclose(apart["advantage"], by_stage(together["advantage"], stage), atol=1e-5)
  assert abs(apart["advantage"][stage == 1].mean()) < 1e-5 < abs(together["advantage"][stage == 1].mean())


def test_the_share_of_penalised_stage_changes_by_hand():
  """Two episodes of three stages; the second one passes two of them and is penalised for the second change."""
  of = lambda potential, stage, completed: SimpleNamespace(
    potential=np.array(potential), stage_id=np.array(stage), completed=np.array(completed)
  )  # fmt: skip
  task = SimpleNamespace(stages=[SimpleNamespace(name=name) for name in "ABC"])
  items = [of([0.2, 0.4, 0.8], [0, 0], [True, False, False]),
           of([0.1, 0.9, 1.0, 1.2], [0, 1, 2], [True, True, False])]  # fmt: skip
  first, second, inside = stage_rewards.changes(task, items, 0.5)
  assert first == {"change": "A -> B", "steps": 2, "rise": 0.6, "reward": 0.175, "penalised": 0.0}
  assert second == {"change": "B -> C", "steps": 1, "rise": 0.1, "reward": -0.4, "penalised": 1.0}
  assert inside["steps"] == 2 and inside["reward"] == -0.2
