"""From staged episodes to batches of static shape: pair, bucket, pad, shuffle. numpy only.

A preference batch of B pairs is laid out as 2B rows: rows 0 .. B-1 are the first episodes of the pairs, rows
B .. 2B-1 the second. Which of the two is better is told per stage, because one can be better at reaching and
worse at placing.
"""

from __future__ import annotations

import concurrent.futures
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from stare_jax.episode import StagedEpisode

PADDING = -1  # stage_id of a step that does not exist
T = TypeVar("T")


class Pair(NamedTuple):
  """Two rollouts from the same start, by their indices in the list that was paired.

  Attributes:
    sign: int8[K]; +1 where `first` did stage k better, -1 where `second` did, 0 where there is no pair.
  """

  first: int
  second: int
  sign: np.ndarray

  @property
  def overall(self) -> int:
    """The trajectory-level preference (Eq. TPO): the sign of the last stage that decides, 0 if none does.

    So the episode that got further wins, and among equals the one with the smaller cost, latest stage first;
    with K = 1 it is the stage's own sign.
    """
    decided = np.flatnonzero(self.sign)
    return int(self.sign[decided[-1]]) if decided.size else 0


class StageBatch(NamedTuple):
  """B pairs as arrays of static shape; padded entries are zeros, with stage_id -1. Images are apart: `pad_images`.

  Attributes:
    tokens: int32[2B, T, A].
    stage_id: int32[2B, T], g(t), or -1 for padding: the only mask that is needed.
    ref_log_prob: float32[2B, T], nats, log pi_ref(a_t | o_t), summed over action tokens.
    sign: int8[B, K], as in `Pair`; zeros in a padded pair.
    overall: int8[B], as in `Pair`.
    cost: float32[2B, K], the stage cost; 0 where the stage has no steps.
    episode: int32[2B], index of the episode in the list that was paired (its instruction, its seed); -1 for
      padding.
  """

  tokens: np.ndarray
  stage_id: np.ndarray
  ref_log_prob: np.ndarray
  sign: np.ndarray
  overall: np.ndarray
  cost: np.ndarray
  episode: np.ndarray


def pair(
  staged: Sequence[StagedEpisode],
  *,
  margin: float,
  both_failed: bool = False,
  by: str = "stage",
  gating: bool = True,
  cap: int | None = None,
  rng: np.random.Generator | None = None,
) -> list[Pair]:
  """Stage pairs (METHOD: "Which pairs exist for stage k").

  Rollouts with the same task, instruction and seed are paired all with all. For stage k a pair exists where
  both completed the stages before k and both have steps in k (a stage without steps has no mean and no cost).
  Better is

    - the one that completed k, when the other did not;
    - the smaller cost, when both did and the costs differ by more than `margin`;
    - nobody, when neither did; with `both_failed`, the smaller cost by more than `margin`.

  Only pairs with at least one such stage are returned, in the order of the list.

  Args:
    margin: unitless, like the costs; >= 0.
    by: "stage", or "trajectory": a success against a failure of the same start and nothing else, which says something
      of the whole trajectories alone (`Pair.overall`, kept as the sign of the last stage).
    gating: False (an ablation) does without the stages before k: who completed k is better than who did not even reach
      it, where at least one of them has steps in k.
    cap: at most so many pairs per start, drawn with `rng`.
  """
  if not margin >= 0:
    raise ValueError(f"margin is {margin}, expected a number >= 0 in units of the stage cost")
  if by not in ("stage", "trajectory"):
    raise ValueError(f'by is {by!r}, expected "stage" or "trajectory"')
  if cap is not None and (cap < 1 or rng is None):
    raise ValueError(
      f"cap is {cap} and rng is {rng}; a cap must be at least 1 and needs a numpy Generator to draw with"
    )
  pairs = []
  for members in _starts(staged):
    i, j = (np.array(side) for side in np.triu_indices(len(members), k=1))
    items = [staged[m] for m in members]
    sign = _signs(items, i, j, margin, both_failed, gating) if by == "stage" else _outcomes(items, i, j)
    keep = np.flatnonzero(sign.any(axis=1))
    if cap is not None and rng is not None and len(keep) > cap:
      keep = np.sort(rng.choice(keep, size=cap, replace=False))
    pairs += [Pair(members[i[p]], members[j[p]], sign[p]) for p in keep]
  return pairs


