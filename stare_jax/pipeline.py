"""The hall: Imitation -> Preference -> Interaction, one function per phase. `pipeline_run` has what they share.

A phase is a pure function of (its starting parameters, the configuration, the seed): the i-th advance of its loop
depends on the state and on i alone. So a run that was killed anywhere repeats from its last checkpoint and ends with
the same parameters as one that was not, wherever a program gives the same numbers twice (a CPU does, a GPU may not).
What is on disk is complete or absent, never half.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from stare_jax import (
  batching,
  checkpoint,
  dataset,
  evaluate,
  pipeline_pairs,
  pipeline_together,
  pipeline_updates,
  policies,
  processes,
  report,
  report_suites,
  sharding,
  sims,
  stages,
  suites,
  train,
)
from stare_jax.config import PHASES, ConfigError
from stare_jax.episode import Episode
from stare_jax.pipeline_check import IDENTITY_SKIPS, check
from stare_jax.pipeline_interaction import interaction
from stare_jax.pipeline_run import (
  Run,
  advance_until,
  check_saved,
  checkpoint_dir,
  finished,
  gather,
  minibatch,
  read_statistics,
  starting_folder,
  starting_params,
  step,
)
from stare_jax.rollout import ExpertActor, Start, Stop

__all__ = ["USER_ERRORS", "Stop", "run"]

log = logging.getLogger("stare_jax")
# What a user's input, disk or simulator can cause: the message is the answer, a traceback would only hide it.
USER_ERRORS = (ConfigError, checkpoint.CheckpointError, dataset.DatasetError, sims.SimulatorError, train.NonFiniteError,
               processes.ProcessError, ValueError, OSError)  # fmt: skip


def demonstrations(run: Run) -> list[Episode]:
  """Successful episodes of the task's scripted expert."""
  c = run.config.imitation
  starts = [Start(seed) for seed in run.seeds("demonstrations", c.demonstrations)]
  fields = {k: v for k, v in run.identity("imitation").items() if k.startswith(("task", "seed", "sim."))}
  fields |= {"demonstrations": c.demonstrations, "noise": c.expert_noise}
  actor = lambda: ExpertActor(run.task, c.expert_noise, run.config.seed)
  found = gather(run, "demonstrations", starts, actor, fields)
  kept = [episode for episode in found if episode.terminated]
  if not kept:
    raise ConfigError(f"none of {len(found)} demonstrations of {run.task.name} succeeded; lower imitation.expert_noise "
                      f"(now {c.expert_noise}) or raise sim.horizon (now {run.config.sim.horizon})")
  log.info("demonstrations: kept the %d of %d that succeeded", len(kept), len(found))
  return kept


def check_demonstrations(steps: int, c: Any, shards: int) -> None:
  """A batch holds all steps where there are fewer; raises ConfigError where those cannot be cut as it would be."""
  if steps >= c.batch:
    return
  parts = c.micro_batches * shards
  if steps % parts:
    raise ConfigError(f"imitation.batch = {c.batch}, and {steps} steps were demonstrated, which do not divide into "
                      f"{parts} parts: "
                      + (f"choose a batch of {steps // parts * parts}, or " if steps >= parts else "choose ")
                      + f"more imitation.demonstrations (now {c.demonstrations})")
  log.info("imitation: batches of all %d demonstrated steps, not of imitation.batch = %d", steps, c.batch)


def imitation(run: Run) -> Any:
  """SFT on demonstrations (METHOD: Imitation)."""
  c = run.config.imitation
  episodes = demonstrations(run)
  actions = np.concatenate([episode.actions for episode in episodes])
  run.use_statistics(run.folder_statistics or policies.ActionStats.from_actions(actions))
  images = batching.Rows([episode.images for episode in episodes])  # all of them need not fit into memory
  check_demonstrations(len(images), c, sharding.batch_shards(run.mesh))
  tokens = run.policy.tokenize(actions)
  tx, update = pipeline_updates.imitation(run.policy, c, run.mesh, run.param_axes)
  trained = dict(mesh=run.mesh, param_axes=run.param_axes, trainable=run.policy.trainable)
  init = functools.partial(starting_params, run, "imitation")
  state = train.new_state(init(), tx, **trained)

  def batch(i):
    rows = run.mine(minibatch(len(images), c.batch, i, run.config.seed))
    return {"obs": run.obs(images[rows]), "tokens": tokens[rows]}

  batches = batching.Ahead(batch, c.updates)
  advance = lambda state, i: step(run, update, state, batches(i))
  state = advance_until(run, "imitation", state, advance, total=c.updates, every=c.checkpoint_every,
                        unit="update", show=("loss", "accuracy"))  # fmt: skip
  return state.params


