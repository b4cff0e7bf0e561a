"""StARe on the host against a loop that reads like METHOD.md, offline and online alike."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stare_jax import stages, tasks
from stare_jax.episode import SIGNAL_SIZE, SIGNALS, Episode, pack_signals, unpack_signals

REPEATABLE = hypothesis.settings(derandomize=True, deadline=None, max_examples=100)
NAMES = ("Reach", "Grasp", "Transport", "Place", "Settle")


class Stage(NamedTuple):
  name: str
  end: object
  distance: object
  scale: float


@dataclasses.dataclass(frozen=True)
class Task:
  name: str
  stages: tuple


def pattern_task(k: int) -> Task:
  """Stage k fires where joint k is above a mark that the reset sets; its distance is the change of joint speed k."""
  return Task(
    "pattern",
    tuple(
      Stage(
        NAMES[i],
        lambda now, first, i=i: now["qpos"][..., i] - first["goal_pose"][..., i] > 0.5,
        lambda now, first, i=i: np.abs(now["qvel"][..., i] - first["qvel"][..., i]),
        0.5 + i,
      )
      for i in range(k)
    ),
  )


def pattern_episode(events: np.ndarray, rng: np.random.Generator, seed: int = 0) -> Episode:
  """An episode of `pattern_task` whose events are events bool[T+1, K]; those of s_0 must not count."""
  signals = {name: rng.normal(size=(len(events), *shape)) for name, shape in SIGNALS.items()}
  signals["qpos"][:, : events.shape[1]] = signals["goal_pose"][0, : events.shape[1]] + events
  return episode("pattern", pack_signals(signals), seed)


def episode(task: str, signals: np.ndarray, seed: int = 0, terminated: bool = False) -> Episode:
  steps = len(signals) - 1
  zeros = np.zeros((steps, 7), np.float32)
  images = np.zeros((steps, 1, 1, 3), np.uint8)
  return Episode(task, seed, "", images, signals, zeros, zeros.astype(np.int32), zeros, zeros[:, 0], 0.0, terminated)


def reference(events: np.ndarray, home: int | None) -> tuple[list[int], list[int]]:
  """g(0) .. g(T) and completed_at from events bool[T+1, K], word by word as in the module's text."""
  count = events.shape[1]
  g, completed_at = [0], [-1] * count
  for t in range(1, len(events)):
    now = g[-1]
    while completed_at[-1] < 0 and events[t, now]:
      if completed_at[now] < 0:
        completed_at[now] = t
      now = min(now + 1, count - 1)
    if home is not None and completed_at[-1] < 0 and now > home and not events[t, home:now].any():
      now = home
    g.append(now)
  return g, completed_at


def online(task, signals: np.ndarray, regress: bool) -> tuple[np.ndarray, np.ndarray]:
  """[T+1, N, S] -> stage [T+1, N], completed_at [N, K]."""
  separator = stages.Separator(task, signals.shape[1], regress=regress)
  separator.reset(range(signals.shape[1]), signals[0])
  seen = [separator.stage.copy()] + [separator.step(now) for now in signals[1:]]
  return np.stack(seen), separator.completed_at


@st.composite
def event_patterns(draw):
  """A list of bool[T+1, K] of unequal T, one K, from rare to frequent events."""
  k = draw(st.integers(1, 5))
  lengths = draw(st.lists(st.integers(1, 14), min_size=1, max_size=6))
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  rate = draw(st.sampled_from([0.1, 0.3, 0.5, 0.8]))
  return [rng.random((t + 1, k)) < rate for t in lengths]


@REPEATABLE
@hypothesis.given(event_patterns(), st.booleans())
def test_offline_online_and_the_equations_agree_on_random_events(patterns, regress):
  rng = np.random.default_rng(0)
  task = pattern_task(patterns[0].shape[1])
  home = 1 if regress and len(task.stages) > 1 else None
  episodes = [pattern_episode(events, rng) for events in patterns]
  staged = stages.annotate(task, episodes, regress=regress)
  for events, item in zip(patterns, staged, strict=True):
    g, completed_at = reference(events, home)
    stage_id, completed, last = stages.label(task, item.episode.signals, regress=regress)
    assert stage_id.tolist() == g[:-1] == item.stage_id.tolist() and last == g[-1]
    assert completed.tolist() == completed_at == item.completed_at.tolist()
    assert stage_id.dtype == completed.dtype == item.stage_id.dtype == item.completed_at.dtype == np.int32
    seen, done = online(task, item.episode.signals[:, None], regress)
    assert seen[:, 0].tolist() == g and done[0].tolist() == completed_at


