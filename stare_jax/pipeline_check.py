"""What can be checked of a run before anything heavy is loaded: its configuration, its names, its folder."""

from __future__ import annotations

import os
import pathlib
import tempfile
from typing import Any

from stare_jax import losses, sims, suites, tasks
from stare_jax.config import LEFT_OPEN, ConfigError, suggest, validate
from stare_jax.sims import pool

TRAINING = 2**24  # the first environment seed that training may take (`pipeline_run.Run.seeds`)
# Fields that no parameter depends on, or that a run may change as it goes on (`pipeline_run.Run.identity`). The last
# two lines say where an update is computed and in how much memory: they change rounding alone, and a run that found
# too little memory, or other devices, goes on with others.
IDENTITY_SKIPS = (
  "phases", "preset", "method", "evaluation.", "report.", "checkpoint.", "sim.timeout", "sim.num_workers", "sim.python",
  "imitation.checkpoint_every", "preference.checkpoint_every", "interaction.checkpoint_every", "interaction.iterations",
  "mesh.", "policy.options.remat", "policy.options.attention",
  "imitation.micro_batches", "preference.micro_batch", "interaction.micro_batches",
)  # fmt: skip
# Of `preference`: what its rollouts depend on, beside the policy that makes them. The rest says how they are compared.
ROLLOUTS = ("starts", "samples", "temperature", "parts_before", "tail")


