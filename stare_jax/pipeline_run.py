"""What the phases share: the run and its folders, the loop that checkpoints and resumes, and growing data sets."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stare_jax import (
  batching,
  checkpoint,
  dataset,
  pipeline_together,
  policies,
  processes,
  report,
  report_progress,
  sharding,
  sims,
  suites,
  tasks,
  train,
  train_critic,
)
from stare_jax.config import PHASES, ConfigError
from stare_jax.episode import Episode
from stare_jax.pipeline_check import IDENTITY_SKIPS, TRAINING, check_batches, resolved
from stare_jax.pipeline_policy import Base, carry, described, folder_statistics, make_policy, table
from stare_jax.policies import action_stats
from stare_jax.rollout import Collector, PolicyActor, Start, Stop, compile_act

log = logging.getLogger("stare_jax")
CHUNK = 64  # episodes per file of a growing data set: what a kill during collection can cost


class Run:
  """What the phases of one run share: configuration, folders, policy, simulator, metrics.

  The simulator starts when it is first needed and the policy exists once its action statistics do.
  """

  def __init__(self, config: Any, workdir: str | os.PathLike, *, stop: Callable[[], bool] = lambda: False):
    self.config, self.stop = resolved(config), stop
    self.workdir = pathlib.Path(workdir)
    self.task = tasks.get(config.task)
    if (episodes := self.config.evaluation.episodes) != config.evaluation.episodes:
      log.info("evaluation.episodes: %d, not %d, so that each of the %d published starts of %s counts alike", episodes,
               config.evaluation.episodes, self.task.starts, self.task.name)  # fmt: skip
    self.mesh = sharding.make_mesh(dict(config.mesh))
    self.key = jax.random.key(config.seed)
    check_batches(self.config, sharding.batch_shards(self.mesh))
    pipeline_together.check(config, self.workdir)
    unit = np.ones(7, np.float32)  # a mistake in the policy's options is answered before any work is done
    policy = make_policy(self.config, policies.ActionStats(-unit, unit, unit > 0))
    size = self.config.sim.image_size
    policy.encode(np.zeros((1, size, size, 3), np.uint8), [self.task.instruction])  # may be too long for it
    self.folder_statistics = folder_statistics(config)
    self.base = Base(config)
    self.policy: policies.Policy | None = None
    self.logger: report.MetricsLogger | None = None
    self._sim: Any = None
    self._announced = False
    self.results: dict[str, dict] = {}
    self.earlier_events: list[str] = []
    self.earlier_simulator: dict[str, str] = {}
    self.env_steps: dict[str, int] = {}
    self.seconds: dict[str, float] = {}

  @property
  def sim(self) -> Any:
    if self._sim is None:
      c = self.config.sim
      self._sim = sims.make(
        c.name, task=self.task, image_size=c.image_size, timeout=c.timeout, python=c.get("python", ""),
        **pipeline_together.share_of_simulators(c),
      )  # fmt: skip
    return self._sim

  @property
  def events(self) -> list[str]:
    """What happened to the simulators' workers, launches before this one included; the pool logs it as it happens."""
    here = list(self._sim.events if self._sim is not None else ())
    return self.earlier_events + pipeline_together.events(here)

  @property
  def simulator(self) -> dict[str, str]:
    """What plays the episodes, and the versions that it runs on where this launch has started it."""
    return {"name": self.config.sim.name} | (self._sim.about if self._sim is not None else {})

  def close(self) -> None:
    if self._sim is not None:
      self._sim.close()
    if self.logger is not None:
      self.logger.close()

  def check(self) -> None:
    """Called before every update; leaves the loop when this process, or any other, was asked to end."""
    if processes.any_of(self.stop()):
      raise Stop

  def check_here(self) -> None:
    """Called in what a process does in its own time; the others hear of it, and stop there as well."""
    if self.stop():
      processes.stop()
    if self.stop() or processes.stopping():
      raise Stop

  def use_statistics(self, stats: policies.ActionStats) -> None:
    self.stats = stats
    self.policy = make_policy(self.config, stats)
    self.act = compile_act(self.policy, sharding.acting_mesh(self.mesh))
    self.param_axes = self.policy.param_axes if self.mesh.size > 1 else None
    if not self._announced:
      log.info("%s", self.table())
      self._announced = True

  def table(self) -> str:
    """What the state of this run's phases takes on each device, and what of it is not cut."""
    from stare_jax import pipeline_interaction, pipeline_updates  # of which the first imports this module

    c, phase = self.config, self.config.phases[0]
    tx = pipeline_updates.optimizer(c[phase], c[phase].iterations if phase == "interaction" else c[phase].updates)
    critic = None
    if "interaction" in c.phases and c.interaction.critic == "state":
      features = pipeline_interaction.num_features(self)
      critic = jax.eval_shape(functools.partial(train_critic.init, features=features), self.key)
    return table(self.policy, jax.eval_shape(self.policy.init, self.key), self.mesh, tx, critic)

  def obs(self, images: np.ndarray) -> policies.Obs:
    """What the policy sees of images uint8[N, H, W, 3] under the task's instruction."""
    return self.policy.encode(images, [self.task.instruction] * len(images))

  def identity(self, phase: str) -> dict[str, Any]:
    """The flat fields that decide a phase's parameters: a checkpoint of other ones is refused.

    Not among them: how a run shows itself, how often it saves, evaluation, later phases, how long Interaction goes on,
    and devices and memory, so that a finished run may be evaluated otherwise, changed from a later phase on, or trained
    for longer, and one that ran out of memory goes on with less.
    """
    skipped = self.skipped(phase)
    return {k: v for k, v in checkpoint.flatten_config(self.config).items() if not k.startswith(skipped)}

  def skipped(self, phase: str) -> tuple[str, ...]:
    """Beginnings of the fields that are not in `identity`: also those of later phases, and of phases never run here."""
    return (*IDENTITY_SKIPS, *self.never_run, *(f"{name}." for name in PHASES[PHASES.index(phase) + 1 :]))

  @property
  def never_run(self) -> tuple[str, ...]:
    """Beginnings of the fields of phases that neither ran in this folder nor will."""
    there = lambda name: name in self.config.phases or checkpoint.latest(checkpoint_dir(self, name)) is not None
    return tuple(f"{name}." for name in PHASES if not there(name))

  def seeds(self, purpose: str, count: int) -> range:
    """`count` environment seeds for a purpose; never those of the evaluation, which lie below 2^24."""
    state = np.random.SeedSequence([self.config.seed, *purpose.encode()]).generate_state(1)[0]
    first = TRAINING + int(state) % 2**30
    return range(first, first + count)

  def collector(self, actor: Any, *, progress: report_progress.Progress | None = None, **options: Any) -> Collector:
    def show(steps: int, episode: Episode | None) -> None:
      if progress is not None and episode is not None:
        successes.append(bool(episode.success[1:].any()))
        progress.update(1, success=float(np.mean(successes)))

    successes: list[bool] = []
    c = self.config.sim
    return Collector(
      self.sim, self.task, actor, horizon=c.horizon, groups=c.groups, check=self.check_here, progress=show, **options
    )  # fmt: skip

  def actor(self, params: Any, purpose: str, temperature: float) -> PolicyActor:
    key = jax.random.fold_in(self.key, int.from_bytes(purpose.encode()[:4], "little"))
    params = sharding.local_copy(params, self.param_axes, self.mesh, self.policy.acts_in)
    return PolicyActor(self.act, self.policy, params, key, temperature, self.task.instruction)

  @contextlib.contextmanager
  def changed(self, suite: suites.Suite | None, actor: PolicyActor) -> Iterator[None]:
    """Inside, episodes are as `suite` has them, and from here on what the actor is told; None: as in training."""
    actor.instruction = self.task.instruction
    if suite is not None:
      actor.instruction = lambda start: suites.instruction(suite, self.task, start.seed)
      if set(suite.changes) - {"instruction"}:  # which needs nothing of a simulator
        self.sim.suite = suites.for_worker(suite, self.task)
    try:
      yield
    finally:
      if suite is not None:
        self.sim.suite = None

  def mine(self, x: np.ndarray) -> np.ndarray:
    """The rows of a batch that this process puts on its devices: all of them, where it is the only one."""
    return x if processes.count() == 1 or not np.ndim(x) else x[sharding.local_rows(len(x), self.mesh)]


