"""Collector: what comes back depends on the starts alone, whatever the timing, the groups and the deaths of workers."""

from __future__ import annotations

import dataclasses
import itertools
import os
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from stare_jax import sims, tasks
from stare_jax.episode import Episode
from stare_jax.rollout import Collector, Decision, ExpertActor, PolicyActor, Start, Stop, compile_act

TASK = tasks.get("pull_cube")
HORIZON = 9


def make(num_envs: int = 4, num_workers: int = 2) -> sims.pool.Pool:
  return sims.make("toy", task=TASK, num_envs=num_envs, num_workers=num_workers, image_size=8)


@pytest.fixture(scope="module")
def sim():
  with make() as pool:
    yield pool


class Wanderer:
  """Actions, log-probs and values drawn from (start, step) and from what it sees, so that a mix-up of rows shows."""

  def __call__(self, images, signals, starts, steps, live) -> Decision:
    rows = []
    for image, signal_, start, step in zip(images, signals, starts, steps, strict=True):
      draw = np.random.default_rng([start.seed, start.sample, int(step)])
      action = np.clip(0.3 * draw.standard_normal(7), -1, 1)
      value = step + 0.001 * start.seed + float(signal_[:3].sum()) + float(image.mean())
      rows.append((action, draw.integers(0, 256, 7), draw.standard_normal(7), value))
    actions, tokens, log_prob, value = (np.stack(x) for x in zip(*rows, strict=True))
    return Decision(actions.astype(np.float32), tokens, log_prob, value)


def collector(sim, actor=None, **options) -> Collector:
  return Collector(sim, TASK, actor or Wanderer(), horizon=options.pop("horizon", HORIZON), **options)


def assert_same(ours: list[Episode], theirs: list[Episode]) -> None:
  assert len(ours) == len(theirs)
  for a, b in zip(ours, theirs, strict=True):
    for field in dataclasses.fields(Episode):
      x, y = getattr(a, field.name), getattr(b, field.name)
      np.testing.assert_array_equal(x, y, err_msg=f"seed {a.seed}: {field.name}")


STARTS = [Start(seed, sample) for seed in (7, 3, 11, 5) for sample in (0, 1, 2)]


@pytest.fixture(scope="module")
def alone() -> list[Episode]:
  """Each start by itself: one environment, one group."""
  with make(1, 1) as pool:
    return collector(pool, groups=1).episodes(STARTS)


def test_episodes_come_in_the_order_of_their_starts(sim, alone):
  found = collector(sim).episodes(STARTS)
  assert [episode.seed for episode in found] == [start.seed for start in STARTS]
  assert_same(found, alone)


@pytest.mark.parametrize("envs, workers, groups", [(4, 2, 1), (6, 3, 3), (16, 2, 2)])
def test_grouping_changes_nothing(alone, envs, workers, groups):
  """Also with more environments than starts: the idle ones are not waited for."""
  with make(envs, workers) as pool:
    assert_same(collector(pool, groups=groups).episodes(STARTS), alone)


def test_a_second_call_is_as_the_first(sim):
  assert_same(collector(sim).episodes(STARTS[:5]), collector(sim).episodes(STARTS[:5]))


def test_shapes_and_what_follows_what(sim):
  actor, (episode, *_) = Wanderer(), collector(sim).episodes(STARTS[:3])
  assert len(episode) == HORIZON and not episode.terminated
  assert episode.images.shape == (HORIZON, 8, 8, 3) and episode.images.dtype == np.uint8
  assert episode.signals.shape[0] == HORIZON + 1
  for t in range(HORIZON):
    decision = actor(episode.images[t : t + 1], episode.signals[t : t + 1], STARTS[:1], np.array([t]), np.ones(1, bool))
    np.testing.assert_array_equal(episode.actions[t], decision.actions[0])
    np.testing.assert_array_equal(episode.tokens[t], decision.tokens[0])
    assert episode.value[t] == np.float32(decision.value[0])


