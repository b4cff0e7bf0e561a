"""A run that is killed anywhere and started again ends as one that was not, bit for bit; a stopped one does too."""

from __future__ import annotations

import json
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from stare_jax import checkpoint, main
from tests import toy_run

pytestmark = pytest.mark.multiprocess


def rows(workdir: pathlib.Path, phase: str) -> int:
  """Complete rows of a phase in metrics.jsonl."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return sum(json.loads(line)["phase"] == phase for line in lines)


class Launch:
  """The front door in the background; its output goes to a file, so that a full pipe cannot stop it."""

  def __init__(self, workdir: pathlib.Path, env: dict[str, str], *flags: str):
    self.log = workdir.with_name(f"{workdir.name}.log")
    with self.log.open("ab") as out:
      self.process = subprocess.Popen(
        toy_run.command(workdir, *flags), cwd=toy_run.ROOT, env=env, stdout=out, stderr=subprocess.STDOUT
      )

  def wait_for(self, condition: Callable[[], bool]) -> bool:
    """False if the run ended before the condition held."""
    while not condition():
      if self.process.poll() is not None:
        return False
      time.sleep(0.002)
    return True

  def signal(self, number: int) -> int:
    self.process.send_signal(number)
    return self.process.wait()


def finish(workdir: pathlib.Path, env: dict[str, str], *flags: str) -> str:
  done = toy_run.launch(workdir, env, *flags)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stderr


POINTS: dict[str, Callable[[pathlib.Path], bool]] = {
  "demonstrations": lambda at: (at / "config.json").exists(),
  "first updates": lambda at: rows(at, "imitation") >= 1,
  "imitation": lambda at: rows(at, "imitation") >= 3,
  "imitation evaluation": lambda at: (at / "checkpoints/imitation/00000006").exists(),
  "preference rollouts": lambda at: (at / "evaluations/imitation.json").exists(),
  "pairs": lambda at: (at / "data/preference/pairs.json").exists(),
  "preference": lambda at: rows(at, "preference") >= 3,
  "interaction": lambda at: rows(at, "interaction") >= 3,
  "writing a checkpoint": lambda at: any((at / "checkpoints").glob("interaction/.tmp-*")),
  "evaluation": lambda at: (at / "checkpoints/interaction/00000004").exists(),
}


def kill_at(point: str, workdir: pathlib.Path, env: dict[str, str]) -> None:
  launch = Launch(workdir, env)
  assert launch.wait_for(lambda: POINTS[point](workdir)), launch.log.read_text()
  assert launch.signal(signal.SIGKILL) == -signal.SIGKILL


def test_killed_in_every_phase(tmp_path, toy_environment, uninterrupted):
  workdir = tmp_path / "run"
  for point in ("imitation", "preference", "interaction"):
    kill_at(point, workdir, toy_environment)
  finish(workdir, toy_environment)
  assert toy_run.results(workdir) == toy_run.results(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_once(tmp_path, toy_environment, uninterrupted, point):
  workdir = tmp_path / "run"
  kill_at(point, workdir, toy_environment)
  finish(workdir, toy_environment)
  assert toy_run.results(workdir) == toy_run.results(uninterrupted)


def test_sigterm_writes_a_checkpoint_and_ends_with_a_status_of_its_own(tmp_path, toy_environment, uninterrupted):
  assert main.STOPPED == 75  # launch/ and whoever else starts runs go by the number
  workdir = tmp_path / "run"
  launch = Launch(workdir, toy_environment)
  assert launch.wait_for(lambda: rows(workdir, "imitation") >= 1), launch.log.read_text()
  assert launch.signal(signal.SIGTERM) == main.STOPPED, launch.log.read_text()
  assert "stopped on SIGTERM" in launch.log.read_text()
  assert checkpoint.latest(workdir / "checkpoints/imitation") == rows(workdir, "imitation")
  launch = Launch(workdir, toy_environment)
  assert launch.wait_for(lambda: rows(workdir, "preference") >= 1), launch.log.read_text()
  assert launch.signal(signal.SIGTERM) == main.STOPPED
  assert (workdir / "report.html").exists()  # there is an evaluation to read
  finish(workdir, toy_environment)
  assert toy_run.results(workdir) == toy_run.results(uninterrupted)


def test_a_second_interrupt_ends_the_run_at_once(tmp_path, toy_environment):
  launch = Launch(tmp_path / "run", toy_environment)
  assert launch.wait_for(lambda: "run folder" in launch.log.read_text()), launch.log.read_text()  # nothing looks yet
  launch.process.send_signal(signal.SIGINT)
  assert launch.wait_for(lambda: "Ctrl-C ends the run at once" in launch.log.read_text())
  launch.process.send_signal(signal.SIGINT)
  assert launch.process.wait() == -signal.SIGINT, launch.log.read_text()


def test_a_run_goes_on_with_other_devices_and_less_memory(tmp_path, toy_environment, uninterrupted):
  """As one that found too little of it must: what changes then is rounding."""
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  shutil.rmtree(workdir / "checkpoints/imitation/00000006")
  said = finish(
    workdir, toy_environment | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}, "--config.mesh.fsdp=2",
    "--config.policy.options.remat=block", "--config.imitation.micro_batches=2", "--config.phases=('imitation',)",
  )  # fmt: skip
  assert "imitation: resuming after 4 of 6 updates" in said
  other, one = (toy_run.results(path)["metrics"] for path in (workdir, uninterrupted))
  key = lambda row: (row["phase"], row["step"])
  other, one = sorted(other, key=key), sorted(one, key=key)
  assert [key(row) for row in other] == [key(row) for row in one]  # those of the phases that are finished stay
  for a, b in zip(other, one):
    missing = {name for name in a if a[name] is None}  # of a stage that no episode came to
    assert missing == {name for name in b if b[name] is None}
    a, b = ({name: x for name, x in row.items() if name not in missing} for row in (a, b))
    assert a.pop("phase") == b.pop("phase") and a == pytest.approx(b, rel=1e-4, abs=1e-4), (a, b)


def contents(workdir: pathlib.Path) -> dict[str, tuple[int, int]]:
  """What a launch must leave alone: checkpoints, data, metrics and figures."""
  kept = [path for name in ("checkpoints", "data", "evaluations", "videos") for path in (workdir / name).rglob("*")]
  files = [path for path in kept if path.is_file()] + [workdir / "metrics.jsonl"]
  return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def test_a_finished_run_does_nothing_and_a_longer_one_goes_on(tmp_path, toy_environment, uninterrupted):
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  before, figures = contents(workdir), toy_run.results(workdir)
  finish(workdir, toy_environment)
  assert contents(workdir) == before
  assert toy_run.results(workdir) == figures

  shutil.rmtree(workdir / "data/demonstrations")  # of a phase that is finished nothing but its checkpoint is read
  said = finish(workdir, toy_environment, "--config.interaction.iterations=6")
  assert "resuming after 4 of 6 iterations" in said
  longer = toy_run.results(workdir)
  assert longer["metrics"][: len(figures["metrics"])] == figures["metrics"]
  assert [row["step"] for row in longer["metrics"][len(figures["metrics"]) :]] == [5, 6]
  assert longer["params_sha256"] != figures["params_sha256"]
  assert longer["evaluations"]["preference"] == figures["evaluations"]["preference"]


def test_other_phases_than_those_of_before_are_refused_at_once(tmp_path, toy_environment, uninterrupted):
  workdir = tmp_path / "run"
  shutil.copytree(uninterrupted, workdir)
  before = contents(workdir)
  done = toy_run.launch(workdir, toy_environment, "--config.phases=('imitation','interaction')")
  assert done.returncode == 2 and "started from preference" in done.stderr and "from imitation" in done.stderr
  done = toy_run.launch(workdir, toy_environment, "--config.interaction.iterations=3")
  assert done.returncode == 2 and "has 4 iterations behind it, more than the 3 asked for" in done.stderr
  assert contents(workdir) == before


def test_a_dead_worker_is_reported_and_changes_nothing(tmp_path, toy_environment, uninterrupted):
  workdir = tmp_path / "run"
  launch = Launch(workdir, toy_environment)
  assert launch.wait_for(lambda: rows(workdir, "imitation") >= 1), launch.log.read_text()
  children = pathlib.Path(f"/proc/{launch.process.pid}/task/{launch.process.pid}/children").read_text().split()
  workers = [int(pid) for pid in children if b"boot.py" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()]
  assert len(workers) == 2
  subprocess.run(["kill", "-KILL", str(workers[0])], check=True)
  assert launch.process.wait() == 0, launch.log.read_text()
  said = launch.log.read_text()
  assert f"process {workers[0]}" in said and "SIGKILL" in said and "are discarded" in said
  (event,) = json.loads((workdir / "summary.json").read_text())["simulator_events"]
  assert f"process {workers[0]}" in event
  assert toy_run.results(workdir) == toy_run.results(uninterrupted)


POISON = """
import runpy, sys
import jax.numpy as jnp
from stare_jax import losses, pipeline
kernel, step, calls = losses.get("cross_entropy"), pipeline.step, []

