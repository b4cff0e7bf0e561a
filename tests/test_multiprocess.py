"""Two processes are one run: the same episodes and losses as one process, one writer, one end."""

from __future__ import annotations

import json
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from stare_jax import checkpoint, dataset, main, pipeline_together, processes, sharding
from stare_jax.rollout import Start
from tests import toy_run
from tests.together import Together, environment, free_port

pytestmark = pytest.mark.multiprocess
# What another order of float32 sums may change, for losses of about 1; seen were differences of up to 2e-5.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)
# Not compared: the clock, and of the first preference update, where policy and reference are one, the sign of rounding.
TIMED = ("time", "rollout_seconds", "update_seconds", "steps_per_second")


def metrics(workdir: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def rows(workdir: pathlib.Path, phase: str) -> int:
  path = workdir / "metrics.jsonl"
  lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return sum(json.loads(line)["phase"] == phase for line in lines)


@pytest.fixture(scope="module")
def env(toy_environment: dict[str, str]) -> dict[str, str]:
  return environment(toy_environment)


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, toy_environment: dict[str, str]) -> pathlib.Path:
  """One process with two devices."""
  workdir = tmp_path_factory.mktemp("single") / "run"
  done = toy_run.launch(workdir, environment(toy_environment, devices=2))
  assert done.returncode == 0, done.stdout + done.stderr
  return workdir


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory, env: dict[str, str]) -> pathlib.Path:
  """Two processes with one device each; never to be changed: copy it."""
  workdir = tmp_path_factory.mktemp("double") / "run"
  with Together(workdir, env) as run:
    run.wait_for(lambda: all(len(run.simulators(i)) == 2 for i in range(2)))  # each has workers of its own
    assert not run.simulators(0) & run.simulators(1)
    run.finish()
    # The first one writes and speaks; of the other there is nothing to be heard.
    assert "Done. Results are in" in run.said(0) and "[process 0 of 2] run folder" in run.said(0)
    assert "compiled again" not in run.said(0)
    assert [line for line in run.said(1).splitlines() if "process 1" in line or "Done" in line] == []
  return workdir


def same_episodes(here: pathlib.Path, there: pathlib.Path) -> None:
  """Equal in everything that was decided or seen; log-probs and values to rounding."""
  files = sorted(path.name for path in here.iterdir())
  assert files == sorted(path.name for path in there.iterdir())
  for name in (name for name in files if name.endswith(".episodes")):
    (a, meta), (b, other) = dataset.open(here / name), dataset.open(there / name)
    assert len(a) == len(b) and meta["digest"] == other["digest"] and meta["fields"] == other["fields"]
    for left, right in zip(a, b, strict=True):
      assert (left.seed, left.terminated, left.instruction) == (right.seed, right.terminated, right.instruction)
      for field in ("images", "signals", "actions", "tokens"):
        np.testing.assert_array_equal(getattr(left, field), getattr(right, field))
      for field in ("log_prob", "value"):
        np.testing.assert_allclose(getattr(left, field), getattr(right, field), rtol=1e-3, atol=1e-4)


def compared(row: dict) -> dict:
  noise = ("accuracy",) if (row["phase"], row["step"]) == ("preference", 1) else ()
  return {name: x for name, x in row.items() if name not in (*TIMED, *noise, "phase")}


def same_metrics(ours: list[dict], theirs: list[dict]) -> None:
  assert [(row["phase"], row["step"]) for row in ours] == [(row["phase"], row["step"]) for row in theirs]
  for a, b in zip(ours, theirs, strict=True):
    assert a.keys() == b.keys()
    for name, x in compared(a).items():
      if x is None:  # of a stage that no episode came to
        assert b[name] is None, f"{a['phase']} {a['step']} {name}"
        continue
      np.testing.assert_allclose(x, b[name], **TOLERANCE, err_msg=f"{a['phase']} {a['step']} {name}")