def test_success_ends_an_episode_in_training_and_not_in_evaluation(sim):
  expert = lambda: ExpertActor(TASK)
  trained = collector(sim, expert(), horizon=50).episodes([Start(1), Start(2)])
  evaluated = collector(sim, expert(), horizon=50, stop_on_success=False).episodes([Start(1), Start(2)])
  for stopped, whole in zip(trained, evaluated, strict=True):
    assert stopped.terminated and stopped.success[-1] and not stopped.success[1:-1].any()
    assert stopped.last_value == 0.0
    assert not whole.terminated and len(whole) == 50 and whole.success[1:].any()
    np.testing.assert_array_equal(whole.signals[: len(stopped) + 1], stopped.signals)


def test_the_expert_records_what_it_decided_not_the_disturbance(sim):
  (clean,) = collector(sim, ExpertActor(TASK, noise=0.0, seed=1), horizon=50).episodes([Start(4)])
  (noisy,) = collector(sim, ExpertActor(TASK, noise=0.3, seed=1), horizon=50).episodes([Start(4)])
  np.testing.assert_array_equal(clean.actions[0], noisy.actions[0])  # the same state, the same advice
  assert np.abs(clean.signals[1] - noisy.signals[1]).max() > 1e-4  # another motion


def start_of(env: int, j: int) -> Start:
  return Start(100 * env + j)


@pytest.mark.parametrize("steps", [4, HORIZON, 2 * HORIZON + 5])
def test_rows_hold_exactly_their_steps(sim, steps):
  rows = collector(sim).rows(start_of, steps)
  assert len(rows) == sim.num_envs
  for env, row in enumerate(rows):
    assert sum(len(episode) for episode in row) == steps
    assert [episode.seed for episode in row] == [start_of(env, j).seed for j in range(len(row))]
    assert [len(episode) for episode in row[:-1]] == [HORIZON] * (len(row) - 1)


def test_a_cut_episode_bootstraps_from_the_state_behind_it(sim):
  """The value of s_T, which the longer episode of the same start has at that step."""
  for env, (short,) in enumerate(collector(sim).rows(start_of, 4)):
    (whole,) = collector(sim).episodes([start_of(env, 0)])
    assert not short.terminated and len(short) == 4
    np.testing.assert_array_equal(short.signals[-1], whole.signals[4])
    assert np.float32(short.last_value) == whole.value[4] != 0


def test_rows_start_again_after_success(sim):
  rows = collector(sim, ExpertActor(TASK), horizon=50).rows(start_of, 70)
  for row in rows:
    assert len(row) >= 2 and row[0].terminated and row[0].last_value == 0.0
    assert sum(len(episode) for episode in row) == 70


class Killer:
  """`check` that kills a worker at the given rounds."""

  def __init__(self, sim, *rounds: int):
    self.sim, self.rounds, self.at = sim, rounds, 0

  def __call__(self) -> None:
    if self.at in self.rounds:
      os.kill(self.sim._workers[self.at % self.sim.num_workers].process.pid, signal.SIGKILL)
    self.at += 1


@pytest.mark.multiprocess
def test_episodes_of_a_dead_worker_are_run_again(alone):
  with make() as pool:
    found = collector(pool, check=Killer(pool, 1, 10, 31)).episodes(STARTS)
    assert pool.restarts == 3 and len(pool.events) == 3 and all("SIGKILL" in event for event in pool.events)
  assert_same(found, alone)


@pytest.mark.multiprocess
def test_rows_survive_a_dead_worker():
  with make() as pool:
    whole = collector(pool).rows(start_of, 2 * HORIZON + 3)
    again = collector(pool, check=Killer(pool, 6, 25)).rows(start_of, 2 * HORIZON + 3)
    assert pool.restarts == 2
  for ours, theirs in zip(again, whole, strict=True):
    assert_same(ours, theirs)


@pytest.mark.multiprocess
def test_a_dead_worker_does_not_disturb_the_expert():
  with make() as pool:
    run = lambda **options: collector(pool, ExpertActor(TASK, noise=0.1), horizon=50, **options).episodes(STARTS)
    whole = run()
    assert_same(run(check=Killer(pool, 8)), whole)
    assert pool.restarts == 1


@pytest.mark.parametrize("turn", [0, 1, 5])
def test_stop_leaves_no_answer_behind(sim, alone, turn):
  def check() -> None:
    if next(count) == turn:
      raise Stop

  count = itertools.count()
  with pytest.raises(Stop):
    collector(sim, check=check).episodes(STARTS)
  assert not sim._pending and not sim._results
  assert_same(collector(sim).episodes(STARTS), alone)


