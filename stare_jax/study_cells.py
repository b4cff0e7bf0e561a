"""The cells of a study: what each runs, where, and how far it is."""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import functools
import os
import pathlib
import shlex
import shutil
from collections.abc import Sequence
from typing import Any

from stare_jax import pipeline_check, report, tasks
from stare_jax.config import ConfigError, suggest

START = "sft"  # the method whose run the others start from


@dataclasses.dataclass(frozen=True, eq=False)
class Cell:
  """One run.

  Attributes:
    folder: its --workdir.
    command: what is started, beginning with "python".
    phases: that it trains, in order.
    total: updates or iterations of the last of them.
    needs: the cell whose checkpoint it starts from; None for that one.
    rollouts: (field, value)s that, with that checkpoint, decide the rollouts of its Preference; () where it has none.
  """

  task: str
  method: str
  seed: int
  folder: pathlib.Path
  command: tuple[str, ...]
  phases: tuple[str, ...]
  total: int
  needs: Cell | None
  rollouts: tuple = ()

  def __str__(self) -> str:
    return f"{self.task} {self.method} seed {self.seed}"

  @property
  def lock(self) -> pathlib.Path:
    return self.folder / ".running"

  def busy(self) -> bool:
    """Whether a process runs it, whoever started that."""
    if not self.lock.exists():
      return False
    with open(self.lock, "w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
      except BlockingIOError:
        return True
    return False

  def finished(self) -> bool:
    """Whether this command came to its end, wherever the folder was then: its last phase is whole and evaluated."""
    path, phase = self.folder / "summary.json", self.phases[-1]
    if not path.exists() or self.busy():
      return False
    summary = report.read_json(path)
    rows = [row["step"] for row in report.read_metrics(self.folder / "metrics.jsonl") if row["phase"] == phase]
    whole = bool(rows) and rows[-1] == self.total
    return whole and phase in summary["phases"] and not self.of_others()

  def of_others(self) -> bool:
    """Whether what lies in the folder came from another command."""
    path = self.folder / "summary.json"
    return path.exists() and said(shlex.split(report.read_json(path)["command"])) != said(self.command)

  def adopt(self, cells: Sequence[Cell]) -> None:
    """Takes over the rollouts of a finished cell that would be the same here, file by file, with what they cost."""
    mine = self.folder / "data" / "preference"
    for other in cells if self.rollouts and not mine.exists() else ():
      theirs = other.folder / "data" / "preference"
      if (other.needs, other.rollouts) == (self.needs, self.rollouts) and theirs.is_dir() and other.finished():
        partial = mine.with_name(".preference.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for path in theirs.glob("*.episodes"):  # nothing writes into one that is there
          link(path, partial / path.name)
        partial.rename(mine)
        return

  @property
  def env_steps(self) -> int:
    """Environment steps after its start, of rollouts for pairs and of Interaction."""
    return self.steps_of("preference rollouts", "interaction")

  def steps_of(self, *names: str) -> int:
    steps = report.read_json(self.folder / "summary.json")["env_steps"]
    return sum(steps.get(name, 0) for name in names)

  def evaluation(self) -> dict | None:
    """evaluations/<the last phase>.json, if it is there."""
    path = self.folder / "evaluations" / f"{self.phases[-1]}.json"
    return report.read_json(path) if path.exists() else None

  def result(self) -> str:
    success = (self.evaluation() or {})["success_once"]
    return (f"success {100 * success['rate']:.1f} % [{100 * success['low']:.1f}, {100 * success['high']:.1f}] over "
            f"{success['n']} episodes")

  def progress(self) -> str:
    """Where it is, as it said last."""
    return self.last_words(1).strip() or "starting"

  def last_words(self, lines: int = 5) -> str:
    path = self.folder / "log.txt"
    said = [line for line in path.read_text(errors="replace").splitlines() if any(c.isalpha() for c in line)]
    return "\n".join(f"  {line}" for line in said[-lines:])


def link(path: pathlib.Path, to: pathlib.Path) -> None:
  """A second name of a file, or a copy where the file system has no such thing."""
  try:
    os.link(path, to)
  except OSError:
    shutil.copyfile(path, to)


def said(command: Sequence[str]) -> list[str]:
  """What a command asks for; the paths in it may have been spelled or mounted otherwise."""
  return [part for part in command if not part.startswith(("--workdir=", "--config.init_from="))]


def make(c: Any, workdir: pathlib.Path, base: Any) -> list[Cell]:
  """All cells of the study `c`, in the order in which they are started; `base` is the module with `get_config`.

  Raises: ConfigError for a cell that could not run.
  """
  cells = []
  if len({*c.seeds}) != len(c.seeds):
    raise ConfigError(f"seeds = {tuple(c.seeds)}: expected each of them once")
  for seed in c.seeds:
    for task in c.tasks:
      start = make_cell(c, workdir, base, task, START, seed, None)
      cells += [start, *(make_cell(c, workdir, base, task, m, seed, start) for m in c.methods if m != START)]
  if not cells:
    raise ConfigError(f"tasks = {c.tasks} and seeds = {c.seeds}: name at least one of each")
  for pair in c.compare:
    if pair.count(":") != 1:
      raise ConfigError(f'compare names "{pair}": expected two methods, such as "ppo_clean:sta_ppo"')
    for method in pair.split(":"):
      if method not in getattr(base, "METHODS", (method,)):
        raise ConfigError(f'compare names "{pair}", and there is no method "{method}": '
                          f"{suggest(method, tuple(base.METHODS))}")  # fmt: skip
  return cells


def make_cell(c: Any, workdir: pathlib.Path, base: Any, task: str, method: str, seed: int, start: Cell | None) -> Cell:
  """Checked as `stare_jax.main` would check it."""
  argument = f"{c.preset},method={method},task={task},seed={seed}"
  config = base.get_config(argument)
  folder = workdir / task / method / f"seed{seed}"
  phases = tuple(config.phases) if start is None else tuple(p for p in config.phases if p != "imitation")
  fields: dict[str, Any] = dict(changed(c.changes, task))
  for field, value in (("interaction.iterations", c.interaction.iterations),
                       ("evaluation.episodes", c.evaluation.episodes)):  # fmt: skip
    fields |= {field: str(value)} if value else {}
  if start is not None:
    fields |= {"phases": repr(phases), "init_from": str(start.folder / "checkpoints" / "imitation")}
  try:
    config.update_from_flattened_dict({name: read(text, config, name) for name, text in fields.items()})
    pipeline_check.check_config(config)
  except (ConfigError, KeyError, AttributeError, TypeError) as error:
    raise ConfigError(f"the cell {task} {method} seed {seed} cannot run: {error}") from error
  section = config[phases[-1]]
  total = section.iterations if phases[-1] == "interaction" else section.updates
  command = ("python", "-m", "stare_jax.main", f"--config={c.base}:{argument}", f"--workdir={folder}",
             *(f"--config.{name}={text}" for name, text in fields.items()))  # fmt: skip
  return Cell(task, method, seed, folder, command, phases, total, start, rollouts_of(config))


def changed(changes: Sequence[str], task: str) -> list[tuple[str, str]]:
  """(field, text)s that hold for a task: of "field=value" for all, and of "task:field=value".

  Raises: ConfigError.
  """
  out = []
  for change in changes:
    name, equals, value = change.partition("=")
    where, _, field = name.rpartition(":")
    if not equals:
      raise ConfigError(f'changes names "{change}": expected a field and its value, such as "preference.starts=80", or '
                        f'"{task}:preference.starts=80" for one task')  # fmt: skip
    if where and where not in tasks.names():
      raise ConfigError(f'changes names "{change}", and there is no task "{where}": {suggest(where, tasks.names())}')
    if where in ("", task):
      out.append((field, value))
  return out


def rollouts_of(config: Any) -> tuple:
  """`Cell.rollouts` of a cell's configuration."""
  if "preference" not in config.phases:
    return ()
  skipped = (*pipeline_check.IDENTITY_SKIPS, "preference.", "interaction.")
  kept = {f"preference.{name}" for name in pipeline_check.ROLLOUTS}
  fields = dotted(pipeline_check.resolved(config))
  return tuple((k, repr(v)) for k, v in sorted(fields.items()) if k in kept or not k.startswith(skipped))


def read(text: str, config: Any, name: str) -> Any:
  """A field's value from its text, as a flag would be read. Raises: ConfigError for an unknown field or a bad value."""
  fields = dotted(config)
  if name not in fields:
    raise ConfigError(f'unknown field "{name}": {suggest(name, tuple(fields))}')
  *sections, field = name.split(".")
  kind = functools.reduce(getattr, sections, config).get_type(field)  # of a field that is left open, too
  if kind is str:
    return text
  try:
    return ast.literal_eval(text)
  except (SyntaxError, ValueError):
    raise ConfigError(f'{name}="{text}": expected a {kind.__name__}') from None


def dotted(config: Any, prefix: str = "") -> dict[str, Any]:
  """{"preference.starts": 160, ...}: every field of a configuration under its dotted name."""
  out: dict[str, Any] = {}
  for name, value in config.items():
    out |= dotted(value, f"{prefix}{name}.") if hasattr(value, "items") else {f"{prefix}{name}": value}
  return out
