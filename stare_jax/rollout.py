"""Actor x simulator -> episodes, with the behaviour's log-probs and values; simulation and inference overlap.

Environments are split into groups. While one group's environments step in their worker processes, the actor decides for
the other: with two groups neither side waits for the slower one's full turn. `episodes` gives the next start to
whichever environment is free, `rows` a queue of its own to each. What an environment does depends on (start, sample,
step) alone, so the same call gives the same episodes whatever the timing. A worker's death costs the episodes on it:
they are discarded and run again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from stare_jax.episode import Episode, unpack_signals


class Start(NamedTuple):
  """What an episode starts from: the environment seed, and which of the actor's samples it is.

  Before step `parts_at` a policy acts as its sample 0 does, so all samples of a seed meet the same states until there.
  """

  seed: int
  sample: int = 0
  parts_at: int = 0


class Decision(NamedTuple):
  """One step of a group of n environments."""

  actions: np.ndarray  # float32[n, D], what is recorded
  tokens: np.ndarray  # int32[n, A]
  log_prob: np.ndarray  # float32[n, A]
  value: np.ndarray  # float32[n]
  sent: np.ndarray | None = None  # float32[n, D], what the simulator gets where it is not `actions`


class Actor(Protocol):
  """Decides for n environments at once. Rows that are not `live` get a decision that nobody uses."""

  def __call__(
    self, images: np.ndarray, signals: np.ndarray, starts: Sequence[Start], steps: np.ndarray, live: np.ndarray
  ) -> Decision: ...


class Stop(Exception):
  """Raised by `check` to leave a rollout early, for example on SIGTERM."""


@dataclasses.dataclass
class Tape:
  """One environment: the episode it is in and those behind it."""

  queue: Iterator[tuple[int, Start]]  # (position in the result, start)
  position: int = -1
  start: Start | None = None  # None: this environment is done
  images: list = dataclasses.field(default_factory=list)
  signals: list = dataclasses.field(default_factory=list)
  decisions: list = dataclasses.field(default_factory=list)  # per step: actions, tokens, log_prob, value
  action: np.ndarray | None = None  # on its way to the simulator
  steps_left: int | None = None  # the environment's step budget; None is without limit
  resetting: bool = False

  def next_start(self) -> None:
    self.position, self.start = next(self.queue, (-1, None))
    self.rewind()

  def finish(self) -> None:
    self.start = None

  def rewind(self) -> None:
    self.images, self.signals, self.decisions, self.resetting = [], [], [], True


@dataclasses.dataclass
class Collector:
  """Collects episodes of one task.

  Attributes:
    sim: the simulator.
    task: supplies the name and instruction that episodes carry.
    actor: decides.
    horizon: control steps until an episode is cut.
    tail: control steps after `Start.parts_at` until it is cut, if that comes earlier; None is without limit.
    groups: how many groups the environments are split into; must divide `sim.num_envs`.
    stop_on_success: end an episode at its first success (training), or run on to the horizon (evaluation).
    check: called once per simulator round; may raise `Stop`.
    progress: called with (steps taken, episode or None) as they happen.
  """

  sim: Any
  task: Any
  actor: Actor
  horizon: int
  tail: int | None = None
  groups: int = 2
  stop_on_success: bool = True
  check: Callable[[], None] = lambda: None
  progress: Callable[[int, Episode | None], None] = lambda steps, episode: None

  def episodes(self, starts: Sequence[Start]) -> list[Episode]:
    """One episode for each start, in their order."""
    shared = iter(enumerate(starts))
    done = self._run([Tape(shared) for _ in range(self.sim.num_envs)])
    return [episode for _, _, episode in sorted(done, key=lambda item: item[1])]

  def rows(self, start_of: Callable[[int, int], Start], steps: int) -> list[list[Episode]]:
    """For each environment n, episodes `start_of(n, 0)`, `start_of(n, 1)`, ... of together exactly `steps` steps.

    The last episode of a row is cut where the budget ends and carries the value to bootstrap from.
    """
    queue = lambda n: ((j, start_of(n, j)) for j in itertools.count())
    done = self._run([Tape(queue(n), steps_left=steps) for n in range(self.sim.num_envs)])
    rows: list[list[Episode]] = [[] for _ in range(self.sim.num_envs)]
    for env, _, episode in sorted(done, key=lambda item: item[:2]):
      rows[env].append(episode)
    return rows

  def _run(self, tapes: list[Tape]) -> list[tuple[int, int, Episode]]:
    groups = np.split(np.arange(len(tapes)), self.groups)
    pending: list[list[int]] = []
    for group in groups:  # every group is on its way before the first answer is awaited
      for env in group:
        tapes[env].next_start()
      pending.append(self._send(tapes, group))
    done: list[tuple[int, int, Episode]] = []
    try:
      while any(pending):
        for g, group in enumerate(groups):
          if pending[g]:
            self.check()
            pending[g] = self._turn(tapes, group, pending[g], done)
    except BaseException:
      for envs in pending:  # leave no answer in the pipes for the next caller to trip over
        with contextlib.suppress(Exception):  # a simulator that is closed has none, and the first error is the news
          self.sim.receive(envs)
      raise
    return done

  def _turn(self, tapes: list[Tape], group: np.ndarray, waiting: list[int], done: list) -> list[int]:
    """Receive a group's frames, decide, close the episodes that ended, send the next requests."""
    envs = waiting.copy()
    waiting.clear()  # received or broken, nobody shall wait for these again
    self._record(tapes, envs, self.sim.receive(envs))
    decision = self._decide(tapes, group)
    steps = 0
    for row, env in enumerate(group):
      tape = tapes[env]
      if tape.start is None or tape.resetting:
        continue
      if tape.decisions and (self._succeeded(tape) or len(tape.decisions) == self._limit(tape.start) or
                             tape.steps_left == 0):  # fmt: skip
        episode = self._close(tape, last_value=float(decision.value[row]))
        done.append((int(env), tape.position, episode))
        self.progress(0, episode)
        tape.next_start() if tape.steps_left != 0 else tape.finish()
      else:
        tape.decisions.append(tuple(array[row] for array in decision[:4]))
        tape.action = (decision.actions if decision.sent is None else decision.sent)[row]
        tape.steps_left = None if tape.steps_left is None else tape.steps_left - 1
        steps += 1
    self.progress(steps, None)
    return self._send(tapes, group)

  def _record(self, tapes: list[Tape], envs: list[int], frame: Any) -> None:
    for row, env in enumerate(envs):
      tape = tapes[env]
      if frame.lost[row]:
        tape.steps_left = None if tape.steps_left is None else tape.steps_left + len(tape.decisions)
        tape.rewind()
      else:
        tape.resetting = False
        tape.images.append(frame.images[row])
        tape.signals.append(frame.signals[row])

  def _decide(self, tapes: list[Tape], group: np.ndarray) -> Decision:
    """The actor always sees the whole group, so its batch has one shape; idle rows repeat a live one."""
    live = np.array([tapes[env].start is not None and not tapes[env].resetting for env in group])
    stand_in = group[int(np.argmax(live))]
    shown = [tapes[env if here else stand_in] for env, here in zip(group, live)]
    if not live.any():
      n, dims = len(group), 1
      return Decision(np.zeros((n, dims), np.float32), np.zeros((n, dims), np.int32), np.zeros((n, dims)), np.zeros(n))
    return self.actor(
      np.stack([tape.images[-1] for tape in shown]),
      np.stack([tape.signals[-1] for tape in shown]),
      [tape.start for tape in shown],
      np.array([len(tape.decisions) for tape in shown], np.int32),
      live,
    )

  def _limit(self, start: Start) -> int:
    return self.horizon if self.tail is None else min(self.horizon, start.parts_at + self.tail)

  def _succeeded(self, tape: Tape) -> bool:
    return self.stop_on_success and bool(unpack_signals(tape.signals[-1])["success"] > 0.5)

  def _close(self, tape: Tape, last_value: float) -> Episode:
    actions, tokens, log_prob, value = (np.stack(parts) for parts in zip(*tape.decisions))
    terminated = self._succeeded(tape)
    return Episode(
      task=self.task.name,
      seed=tape.start.seed,
      instruction=self.task.instruction,
      images=np.stack(tape.images[:-1]),
      signals=np.stack(tape.signals),
      actions=actions.astype(np.float32),
      tokens=tokens.astype(np.int32),
      log_prob=log_prob.astype(np.float32),
      value=value.astype(np.float32),
      last_value=0.0 if terminated else last_value,
      terminated=terminated,
    )

  def _send(self, tapes: list[Tape], group: np.ndarray) -> list[int]:
    """Request a reset for every new start and a step for every running episode; returns who will answer."""
    active = [int(env) for env in group if tapes[env].start is not None]
    resets = [env for env in active if tapes[env].resetting]
    moving = [env for env in active if not tapes[env].resetting]
    if resets:
      self.sim.send_reset(resets, [tapes[env].start.seed for env in resets])
    if moving:
      self.sim.send_step(moving, np.stack([tapes[env].action for env in moving]))
    return active