def test_imitation_by_two_processes_is_that_of_one(tmp_path, toy_environment):
  """The first phase alone; the slow tests do all three."""
  only = "--config.phases=('imitation',)"
  with Together(tmp_path / "two", environment(toy_environment), only) as run:
    run.wait_for(lambda: all(len(run.simulators(i)) == 2 for i in range(2)))  # each has workers of its own
    assert not run.simulators(0) & run.simulators(1)
    run.finish()
  done = toy_run.launch(tmp_path / "one", environment(toy_environment, devices=2), only)
  assert done.returncode == 0, done.stdout + done.stderr
  two, one = tmp_path / "two", tmp_path / "one"
  same_episodes(two / "data" / "demonstrations", one / "data" / "demonstrations")
  assert len(metrics(two)) == 6
  same_metrics(metrics(two), metrics(one))
  figures = [json.loads((at / "evaluations" / "imitation.json").read_text()) for at in (two, one)]
  assert figures[0]["success_once"] == figures[1]["success_once"] and figures[0]["stages"] == figures[1]["stages"]
  assert checkpoint.steps(two / "checkpoints" / "imitation") == checkpoint.steps(one / "checkpoints" / "imitation")
  assert len(list((two / "tensorboard" / "imitation").iterdir())) == 1


def same_run(here: pathlib.Path, there: pathlib.Path) -> None:
  """The same episodes, the same metrics of every update, the same evaluations."""
  for name in ("demonstrations", "preference"):
    same_episodes(here / "data" / name, there / "data" / name)
  same_metrics(metrics(here), metrics(there))
  left, right = toy_run.results(here), toy_run.results(there)
  for name, found in left["evaluations"].items():
    other = right["evaluations"][name]
    named = lambda figures: {k: v for k, v in figures.items() if k != "digest"}  # of the parameters, to the last bit
    assert named(found) == named(other)
  assert left["videos"].keys() == right["videos"].keys() and left["env_steps"] == right["env_steps"]


@pytest.mark.slow
def test_two_processes_give_what_one_gives(double, uninterrupted):
  """All three phases, against the run of one process on one device."""
  same_run(double, uninterrupted)


@pytest.mark.slow
def test_one_process_writes(double):
  summary = json.loads((double / "summary.json").read_text())
  assert summary["hardware"]["processes"] == 2 and summary["hardware"]["devices"] == 2
  found = metrics(double)
  assert len({(row["phase"], row["step"]) for row in found}) == len(found) == 6 + 4 + 4
  for phase in ("imitation", "preference", "interaction"):
    assert len(list((double / "tensorboard" / phase).iterdir())) == 1
    steps = checkpoint.steps(double / "checkpoints" / phase)
    assert steps and not [p for p in (double / "checkpoints" / phase).iterdir() if not p.name.isdecimal()]
  left = [p.name for folder in (double, *(double / "data").iterdir()) for p in folder.iterdir() if p.name[0] == "."]
  assert left == [main.IN_USE] and (double / "report.html").exists()


@pytest.mark.slow
def test_two_processes_give_what_two_devices_give(double, single):
  same_run(double, single)


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.timeout(3600)
def test_the_smoke_preset_on_maniskill(tmp_path, toy_environment):
  """Two processes with a simulator each, against one with two devices."""
  smoke = dict(config="configs/ipi.py:smoke")
  with Together(tmp_path / "two", environment(toy_environment), **smoke) as run:
    run.finish()
  done = toy_run.launch(tmp_path / "one", environment(toy_environment, devices=2), **smoke)
  assert done.returncode == 0, done.stdout + done.stderr
  same_run(tmp_path / "two", tmp_path / "one")


@pytest.mark.slow
def test_sigterm_on_one_stops_all_at_one_update_and_any_number_continues(tmp_path, env, double, toy_environment):
  workdir = tmp_path / "run"
  with Together(workdir, env) as run:
    run.wait_for(lambda: rows(workdir, "imitation") >= 2)
    run.processes[1].send_signal(signal.SIGTERM)
    run.finish(main.STOPPED)  # all of them: a drained pod must not look finished, nor the others failed
    assert "stopped on a signal to another process" in run.said(0)
    assert checkpoint.latest(workdir / "checkpoints" / "imitation") == rows(workdir, "imitation")
  with Together(workdir, env) as run:
    run.wait_for(lambda: rows(workdir, "interaction") >= 1)
    run.processes[0].send_signal(signal.SIGTERM)
    run.finish(main.STOPPED)
    assert "stopped on SIGTERM" in run.said(0)
    assert checkpoint.latest(workdir / "checkpoints" / "interaction") == rows(workdir, "interaction")
  shutil.copytree(workdir, tmp_path / "alone")
  with Together(workdir, env) as run:
    run.finish()
  assert toy_run.results(workdir) == toy_run.results(double)  # bit for bit
  done = toy_run.launch(tmp_path / "alone", environment(toy_environment))
  assert done.returncode == 0, done.stdout + done.stderr
  same_run(tmp_path / "alone", double)


