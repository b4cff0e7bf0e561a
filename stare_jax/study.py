"""Methods x tasks x seeds in one folder, each cell a run of its own.

  python -m stare_jax.study --config=configs/study.py --workdir=DIR [--jobs=N] [--threads=T] [--config.field=value]
  python -m stare_jax.study --config=configs/study.py --workdir=DIR --report      tables and curves of what is there

A cell is `stare_jax.main` in DIR/<task>/<method>/seed<seed>, with its output in log.txt there. The start of a task and
seed (method sft) comes first and the other methods go on from its checkpoint. The same command again goes on: finished
cells are skipped, and one that was stopped or killed continues from its last checkpoint. Results are written whenever a
cell is finished: results.md and results.html, and at the end curves-<task>.svg and .png.

Status 0: all cells finished; 75: stopped by Ctrl-C or SIGTERM, and the same command goes on; 1: some cells failed; 2: a
mistake in the input.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import itertools
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from typing import Any, NamedTuple

from absl import app, flags
from ml_collections import config_flags

from stare_jax import report_progress, study_cells, study_report
from stare_jax.config import STOPPED, ConfigError
from stare_jax.config_command import fail, parse
from stare_jax.study_cells import Cell

FLAGS = flags.FLAGS
log = logging.getLogger("stare_jax")
LOOK, TELL = 1.0, 60.0  # seconds between two looks at the running cells, and between two lines about them


class Running(NamedTuple):
  process: subprocess.Popen
  slot: int
  began: float


class Runner:
  """Runs cells, `jobs` at a time, until none is left that can run."""

  def __init__(self, cells: list[Cell], workdir: pathlib.Path, config: Any, *, jobs: int, threads: int):
    self.cells, self.workdir, self.config, self.jobs, self.threads = cells, workdir, config, jobs, threads
    self.running: dict[Cell, Running] = {}
    self.failed: dict[Cell, str] = {}
    self.done: set[Cell] = set()
    self.stopping = False
    self.stopped: list[Cell] = []
    self.told = time.monotonic()

  def stop(self, *_: Any) -> None:
    """Ends the running cells, each with a checkpoint."""
    self.stopping = True
    self.terminate()

  def terminate(self) -> None:
    for job in self.running.values():
      job.process.terminate()

  def run(self) -> None:
    waiting = [cell for cell in self.cells if not self._finished(cell)]
    log.info("%d cells, %d of them finished before", len(self.cells), len(self.done))
    try:
      while self.running or ((waiting or self.stopped) and not self.stopping):
        waiting, self.stopped = self._start(self.stopped + waiting), []
        time.sleep(LOOK)
        self._look()
    finally:
      self.terminate()  # nothing runs on that nobody looks after

  def _finished(self, cell: Cell) -> bool:
    """As `cell.finished()`, whose files need not be read again once it is."""
    if cell not in self.done and cell.finished():
      self.done.add(cell)
    return cell in self.done

  def _start(self, waiting: list[Cell]) -> list[Cell]:
    left = []
    for cell in waiting:
      if cell.needs is not None and cell.needs in self.failed:
        self._fail(cell, f"its start, {cell.needs}, failed")
      elif self.stopping or len(self.running) >= self.jobs or not (cell.needs is None or self._finished(cell.needs)):
        left.append(cell)
      elif not self._finished(cell) and not self._launch(cell):
        left.append(cell)
    return left

  def _launch(self, cell: Cell) -> bool:
    """False where another process has the cell."""
    slot = min(set(range(self.jobs)) - {job.slot for job in self.running.values()})
    cell.folder.mkdir(parents=True, exist_ok=True)
    with open(cell.lock, "w") as lock, open(cell.folder / "log.txt", "ab") as output, cores(slot, self.threads) as env:
      try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError:
        return False
      cell.adopt(self.cells)
      process = subprocess.Popen(  # in a session of its own: Ctrl-C reaches it through `stop` alone
        [sys.executable, *cell.command[1:]], stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=env,
        start_new_session=True, pass_fds=(lock.fileno(),),  # the lock is the cell's as long as it lives
      )  # fmt: skip
    self.running[cell] = Running(process, slot, time.monotonic())
    if self.stopping:  # since it was started
      process.terminate()
    log.info("%s: started; %s", cell, cell.folder / "log.txt")
    return True

  def _look(self) -> None:
    for cell, job in list(self.running.items()):
      if job.process.poll() is None:
        continue
      del self.running[cell]
      took = report_progress.duration(time.monotonic() - job.began)
      if job.process.returncode == STOPPED and not self.stopping:
        self.stopped.append(cell)  # by somebody else: it goes on where it was
      elif self._finished(cell):
        log.info("%s: %s, after %s", cell, cell.result(), took)
        study_report.write(self.workdir, self.config, self.cells, pictures=False)
      elif not self.stopping:
        self._fail(cell, f"ended with status {job.process.returncode} after {took}\n{cell.last_words()}")
    if time.monotonic() - self.told > TELL:
      self.told = time.monotonic()
      if not self.running:
        log.info("waiting for cells that another process runs")
      for cell, job in self.running.items():
        log.info("%s: %s, for %s", cell, cell.progress(), report_progress.duration(self.told - job.began))

  def _fail(self, cell: Cell, why: str) -> None:
    self.failed[cell] = why
    log.info("%s: %s", cell, why)


@contextlib.contextmanager
def cores(slot: int, threads: int) -> Any:
  """Within, child processes get the slot's own cores (where the system can do that); gives their environment."""
  if not threads:
    yield dict(os.environ)
    return
  mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
  env = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}
  if threads == 1:
    env["LP_NUM_THREADS"] = "0"  # lavapipe: rasterise in the calling thread
  if not mine:
    yield env
    return
  os.sched_setaffinity(0, {mine[(slot * threads + i) % len(mine)] for i in range(threads)})
  try:
    yield env
  finally:
    os.sched_setaffinity(0, mine)