def poisoned(logits, tokens, valid, **hp):
  return kernel(jnp.where(jnp.any(tokens == -7), jnp.nan, logits), jnp.maximum(tokens, 0), valid, **hp)

def counted(run, update, state, batch):
  calls.append(1)
  return step(run, update, state, {**batch, "tokens": batch["tokens"] * 0 - 7} if len(calls) == 4 else batch)

losses.get, pipeline.step = lambda name: poisoned, counted
runpy.run_module("stare_jax.main", run_name="__main__", alter_sys=True)
"""


def test_a_batch_that_is_not_finite_is_refused_and_named(tmp_path, toy_environment):
  workdir = tmp_path / "run"
  flags = toy_run.command(workdir, "--config.phases=('imitation',)")[3:]
  done = subprocess.run(
    [sys.executable, "-c", POISON, *flags], cwd=toy_run.ROOT, env=toy_environment, capture_output=True, text=True
  )
  assert done.returncode == 2, done.stdout + done.stderr
  assert "NonFiniteError: update refused: loss terms not finite" in done.stderr and "loss = nan" in done.stderr
  assert "Traceback" not in done.stderr
  assert checkpoint.latest(workdir / "checkpoints/imitation") == 2 and rows(workdir, "imitation") == 3
  finish(workdir, toy_environment, "--config.phases=('imitation',)")  # without the poison it goes on from there
  assert checkpoint.latest(workdir / "checkpoints/imitation") == 6


@pytest.mark.slow
def test_a_step_that_is_far_too_long_is_refused(tmp_path, toy_environment):
  done = toy_run.launch(tmp_path / "run", toy_environment, "--config.imitation.optimiser.learning_rate=1e30")
  assert done.returncode == 2 and "NonFiniteError: update refused" in done.stderr, done.stderr
  assert "learning rate" in done.stderr
