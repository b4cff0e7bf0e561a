"""Rollouts of a start until there is something to prefer: who goes on, where it ends, that a kill changes nothing."""

from __future__ import annotations

import json
from types import SimpleNamespace

import ml_collections
import numpy as np
import pytest

from stare_jax import pipeline_pairs, tasks
from stare_jax.config import ConfigError
from stare_jax.episode import SIGNAL_SIZE, Episode
from stare_jax.rollout import Start, Stop
from stare_jax.sims.toy import Toy

STEPS = 6
LUCKY = {0: 0, 1: 2, 2: 4, 3: 99, 4: 5}  # which sample of the i-th start succeeds; 99: none ever


def rolled_out(start: Start, index: int) -> Episode:
  """A rollout that stands still on the toy table, and succeeds at once if it is the start's lucky sample."""
  toy = Toy(image_size=8)
  toy.reset(start.seed)
  states = np.zeros((STEPS + 1, SIGNAL_SIZE), np.float32)
  for state in states:
    toy.observe(np.zeros((8, 8, 3), np.uint8), state)
  success = start.sample == LUCKY[index]
  states[1:, -1] = success
  return Episode(
    task="pull_cube", seed=start.seed, instruction="pull", images=np.zeros((STEPS, 8, 8, 3), np.uint8),
    signals=states, actions=np.zeros((STEPS, 7), np.float32),
    tokens=np.full((STEPS, 7), start.sample, np.int32), log_prob=np.full((STEPS, 7), -1, np.float32),
    value=np.zeros(STEPS, np.float32), last_value=0.0, terminated=success,
  )  # fmt: skip


class World:
  """In the place of a run and its simulator: counts the rollouts, and can be killed before one of them."""

  def __init__(self, workdir, kill_at: int | None = None, **changes):
    c = dict(starts=5, samples=2, samples_max=6, temperature=1.0, parts_before=0, tail=0, margin=0.05)
    c |= dict(both_failed=False, pairs="stage", pairs_per_start=8, hp=dict(gating=True))
    self.config = ml_collections.ConfigDict(dict(seed=0, phases=("preference",), preference=c | changes))
    self.workdir, self.task, self.kill_at = workdir, tasks.get("pull_cube"), kill_at
    self.seconds, self.env_steps, self.asked, self.never_run = {}, {}, [], ()
    self.base = SimpleNamespace(digest="")
    self.actor = lambda *_: None
    self.check_here = lambda: None

  def seeds(self, purpose, count):
    return range(100, 100 + count)

  def identity(self, phase):
    return {"task": "pull_cube", "preference.updates": 3}

  def collector(self, actor, progress=None, **options):
    return self

  def episodes(self, starts):
    out = []
    for start in starts:
      if self.kill_at is not None and len(self.asked) == self.kill_at:
        raise Stop
      self.asked.append(start)
      out.append(rolled_out(start, start.seed - 100))
    return out


def summary(staged, pairs):
  return ([(s.episode.seed, int(s.episode.tokens[0, 0])) for s in staged],
          [(p.first, p.second, p.sign.tolist()) for p in pairs])  # fmt: skip


def test_a_start_goes_on_until_it_has_a_pair_or_reaches_the_cap(tmp_path):
  world = World(tmp_path)
  staged, pairs = pipeline_pairs.collect(world, None)
  count = {index: sum(start.seed == 100 + index for start in world.asked) for index in LUCKY}
  assert count == {0: 2, 1: 3, 2: 5, 3: 6, 4: 6}
  assert len(world.asked) == len(set(world.asked)) == len(staged)  # no sample twice
  assert {staged[p.first].episode.seed for p in pairs} == {100, 101, 102, 104}
  found = json.loads((tmp_path / "data/preference/pairs.json").read_text())
  assert found["starts_by_rollouts"] == {"2": 1, "3": 1, "5": 1, "6": 2} and found["starts_paired"] == 4
  assert set(world.seconds) == set(world.env_steps) == {"preference rollouts"}
  assert world.env_steps["preference rollouts"] == STEPS * len(staged)


def test_without_a_cap_every_start_has_as_many(tmp_path):
  world = World(tmp_path, samples_max=0)
  staged, _ = pipeline_pairs.collect(world, None)
  assert len(staged) == 10 and not list((tmp_path / "data/preference").glob("more_*"))


def test_a_collection_that_is_killed_goes_on_and_ends_the_same(tmp_path):
  whole = World(tmp_path / "whole")
  want = summary(*pipeline_pairs.collect(whole, None))
  for kill_at in (0, 5, 10, 12, 14, 20):
    with pytest.raises(Stop):
      pipeline_pairs.collect(World(tmp_path / f"at {kill_at}", kill_at), None)
    rest = World(tmp_path / f"at {kill_at}")
    assert summary(*pipeline_pairs.collect(rest, None)) == want
    assert kill_at < 10 or all(start.sample >= 2 for start in rest.asked)  # the first round was whole, and is kept
  again = World(tmp_path / "whole")
  assert summary(*pipeline_pairs.collect(again, None)) == want and again.asked == []


def test_a_larger_cap_keeps_what_is_there(tmp_path):
  pipeline_pairs.collect(World(tmp_path, samples_max=4), None)
  world = World(tmp_path)
  pipeline_pairs.collect(world, None)
  assert {start.sample for start in world.asked} == {4, 5}


def test_other_rules_of_pairing_do_not_take_over_rounds_of_these(tmp_path):
  pipeline_pairs.collect(World(tmp_path), None)
  with pytest.raises(ValueError, match="collected with another configuration(.|\n)*margin"):
    pipeline_pairs.collect(World(tmp_path, margin=0.3), None)


def test_no_pair_at_all_is_an_error(tmp_path, monkeypatch):
  monkeypatch.setitem(LUCKY, 0, 99)
  with pytest.raises(ConfigError, match="no two of the 3 rollouts differ in any stage"):
    pipeline_pairs.collect(World(tmp_path, starts=1, samples_max=3), None)