def load_base(path: str) -> Any:
  """The module of a config file, by its path as --config takes it."""
  spec = importlib.util.spec_from_file_location("study_base", path)
  if spec is None or spec.loader is None or not pathlib.Path(path).is_file():
    raise ConfigError(f"base = {path}: there is no such config file; start this where it is, or name another")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def main(argv: list[str]) -> None:
  logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
  log.setLevel(logging.INFO)
  if len(argv) > 1 or FLAGS.config is None or not FLAGS.workdir:
    fail("expected --config=configs/study.py --workdir=DIR and settings as flags, such as --config.seeds='(0,1)'"
         + (f"; got {argv[1:]}" if len(argv) > 1 else ""))
  config, workdir = FLAGS.config, pathlib.Path(FLAGS.workdir)
  if "base" not in config:
    fail("this configuration is not one of a study: give one such as configs/study.py")
  if workdir.exists() and not workdir.is_dir():
    fail(f"--workdir={workdir} is a file: name a folder")
  try:
    cells = study_cells.make(config, workdir, load_base(config.base))
  except (ValueError, OSError, AttributeError, KeyError, TypeError) as error:
    fail(f"{type(error).__name__}: {error}")
  runner = Runner(cells, workdir, config, jobs=FLAGS.jobs, threads=FLAGS.threads)
  if FLAGS.report and not workdir.is_dir():
    fail(f"--workdir={workdir}: there is no such folder to report on; name that of a study that was started")
  if not FLAGS.report:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
      if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
        signal.signal(number, runner.stop)
    keep_tables(workdir, [cell for cell in cells if cell.of_others()])
    runner.run()
  elif not any(cell.finished() for cell in cells) and any(workdir.glob("*/*/seed*/summary.json")):
    fail(f"{workdir} holds finished runs, but none of this study: give the settings with which it was run")
  written = study_report.write(workdir, config, cells)
  print("\n".join(["Results:", *map(str, written)]))
  if runner.failed:
    log.info("%d of %d cells failed: %s", len(runner.failed), len(cells), ", ".join(map(str, runner.failed)))
  if runner.stopping:
    log.info("stopped; the same command goes on")
  sys.exit(STOPPED if runner.stopping else 1 if runner.failed else 0)


def keep_tables(workdir: pathlib.Path, others: list[Cell]) -> None:
  """What was told of cells that were run with other settings is kept: these may refuse them, or go on with them."""
  if not others or not (workdir / "results.md").exists():
    return
  kept = next(f"results-before-{n}" for n in itertools.count(1) if not (workdir / f"results-before-{n}.md").exists())
  for kind in ("md", "html"):
    shutil.copyfile(workdir / f"results.{kind}", workdir / f"{kept}.{kind}")
  log.info("%d cells were run before with other settings (%s): the tables of before are kept in %s.md and .html",
           len(others), ", ".join(map(str, others)), kept)  # fmt: skip


def define_flags() -> None:
  """Not when this is imported: `stare_jax.main` has flags of the same names."""
  config_flags.DEFINE_config_file("config", None, "The study, such as configs/study.py.", lock_config=True)
  flags.DEFINE_string("workdir", "", "The folder of the study.")
  flags.DEFINE_integer("jobs", 1, "Cells that run side by side.", lower_bound=1)
  flags.DEFINE_integer("threads", 0, "Cores of a cell; 0: as many as it likes.", lower_bound=0)
  flags.DEFINE_bool("report", False, "Only write the results of what is there.")


if __name__ == "__main__":
  define_flags()
  app.run(main, flags_parser=parse)