# --- the shared loop --------------------------------------------------------------------------------------------


def checkpoint_dir(run: Run, phase: str) -> pathlib.Path:
  return run.workdir / "checkpoints" / phase


def updates_of(run: Run, phase: str) -> int:
  """How many updates (of Interaction: iterations) a phase has in all."""
  c = run.config[phase]
  return c.iterations if phase == "interaction" else c.updates


def check_saved(run: Run, phase: str) -> None:
  """Refuses a phase's checkpoint that this run cannot use or go on with.

  Raises:
    ConfigMismatchError: it is of another configuration.
    ConfigError: it started from another phase than this run would start it from, or has more updates behind it.
  """
  if checkpoint.latest(folder := checkpoint_dir(run, phase)) is None:
    return
  meta, origin, total = checkpoint.read_meta(folder), predecessor(run, phase), updates_of(run, phase)
  came, words = meta.get("starts_from", origin), lambda name: name or "fresh parameters"
  runs = phase in run.config.phases
  if runs and came != origin:
    raise ConfigError(f"{phase} in {run.workdir} started from {words(came)}, and this run would start it from "
                      f"{words(origin)}: continue with the phases of then, or choose another --workdir")
  checkpoint.check_config(folder, run.identity(phase), ignore=run.skipped(phase))
  if runs and (done := meta["iteration"]) > total:  # of Interaction alone, as the others' numbers are in their identity
    raise ConfigError(f"{phase} in {run.workdir} has {done} iterations behind it, more than the {total} asked for: ask "
                      f"for {done} or more, or choose another --workdir")