@REPEATABLE
@hypothesis.given(st.integers(0, 2**32), st.sampled_from([0.05, 0.3, 1.0]), st.booleans())
def test_offline_and_online_agree_on_random_signals(seed, speed, regress):
  rng = np.random.default_rng(seed)
  near = lambda a, b, d: lambda now, first: np.linalg.norm(now[a][..., :3] - now[b][..., :3], axis=-1) < d
  gap = lambda a, b: lambda now, first: np.linalg.norm(now[a][..., :3] - now[b][..., :3], axis=-1)
  lifted = lambda now, first: (now["object_pose"][..., 2] - first["object_pose"][..., 2] > 0.02) & (now["grasped"] > 0)
  task = Task(
    "walk",
    (
      Stage("Reach", near("tcp_pose", "object_pose", 1.0), gap("tcp_pose", "object_pose"), 0.2),
      Stage("Grasp", lifted, gap("tcp_pose", "object_pose"), 0.2),
      Stage("Transport", near("object_pose", "goal_pose", 1.0), gap("object_pose", "goal_pose"), 0.3),
      Stage("Place", lambda now, first: now["success"] > 1.0, gap("object_pose", "goal_pose"), 0.3),
    ),
  )
  signals = np.cumsum(speed * rng.normal(size=(25, 7, SIGNAL_SIZE)), axis=0).astype(np.float32)  # [T+1, N, S]
  seen, completed_at = online(task, signals, regress)
  staged = stages.annotate(task, [episode("walk", signals[:, n]) for n in range(7)], regress=regress)
  for n, item in enumerate(staged):
    assert item.stage_id.tolist() == seen[:-1, n].tolist()
    assert item.completed_at.tolist() == completed_at[n].tolist()
    assert stages.label(task, signals[:, n], regress=regress)[2] == seen[-1, n]


@pytest.mark.parametrize("regress", [False, True])
@pytest.mark.parametrize("name", tasks.names())
def test_registered_tasks_have_the_same_labels_both_ways(name, regress):
  rng, task = np.random.default_rng(3), tasks.get(name)
  signals = {key: rng.normal(0, 0.05, (40, 30, *shape)).astype(np.float32) for key, shape in SIGNALS.items()}
  for pose in ("tcp_pose", "object_pose", "goal_pose"):
    signals[pose][..., 3:] = rng.normal(size=(40, 30, 4))
    signals[pose][..., 3:] /= np.linalg.norm(signals[pose][..., 3:], axis=-1, keepdims=True)
  for flag, rate in (("grasped", 0.5), ("success", 0.05)):
    signals[flag] = (rng.random((40, 30)) < rate).astype(np.float32)
  packed = pack_signals(signals)
  seen, completed_at = online(task, packed, regress)
  staged = stages.annotate(task, [episode(name, packed[:, n]) for n in range(30)], regress=regress)
  np.testing.assert_array_equal(np.stack([item.stage_id for item in staged], axis=1), seen[:-1])
  np.testing.assert_array_equal(np.stack([item.completed_at for item in staged]), completed_at)
  assert len({tuple(row) for row in completed_at}) > 1  # the signals do exercise the rules


def test_environments_reset_and_step_on_their_own():
  rng = np.random.default_rng(5)
  task = pattern_task(3)
  episodes = [pattern_episode(rng.random((rng.integers(3, 12), 3)) < 0.3, rng) for _ in range(40)]
  waiting, separator = list(range(40)), stages.Separator(task, 4)
  playing, time = [None] * 4, [0] * 4
  checked = 0
  while waiting or any(p is not None for p in playing):
    for env in range(4):
      if playing[env] is None and waiting:
        playing[env], time[env] = waiting.pop(), 0
        separator.reset([env], episodes[playing[env]].signals[:1])
    group = [env for env in range(4) if playing[env] is not None and rng.random() < 0.7]  # some wait, some step
    for env in group:
      time[env] += 1
    if group:
      now = np.stack([episodes[playing[env]].signals[time[env]] for env in group])
      returned = separator.step(now, envs=group)
      np.testing.assert_array_equal(returned, separator.stage[group])
    for env in group:
      signals = episodes[playing[env]].signals
      if time[env] == len(signals) - 1:
        _, completed_at, last = stages.label(task, signals)
        assert separator.stage[env] == last and separator.completed_at[env].tolist() == completed_at.tolist()
        playing[env], checked = None, checked + 1
  assert checked == 40


def test_several_events_fire_on_one_step_and_the_start_fires_none():
  events = np.array([[1, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]], bool)
  stage_id, completed_at, last = stages.label(
    pattern_task(3), pattern_episode(events, np.random.default_rng(0)).signals
  )
  assert stage_id.tolist() == [0, 0, 2, 2, 2] and completed_at.tolist() == [2, 2, 4] and last == 2