def preference(run: Run) -> Any:
  """TPO or StA-TPO on same-start pairs of the starting policy's own rollouts (METHOD: Preference).

  The starting policy is the reference, and what it recorded while it acted are the reference log-probabilities.
  """
  c = run.config.preference
  params = starting_params(run, "preference")
  staged, pairs = pipeline_pairs.collect(run, params)
  reference = [item.episode.log_prob for item in staged]
  tx, update = pipeline_updates.preference(run.policy, c, run.mesh, run.param_axes)
  trained = dict(mesh=run.mesh, param_axes=run.param_axes, trainable=run.policy.trainable)
  state = train.new_state(params, tx, **trained)
  del params  # the state has its own

  def batch(i):
    rows = minibatch(len(pairs), c.batch, i, run.config.seed)
    b = batching.pad_pairs(staged, [pairs[r] for r in rows], reference, buckets=c.buckets, batch_size=c.batch)
    b, length = b._replace(**{name: run.mine(x) for name, x in b._asdict().items()}), b.tokens.shape[1]
    images = batching.pad_images(staged, b.episode, length)
    flat = run.obs(images.reshape(-1, *images.shape[2:]))
    obs = jax.tree.map(lambda x: x.reshape(*images.shape[:2], *x.shape[1:]), flat)
    data = {"stage_id": b.stage_id, "cost": b.cost, "sign": b.sign, "overall": b.overall}
    return train.PreferenceBatch(obs, b.tokens, b.stage_id >= 0, b.ref_log_prob, data)

  batches = batching.Ahead(batch, c.updates)
  advance = lambda state, i: step(run, update, state, batches(i))
  state = advance_until(run, "preference", state, advance, total=c.updates, every=c.checkpoint_every,
                        unit="update", show=("loss", "accuracy"))  # fmt: skip
  return state.params


# --- evaluation and the run -------------------------------------------------------------------------------------