def finished(run: Run, phase: str) -> Any | None:
  """The parameters of a phase that has all its updates, read without its data and its optimiser; None if it has not."""
  folder = checkpoint_dir(run, phase)
  done = 0 if checkpoint.latest(folder) is None else checkpoint.read_meta(folder)["iteration"]
  processes.same(done, f"the updates that {phase} has behind it", pipeline_together.SHARED)
  if done < updates_of(run, phase):
    return None
  log.info("%s: finished, all %d %s", phase, done, "iterations" if phase == "interaction" else "updates")
  run.use_statistics(read_statistics(folder))
  return run.base.from_checkpoint(run.policy, folder, jax.random.fold_in(run.key, 0), run.mesh)


def advance_until(
  run: Run,
  phase: str,
  state: train.TrainState,
  advance: Callable[[train.TrainState, int], tuple[train.TrainState, dict[str, float]]],
  *,
  total: int,
  every: int,
  unit: str,
  show: Sequence[str],
) -> train.TrainState:
  """Run `advance(state, i)` for i up to `total` from the last checkpoint, saving every `every` and at the end.

  `advance` returns metrics of floats; "env_steps", if there, is how many simulator steps it took.
  """
  folder, fields, origin = checkpoint_dir(run, phase), run.identity(phase), predecessor(run, phase)
  meta: dict[str, Any] = {}
  if checkpoint.latest(folder) is not None:
    state, meta = run.base.restore(run.policy, folder, state)
  start, env_steps, spent = meta.get("iteration", 0), meta.get("env_steps", 0), meta.get("seconds", 0.0)
  if start:
    log.info("%s: resuming after %d of %d %ss", phase, start, total, unit)
  later = [p for p in PHASES[PHASES.index(phase) + 1 :] if checkpoint.latest(checkpoint_dir(run, p)) is not None]
  run.logger = pipeline_together.logger(run.workdir, resume=(phase, start), keep=later)
  began = time.monotonic()

  def save(i: int) -> None:
    run.logger.flush()
    seconds = spent + time.monotonic() - began
    stats = {name: np.asarray(value).tolist() for name, value in run.stats._asdict().items()}
    rollouts = {name: [run.seconds[name], n] for name, n in run.env_steps.items() if name not in PHASES}
    meta = dict(
      phase=phase, iteration=i, env_steps=env_steps, seconds=seconds, action_stats=stats, starts_from=origin,
      rollouts=rollouts,
      base=run.base.digest, **carry(described(run.config), folder, run.policy.config),
    )  # fmt: skip
    kept = run.base.saved(run.policy, state)
    written = checkpoint.save(folder, i, kept, meta, config=fields, keep=run.config.checkpoint.keep)
    processes.appear(written / checkpoint.META)

  saved = start
  with report_progress.Progress(phase, total, initial=start, unit=unit, quiet=not processes.first()) as bar:
    for i in range(start, total):
      try:
        run.check()
        state, metrics = advance(state, i)
      except Stop:
        if i > saved:
          save(i)
        raise
      env_steps += int(metrics.pop("env_steps", 0))
      run.logger.log(phase, i + 1, metrics, env_steps=env_steps)
      bar.update(1, **{name: metrics[name] for name in show if name in metrics})
      if (i + 1) % every == 0 or i + 1 == total:
        save(i + 1)
        saved = i + 1
  run.env_steps[phase], run.seconds[phase] = env_steps, spent + time.monotonic() - began
  run.logger.close()
  return state