def test_a_drop_goes_back_to_grasp_and_a_release_at_the_target_does_not():
  # columns: Reach, Grasp, Transport, Place
  events = np.array(
    [
      [0, 0, 0, 0],
      [1, 0, 0, 0],  # reached: Grasp
      [1, 1, 0, 0],  # grasped: Transport
      [0, 0, 0, 0],  # dropped on the way: Grasp
      [0, 1, 0, 0],  # grasped again: Transport
      [0, 1, 1, 0],  # at the target: Place
      [0, 0, 1, 0],  # released there: still Place
      [0, 0, 0, 0],  # rolls away: Grasp
      [0, 1, 1, 0],  # grasped and brought back: Place
      [0, 0, 1, 1],  # success, latched
      [0, 0, 0, 0],
    ],
    bool,
  )
  signals = pattern_episode(events, np.random.default_rng(0)).signals
  stage_id, completed_at, last = stages.label(pattern_task(4), signals, regress=True)
  assert [*stage_id.tolist(), last] == [0, 1, 2, 1, 2, 3, 3, 1, 3, 3, 3]
  assert completed_at.tolist() == [1, 2, 5, 9]
  assert [*stages.label(pattern_task(4), signals)[0]] == [0, 1, 2, 2, 2, 3, 3, 3, 3, 3]


def test_cost_and_potential_equal_loops(monkeypatch):
  rng = np.random.default_rng(1)
  task = pattern_task(4)
  episodes = [pattern_episode(rng.random((t, 4)) < 0.25, rng) for t in rng.integers(2, 20, 30)]
  whole = stages.annotate(task, episodes, offset=0.7)
  for item in whole:
    qvel = unpack_signals(item.episode.signals)["qvel"]
    g = [*item.stage_id, stages.label(task, item.episode.signals)[2]]
    ratio = [abs(qvel[t, k] - qvel[0, k]) / (0.5 + k) for t, k in enumerate(g)]
    for k in range(4):
      steps = [ratio[t] for t in range(len(item.episode)) if g[t] == k]
      assert np.isnan(item.cost[k]) if not steps else np.isclose(item.cost[k], np.mean(steps), rtol=1e-5)
    expected = [0.7 * k + 1 / (1 + np.exp(r - 1)) for k, r in zip(g, ratio, strict=True)]
    np.testing.assert_allclose(item.potential, expected, rtol=1e-5)
    again = stages.potential(task, item.episode.signals, np.array(g), reset=item.episode.signals[0], offset=0.7)
    np.testing.assert_array_equal(again, item.potential)
    assert item.cost.dtype == item.potential.dtype == again.dtype == np.float32
  monkeypatch.setattr(stages, "CHUNK", 25)
  for a, b in zip(whole, stages.annotate(task, episodes, offset=0.7), strict=True):
    np.testing.assert_array_equal(a.potential, b.potential)
    np.testing.assert_array_equal(a.cost, b.cost)


def test_what_is_left_of_an_episode_keeps_its_labels():
  rng = np.random.default_rng(3)
  task = pattern_task(4)
  for item in stages.annotate(task, [pattern_episode(rng.random((t, 4)) < 0.2, rng) for t in range(3, 20)]):
    step = int(rng.integers(1, len(item.episode)))
    rest = stages.after(item, step)
    assert len(rest.episode) == len(item.episode) - step and len(rest.episode.signals) == len(rest.episode) + 1
    for field in ("images", "signals", "actions", "tokens", "log_prob", "value"):
      np.testing.assert_array_equal(getattr(rest.episode, field), getattr(item.episode, field)[step:])
    np.testing.assert_array_equal(rest.stage_id, item.stage_id[step:])
    np.testing.assert_array_equal(rest.completed, item.completed)
    for before, now in zip(item.completed_at, rest.completed_at, strict=True):
      assert now == (max(before - step, 0) if before >= 0 else -1)
    for k in range(4):
      mine = [item.distance[t] for t in range(step, len(item.episode)) if item.stage_id[t] == k]
      assert np.isnan(rest.cost[k]) if not mine else np.isclose(rest.cost[k], np.mean(mine), rtol=1e-5)
    np.testing.assert_allclose(stages.after(item, 0).cost, item.cost, rtol=1e-5)
    with pytest.raises(ValueError, match="expected one of"):
      stages.after(item, len(item.episode))


def test_online_potential_equals_offline():
  rng = np.random.default_rng(2)
  task = pattern_task(3)
  episodes = [pattern_episode(rng.random((9, 3)) < 0.3, rng) for _ in range(6)]
  signals = np.stack([e.signals for e in episodes], axis=1)
  separator = stages.Separator(task, 6)
  separator.reset(range(6), signals[0])
  phi = [separator.potential(signals[0])]
  for now in signals[1:]:
    separator.step(now)
    phi.append(separator.potential(now))
  np.testing.assert_array_equal(np.stack(phi, axis=1), [item.potential for item in stages.annotate(task, episodes)])
  assert separator.potential(signals[-1][[4, 1]], [4, 1]).tolist() == phi[-1][[4, 1]].tolist()