def test_an_actor_that_fails_leaves_no_answer_behind(sim, alone):
  count = itertools.count()

  def actor(*arguments) -> Decision:
    if next(count) == 7:
      raise FloatingPointError("the policy")
    return Wanderer()(*arguments)

  with pytest.raises(FloatingPointError, match="the policy"):
    collector(sim, actor).episodes(STARTS)
  assert_same(collector(sim).episodes(STARTS), alone)


def test_the_first_error_is_the_one_that_is_told():
  """A simulator that gave up has no answers left; asking for them must not hide why."""

  class Broken:
    num_envs = 4
    send_reset = send_step = lambda self, *_: None

    def receive(self, envs):
      self.calls = getattr(self, "calls", 0) + 1
      raise sims.SimulatorError("gave up") if self.calls == 1 else ValueError("no pending request")

  with pytest.raises(sims.SimulatorError, match="gave up"):
    collector(Broken()).episodes(STARTS)


def test_progress_counts_every_step_and_episode(sim):
  seen: list[tuple[int, Episode | None]] = []
  found = collector(sim, progress=lambda steps, episode: seen.append((steps, episode))).episodes(STARTS)
  assert sum(steps for steps, _ in seen) == HORIZON * len(STARTS)
  assert sorted(e.seed for _, e in seen if e is not None) == sorted(e.seed for e in found)


def sampler(temperature: float = 1.0) -> PolicyActor:
  """A policy without a network: uniform tokens, by the key of each row alone."""
  import jax
  import jax.numpy as jnp

  def act(params, obs, keys, temperature):
    tokens = jax.vmap(lambda key: jax.random.randint(key, (7,), 0, 256))(keys)
    return tokens, jnp.log(tokens + 1.0) * temperature, tokens[:, 0] * params

  policy = SimpleNamespace(act=act, encode=lambda images, words: images, decode=lambda t: (t / 127.5 - 1).astype("f4"))
  return PolicyActor(compile_act(policy), policy, np.float32(2.0), jax.random.key(3), temperature, TASK.instruction)


def test_samples_depend_on_seed_sample_and_step_not_on_the_slot():
  actor, images, signals = sampler(), np.zeros((3, 8, 8, 3), np.uint8), np.zeros((3, 45), np.float32)
  draw = lambda starts, steps: actor(images, signals, starts, np.array(steps, np.int32), np.ones(3, bool)).tokens
  a, b, c = Start(5, 0), Start(5, 1), Start(6, 0)
  tokens, moved = draw([a, b, c], [4, 4, 4]), draw([c, a, b], [4, 4, 4])
  np.testing.assert_array_equal(tokens, moved[[1, 2, 0]])
  assert len({tuple(row) for row in tokens}) == 3
  later = draw([a, a, c], [4, 5, 4])
  np.testing.assert_array_equal(later[[0, 2]], tokens[[0, 2]])
  assert (later[1] != later[0]).any()


def test_samples_of_a_start_part_where_they_are_told_to(sim):
  starts = [Start(5, sample, 4) for sample in range(3)] + [Start(5, 0), Start(5, 1)]
  *parting, whole, other = collector(sim, sampler(), tail=3).episodes(starts)
  assert [len(episode) for episode in (*parting, whole)] == [7, 7, 7, 3]
  whole, other = collector(sim, sampler()).episodes(starts[3:])
  for sample, episode in enumerate(parting):
    np.testing.assert_array_equal(episode.tokens[:4], whole.tokens[:4])
    np.testing.assert_array_equal(episode.signals[:5], whole.signals[:5])  # s_4 still comes before they part
    own = (whole, other)[sample] if sample < 2 else None
    assert own is None or (episode.tokens[4:] == own.tokens[4:7]).all()  # its own sample's draws, as ever
  assert (parting[0].tokens[4] != parting[1].tokens[4]).any() and (parting[1].tokens[4] != parting[2].tokens[4]).any()


@pytest.mark.multiprocess
def test_a_policy_samples_the_same_in_any_group_and_after_a_death():
  with make() as pool:
    two = collector(pool, sampler(), groups=2).episodes(STARTS)
    assert_same(collector(pool, sampler(), groups=1).episodes(STARTS), two)
    assert_same(collector(pool, sampler(), groups=2, check=Killer(pool, 5)).episodes(STARTS), two)
