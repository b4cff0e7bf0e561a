"""Pairs against a loop over METHOD's rules; padding that cannot be mistaken for data; a stream that resumes."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from stare_jax import batching
from stare_jax.episode import SIGNAL_SIZE, Episode, StagedEpisode

REPEATABLE = hypothesis.settings(derandomize=True, deadline=None, max_examples=100)


def staged_episode(seed: int, completed: int, cost, steps: int = 4, index: int = 0, **fields) -> StagedEpisode:
  """An episode that completed its first `completed` stages; its images and tokens tell it from others."""
  rng = np.random.default_rng([seed, index])
  stages = len(cost)
  episode = Episode(
    task="push_cube",
    seed=seed,
    instruction="push",
    images=rng.integers(1, 256, (steps, 4, 4, 3), dtype=np.uint8),
    signals=np.concatenate([np.full((1, SIGNAL_SIZE), seed), rng.normal(size=(steps, SIGNAL_SIZE))]).astype(np.float32),
    actions=rng.normal(size=(steps, 7)).astype(np.float32),
    tokens=rng.integers(1, 256, (steps, 7), dtype=np.int32),
    log_prob=-rng.random((steps, 7)).astype(np.float32) - 0.1,
    value=np.zeros(steps, np.float32),
    last_value=0.0,
    terminated=completed == stages,
  )
  episode = dataclasses.replace(episode, **fields)
  return StagedEpisode(
    episode,
    stage_id=np.sort(rng.integers(0, min(completed + 1, stages), steps)).astype(np.int32),
    completed_at=np.where(np.arange(stages) < completed, np.arange(stages) + 1, -1).astype(np.int32),
    cost=np.array(cost, np.float32),
    potential=np.zeros(steps + 1, np.float32),
    distance=np.zeros(steps, np.float32),
  )


def stage_sign(a: StagedEpisode, b: StagedEpisode, k: int, margin: float, both_failed: bool) -> int:
  """METHOD, "Which pairs exist for stage k", word by word."""
  if not (a.completed[:k].all() and b.completed[:k].all()):
    return 0
  if np.isnan(a.cost[k]) or np.isnan(b.cost[k]):
    return 0
  if a.completed[k] != b.completed[k]:
    return 1 if a.completed[k] else -1
  if not a.completed[k] and not both_failed:
    return 0
  if abs(a.cost[k] - b.cost[k]) <= margin:
    return 0
  return 1 if a.cost[k] < b.cost[k] else -1


@st.composite
def rollouts(draw):
  """Rollouts of a few starts in mixed order, with costs on a coarse grid (ties happen) and stages without steps."""
  rng = np.random.default_rng(draw(st.integers(0, 2**32)))
  k, n = draw(st.integers(1, 4)), draw(st.integers(1, 12))
  cost = np.where(rng.random((n, k)) < 0.1, np.nan, rng.integers(0, 4, (n, k)) / 4)
  return [staged_episode(int(rng.integers(3)), int(rng.integers(k + 1)), cost[i], index=i) for i in range(n)]


@REPEATABLE
@hypothesis.given(rollouts(), st.sampled_from([0.0, 0.25, 0.3]), st.booleans())
def test_pairs_equal_a_loop_over_the_rules(staged, margin, both_failed):
  expected = {}
  for i, j in itertools.combinations(range(len(staged)), 2):
    sign = [stage_sign(staged[i], staged[j], k, margin, both_failed) for k in range(len(staged[i].cost))]
    if staged[i].episode.seed == staged[j].episode.seed and any(sign):
      expected[i, j] = sign
  pairs = batching.pair(staged, margin=margin, both_failed=both_failed)
  assert {(p.first, p.second): p.sign.tolist() for p in pairs} == expected
  assert len(pairs) == len(expected) and all(p.sign.dtype == np.int8 for p in pairs)
  statistics = batching.pair_statistics(staged, pairs)
  assert statistics["pairs"] == len(expected) and statistics["starts"] == len({s.episode.seed for s in staged})
  assert (
    statistics["stage_pairs"]
    == np.count_nonzero(list(expected.values()) or np.zeros((1, len(staged[0].cost))), 0).tolist()
  )
  both = np.add(statistics["by_completion"], statistics["by_cost"])
  assert both.tolist() == statistics["stage_pairs"]


def test_swapping_the_two_episodes_swaps_the_sign():
  a, b = staged_episode(0, 2, [0.5, 0.1, 0.3], index=0), staged_episode(0, 3, [0.2, 0.4, 0.2], index=1)
  (forward,), (back,) = (batching.pair(s, margin=0.05) for s in ([a, b], [b, a]))
  assert forward.sign.tolist() == [-1, 1, -1] and back.sign.tolist() == [1, -1, 1]
  assert forward.overall == -1 and back.overall == 1


def test_the_overall_sign_is_the_last_that_decides():
  further, cheaper = staged_episode(0, 2, [0.9, 0.9], index=0), staged_episode(0, 1, [0.1, 0.1], index=1)
  (pair,) = batching.pair([further, cheaper], margin=0.0)
  assert pair.sign.tolist() == [-1, 1] and pair.overall == 1
  assert batching.Pair(0, 1, np.zeros(3, np.int8)).overall == 0
  (single,) = batching.pair([staged_episode(0, 1, [0.3]), staged_episode(0, 0, [0.1])], margin=0.0)
  assert single.overall == single.sign[0] == 1


def test_other_tasks_instructions_and_seeds_are_other_starts():
  make = lambda index, **fields: staged_episode(0, index % 2, [0.5], index=index, **fields)
  staged = [make(0), make(1, instruction="pull"), make(3, task="pull_cube"), staged_episode(1, 1, [0.5])]
  assert batching.pair(staged, margin=0.0) == []
  assert batching.pair_statistics(staged, [])["starts"] == 4
  assert len(batching.pair([*staged, make(5)], margin=0.0)) == 1


def test_a_start_that_only_has_the_same_seed_is_an_error():
  a = staged_episode(0, 1, [0.5])
  moved = a.episode.signals + np.float32(0.25)
  b = staged_episode(0, 0, [0.5], signals=moved)
  with pytest.raises(ValueError, match=r"same seed 0 but start differently \(signals differ by up to 0.25\)"):
    batching.pair([a, b], margin=0.0)


def test_the_cap_draws_the_same_pairs_from_every_start_each_time():
  staged = [staged_episode(i % 2, i % 3, [0.1 * i, 0.2, 0.3], index=i) for i in range(16)]

  def drawn(cap, seed):
    pairs = batching.pair(staged, margin=0.0, cap=cap, rng=np.random.default_rng(seed))
    return [(p.first, p.second) for p in pairs]

  every = [(p.first, p.second) for p in batching.pair(staged, margin=0.0)]
  assert drawn(5, 0) == drawn(5, 0) != drawn(5, 1)
  assert set(drawn(5, 0)) < set(every) and len(set(drawn(5, 0))) == 10
  assert sum(first % 2 for first, _ in drawn(5, 0)) == 5
  assert drawn(999, 0) == every


# METHOD's rules on trajectories made by hand: K = 3 stages, cost per stage, NaN where it was not reached.
REACHED_2 = staged_episode(0, 1, [0.2, 0.6, np.nan], index=0)  # completed Reach, was lost in stage 2
REACHED_3 = staged_episode(0, 2, [0.3, 0.4, 0.5], index=1)  # was lost in the last stage
NEVER = staged_episode(0, 0, [0.9, np.nan, np.nan], index=2)  # was lost in the first
CHEAP, DEAR = (staged_episode(0, 3, cost, index=3 + i) for i, cost in enumerate(([0.3, 0.4, 0.2], [0.3, 0.3, 0.4])))
HAND_MADE = {
  "one got further: it is better where the other stopped, nothing is said after": (REACHED_3, REACHED_2, [-1, 1, 0]),
  "one failed at once: only the first stage can be compared": (NEVER, REACHED_3, [-1, 0, 0]),
  "completion beats cost": (DEAR, staged_episode(0, 2, [0.3, 0.3, 0.1], index=5), [0, 0, 1]),
  "both succeeded, one cheaper, and in another stage the other": (CHEAP, DEAR, [0, -1, 1]),
  "both succeeded alike": (CHEAP, staged_episode(0, 3, [0.3, 0.4, 0.22], index=6), None),
  "both failed in the same stage": (NEVER, staged_episode(0, 0, [0.5, np.nan, np.nan], index=7), None),
}  # fmt: skip


@pytest.mark.parametrize("what", HAND_MADE)
def test_pairs_of_trajectories_made_by_hand(what):
  first, second, sign = HAND_MADE[what]
  found = batching.pair([first, second], margin=0.05)
  assert [pair.sign.tolist() for pair in found] == ([sign] if sign else [])


def test_both_failed_are_compared_where_asked_for():
  (pair,) = batching.pair([NEVER, staged_episode(0, 0, [0.5, *[np.nan] * 2])], margin=0.05, both_failed=True)
  assert pair.sign.tolist() == [-1, 0, 0]


def test_pairs_by_trajectory_are_successes_against_failures():
  staged = [CHEAP, REACHED_3, DEAR, NEVER, staged_episode(1, 3, [0.1] * 3), staged_episode(1, 3, [0.9] * 3, index=9)]
  pairs = batching.pair(staged, margin=0.0, by="trajectory")
  assert {(p.first, p.second): p.overall for p in pairs} == {(0, 1): 1, (0, 3): 1, (1, 2): -1, (2, 3): 1}
  assert all(p.sign.tolist() == [0, 0, p.overall] for p in pairs)
  found = batching.pair_statistics(staged, pairs)
  assert found["by_completion"] == [0, 0, 4] and found["by_cost"] == [0, 0, 0] and found["starts_paired"] == 1
  reference = [item.episode.log_prob for item in staged]
  batch = batching.pad_pairs(staged, pairs, reference, buckets=(4,))
  assert batch.overall.tolist() == [p.overall for p in pairs] and np.isfinite(batch.cost).all()


def test_without_gating_who_completed_a_stage_is_better_than_who_never_reached_it():
  (pair,) = batching.pair([NEVER, REACHED_3], margin=0.0, gating=False)
  assert pair.sign.tolist() == [-1, -1, 0]  # stage 3 neither completed
  (pair,) = batching.pair([CHEAP, DEAR], margin=0.05, gating=False)
  assert pair.sign.tolist() == [0, -1, 1]  # where both were there, nothing changes


def test_statistics_of_starts():
  alike = [staged_episode(1, 3, [0.1] * 3, index=i) for i in range(3)]
  staged = [CHEAP, REACHED_3, *alike, staged_episode(2, 0, [0.1] * 3)]
  found = batching.pair_statistics(staged, batching.pair(staged, margin=0.0))
  assert found["starts_by_rollouts"] == {"1": 1, "2": 1, "3": 1} and found["starts_paired"] == 1
  assert found["stage_starts"] == [int(n > 0) for n in found["stage_pairs"]]


def test_pairing_is_loud():
  with pytest.raises(ValueError, match="by is 'step'"):
    batching.pair([], margin=0, by="step")
  with pytest.raises(ValueError, match="margin is -1"):
    batching.pair([], margin=-1)
  with pytest.raises(ValueError, match="margin is nan"):
    batching.pair([], margin=float("nan"))
  with pytest.raises(ValueError, match="needs a numpy Generator"):
    batching.pair([], margin=0, cap=3)
  assert batching.pair([], margin=0.0) == []


def example(sizes=(3, 5, 9, 2)) -> tuple[list[StagedEpisode], list[batching.Pair], list[np.ndarray]]:
  cost = [[0.5, np.nan], [0.2, 0.3], [0.9, 0.1], [0.4, 0.8]]
  done = [0, 2, 2, 1]
  staged = [staged_episode(0, done[i], cost[i], steps=n, index=i) for i, n in enumerate(sizes)]
  pairs = batching.pair(staged, margin=0.0)
  return staged, pairs, [s.episode.log_prob for s in staged]


def test_padded_rows_hold_their_episode_and_nothing_else():
  staged, pairs, reference = example()
  batch = batching.pad_pairs(staged, pairs, reference, buckets=(4, 12, 30), batch_size=8)
  images = batching.pad_images(staged, batch.episode, 12)
  assert images.shape == (16, 12, 4, 4, 3) and images.dtype == np.uint8
  assert batch.tokens.shape == (16, 12, 7) and batch.tokens.dtype == np.int32
  assert batch.stage_id.shape == batch.ref_log_prob.shape == (16, 12)
  assert batch.sign.shape == (8, 2) and batch.sign.dtype == batch.overall.dtype == np.int8
  assert batch.cost.shape == (16, 2) and batch.cost.dtype == batch.ref_log_prob.dtype == np.float32
  for b, pair in enumerate(pairs):
    assert batch.sign[b].tolist() == pair.sign.tolist() and batch.overall[b] == pair.overall
    for row, index in ((b, pair.first), (8 + b, pair.second)):
      item, steps = staged[index], len(staged[index].episode)
      assert batch.episode[row] == index
      np.testing.assert_array_equal(images[row, :steps], item.episode.images)
      np.testing.assert_array_equal(batch.tokens[row, :steps], item.episode.tokens)
      np.testing.assert_array_equal(batch.stage_id[row, :steps], item.stage_id)
      np.testing.assert_allclose(batch.ref_log_prob[row, :steps], item.episode.log_prob.sum(-1), rtol=1e-6)
      np.testing.assert_array_equal(batch.cost[row], np.nan_to_num(item.cost))
      assert (batch.stage_id[row, steps:] == -1).all()
  empty = np.r_[len(pairs) : 8, 8 + len(pairs) : 16]
  assert (batch.stage_id[empty] == -1).all() and (batch.episode[empty] == -1).all()
  assert not batch.sign[len(pairs) :].any() and not batch.cost[empty].any()
  for array in (images, batch.tokens, batch.ref_log_prob):
    assert not array[batch.stage_id < 0].any()
    assert np.isfinite(array).all()


def test_a_sign_never_stands_on_a_stage_without_steps():
  staged, pairs, reference = example()
  batch = batching.pad_pairs(staged, pairs, reference, buckets=(12,))
  rows = np.concatenate([batch.episode[: len(pairs)], batch.episode[len(pairs) :]])
  nan = np.isnan(np.array([staged[e].cost for e in rows])).reshape(2, len(pairs), 2).any(axis=0)
  assert nan.any() and not batch.sign[nan].any()


def test_reference_log_probs_may_be_summed_already():
  staged, pairs, reference = example()
  a = batching.pad_pairs(staged, pairs, reference, buckets=(12,))
  b = batching.pad_pairs(staged, pairs, [r.sum(-1) for r in reference], buckets=(12,))
  np.testing.assert_allclose(a.ref_log_prob, b.ref_log_prob, rtol=1e-6)
  assert a.tokens.shape[0] == 2 * len(pairs)


def test_the_next_batch_is_made_while_one_is_used():
  made, asked = [], {i: threading.Event() for i in range(2, 6)}

  def make(i):
    made.append(i)
    asked[i].set()
    if i == 4:
      raise ValueError("batch 4")
    return 10 * i

  ahead = batching.Ahead(make, end=6)
  assert ahead(2) == 20 and asked[3].wait(60) and made == [2, 3]  # nobody has asked for 3 yet
  assert ahead(3) == 30 and asked[4].wait(60)  # what goes wrong with 4 is nothing to 3
  with pytest.raises(ValueError, match="batch 4"):
    ahead(4)
  assert ahead(5) == 50 and ahead(5) == 50 and made == [2, 3, 4, 5, 5]  # never 6


def test_padding_is_loud():
  staged, pairs, reference = example()
  with pytest.raises(ValueError, match=r"9 steps fits no bucket of \[4, 8\]"):
    batching.pad_pairs(staged, pairs, reference, buckets=(4, 8))
  with pytest.raises(ValueError, match="do not fit into a batch of 1"):
    batching.pad_pairs(staged, pairs, reference, buckets=(12,), batch_size=1)
  with pytest.raises(ValueError, match="got no pairs"):
    batching.pad_pairs(staged, [], reference, buckets=(12,))
  with pytest.raises(ValueError, match="3 entries for 4 episodes"):
    batching.pad_pairs(staged, pairs, reference[:3], buckets=(12,))
  with pytest.raises(ValueError, match=r"ref_log_prob of episode 1: .* 1 values that are not finite"):
    bad = reference[1].copy()
    bad[0, 0] = np.nan
    batching.pad_pairs(staged, pairs, [reference[0], bad, *reference[2:]], buckets=(12,))
  with pytest.raises(ValueError, match="do not fit into"):
    batching.pad([np.zeros(5)], 4)


def test_bucket():
  assert batching.bucket([1, 4, 5, 12], (12, 4)).tolist() == [4, 4, 12, 12]
  assert batching.bucket(3, (8,)) == 8
  with pytest.raises(ValueError, match="expected at least one length"):
    batching.bucket([1], ())


@REPEATABLE
@hypothesis.given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5))
def test_an_epoch_shows_every_item_once(n, batch_size, epoch):
  hypothesis.assume(n >= batch_size)
  batches = batching.epoch_batches(n, batch_size, seed=1, epoch=epoch)
  seen = np.concatenate(batches)
  assert len(set(seen.tolist())) == len(seen) and set(seen.tolist()) <= set(range(n))
  assert {len(b) for b in batches} == {batch_size} and len(batches) == n // batch_size
  again = batching.epoch_batches(n, batch_size, seed=1, epoch=epoch)
  assert all(np.array_equal(a, b) for a, b in zip(batches, again, strict=True))


def test_epochs_and_seeds_differ():
  order = lambda seed, epoch: np.concatenate(batching.epoch_batches(50, 5, seed=seed, epoch=epoch)).tolist()
  assert len({tuple(order(s, e)) for s in range(3) for e in range(3)}) == 9


def test_an_epoch_is_loud():
  with pytest.raises(ValueError, match="3 items do not fill one batch of 4"):
    batching.epoch_batches(3, 4, seed=0, epoch=0)


def test_rows_are_those_of_the_arrays_put_together_which_they_never_are():
  rng = np.random.default_rng(0)
  arrays = [rng.integers(0, 256, (n, 64, 64, 3), dtype=np.uint8) for n in (5, 1, 0, 40, 3)]
  whole = np.concatenate(arrays)
  tracemalloc.start()
  rows = batching.Rows(arrays)
  rows[np.arange(4)]
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < whole.nbytes / 4
  assert len(rows) == len(whole) == 49
  for wanted in ([0, 4, 5, 6, 45, 46, 48], rng.permutation(49)[:8], [7, 7], []):
    found = rows[np.array(wanted, np.int64)]
    np.testing.assert_array_equal(found, whole[np.array(wanted, np.int64)])
    assert found.dtype == np.uint8 and found.flags.writeable
  with pytest.raises(IndexError, match="got rows 3 to 49, expected 0 to 48"):
    rows[np.array([3, 49])]
  with pytest.raises(ValueError, match="expected one dtype and shape"):
    batching.Rows([whole, whole[:, :32]])