def test_passing_to_the_next_stage_never_lowers_the_potential():
  task = pattern_task(3)
  rng = np.random.default_rng(4)
  signals = 100 * rng.normal(size=(500, SIGNAL_SIZE)).astype(np.float32)  # far from and near the target
  signals[:200] *= 1e-4
  first = np.zeros(SIGNAL_SIZE, np.float32)
  phi = [stages.potential(task, rng.permutation(signals), np.full(500, k), reset=first) for k in range(3)]
  assert all(np.isfinite(p).all() for p in phi)
  assert phi[0].max() <= phi[1].min() and phi[1].max() <= phi[2].min()


@pytest.mark.parametrize("terminal", ["zero", "keep"])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_shaping_telescopes(lead, terminal):
  rng = np.random.default_rng(0)
  discount, steps = 0.9, 12
  reward = rng.normal(size=(*lead, steps)).astype(np.float32)
  phi = rng.normal(size=(*lead, steps + 1)).astype(np.float32)
  terminated = rng.random(lead) < 0.5
  shaped = stages.shaped_reward(reward, phi, terminated, discount=discount, terminal=terminal)
  total = ((shaped - reward) * discount ** np.arange(steps)).sum(axis=-1)
  last = np.where(terminated & (terminal == "zero"), 0.0, phi[..., -1])
  np.testing.assert_allclose(total, discount**steps * last - phi[..., 0], rtol=1e-5, atol=1e-5)
  assert shaped.dtype == np.float32 and shaped.shape == reward.shape


def test_shaping_is_loud():
  reward, phi = np.zeros(3, np.float32), np.zeros(4, np.float32)
  with pytest.raises(TypeError, match="int64.*expected float"):
    stages.shaped_reward(np.array([0, 0, 1]), phi, False, discount=0.9)
  with pytest.raises(TypeError, match="bool"):
    stages.shaped_reward(reward, phi, 1, discount=0.9)
  with pytest.raises(ValueError, match=r"potential: got shape \(3,\)"):
    stages.shaped_reward(reward, phi[1:], False, discount=0.9)
  with pytest.raises(ValueError, match="one per episode"):
    stages.shaped_reward(reward, phi, np.zeros(3, bool), discount=0.9)
  with pytest.raises(ValueError, match='expected "zero" or "keep"'):
    stages.shaped_reward(reward, phi, False, discount=0.9, terminal="drop")


def test_bad_tasks_and_signals_say_so():
  good = pattern_task(2)
  signals = pattern_episode(np.zeros((4, 2), bool), np.random.default_rng(0)).signals
  with pytest.raises(ValueError, match="pattern: it has no stages"):
    stages.label(Task("pattern", ()), signals)
  with pytest.raises(ValueError, match="scale that is not positive"):
    stages.annotate(Task("pattern", (good.stages[0]._replace(scale=0.0),)), [])
  bad = good.stages[0]._replace(end=lambda now, first: now["qpos"][..., 0])
  with pytest.raises(TypeError, match=r"stage Reach: its end event gave float32\(4,\), expected bool\[4\]"):
    stages.label(Task("pattern", (bad,)), signals)
  with pytest.raises(ValueError, match=r"signals: got shape \(4,\)"):
    stages.label(good, signals[:, 0])
  with pytest.raises(ValueError, match="given to task 'pattern'"):
    stages.annotate(good, [episode("other", signals)])
  with pytest.raises(ValueError, match="at least one step"):
    stages.annotate(good, [episode("pattern", signals[:1])])
  broken = signals.copy()
  broken[2] = np.nan
  with pytest.raises(ValueError, match="stage Reach: its distance .* 1 values that are not finite"):
    stages.annotate(good, [episode("pattern", broken)])
  with pytest.raises(ValueError, match="stage: got -1 to -1, expected 0 to 1"):
    stages.potential(good, signals, np.full(4, -1), reset=signals[0])


def test_separator_is_loud():
  separator = stages.Separator(pattern_task(2), 3)
  row = np.zeros((1, SIGNAL_SIZE), np.float32)
  separator.reset([1], row)
  with pytest.raises(ValueError, match=r"environments \[0, 2\] were stepped before a reset"):
    separator.step(np.zeros((3, SIGNAL_SIZE), np.float32))
  with pytest.raises(ValueError, match="a row per env"):
    separator.step(row)
  assert separator.step(row, envs=[1]).tolist() == [0]