@dataclasses.dataclass
class ExpertActor:
  """A task's scripted expert, one per episode; log-probs and values are zero.

  With noise, the simulator gets a disturbed action and the episode records the expert's own: demonstrations then show
  how to come back from states that a learner will drift into (Laskey et al. 2017), and their labels stay clean.

  Attributes:
    task: has `expert(rng, noise)`.
    noise: standard deviation of the disturbance of the three translations, in the task's `unit`.
    seed: with the start, fixes the disturbance.
  """

  task: Any
  noise: float = 0.0
  seed: int = 0
  episodes: dict = dataclasses.field(default_factory=dict)  # start -> (generator, expert)

  def __call__(self, images, signals, starts, steps, live) -> Decision:
    actions, sent = np.zeros((2, len(starts), 7), np.float32)
    for row in np.flatnonzero(live):
      start = starts[row]
      if steps[row] == 0:
        rng = np.random.default_rng([self.seed, start.seed, start.sample])
        self.episodes[start] = rng, self.task.expert(rng, 0.0)
      rng, expert = self.episodes[start]
      actions[row] = expert.act(unpack_signals(signals[row]))
      sent[row] = actions[row]
      sent[row, :3] = np.clip(sent[row, :3] + self.noise * self.task.unit * rng.standard_normal(3), -1, 1)
    nothing = np.zeros(actions.shape)
    return Decision(actions, nothing.astype(np.int32), nothing, np.zeros(len(actions)), sent)


