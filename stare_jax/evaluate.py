"""What evaluation episodes say: success and stage completion, each as a count, an N and an interval.

Two success rates are always given, because published figures differ in which one they mean:

  success_once    the simulator reported success at some state s_1 .. s_T
  success_at_end  ... at the last state s_T

They can only differ where episodes run on after success; `stopped_at_success` counts those that did not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from stare_jax.episode import StagedEpisode

Z95 = 1.959963984540054  # two-sided 95 % point of the standard normal


def wilson(count: int, n: int, z: float = Z95) -> tuple[float, float]:
  """Wilson score interval of a proportion: (low, high) in [0, 1].

      centre = (p + z^2 / 2n) / (1 + z^2 / n),   half = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)

  Unlike the normal interval it stays inside [0, 1] and does not shrink to a point at 0 or n successes.
  """
  if n < 1 or not 0 <= count <= n:
    raise ValueError(f"wilson: {count} of {n}; expected 0 <= count <= n and n >= 1")
  p, zz = count / n, z * z
  centre = (p + zz / (2 * n)) / (1 + zz / n)
  half = z * math.sqrt(p * (1 - p) / n + zz / (4 * n * n)) / (1 + zz / n)
  # At the ends the interval touches 0 or 1 exactly; rounding must not put it a hair outside the rate.
  return (0.0 if count == 0 else centre - half), (1.0 if count == n else centre + half)


def rate(count: int, n: int) -> dict[str, float | int | None]:
  """{"count", "n", "rate", "low", "high"}; the last three are None where n is 0: nothing was observed."""
  count, n = int(count), int(n)
  if n == 0:
    return {"count": 0, "n": 0, "rate": None, "low": None, "high": None}
  low, high = wilson(count, n)
  return {"count": count, "n": n, "rate": count / n, "low": low, "high": high}


def stage_rates(completed: np.ndarray, names: Sequence[str]) -> list[dict]:
  """Completion of every stage: marginal P(k) over all episodes, conditional P(k | k-1) over those that reached k.

  Args:
    completed: bool[N, K].
    names: K stage names.
  """
  completed = np.asarray(completed)
  if completed.ndim != 2 or completed.dtype != np.bool_ or completed.shape[1] != len(names):
    raise ValueError(
      f"stage_rates: completed is {completed.dtype}{list(completed.shape)}, "
      f"expected bool[N, {len(names)}] for the stages {list(names)}"
    )
  skipped = completed[:, 1:] & ~completed[:, :-1]
  if skipped.any():
    n, k = np.argwhere(skipped)[0]
    raise ValueError(
      f"stage_rates: episode {n} completed stage {names[k + 1]!r} but not {names[k]!r} before it; "
      f"stages are ordered, so check `completed_at`"
    )
  total = len(completed)
  counts = completed.sum(axis=0)
  reached = [total, *counts[:-1]]
  return [
    {"name": name, "marginal": rate(count, total), "conditional": rate(count, start)}
    for name, count, start in zip(names, counts, reached, strict=True)
  ]


def success_flags(staged: Sequence[StagedEpisode]) -> tuple[np.ndarray, np.ndarray]:
  """(once bool[N], at_end bool[N]). State 0 is not the policy's doing and does not count."""
  success = [s.episode.success for s in staged]
  return np.array([s[1:].any() for s in success], bool), np.array([s[-1] for s in success], bool)


def summarise(
  staged: Sequence[StagedEpisode],
  *,
  label: str,
  stage_names: Sequence[str],
  temperature: float,
  seconds: float | None = None,
) -> dict:
  """One evaluation as evaluations/<label>.json holds it; plain Python numbers only.

  Args:
    staged: at least one episode, all of one task.
    label: which policy was evaluated: "imitation", "preference", "interaction".
    stage_names: the task's K stage names, in order.
    temperature: of the sampled actions; 0 is argmax.
    seconds: wall-clock time of the rollouts, where it was measured.
  """
  if not staged:
    raise ValueError(f"evaluation {label!r}: no episodes to summarise; were all lost to dead workers?")
  tasks = sorted({s.episode.task for s in staged})
  if len(tasks) != 1:
    raise ValueError(f"evaluation {label!r}: episodes of tasks {', '.join(tasks)}; summarise each task alone")
  once, at_end = success_flags(staged)
  lengths = np.array([len(s.episode) for s in staged])
  seeds = [int(s.episode.seed) for s in staged]
  return {
    "label": label,
    "task": tasks[0],
    "episodes": len(staged),
    "seeds": [min(seeds), max(seeds)],
    # Repeated seeds are correlated trials: the interval would be too narrow, so the reader must see it.
    "distinct_seeds": len(set(seeds)),
    "temperature": float(temperature),
    "mean_length": float(lengths.mean()),
    "max_length": int(lengths.max()),
    "stopped_at_success": int(sum(bool(s.episode.terminated) for s in staged)),
    "env_steps": int(lengths.sum()),
    "seconds": None if seconds is None else float(seconds),
    "success_once": rate(once.sum(), len(staged)),
    "success_at_end": rate(at_end.sum(), len(staged)),
    "stages": stage_rates(np.stack([s.completed for s in staged]), stage_names),
  }


def pick_samples(staged: Sequence[StagedEpisode], count: int) -> list[int]:
  """Indices of the episodes to film: the first by seed, so that nobody chose them, successes in front of failures.

  Half of them are failures (of an odd number the smaller half), as far as there are enough of either.
  """
  once, _ = success_flags(staged)
  order = sorted(range(len(staged)), key=lambda i: (staged[i].episode.seed, i))
  successes, failures = ([i for i in order if once[i] == wanted] for wanted in (True, False))
  failed = max(count // 2, count - len(successes))
  return successes[: max(count - count // 2, count - len(failures))] + failures[:failed]
