"""StARe on the host (METHOD: "StARe = stage separator + stage calculator"): Episode x Task -> StagedEpisode.
numpy only.

A task is a row of stages, each with an end event e_k and a distance d_k with its scale L_k. Stages are
numbered from 0 here and from 1 in the equations:

  g(0) = 0;  g(t+1) = g(t) + 1 if e_{g(t)}(s_{t+1}) else g(t)          several events may fire on one step

The initial state s_0 fires nothing. Stage k is completed at the state index t >= 1 of its first firing and
stays so; once the last stage is completed, g stays K - 1 for good.

`regress=True` (off by default) lets g go back. The home stage is the one named "Grasp"; a task without it
never goes back. In a stage g after home the object counts as dropped at s when none of e_home, ..., e_{g-1}
holds there: the grasp is gone and nothing that was achieved with it holds either. So in Transport a lost
grasp is a drop, in Place it is one only away from the target, and releasing on the target is not. Events are
judged first, then the drop; a drop sets g to home, completions stay as they were, and nothing happens after
the last stage.

The same rules run offline (`label`, `annotate`: whole trajectories, vectorised over time and over episodes)
and online (`Separator`: one step at a time, vectorised over environments), and give the same labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from stare_jax.episode import SIGNAL_SIZE, Episode, Signals, StagedEpisode, unpack_signals

HOME = "Grasp"  # the stage that `regress=True` goes back to
CHUNK = 16384  # states judged at once: 3 MB of signals, enough to hide the calls, few enough for the cache


class StageRules(Protocol):
  """What is read of a stage; every rule takes (signals now, signals at reset) with broadcastable leading axes."""

  name: str
  end: Callable[[Signals, Signals], np.ndarray]  # e_k: bool[...]
  distance: Callable[[Signals, Signals], np.ndarray]  # d_k: float[...], metres or radians
  scale: float  # L_k, same unit


class TaskRules(Protocol):
  """What is read of a task."""

  name: str
  stages: Sequence[StageRules]


class _Rows(dict):
  """Signals of some rows, gathered by name at first use: a rule reads a few of the signals, rarely all."""

  def __init__(self, signals: Signals, rows: np.ndarray):
    super().__init__()
    self._signals, self._rows = signals, rows

  def __missing__(self, name: str) -> np.ndarray:
    value = self[name] = self._signals[name][self._rows]
    return value


def label(task: TaskRules, signals: np.ndarray, *, regress: bool = False) -> tuple[np.ndarray, np.ndarray, int]:
  """Stages of one whole trajectory.

  Args:
    signals: float32[T+1, S], s_0 .. s_T.
  Returns:
    stage_id int32[T], g(0) .. g(T-1); completed_at int32[K], -1 where never; last_stage, g(T).
  """
  if signals.ndim != 2 or not len(signals):
    raise ValueError(f"signals: got shape {signals.shape}, expected [T+1, {SIGNAL_SIZE}] with at least s_0")
  home = _home(task, regress)
  fires = _events(task, unpack_signals(signals), unpack_signals(signals[:1]), len(signals))
  stage, completed_at = _segment(fires, np.zeros(1, np.int64), home)
  return stage[:-1], completed_at[0], int(stage[-1])


def annotate(
  task: TaskRules, episodes: Sequence[Episode], *, offset: float = 1.0, regress: bool = False
) -> list[StagedEpisode]:
  """Stages, costs and potentials of many trajectories of one task; the rules see many episodes in one call.

  Every episode must begin at a reset: its first state is g = 0 and what the rules take for the signals at reset.
  """
  home = _home(task, regress)
  for episode in episodes:
    _check_episode(task, episode)
  return [staged for chunk in _chunks(episodes) for staged in _annotate(task, chunk, offset, home)]


def after(item: StagedEpisode, step: int) -> StagedEpisode:
  """The episode from s_step on, labelled as the whole: its costs are means over the steps that are left.

  What was completed before counts as completed at 0.
  """
  if not 0 <= step < len(item.episode):
    raise ValueError(f"step is {step}, expected one of the episode's {len(item.episode)} steps")
  episode, stages = item.episode, len(item.cost)
  fields = ("images", "signals", "actions", "tokens", "log_prob", "value")
  rest = dataclasses.replace(episode, **{name: getattr(episode, name)[step:] for name in fields})
  stage, distance = item.stage_id[step:], item.distance[step:]
  steps = np.bincount(stage, minlength=stages)
  total = np.bincount(stage, weights=distance, minlength=stages)
  cost = np.where(steps > 0, total / np.maximum(steps, 1), np.nan).astype(np.float32)
  completed_at = np.where(item.completed_at >= 0, np.maximum(item.completed_at - step, 0), -1).astype(np.int32)
  return StagedEpisode(rest, stage, completed_at, cost, item.potential[step:], distance)


class Separator:
  """The stage separator online: one step at a time, vectorised over N environments.

  Attributes:
    stage: int32[N], g of the latest state; -1 before an environment's first reset.
    completed_at: int32[N, K], steps after the reset; -1 where not yet.
  """

  def __init__(self, task: TaskRules, n: int, regress: bool = False):
    self._task, self._home = task, _home(task, regress)
    self.stage = np.full(n, -1, np.int32)
    self.completed_at = np.full((n, len(task.stages)), -1, np.int32)
    self._time = np.zeros(n, np.int32)
    self._first = np.zeros((n, SIGNAL_SIZE), np.float32)

  def reset(self, envs: Sequence[int] | np.ndarray, signals: np.ndarray) -> None:
    """Starts new episodes in `envs` at s_0 = signals, float32[len(envs), S]."""
    envs = self._select(envs, signals)
    self.stage[envs], self.completed_at[envs], self._time[envs] = 0, -1, 0
    self._first[envs] = signals

  def step(self, signals: np.ndarray, envs: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """Judges the states after one more step: float32[n, S] for `envs` (all by default) -> int32[n], g there now."""
    envs = self._select(envs, signals)
    stage, completed_at, k_last = self.stage[envs], self.completed_at[envs], len(self._task.stages) - 1
    if (stage < 0).any():
      raise ValueError(f"environments {envs[stage < 0].tolist()} were stepped before a reset; call reset first")
    self._time[envs] += 1
    fires = _events(self._task, unpack_signals(signals), unpack_signals(self._first[envs]), len(envs))
    finished = completed_at[:, -1] >= 0
    for k in range(k_last + 1):  # in order, so that an event can open the way for the next one on the same step
      now = (stage == k) & fires[k] & ~finished
      completed_at[now & (completed_at[:, k] < 0), k] = self._time[envs][now & (completed_at[:, k] < 0)]
      stage[now] = min(k + 1, k_last)
    if self._home is not None:
      finished = completed_at[:, -1] >= 0
      dropped = _drops(fires, self._home)[stage, np.arange(len(envs))]
      stage[dropped & ~finished] = self._home
    self.stage[envs], self.completed_at[envs] = stage, completed_at
    return stage

  def potential(
    self, signals: np.ndarray, envs: Sequence[int] | np.ndarray | None = None, *, offset: float = 1.0
  ) -> np.ndarray:
    """Phi(s, g) of the latest states, float32[n]: `signals` as given to `reset` or `step`."""
    envs = self._select(envs, signals)
    return potential(self._task, signals, self.stage[envs], reset=self._first[envs], offset=offset)

  def _select(self, envs: Sequence[int] | np.ndarray | None, signals: np.ndarray) -> np.ndarray:
    envs = np.arange(len(self.stage)) if envs is None else np.asarray(envs, np.int64)
    if signals.shape != (len(envs), SIGNAL_SIZE):
      raise ValueError(f"signals: got shape {signals.shape}, expected {(len(envs), SIGNAL_SIZE)}, a row per env")
    return envs


def potential(
  task: TaskRules, signals: np.ndarray, stage: np.ndarray, *, reset: np.ndarray, offset: float = 1.0
) -> np.ndarray:
  """Phi(s, g) = offset * g + sigmoid(1 - d_g(s) / L_g), with g from 0.

  Args:
    signals: float32[..., S].
    stage: int[...], g.
    reset: float32[..., S] or broadcastable to `signals`: s_0 of the same episode.
  Returns: float32[...].
  """
  lead = signals.shape[:-1]
  if np.shape(stage) != lead:
    raise ValueError(f"stage: got shape {np.shape(stage)}, expected the leading axes of signals, {lead}")
  flat = np.reshape(stage, -1)
  if flat.size and not 0 <= flat.min() <= flat.max() < len(task.stages):
    raise ValueError(f"stage: got {flat.min()} to {flat.max()}, expected 0 to {len(task.stages) - 1} for {task.name}")
  now = unpack_signals(signals.reshape(-1, signals.shape[-1]))
  first = unpack_signals(np.broadcast_to(reset, signals.shape).reshape(-1, signals.shape[-1]))
  ratio = _ratio(task, now, first, np.arange(len(flat)), flat)
  return _phi(ratio, flat, offset).reshape(lead)


def shaped_reward(
  reward: np.ndarray,
  potential: np.ndarray,
  terminated: np.ndarray | bool,
  *,
  discount: float,
  terminal: str = "zero",
) -> np.ndarray:
  """Eq. Shape: r'_t = r_t + discount * Phi(s_{t+1}, g(t+1)) - Phi(s_t, g(t)).

  Args:
    reward: float[..., T].
    potential: float[..., T+1].
    terminated: bool[...], the episode ended in a terminal state; a truncation is not one.
    terminal: "zero" makes Phi of a terminal state 0, which leaves the optimal policy exactly as it was;
      "keep" uses it as it is (ablation).
  Returns: float32[..., T].
  """
  reward, potential, terminated = np.asarray(reward), np.asarray(potential), np.asarray(terminated)
  if reward.dtype.kind != "f" or potential.dtype.kind != "f" or terminated.dtype != bool:
    raise TypeError(
      f"reward, potential, terminated: got {reward.dtype}, {potential.dtype}, {terminated.dtype}, expected float, "
      "float, bool; convert them where they are made (an integer reward would lose the shaping)"
    )
  if not reward.ndim or potential.shape != (*reward.shape[:-1], reward.shape[-1] + 1):
    raise ValueError(f"potential: got shape {potential.shape}, expected [..., T+1] for reward {reward.shape}")
  if terminated.shape != reward.shape[:-1]:
    raise ValueError(f"terminated: got shape {terminated.shape}, expected {reward.shape[:-1]}, one per episode")
  if terminal not in ("zero", "keep"):
    raise ValueError(f'terminal: got {terminal!r}, expected "zero" or "keep"')
  after = potential[..., 1:].astype(np.float32)
  if terminal == "zero" and reward.shape[-1]:
    after[..., -1] = np.where(terminated, 0.0, after[..., -1])
  return (reward + np.float32(discount) * after - potential[..., :-1]).astype(np.float32)


def _home(task: TaskRules, regress: bool) -> int | None:
  """Index of the stage to go back to, None where g never does."""
  if not task.stages:
    raise ValueError(f"task {task.name}: it has no stages; give it at least one, whose end event is success")
  if bad := [stage.name for stage in task.stages if not stage.scale > 0]:
    raise ValueError(f"task {task.name}: stages {bad} have a scale that is not positive; L_k is a length or an angle")
  names = [stage.name for stage in task.stages]
  return names.index(HOME) if regress and HOME in names else None


def _events(task: TaskRules, now: Signals, first: Signals, rows: int) -> np.ndarray:
  """bool[K, rows]: e_k at every state."""
  fires = np.empty((len(task.stages), rows), bool)
  for k, stage in enumerate(task.stages):
    fired = np.asarray(stage.end(now, first))
    if fired.dtype != bool or fired.shape not in ((), (1,), (rows,)):
      raise TypeError(
        f"task {task.name}, stage {stage.name}: its end event gave {fired.dtype}{fired.shape}, expected "
        f"bool[{rows}], one truth value per state"
      )
    fires[k] = fired
  return fires


def _drops(fires: np.ndarray, home: int) -> np.ndarray:
  """bool[K, rows]: in stage g this state is a drop (see the module's text)."""
  drops = np.zeros_like(fires)
  for g in range(home + 1, len(fires)):
    drops[g] = ~fires[home:g].any(axis=0)
  return drops


def _next(mask: np.ndarray) -> np.ndarray:
  """int32[K, R+1]: the first row >= r where the mask holds, R where none does."""
  rows = mask.shape[1]
  at = np.where(mask, np.arange(rows, dtype=np.int32), np.int32(rows))
  at = np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1]
  return np.pad(at, ((0, 0), (0, 1)), constant_values=rows)