def _starts(staged: Sequence[StagedEpisode]) -> list[list[int]]:
  """Indices grouped by start, groups in the order of their first member."""
  groups: dict[tuple, list[int]] = {}
  for index, item in enumerate(staged):
    episode = item.episode
    members = groups.setdefault((episode.task, episode.instruction, episode.seed), [])
    members.append(index)
    if not np.array_equal(staged[members[0]].episode.signals[0], episode.signals[0]):
      differ = np.abs(staged[members[0]].episode.signals[0] - episode.signals[0]).max()
      raise ValueError(
        f"episodes {members[0]} and {index} of {episode.task} have the same seed {episode.seed} but start differently "
        f"(signals differ by up to {differ:g}); pairs need the same initial state: check the simulator's reset"
      )
  return list(groups.values())


def _signs(
  items: Sequence[StagedEpisode], i: np.ndarray, j: np.ndarray, margin: float, both_failed: bool, gating: bool
) -> np.ndarray:
  """int8[P, K] for the pairs (i[p], j[p]) of `items`."""
  completed = np.stack([item.completed for item in items])
  cost = np.stack([item.cost for item in items])
  reached = np.concatenate([np.ones_like(completed[:, :1]), completed[:, :-1]], axis=1).cumprod(axis=1).astype(bool)
  has_steps = np.isfinite(cost)
  both = (reached & has_steps)[i] & (reached & has_steps)[j]
  exists = both if gating else has_steps[i] | has_steps[j]
  gap = np.where(both, cost[j] - cost[i], 0.0)  # positive: i was cheaper
  by_cost = np.where(np.abs(gap) > margin, np.sign(gap), 0)
  by_completion = completed[i].astype(np.int8) - completed[j]
  neither = ~(completed[i] | completed[j])
  sign = np.where(by_completion != 0, by_completion, by_cost)
  return np.where(exists & (both_failed | ~neither), sign, 0).astype(np.int8)


def _outcomes(items: Sequence[StagedEpisode], i: np.ndarray, j: np.ndarray) -> np.ndarray:
  """int8[P, K]: success against failure, in the column of the last stage."""
  success = np.array([item.completed[-1] for item in items], np.int8)
  sign = np.zeros((len(i), len(items[0].cost)), np.int8)
  sign[:, -1] = success[i] - success[j]
  return sign


def pair_statistics(staged: Sequence[StagedEpisode], pairs: Sequence[Pair]) -> dict[str, Any]:
  """What the pairs are made of: how many starts and pairs, and per stage how each pair was decided.

  Returns: {"episodes", "starts", "starts_paired", "pairs": int, "stage_pairs", "by_completion", "by_cost":
    [K] ints, "stage_starts": [K] ints, starts with a pair in the stage, "starts_by_rollouts": {rollouts: starts}},
  with stage_pairs = by_completion + by_cost.
  """
  stages = len(staged[0].cost) if staged else 0
  sign = np.array([p.sign for p in pairs], np.int8).reshape(-1, stages)
  completed = np.array([item.completed for item in staged], bool).reshape(-1, stages)
  first, second = (np.array([p[side] for p in pairs], np.int64) for side in (0, 1))
  one = (sign != 0) & (completed[first] != completed[second])
  start = lambda index: (
    staged[index].episode.task,
    staged[index].episode.instruction,
    staged[index].episode.seed,
  )
  rollouts = Counter(start(index) for index in range(len(staged)))
  return {
    "episodes": len(staged),
    "starts": len(rollouts),
    "starts_paired": len({start(p.first) for p in pairs}),
    "pairs": len(pairs),
    "stage_pairs": np.count_nonzero(sign, axis=0).tolist(),
    "by_completion": np.count_nonzero(one, axis=0).tolist(),
    "by_cost": np.count_nonzero((sign != 0) & ~one, axis=0).tolist(),
    "stage_starts": [len({start(p.first) for p in pairs if p.sign[k]}) for k in range(stages)],
    "starts_by_rollouts": {str(n): count for n, count in sorted(Counter(rollouts.values()).items())},
  }