def evaluation_starts(task: Any, episodes: int, seed: int) -> list[Start]:
  """The published starts of a task, over and over with other samples; of a task without any, seeds from `seed` on."""
  if task.starts is None:
    return [Start(seed + i) for i in range(episodes)]
  return [Start(i % task.starts, i // task.starts) for i in range(episodes)]


def evaluation_fields(run: Run, sha256: str, suite: suites.Suite | None, block: int, show: int) -> dict[str, Any]:
  """What decides an evaluation: results of other values are not these. `sha256` is the parameters'."""
  c = run.config
  fields = {
    "params": sha256, "task": run.task.name, "seed": c.seed, "evaluation": c.evaluation,
    "policy": {k: v for k, v in c.policy.items() if k not in ("checkpoint", "options")},  # `params` is of its file
    "options": {k: v for k, v in c.policy.options.items() if k != "remat"},
    "stats": {name: np.asarray(value).tolist() for name, value in run.stats._asdict().items()},
    "sim": {k: v for k, v in c.sim.items() if f"sim.{k}" not in IDENTITY_SKIPS},
    "offset": c.interaction.offset, "videos": c.report.videos, "pictures": show,
  }  # fmt: skip
  if suite is not None or block:
    fields |= {"suite": suites.fields(suite, run.task), "block": block}
  return fields


def evaluation(
  run: Run, label: str, params: Any, *, suite: suites.Suite | None = None, block: int = 0, show: int = 0,
  sha256: str = "", actor: Any = None,
) -> dict:  # fmt: skip
  """Roll the policy out on the evaluation seeds, unless evaluations/<label>.json has it of these very parameters.

  Args:
    suite: what the episodes have that training's have not; None: nothing.
    block: how many times `evaluation.episodes` starts are left to other evaluations before these begin.
    show: how many episodes' first pictures go to pictures/<label>.jpg.
    sha256, actor: of these parameters, from a caller that has them already.
  """
  c = run.config.evaluation
  fields = evaluation_fields(run, sha256 or run.base.sha256(run.policy, params), suite, block, show)
  digest = checkpoint.config_digest(fields)
  if found := pipeline_together.evaluated(run.workdir / "evaluations" / f"{label}.json", digest):
    return found
  began = time.monotonic()
  starts = evaluation_starts(run.task, (block + 1) * c.episodes, c.seed)[block * c.episodes :]
  with pipeline_together.episodes_bar(f"{label} evaluation", len(pipeline_together.share(starts))) as bar:
    actor = actor or run.actor(params, "evaluation", c.temperature)
    collector = run.collector(actor, progress=bar, stop_on_success=False)
    with run.changed(suite, actor):
      episodes, images = pipeline_together.episodes(collector, starts)
  staged = stages.annotate(run.task, episodes, offset=run.config.interaction.offset)
  names = [stage.name for stage in run.task.stages]
  result = evaluate.summarise(
    staged, label=label, stage_names=names, temperature=c.temperature, seconds=time.monotonic() - began
  )
  picked = evaluate.pick_samples(staged, run.config.report.videos)
  frames = images([*picked, *range(min(show, len(staged)))])
  result |= {"simulator": run.config.sim.name, "digest": digest}
  if label in PHASES:
    result["after"] = checkpoint.latest(checkpoint_dir(run, label))  # updates, or iterations
  if not processes.first():
    return result
  if show:
    told = [actor.told(start) for start in starts[:show]]
    result["told"] = told
    report_suites.write_strip(run.workdir, label, [frames[i] for i in range(len(told))], suite.shown if suite else (0,))
  report.clear_samples(run.workdir, label)
  for index, i in enumerate(picked):
    item = staged[i]
    report.write_sample(
      run.workdir, label=label, index=index, frames=frames[i], fps=run.task.control_hz / 2,
      task=run.task.name, seed=item.episode.seed, success=bool(item.episode.success[1:].any()), stages=names,
      stage_id=item.stage_id, completed_at=item.completed_at, potential=item.potential,
      instruction=actor.told(starts[i]),
    )  # fmt: skip
  report.write_evaluation(run.workdir, result)
  return result


PHASE_FUNCTIONS = {"imitation": imitation, "preference": preference, "interaction": interaction}


def run(
  config: Any, workdir: str | os.PathLike, *, command: str = "", stop: Callable[[], bool] = lambda: False
) -> dict:
  """Run the phases of `config` in `workdir`, resuming whatever is there; returns the summary.

  Raises:
    ConfigError, CheckpointError, DatasetError, SimulatorError: bad input; nothing was overwritten.
    NonFiniteError: an update was refused; the last checkpoint is intact.
    Stop: `stop()` became true; a checkpoint was written, and the same command continues from it.
  """
  check(config, workdir)
  this = Run(config, workdir, stop=stop)
  open_folder(this)
  began = time.monotonic()
  try:
    for phase in config.phases:
      if (params := finished(this, phase)) is None:
        params = PHASE_FUNCTIONS[phase](this)
      this.results[phase] = evaluation(this, phase, params)
      success = this.results[phase]["success_once"]
      log.info("%s: success %.1f %% [%.1f, %.1f] over %d episodes", phase, 100 * success["rate"],
                   100 * success["low"], 100 * success["high"], success["n"])  # fmt: skip
      summary = summarise(this, params, command, time.monotonic() - began)
      if processes.first():
        report.write_summary(this.workdir, summary)
        report.build_report(this.workdir)
      del params  # or they would lie beside the next phase's
  except Stop:
    if processes.first() and any((this.workdir / "evaluations").glob("*.json")):  # the curves go on after the last one
      report.build_report(this.workdir)
    raise
  finally:
    this.close()
  return summary


def open_folder(run: Run) -> None:
  """Refuses what this run cannot go on with, before anything is written or simulated; then config.json."""
  last = PHASES.index(run.config.phases[-1])
  for phase in PHASES[: last + 1]:
    check_saved(run, phase)
  starting_folder(run, run.config.phases[0])
  for phase in PHASES:  # what earlier launches did belongs to the summary too
    if checkpoint.latest(folder := checkpoint_dir(run, phase)) is not None:
      meta = checkpoint.read_meta(folder)
      run.env_steps[phase], run.seconds[phase] = meta["env_steps"], meta["seconds"]
      for name, (seconds, steps) in meta.get("rollouts", {}).items():
        run.seconds[name], run.env_steps[name] = seconds, steps
    path = run.workdir / "evaluations" / f"{phase}.json"
    if phase not in run.config.phases and path.exists():  # the others' are looked at anew
      run.results[phase] = report.read_json(path)
  if run.config.init_from:
    read_statistics(pathlib.Path(run.config.init_from))
  summary = run.workdir / "summary.json"
  if summary.exists():
    earlier = report.read_json(summary)
    run.earlier_events, run.earlier_simulator = earlier.get("simulator_events", []), earlier.get("simulator", {})
    for name in earlier.get("env_steps", {}):  # rollouts of a checkpoint that does not say them
      run.env_steps.setdefault(name, earlier["env_steps"][name])
      run.seconds.setdefault(name, earlier["wall_seconds"][name])
  if processes.first():
    report.write_json(run.workdir / "config.json", json.loads(run.config.to_json_best_effort()))


def summarise(run: Run, params: Any, command: str, seconds: float) -> dict:
  """What summary.json holds."""
  versions = {}
  for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "mani_skill", "sapien", "torch"):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # the last three may be another Python's
      versions[name] = importlib.metadata.version(name)
  return {
    "task": run.task.name, "method": run.config.get("method", "ipi"), "preset": run.config.preset,
    "seed": run.config.seed,
    "phases": {phase: run.results[phase] for phase in PHASES if phase in run.results},
    "params_sha256": run.base.sha256(run.policy, params), "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "config": json.loads(run.config.to_json_best_effort()),
    "versions": versions | {"python": platform.python_version()},
    "wall_seconds": run.seconds | {"this launch": seconds}, "env_steps": run.env_steps, "command": command,
    "hardware": {"platform": jax.default_backend(), "devices": jax.device_count(), "processes": processes.count(),
                 "cores": os.cpu_count(),
                 "machine": platform.machine(), "device_kind": jax.devices()[0].device_kind},
    "simulator": run.earlier_simulator | run.simulator, "simulator_events": list(run.events),
  }  # fmt: skip