# --- episodes ---------------------------------------------------------------------------------------------------


def gather(
  run: Run,
  name: str,
  starts: Sequence[Start],
  make_actor: Callable[[], Any],
  fields: Mapping[str, Any],
  **options: Any,
) -> list[Episode]:
  """The episodes of `starts`, from data/<name>/ where they are there already; written chunk by chunk as they come."""
  folder, episodes = run.workdir / "data" / name, []
  chunks = [starts[i : i + CHUNK] for i in range(0, len(starts), CHUNK)]
  digest = checkpoint.config_digest(fields)
  seconds = 0.0
  for path in [folder / f"{i:05d}.episodes" for i in range(len(chunks))]:
    if path.exists():  # before any process simulates
      check_collected(path, dataset.open(path)[1], fields, run.never_run)
      break
  make_collector = lambda bar: run.collector(make_actor(), progress=bar, **options)
  pipeline_together.collect(folder, chunks, make_collector, fields, run.check_here)
  with pipeline_together.episodes_bar(f"{name} rollouts", len(starts)) as bar:
    collector = None
    for i, chunk in enumerate(chunks):
      path = folder / f"{i:05d}.episodes"
      if path.exists():
        found, meta = dataset.open(path)
        check_collected(path, meta, fields, run.never_run)
        bar.skip(len(found))
      else:
        began = time.monotonic()
        collector = collector or make_collector(bar)
        found = collector.episodes(chunk)
        meta = {"digest": digest, "fields": checkpoint.flatten_config(fields), "seconds": time.monotonic() - began}
        dataset.write(path, found, meta)
        found, _ = dataset.open(path)  # the images leave the memory: from here on they are those of the file
      episodes += found
      seconds += meta.get("seconds", 0.0)
  run.seconds[f"{name} rollouts"] = seconds
  run.env_steps[f"{name} rollouts"] = sum(map(len, episodes))
  return episodes


def check_collected(
  path: pathlib.Path, meta: Mapping[str, Any], fields: Mapping[str, Any], ignore: tuple[str, ...] = ()
) -> None:
  """Refuses episodes of another configuration; `ignore`: beginnings of fields that do not count."""
  if meta.get("digest") == checkpoint.config_digest(fields):
    return
  if not (lines := checkpoint.config_differences(meta.get("fields", {}), fields, ignore=(*IDENTITY_SKIPS, *ignore))):
    return
  raise dataset.DatasetError(
    f"{path} was collected with another configuration:\n  " + "\n  ".join(lines[:12]) + "\n"
    "Run with that configuration, or start this one with another --workdir; nothing was changed"
  )