def _segment(fires: np.ndarray, start: np.ndarray, home: int | None) -> tuple[np.ndarray, np.ndarray]:
  """First-fire search over episodes that lie one after another.

  All episodes hop at once from one change of stage to the next, so the loop runs as often as the most
  eventful episode changes (at most K + 1 times without regress), not T times.

  Args:
    fires: bool[K, R], events at the R states of all episodes.
    start: int64[E], the row of each episode's s_0.
  Returns: g at every row, int32[R]; completed_at int32[E, K].
  """
  stages, rows = fires.shape
  end = np.append(start[1:], rows)
  fire_at = _next(fires)
  drop_at = fire_at if home is None else _next(_drops(fires, home))
  g, row, live = np.zeros_like(start), start + 1, np.arange(len(start))
  completed_at = np.full((len(start), stages), -1, np.int32)
  change = np.zeros(rows, np.int32)
  while live.size:
    fire, drop = fire_at[g[live], row[live]], drop_at[g[live], row[live]]
    fired, at = fire <= drop, np.minimum(fire, drop)  # on one state the event comes first
    inside = at < end[live]
    live, at, fired = live[inside], at[inside], fired[inside]
    first = fired & (completed_at[live, g[live]] < 0)
    completed_at[live[first], g[live[first]]] = (at - start[live])[first]
    to = np.where(fired, np.minimum(g[live] + 1, stages - 1), home or 0)
    change[at] += (to - g[live]).astype(np.int32)  # one row per episode, so no row comes twice
    g[live], row[live] = to, at
    live = live[completed_at[live, -1] < 0]
  change[start[1:]] = -g[:-1]
  return np.cumsum(change, dtype=np.int32), completed_at