@pytest.mark.slow
def test_all_leave_a_data_set_where_one_is_asked_to_stop(tmp_path, env):
  """Else a drained pod would wait for the others' share of all episodes, and be killed meanwhile."""
  parts = lambda process: len(list((tmp_path / "run" / "data").glob(f"*/.parts-of-2/{process:05d}-*")))
  with Together(tmp_path / "run", env, "--config.imitation.demonstrations=40000") as run:
    run.wait_for(lambda: parts(0) >= 1)
    run.processes[1].send_signal(signal.SIGTERM)
    run.finish(main.STOPPED)
  assert parts(0) < 40000 / 2 / 64 / 2


def check_end(status: int, said: str, victim: int) -> None:
  """Of the process that was left alone; JAX aborts it when it is the first to miss its coordinator, process 0."""
  if victim == 0 and status == -signal.SIGABRT:
    assert "another task died" in said
  else:
    assert status == processes.GONE, said
    assert f"process {victim} of 2 is gone" in said and "same command" in said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("phase", ["imitation", "preference", "interaction"])
def test_the_others_end_when_one_is_killed(tmp_path, env, double, victim, phase):
  workdir = tmp_path / "run"
  with Together(workdir, env) as run:
    run.wait_for(lambda: rows(workdir, phase) >= 2)
    run.processes[victim].kill()
    check_end(run.processes[1 - victim].wait(timeout=60), run.said(1 - victim), victim)
  with Together(workdir, env) as run:
    run.finish()
  assert toy_run.results(workdir) == toy_run.results(double)


@pytest.mark.slow
def test_a_failure_of_one_is_told_to_the_others(tmp_path, env):
  """A wrong file in the way of one process alone."""
  workdir = tmp_path / "run"
  (workdir / "data" / "demonstrations" / ".parts-of-2" / "00001-00000.episodes").mkdir(parents=True)
  with Together(workdir, env) as run:
    assert sorted(run.wait()) == [2, 3], run.everything()
    assert "process 1 of 2 failed: " in run.said(0) and "00001-00000.episodes" in run.said(0)


@pytest.mark.slow
def test_processes_of_different_runs_are_refused(tmp_path, env):
  address = f"localhost:{free_port()}"
  command = lambda i: toy_run.command(
    tmp_path / f"run-{i}", f"--distributed={address}", "--num_processes=2", f"--process_id={i}"
  )
  pair = [subprocess.Popen(command(i), cwd=toy_run.ROOT, env=env, stderr=subprocess.PIPE, text=True) for i in range(2)]
  said = [process.communicate()[1] for process in pair]
  assert all(process.returncode for process in pair)
  assert "which all processes share" in said[1] or "a folder that all processes share" in said[1], said[1]


def exchange(folder: pathlib.Path, env: dict[str, str], *arguments: str) -> list[subprocess.Popen]:
  """tests/exchange.py in two processes."""
  address = f"localhost:{free_port()}"
  command = lambda i: [sys.executable, "-m", "tests.exchange", address, "2", str(i), str(folder), *arguments]
  streams = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return [subprocess.Popen(command(i), cwd=toy_run.ROOT, env=env, **streams) for i in range(2)]


def test_processes_exchange_values_rows_and_parameters(tmp_path, toy_environment):
  """With two devices in each."""
  pair = exchange(tmp_path, environment(toy_environment, devices=2))
  said = [process.communicate()[0] for process in pair]
  assert [process.returncode for process in pair] == [0, 0], said


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_waits_for_a_dead_one_ends(tmp_path, env, victim):
  pair = exchange(tmp_path, env, str(victim))
  while not all((tmp_path / f"waiting-{i}").exists() for i in range(2)):
    assert all(process.poll() is None for process in pair), [process.communicate()[0] for process in pair]
    time.sleep(0.01)
  pair[victim].kill()
  said, _ = pair[1 - victim].communicate(timeout=60)
  pair[victim].communicate()
  check_end(pair[1 - victim].returncode, said, victim)