def predecessor(run: Run, phase: str) -> str:
  """The phase before this one in the run; where it has none, the last earlier one in the folder; else empty."""
  before = PHASES[: PHASES.index(phase)]
  saved = [p for p in before if checkpoint.latest(checkpoint_dir(run, p)) is not None]
  return ([p for p in before if p in run.config.phases] or saved or [""])[-1]


def starting_folder(run: Run, phase: str) -> pathlib.Path | None:
  """The checkpoints that a phase starts from: of the phase before, or `init_from`; None for untrained parameters.

  Raises: ConfigError if there are none and the phase cannot do without.
  """
  if phase == "imitation" and not run.config.init_from:
    return None
  if earlier := predecessor(run, phase):
    folder = checkpoint_dir(run, earlier)
    done, total = checkpoint.read_meta(folder)["iteration"], run.config[earlier].updates
    if done < total:
      raise ConfigError(f"{phase} would start from {earlier} at {done} of {total} updates: finish that phase first "
                        f"(name it in --config.phases), or start a new --workdir with --config.init_from={folder}")
  elif run.config.init_from:
    folder = pathlib.Path(run.config.init_from)
  elif run.folder_statistics is not None:  # a public checkpoint acts as it is
    folder = None
  else:
    raise ConfigError(f"{phase} has nothing to start from: {run.workdir} holds no checkpoint of an earlier phase. "
                      f'Run imitation first, name a checkpoint with --config.init_from=RUN/checkpoints/imitation, '
                      f"or a public one with --config.policy.checkpoint and --config.policy.unnorm_key")
  return folder


def starting_params(run: Run, phase: str) -> Any:
  """Parameters that a phase starts from; with them come the action statistics, except for imitation."""
  folder, key = starting_folder(run, phase), jax.random.fold_in(run.key, 0)
  if phase != "imitation":  # which has its own from the demonstrations
    stats = run.folder_statistics if folder is None else read_statistics(folder)
    if folder is not None and checkpoint.read_meta(folder)["phase"] == "public":  # `convert` keeps the data set's
      stats = action_stats.in_environment(stats)
    run.use_statistics(stats)
  if folder is None:
    return run.base.initial(run.policy, key, run.mesh)
  return run.base.from_checkpoint(run.policy, folder, key, run.mesh)


def read_statistics(folder: pathlib.Path) -> policies.ActionStats:
  """The action statistics that a checkpoint carries: a phase's in the simulator's terms, a converted folder's own."""
  meta = checkpoint.read_meta(folder)
  if "action_stats" not in meta:
    raise checkpoint.CheckpointError(f"checkpoint {folder} carries no action statistics, so it is not a phase's: name "
                                     f"a folder such as runs/x/checkpoints/imitation")
  kinds = {"q01": np.float32, "q99": np.float32, "mask": bool}
  return policies.ActionStats(**{name: np.array(meta["action_stats"][name], kind) for name, kind in kinds.items()})


def step(
  run: Run, update: train.Update, state: train.TrainState, batch: Any
) -> tuple[train.TrainState, dict[str, float]]:
  """One update from a host batch: down through the one door, and the metrics up through the other."""
  traced = update.traces
  state, metrics = update(state, sharding.put(batch, run.mesh))
  if 0 < traced < update.traces:
    log.info("an update was compiled again (%d times so far): a batch of another shape", update.traces)
  return state, train.fetch(metrics, state.params, run.policy.trainable)


@functools.lru_cache(maxsize=2)
def _epoch(n: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
  return batching.epoch_batches(n, size, seed=seed, epoch=epoch)


def minibatch(n: int, size: int, i: int, seed: int) -> np.ndarray:
  """The rows of the i-th batch of an endless shuffled stream over n items: a function of its arguments alone."""
  size = min(size, n)
  epoch, index = divmod(i, n // size)
  return _epoch(n, size, seed, epoch)[index]