def _ratio(task: TaskRules, now: Signals, first: Signals, owner: np.ndarray, stage: np.ndarray) -> np.ndarray:
  """float32[R]: d_g / L_g at every row, with g the row's own stage; `owner` is the row's s_0 in `first`."""
  ratio = np.empty(len(stage), np.float32)
  for k, rules in enumerate(task.stages):
    rows = np.flatnonzero(stage == k)
    if not rows.size:
      continue
    distance = np.asarray(rules.distance(_Rows(now, rows), _Rows(first, owner[rows])))
    if distance.shape not in ((), (1,), rows.shape) or not np.isfinite(distance).all():
      raise ValueError(
        f"task {task.name}, stage {rules.name}: its distance gave shape {distance.shape} with "
        f"{np.count_nonzero(~np.isfinite(distance))} values that are not finite, expected finite float[{len(rows)}]; "
        "check the rule, then the simulator's signals"
      )
    ratio[rows] = distance / rules.scale
  return ratio


def _phi(ratio: np.ndarray, stage: np.ndarray, offset: float) -> np.ndarray:
  """float32: offset * g + sigmoid(1 - ratio); the exponent is held below float32's overflow."""
  inner = 1.0 / (1.0 + np.exp(np.minimum(ratio - np.float32(1.0), np.float32(80.0))))
  return (np.float32(offset) * stage.astype(np.float32) + inner).astype(np.float32)


