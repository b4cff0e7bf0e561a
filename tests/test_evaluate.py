"""evaluate.py: intervals against published values and a binomial check; success and stages from tiny episodes."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stare_jax import evaluate
from stare_jax.episode import SIGNALS, Episode, StagedEpisode, pack_signals


def staged(success, completed_at, *, seed=0, terminated=False, task="pull_cube") -> StagedEpisode:
  """An episode whose success signal is `success` [T+1] and whose stages ended at `completed_at` [K]."""
  success = np.asarray(success, np.float32)
  steps = len(success) - 1
  signals = {name: np.zeros((steps + 1, *shape), np.float32) for name, shape in SIGNALS.items()}
  signals["success"] = success
  zeros = np.zeros((steps, 7), np.float32)
  episode = Episode(
    task=task, seed=seed, instruction="", images=np.zeros((steps, 2, 2, 3), np.uint8), signals=pack_signals(signals),
    actions=zeros, tokens=zeros.astype(np.int32), log_prob=zeros, value=zeros[:, 0], last_value=0.0,
    terminated=terminated,
  )
  k = len(completed_at)
  return StagedEpisode(
    episode=episode, stage_id=np.zeros(steps, np.int32), completed_at=np.asarray(completed_at, np.int32),
    cost=np.zeros(k, np.float32), potential=np.zeros(steps + 1, np.float32),
    distance=np.zeros(steps, np.float32),
  )


@pytest.mark.parametrize(("count", "n", "low", "high"), [
  (0, 10, 0.0, 0.2775),  # Newcombe 1998, table of Wilson intervals and common tables of the same
  (5, 10, 0.2366, 0.7634),
  (81, 263, 0.2553, 0.3662),
  (15, 148, 0.0624, 0.1605),
  (1, 29, 0.0061, 0.1718),
  (29, 29, 0.8830, 1.0),
])
def test_wilson_matches_published_values(count, n, low, high):
  assert evaluate.wilson(count, n) == pytest.approx((low, high), abs=1e-4)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_contains_the_rate_stays_inside_and_mirrors(case):
  count, n = case
  low, high = evaluate.wilson(count, n)
  assert 0.0 <= low <= count / n <= high <= 1.0
  assert evaluate.wilson(n - count, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)
  assert high - low > evaluate.wilson(10 * count, 10 * n)[1] - evaluate.wilson(10 * count, 10 * n)[0]


@pytest.mark.parametrize("p", [0.2, 0.5, 0.9])
def test_wilson_covers_the_truth_about_95_percent_of_the_time(p):
  n = 100
  chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
  inside = [low <= p <= high for low, high in (evaluate.wilson(c, n) for c in range(n + 1))]
  assert 0.93 < np.dot(chance, inside) < 0.97


@pytest.mark.parametrize(("count", "n"), [(1, 0), (0, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(count, n):
  with pytest.raises(ValueError, match=f"{count} of {n}"):
    evaluate.wilson(count, n)


def test_a_rate_of_nothing_has_no_value():
  assert evaluate.rate(0, 0) == {"count": 0, "n": 0, "rate": None, "low": None, "high": None}


def test_stage_rates_against_a_loop():
  rng = np.random.default_rng(0)
  done = np.logical_and.accumulate(rng.random((57, 4)) < 0.7, axis=1)
  for k, stage in enumerate(evaluate.stage_rates(done, "abcd")):
    reached = [row for row in done if all(row[:k])]
    assert (stage["marginal"]["count"], stage["marginal"]["n"]) == (sum(row[k] for row in done), 57)
    assert (stage["conditional"]["count"], stage["conditional"]["n"]) == (sum(r[k] for r in reached), len(reached))
    assert stage["name"] == "abcd"[k]


def test_conditionals_multiply_to_the_last_marginal():
  done = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0], [1, 1, 1]], bool)
  stages = evaluate.stage_rates(done, ["x", "y", "z"])
  assert math.prod(s["conditional"]["rate"] for s in stages) == pytest.approx(stages[-1]["marginal"]["rate"])


def test_a_stage_that_nobody_reached_has_no_conditional_rate():
  last = evaluate.stage_rates(np.zeros((6, 2), bool), ["x", "y"])[1]
  assert last["conditional"]["n"] == 0 and last["conditional"]["rate"] is None
  assert last["marginal"]["n"] == 6 and last["marginal"]["rate"] == 0.0


def test_stage_rates_refuses_skipped_stages_and_wrong_shapes():
  with pytest.raises(ValueError, match="episode 1 completed stage 'y' but not 'x'"):
    evaluate.stage_rates(np.array([[True, True], [False, True]]), ["x", "y"])
  with pytest.raises(ValueError, match=r"expected bool\[N, 3\]"):
    evaluate.stage_rates(np.zeros((2, 2), bool), ["x", "y", "z"])
  with pytest.raises(ValueError, match="int64"):
    evaluate.stage_rates(np.zeros((2, 2), int), ["x", "y"])


def test_success_once_and_at_end_differ_where_success_was_lost():
  once, at_end = evaluate.success_flags([
    staged([0, 0, 1], [2]), staged([0, 1, 0], [1]), staged([0, 0, 0], [-1]),
    staged([1, 0, 0], [-1]),  # the state at reset is not the policy's doing
  ])
  assert once.tolist() == [True, True, False, False]
  assert at_end.tolist() == [True, False, False, False]


def test_summarise_is_the_run_folder_format():
  episodes = [
    staged([0, 0, 1], [1, 2], seed=7, terminated=True), staged([0, 1, 0, 0], [1, 1], seed=5),
    staged([0, 0, 0, 0, 0], [2, -1], seed=6), staged([0, 0], [-1, -1], seed=8),
  ]
  out = evaluate.summarise(episodes, label="imitation", stage_names=["Reach", "Pull"], temperature=0, seconds=3.5)
  assert json.loads(json.dumps(out)) == out  # plain numbers only
  assert list(out) == [
    "label", "task", "episodes", "seeds", "distinct_seeds", "temperature", "mean_length", "max_length",
    "stopped_at_success", "env_steps", "seconds", "success_once", "success_at_end", "stages",
  ]
  assert (out["label"], out["task"], out["episodes"], out["seeds"]) == ("imitation", "pull_cube", 4, [5, 8])
  assert (out["env_steps"], out["mean_length"], out["max_length"]) == (10, 2.5, 4)
  assert out["stopped_at_success"] == 1 and out["distinct_seeds"] == 4
  assert out["success_once"]["count"] == 2 and out["success_at_end"]["count"] == 1
  assert set(out["success_once"]) == {"count", "n", "rate", "low", "high"}
  assert [(s["name"], s["marginal"]["count"], s["conditional"]["n"]) for s in out["stages"]] == [
    ("Reach", 3, 4), ("Pull", 2, 3)
  ]


def test_summarise_does_not_depend_on_the_order_of_the_episodes():
  episodes = [staged([0] * n + [n % 2], [n - 1 if n % 2 else -1], seed=n) for n in range(2, 9)]
  kwargs = dict(label="x", stage_names=["a"], temperature=1.0)
  assert evaluate.summarise(episodes, **kwargs) == evaluate.summarise(episodes[::-1], **kwargs)


def test_summarise_shows_repeated_seeds_and_refuses_nonsense():
  kwargs = dict(label="x", stage_names=["a"], temperature=1.0)
  assert evaluate.summarise([staged([0, 1], [1], seed=3)] * 2, **kwargs)["distinct_seeds"] == 1
  with pytest.raises(ValueError, match="no episodes"):
    evaluate.summarise([], **kwargs)
  with pytest.raises(ValueError, match="pull_cube, push_cube"):
    evaluate.summarise([staged([0, 1], [1]), staged([0, 1], [1], task="push_cube")], **kwargs)


def test_samples_are_the_first_by_seed():
  episodes = [staged([0, s], [1 if s else -1], seed=seed) for seed, s in [(9, 1), (4, 0), (2, 1), (3, 0), (1, 0)]]
  assert [evaluate.pick_samples(episodes, n) for n in (0, 1, 2, 3)] == [[], [2], [2, 4], [2, 0, 4]]
  assert evaluate.pick_samples(episodes, 9) == [2, 0, 4, 3, 1]
  failures = [episodes[i] for i in (1, 3, 4)]  # where there is no success, failures are looked at all the same
  assert evaluate.pick_samples(failures, 1) == [2] and evaluate.pick_samples(failures, 2) == [2, 1]
  assert evaluate.pick_samples(episodes[:1], 3) == [0]