def resolved(config: Any) -> Any:
  """The configuration with what it leaves to the task filled in: what a run does, and what its folder records.

  `sim.name` = "maniskill" becomes the task's own simulator, `sim.horizon` = 0 the task's horizon, `interaction.steps` =
  0 the horizon, and `preference.buckets` = () the one bucket that holds every part of an episode that is compared. What
  `policy.options` leaves open is not there any more: its checkpoint or its size says it.
  Published starts count alike: `evaluation.episodes` above their number becomes the next multiple of it, or, without
  samples to tell the copies apart (temperature 0), their number.
  """
  if config.task not in tasks.names():  # `check` says so
    return config
  config = config.copy_and_resolve_references()
  with config.unlocked():
    task = tasks.get(config.task)
    config.sim.name = task.simulator if config.sim.name == "maniskill" else config.sim.name
    config.sim.horizon = config.sim.horizon or task.horizon
    config.interaction.steps = config.interaction.steps or config.sim.horizon
    if task.starts and config.evaluation.episodes > task.starts:
      times = -(-config.evaluation.episodes // task.starts) if config.evaluation.temperature > 0 else 1
      config.evaluation.episodes = task.starts * times
    longest = config.preference.tail or config.sim.horizon
    config.preference.buckets = tuple(config.preference.buckets) or (longest,)
    options = config.policy.options
    for name in [name for name in LEFT_OPEN if name in options and options[name] is None]:
      del options[name]
  return config


def check(config: Any, workdir: str | os.PathLike) -> None:
  """Raises ConfigError where this configuration cannot run, or not in this folder. Imports no jax.

  The folder is made if it is not there yet, once nothing is wrong with the configuration.
  """
  check_config(config)
  workdir = pathlib.Path(workdir)
  if "suites" in config and not (config.init_from or config.policy.checkpoint or (workdir / "checkpoints").exists()):
    raise ConfigError("nothing to evaluate: name a run, as in --config=configs/eval.py:run=runs/NAME, or a public "
                      "checkpoint with --config.policy.checkpoint=FOLDER and --config.policy.unnorm_key=DATASET")
  check_folder(workdir)


def check_config(config: Any) -> None:
  """The first half of `check`, which touches no disk."""
  config = check_fields(config)
  names = [stage.name for stage in tasks.get(config.task).stages]
  if config.interaction.reward == "levels" and "interaction" in config.phases and "Grasp" not in names:
    raise ConfigError(f'interaction.reward = "levels" (of the method rl4vla_faithful) pays for grasping, and '
                      f"{config.task} goes {' -> '.join(names)}: choose a task with a Grasp stage, or another reward")
  check_simulator(config)
  check_evaluation(config)
  for phase in ("imitation", "preference"):
    if (name := config[phase].loss) not in losses.names(phase):
      raise ConfigError(f'unknown loss {phase}.loss = "{name}": {suggest(name, losses.names(phase))}')


def check_fields(config: Any) -> Any:
  """`resolved`, or a ConfigError for fields that no run could have, on whatever machine."""
  if "policy" not in config:
    raise ConfigError("this configuration is not one of a run: give one such as configs/ipi.py")
  config = resolved(config)
  validate(config, tasks.names)
  return config


def check_batches(config: Any, shards: int) -> None:
  """Raises ConfigError where not every device gets the same share of every batch; shards: mesh.data x mesh.fsdp."""
  c = config
  if "suites" in c:  # nothing is trained
    return
  fields = {
    "imitation.batch": c.imitation.micro_batches, "preference.batch": 1, "preference.micro_batch": 1,
    "interaction.batch": c.interaction.micro_batches,
  }  # fmt: skip
  for field, parts in fields.items():
    section, key = field.split(".")
    if section in c.phases and c[section][key] % (parts * shards):
      raise ConfigError(f"{field} = {c[section][key]} does not divide over {shards} devices (mesh.data x mesh.fsdp) "
                        f"x {parts} micro-batches: choose a multiple of {parts * shards}, or another --config.mesh")


def check_evaluation(config: Any) -> None:
  """Raises ConfigError where suites cannot be run, or an evaluation would count a start twice or one of training."""
  c, seeds = config.evaluation, 1
  if "suites" in config:
    chosen_suites(config)
    seeds = config.suites.seeds
    if seeds < 1 or config.suites.pictures < 0:
      raise ConfigError(f"suites.seeds = {seeds} and suites.pictures = {config.suites.pictures}: expected at least 1 "
                        f"and 0")
  starts, last = tasks.get(config.task).starts, c.seed + c.episodes * seeds
  if starts is None and not (0 <= c.seed and last <= TRAINING):
    raise ConfigError(f"evaluation.seed = {c.seed} with evaluation.episodes = {c.episodes}, {seeds} times, takes "
                      f"environment seeds {c.seed} to {last - 1}: expected 0 to {TRAINING - 1}, because those from "
                      f"{TRAINING} on are of training; choose a seed such as 1000000, or fewer episodes")
  if starts is not None and not c.temperature > 0 and c.episodes * seeds > starts:
    raise ConfigError(f"evaluation.temperature = {c.temperature} and suites.seeds = {seeds}: {config.task} has "
                      f"{starts} published starts, and without sampling the {c.episodes * seeds} episodes would be "
                      f"copies; choose suites.seeds = {max(starts // c.episodes, 1)}, or a temperature above 0")


def check_simulator(config: Any) -> None:
  """Raises ConfigError where a simulator does not have the task, or its interpreter is not there."""
  sims.resolve(config.sim.name)
  own = tasks.get(config.task).simulator
  if config.sim.name not in ("toy", own):
    there = tasks.names(config.sim.name)
    raise ConfigError(f'task "{config.task}" is not in the simulator sim.name = "{config.sim.name}" but in "{own}": '
                      f"leave sim.name out, or choose a task of {config.sim.name}: {', '.join(there)}")
  if config.sim.get("python"):
    try:
      pool.interpreter(config.sim.python)
    except sims.SimulatorError as error:
      raise ConfigError(str(error)) from error
  elif config.sim.name == "simpler":
    raise ConfigError(f'task "{config.task}" runs in SimplerEnv\'s own package, which cannot live beside the '
                      f"learner's: name an interpreter that has it with --config.sim.python=FOLDER/bin/python; "
                      f"docs/simpler_env.md says how to make one")


def chosen_suites(config: Any) -> list[tuple[suites.Suite, str]]:
  """(suite, why it cannot be run here or "") of a configuration. One asked for by name that cannot is an error."""
  try:
    wanted, named = suites.choose(tuple(config.suites.names))
  except ValueError as error:
    raise ConfigError(f"suites.names = {tuple(config.suites.names)}: {error}") from error
  task, simulator = tasks.get(config.task), resolved(config).sim.name
  found = [(suite, suites.why_not(suite, task, simulator)) for suite in wanted]
  for suite, why in found:
    if why and suite.name in named:
      raise ConfigError(f'suites.names asks for "{suite.name}": {why}; leave it out, or ask for "all" to run the rest')
  return found


def check_folder(workdir: pathlib.Path) -> None:
  """Makes the run folder and tries to write into it; leaves nothing behind."""
  if workdir.exists() and not workdir.is_dir():
    raise ConfigError(f"--workdir={workdir} is a file: name a folder, which may be a new one")
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=workdir).close()
  except OSError as error:
    raise ConfigError(f"--workdir={workdir} cannot be written ({error.strerror or error}): choose a folder on a disk "
                      f"with space where you may write, with --workdir=DIR") from error