class Rows:
  """The rows of several arrays as if they lay one after another; only what is asked for is copied.

  So images of a mapped file (`dataset.open`) stay on the disk until a batch wants them.

  Args:
    arrays: of one dtype, [n_i, ...] with equal axes after the first.
  """

  def __init__(self, arrays: Sequence[np.ndarray]):
    kinds = {f"{array.dtype}{list(array.shape[1:])}" for array in arrays}
    if len(kinds) != 1:
      raise ValueError(
        f"Rows: got rows of {sorted(kinds)}, expected one dtype and shape; episodes of one simulator have them"
      )
    self._arrays = list(arrays)
    self._end = np.cumsum([len(array) for array in arrays])

  def __len__(self) -> int:
    return int(self._end[-1])

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    """int[N], each from 0 to len(self) - 1 -> [N, ...], what `np.concatenate(arrays)[rows]` is."""
    rows = np.asarray(rows, np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < len(self):
      raise IndexError(f"Rows: got rows {rows.min()} to {rows.max()}, expected 0 to {len(self) - 1}")
    out = np.empty((len(rows), *self._arrays[0].shape[1:]), self._arrays[0].dtype)
    which = np.searchsorted(self._end, rows, side="right")
    for at, (array, row) in enumerate(zip(which, rows, strict=True)):
      out[at] = self._arrays[array][row - self._end[array]]  # counted from the array's end
    return out


def pair_lengths(staged: Sequence[StagedEpisode], pairs: Sequence[Pair]) -> np.ndarray:
  """int64[P]: steps of the longer episode of each pair, what its row must hold."""
  return np.array([max(len(staged[p.first].episode), len(staged[p.second].episode)) for p in pairs], np.int64)


def bucket(lengths: Sequence[int] | np.ndarray | int, buckets: Sequence[int]) -> np.ndarray:
  """The smallest bucket that holds each length: int64, the shape of `lengths`."""
  ordered, lengths = np.unique(np.asarray(buckets, np.int64)), np.asarray(lengths, np.int64)
  if not ordered.size or ordered[0] < 1:
    raise ValueError(f"buckets are {list(buckets)}, expected at least one length >= 1")
  if lengths.size and lengths.max() > ordered[-1]:
    raise ValueError(f"a length of {lengths.max()} steps fits no bucket of {ordered.tolist()}; add a longer bucket")
  return ordered[np.searchsorted(ordered, lengths)]


def pad(rows: Sequence[np.ndarray], length: int, *, fill: float = 0, count: int | None = None) -> np.ndarray:
  """Rows [t_i, ...] of unequal length -> [count or len(rows), length, ...], `fill` after each row and in extra rows."""
  longest, count = max(len(row) for row in rows), len(rows) if count is None else count
  if longest > length or len(rows) > count:
    raise ValueError(f"{len(rows)} rows of up to {longest} steps do not fit into [{count}, {length}]")
  out = np.full((count, length, *rows[0].shape[1:]), fill, rows[0].dtype)
  for at, row in enumerate(rows):
    out[at, : len(row)] = row
  return out


def pad_pairs(
  staged: Sequence[StagedEpisode],
  pairs: Sequence[Pair],
  ref_log_prob: Sequence[np.ndarray],
  *,
  buckets: Sequence[int],
  batch_size: int | None = None,
) -> StageBatch:
  """One batch; T is the smallest bucket that holds the longest episode.

  Args:
    staged: the list that was paired.
    pairs: those of this batch.
    ref_log_prob: for every episode of `staged`, float32[T] (summed over action tokens) or float32[T, A].
    batch_size: B; empty pairs fill up when `pairs` are fewer. By default B = len(pairs).
  """
  if not pairs:
    raise ValueError(
      "pad_pairs: got no pairs; check pair_statistics, and roll out more episodes per start if it is low"
    )
  if len(ref_log_prob) != len(staged):
    raise ValueError(f"ref_log_prob: {len(ref_log_prob)} entries for {len(staged)} episodes, expected one each")
  size = len(pairs) if batch_size is None else batch_size
  if len(pairs) > size:
    raise ValueError(f"pad_pairs: {len(pairs)} pairs do not fit into a batch of {size}")
  length = int(bucket(pair_lengths(staged, pairs).max(), buckets))
  index = np.full((2, size), PADDING, np.int32)
  index[:, : len(pairs)] = [[p.first for p in pairs], [p.second for p in pairs]]
  half = [[int(e) for e in side[: len(pairs)]] for side in index]

  def lay(get, fill=0) -> np.ndarray:
    return np.concatenate([pad([get(e) for e in side], length, fill=fill, count=size) for side in half])

  cost = np.zeros((2, size, len(pairs[0].sign)), np.float32)
  cost[:, : len(pairs)] = np.nan_to_num([[staged[e].cost for e in side] for side in half], nan=0.0)
  sign = np.zeros((size, cost.shape[-1]), np.int8)
  sign[: len(pairs)] = [p.sign for p in pairs]
  overall = np.zeros(size, np.int8)
  overall[: len(pairs)] = [p.overall for p in pairs]
  return StageBatch(
    tokens=lay(lambda e: staged[e].episode.tokens),
    stage_id=lay(lambda e: staged[e].stage_id, fill=PADDING),
    ref_log_prob=lay(lambda e: _reference(ref_log_prob[e], staged[e], e)),
    sign=sign,
    overall=overall,
    cost=cost.reshape(2 * size, -1),
    episode=index.reshape(-1),
  )


def pad_images(staged: Sequence[StagedEpisode], episode: np.ndarray, length: int) -> np.ndarray:
  """uint8[R, length, H, W, 3], the images behind R rows of a `StageBatch`, zeros after each episode and in empty rows.

  All but all of a batch's bytes are images, so a process reads those of the rows that are its own.

  Args:
    episode: int[R], rows of `StageBatch.episode`.
    length: the batch's T.
  """
  nothing = staged[0].episode.images[:0]
  return pad([staged[e].episode.images if e >= 0 else nothing for e in episode], length)


def _reference(log_prob: np.ndarray, item: StagedEpisode, index: int) -> np.ndarray:
  """float32[T], checked: a NaN here would reach every gradient of its stage."""
  steps = len(item.episode)
  total = log_prob.sum(axis=-1) if log_prob.ndim == 2 else log_prob
  if total.shape != (steps,) or not np.isfinite(total).all():
    raise ValueError(
      f"ref_log_prob of episode {index}: shape {log_prob.shape} with {np.count_nonzero(~np.isfinite(log_prob))} values "
      f"that are not finite, expected finite float32[{steps}] or [{steps}, A]; recompute it with the reference policy"
    )
  return total.astype(np.float32)


class Ahead(Generic[T]):
  """make(i) for i, i + 1, ... in turn: while the caller uses one batch, the next is made on a thread.

  So a device does not wait for the disk, nor for images to be cropped.

  Args:
    make: int -> a batch, of its argument alone; what it raises is raised by the call that asks for that batch.
    end: the first i that is not asked for.
  """

  def __init__(self, make: Callable[[int], T], end: int):
    self._make, self._end = make, end
    self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="batches")
    self._next: tuple[int, concurrent.futures.Future[T]] | None = None

  def __call__(self, i: int) -> T:
    if self._next is None or self._next[0] != i:  # the first one
      self._next = i, self._thread.submit(self._make, i)
    batch = self._next[1].result()
    self._next = (i + 1, self._thread.submit(self._make, i + 1)) if i + 1 < self._end else None
    return batch


def epoch_batches(n: int, batch_size: int, *, seed: int, epoch: int) -> list[np.ndarray]:
  """The shuffled batches of one epoch, index arrays into n items: a pure function of its arguments.

  What does not fill a batch is left out, other items each epoch.
  """
  if not 1 <= batch_size <= n:
    raise ValueError(f"{n} items do not fill one batch of {batch_size}; use a batch size from 1 to {n}")
  order = np.random.default_rng([seed, epoch]).permutation(n)
  return list(order[: n // batch_size * batch_size].reshape(-1, batch_size))