@dataclasses.dataclass
class PolicyActor:
  """A policy with its parameters. The key of a step is folded from (start, step): timing cannot change a sample.

  Attributes:
    act: from `compile_act`.
    policy: encodes observations and decodes tokens.
    params: the parameters.
    key: a typed PRNG key; with the start and the step it fixes every sample.
    temperature: of sampling; 0 takes the most likely token.
    instruction: what the policy is told, or what says it of a start.
  """

  act: Callable
  policy: Any
  params: Any
  key: Any
  temperature: float
  instruction: str | Callable[[Start], str]

  def __call__(self, images, signals, starts, steps, live) -> Decision:
    obs = self.policy.encode(images, [self.told(start) for start in starts])
    seeds = np.array([start.seed for start in starts], np.uint32)
    samples = np.array([start.sample * (at >= start.parts_at) for start, at in zip(starts, steps)], np.uint32)
    out = self.act(self.params, obs, self.key, seeds, samples, steps.astype(np.uint32), np.float32(self.temperature))
    tokens, log_prob, value = (np.asarray(x) for x in out)
    return Decision(self.policy.decode(tokens), tokens, log_prob, value)

  def told(self, start: Start) -> str:
    """The instruction in the episode of a start."""
    return self.instruction(start) if callable(self.instruction) else self.instruction


def act_program(policy: Any, mesh: Any = None) -> Callable:
  """The jitted `(params, obs, key, seeds u32[n], samples u32[n], steps u32[n], temperature) -> Act`.

  mesh: `sharding.acting_mesh`, on which `sharding.local_copy` puts the parameters.
  """
  import jax  # here, so that experts and simulators can be driven without it

  from stare_jax import sharding

  def act(params, obs, key, seeds, samples, steps, temperature):
    fold = lambda *parts: functools.reduce(jax.random.fold_in, parts, key)
    with sharding.activations(mesh):
      return policy.act(params, obs, jax.vmap(fold)(seeds, samples, steps), temperature)

  return jax.jit(act, compiler_options=sharding.compiler_options(mesh, acting=True))


def compile_act(policy: Any, mesh: Any = None) -> Callable:
  """`act_program`, to be called with arrays of the host beside the parameters; one trace per group size."""
  import jax

  from stare_jax import sharding

  program = act_program(policy, mesh)
  if mesh is None:
    return program
  return lambda params, *rest: program(params, *jax.device_put(rest, sharding.replicated(mesh)))