def _check_episode(task: TaskRules, episode: Episode) -> None:
  if episode.task != task.name:
    raise ValueError(f"episode of task {episode.task!r} (seed {episode.seed}) given to task {task.name!r}")
  expected = (len(episode) + 1, SIGNAL_SIZE)
  if episode.signals.shape != expected or not len(episode):
    raise ValueError(
      f"episode of {episode.task}, seed {episode.seed}: {len(episode)} steps with signals {episode.signals.shape}, "
      f"expected at least one step and signals [T+1, S] = {expected}"
    )


def _chunks(episodes: Sequence[Episode]) -> Iterator[list[Episode]]:
  """Whole episodes, about CHUNK states at a time."""
  chunk, rows = [], 0
  for episode in episodes:
    chunk.append(episode)
    rows += len(episode) + 1
    if rows >= CHUNK:
      yield chunk
      chunk, rows = [], 0
  if chunk:
    yield chunk


def _annotate(task: TaskRules, episodes: list[Episode], offset: float, home: int | None) -> list[StagedEpisode]:
  """`annotate` for episodes whose states lie one after another: R states of E episodes."""
  count, stages = len(episodes), len(task.stages)
  size = np.array([len(episode) + 1 for episode in episodes])
  start = np.cumsum(size) - size
  owner = np.repeat(np.arange(count), size)
  # Column by column: a rule reads a few columns of all rows, one number after another in memory.
  packed = np.asfortranarray(np.concatenate([episode.signals for episode in episodes]))
  now, first = unpack_signals(packed), unpack_signals(packed[start])
  stage, completed_at = _segment(_events(task, now, _Rows(first, owner), len(packed)), start, home)
  ratio = _ratio(task, now, first, owner, stage)
  phi = _phi(ratio, stage, offset)
  is_step = np.ones(len(packed), bool)
  is_step[start + size - 1] = False  # s_T is a state without an action: no cost
  cell = (owner * stages + stage)[is_step]
  total = np.bincount(cell, weights=ratio[is_step], minlength=count * stages)
  steps = np.bincount(cell, minlength=count * stages)
  cost = np.where(steps > 0, total / np.maximum(steps, 1), np.nan).astype(np.float32).reshape(count, stages)
  return [
    StagedEpisode(episode, stage[a : a + n - 1], completed_at[e], cost[e], phi[a : a + n], ratio[a : a + n - 1])
    for e, (episode, a, n) in enumerate(zip(episodes, start, size, strict=True))
  ]