def test_shares_are_put_back_in_order(monkeypatch):
  starts = [Start(seed) for seed in range(11)]
  monkeypatch.setattr(processes, "count", lambda: 3)
  parts = []
  for i in range(3):
    monkeypatch.setattr(processes, "index", lambda i=i: i)
    parts.append(list(pipeline_together.share(starts)))
  assert sorted(map(len, parts)) == [3, 4, 4] and len({*parts[0], *parts[1], *parts[2]}) == 11
  assert pipeline_together._merged(parts) == starts


def test_one_process_puts_all_rows():
  for sizes in ({"data": -1}, {"data": 2, "fsdp": 2, "tensor": 2}):
    np.testing.assert_array_equal(sharding.local_rows(16, sharding.make_mesh(sizes)), np.arange(16))


@pytest.mark.parametrize("given, expected", [
  (("off", None, None), ""),
  (("auto", None, None), ""),
  (("node1:8476", 4, 3), ""),
  (("[::1]:8476", 1, 0), ""),
  (("off", 2, 0), "go with --distributed=HOST:PORT"),
  (("auto", 2, None), "go with --distributed=HOST:PORT"),
  (("node1", 2, 0), "expected off, auto, or HOST:PORT"),
  (("node1:port", 2, 0), "expected off, auto, or HOST:PORT"),
  (("node1:8476", 2, None), "expected both"),
  (("node1:8476", 2, 2), "expected both"),
])  # fmt: skip
def test_flags_of_several_processes(given, expected):
  said = main.wrong_processes(*given)
  assert (said == "") if not expected else expected in said


def cached(folder, user_environment, code, *arguments, **more):
  """The programs in a compilation cache after a process whose CPU goes by the name of a GPU."""
  own = {name: value for name, value in user_environment.items() if not name.startswith("JAX_")}
  env = own | {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | more
  code = f"import sys, runpy, jax\njax.default_backend = lambda: 'gpu'\n{code}"
  done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=toy_run.ROOT, env=env, capture_output=True)
  assert done.returncode == 0, done.stderr.decode()
  return sorted(path.name for path in folder.glob("jit_*-cache"))


def test_compiled_programs_are_kept_for_the_next_launch(tmp_path, user_environment):
  """Wherever the folder lies then; but not where the user names another one, and not on a CPU."""
  keep = "from stare_jax import processes\nprocesses.keep_compilation_cache(sys.argv[1])"
  compute = "jax.jit(lambda x: x @ x.T + 1)(jax.numpy.ones((8, 8))).block_until_ready()"
  one, moved, other = (tmp_path / name for name in ("one", "moved", "other"))
  first = cached(one, user_environment, f"{keep}\n{compute}", str(one))
  assert any("lambda" in name for name in first)
  one.rename(moved)
  assert cached(moved, user_environment, f"{keep}\n{compute}", str(moved)) == first
  assert not cached(one, user_environment, f"jax.default_backend = lambda: 'cpu'\n{keep}\n{compute}", str(one))
  assert not cached(one, user_environment, f"{keep}\n{compute}", str(one), JAX_COMPILATION_CACHE_DIR=str(other))
  assert list(other.glob("jit_*"))


def test_a_run_keeps_its_programs(tmp_path, user_environment):
  run = "runpy.run_module('stare_jax.main', run_name='__main__', alter_sys=True)"
  flags = ["--config=tests/toy_run.py", f"--workdir={tmp_path}", "--config.phases=('imitation',)"]
  found = cached(tmp_path / "compilation_cache", user_environment, run, *flags)
  assert {name.rpartition("-")[0].rpartition("-")[0] for name in found} >= {"jit_counted", "jit_act"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_stays_with_the_process():
  """What a thread allocates a second time costs no page fault."""
  code = """
import resource, threading
from stare_jax import processes
processes.keep_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def run():
  b"x" * (256 << 20)
  before = faults()
  b"x" * (256 << 20)
  print(faults() - before)
thread = threading.Thread(target=run)
thread.start()
thread.join()
"""
  env = {**os.environ, "JAX_PLATFORMS": "cpu"}
  done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
  assert int(done.stdout) < 1000  # of 65536 pages
