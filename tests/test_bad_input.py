"""Bad input: one message that says what to do, status 2, nothing overwritten; before anything heavy where possible."""

from __future__ import annotations

import errno
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import pytest

from stare_jax import main, pipeline, pipeline_check, sharding
from stare_jax.checkpoint import CheckpointError, ConfigMismatchError
from stare_jax.config import ConfigError
from stare_jax.dataset import DatasetError
from tests import toy_run

# --- at the front door --------------------------------------------------------------------------------------------

# The front door, which then tells what it loaded.
PROBE = """
import atexit, runpy, sys
heavy = ("jax", "torch", "mani_skill", "sapien", "orbax")
atexit.register(lambda: print("LOADED", [name for name in heavy if name in sys.modules]))
runpy.run_module("stare_jax.main", run_name="__main__", alter_sys=True)
"""

TYPOS = {
  "preset": (["--config=configs/ipi.py:smok"], ('"smok"', 'did you mean "smoke"')),
  "key": (["--config=configs/ipi.py:smoke,sed=1"], ('"sed"', 'did you mean "seed"')),
  "task": (["--config=configs/ipi.py:smoke,task=pul_cube"], ('"pul_cube"', '"pull_cube"')),
  "field": (
    ["--config=configs/ipi.py:smoke", "--config.interaction.hp.clp=0.1"],
    ("--config.interaction.hp.clp", "did you mean --config.interaction.hp.clip?"),
  ),
  "value": (["--config=configs/ipi.py:smoke", "--config.seed=many"], ("seed", "many")),
  "phase": (["--config=configs/ipi.py:smoke", "--config.phases=('imitatoin',)"], ("imitatoin", '"imitation"')),
  "batch": (["--config=configs/ipi.py:smoke", "--config.sim.num_envs=7"], ("sim.num_envs = 7", "multiple of 2")),
  "simulator": (["--config=configs/ipi.py:smoke", "--config.sim.name=maniskil"], ("'maniskil'", "maniskill")),
  "loss": (["--config=configs/ipi.py:smoke", "--config.preference.loss=stage_tp"], ('"stage_tp"', '"stage_tpo"')),
  "loss of another phase": (["--config=configs/ipi.py:smoke", "--config.preference.loss=ppo"], ('"ppo"', "stage_tpo")),
  "choice": (["--config=configs/ipi.py:smoke", "--config.interaction.critic=stat"], ('"stat"', 'did you mean "state"')),
  "critic": (["--config=configs/ipi.py:smoke", "--config.interaction.critic_hp.epochs=0"], ("critic_hp", "at least 1")),
  "method": (["--config=configs/ipi.py:smoke", "--config.method=sta_ppo"], ("--config.method", "smoke,method=sta_ppo")),
  "method, and a file behind a blank": (
    ["--config", "configs/ipi.py:smoke", "--config.method=sta_ppo"], ("--config.method", "smoke,method=sta_ppo")
  ),
  "no such file": (["--config=configs/ippi.py:smoke"], ("ippi.py is not", "did you mean --config=configs/ipi.py?")),
  "nothing to evaluate": (["--config=configs/eval.py"], ("nothing to evaluate", "configs/eval.py:run=runs/NAME")),
  "no Python file": (["--config", "README.md"], ("README.md is not a Python file",)),
  "field, and a file behind a blank": (
    ["--config", "configs/ipi.py:smoke", "--config.sed=1"], ("did you mean --config.seed?",)
  ),
  "twice": (
    ["--config=configs/ipi.py:smoke", "--config.seed=1", "--config.seed=2"], ("--config.seed is given 2 times",)
  ),
  "file": (["--config=configs/ip.py"], ("configs/ip.py",)),
  "nothing": ([], ("--config=configs/ipi.py",)),
}


@pytest.mark.parametrize("kind", TYPOS)
def test_a_typo_is_answered_before_anything_heavy_is_loaded(tmp_path, user_environment, kind):
  flags, words = TYPOS[kind]
  workdir = tmp_path / "run"
  command = [sys.executable, "-c", PROBE, f"--workdir={workdir}", *flags]
  done = subprocess.run(command, cwd=toy_run.ROOT, env=user_environment, capture_output=True, text=True)
  assert done.returncode == 2, done.stdout + done.stderr
  assert all(word in done.stderr for word in words), done.stderr
  assert "Traceback" not in done.stderr
  assert "LOADED []" in done.stdout
  assert not workdir.exists()


@pytest.mark.parametrize("program, config", [("study", "configs/study.py"), ("compile", "configs/ipi.py")])
def test_every_program_with_a_configuration_answers_alike(program, config, user_environment):
  command = [sys.executable, "-m", f"stare_jax.{program}"]
  for flags, words in (
    ([f"--config={config}", "--config.phasses=()"], "did you mean --config."),
    (["--cnfig=x"], f"Did you mean: config ?\nFor the flags: python -m stare_jax.{program} --help"),
  ):
    done = subprocess.run([*command, *flags], cwd=toy_run.ROOT, env=user_environment, capture_output=True, text=True)
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_a_mistake_found_later_is_one_message_too(tmp_path, toy_environment):
  done = toy_run.launch(tmp_path / "run", toy_environment, "--config.phases=('preference',)")
  assert done.returncode == 2, done.stdout + done.stderr
  assert "ConfigError: preference has nothing to start from" in done.stderr and "--config.init_from" in done.stderr
  assert "Traceback" not in done.stderr


def test_help_is_no_mistake(user_environment):
  command = [sys.executable, "-m", "stare_jax.main", "--config=configs/ipi.py", "--help"]
  done = subprocess.run(command, cwd=toy_run.ROOT, env=user_environment, capture_output=True, text=True)
  assert "--workdir" in done.stdout and "unexpected" not in done.stdout + done.stderr


def test_a_full_disk_gets_its_advice():
  full = OSError(errno.ENOSPC, "No space left on device", "metrics.jsonl")
  assert "Free space" in main.describe(full) and "continues" in main.describe(full)
  advised = OSError(errno.ENOSPC, "disk full: dataset x needs 3 MB. Free space or choose another workdir")
  assert main.describe(advised).count("ree space") == 1
  assert main.describe(ValueError("x")) == "ValueError: x"


# --- the run folder -----------------------------------------------------------------------------------------------


def test_a_run_folder_that_is_a_file(tmp_path):
  path = tmp_path / "run"
  path.write_text("mine")
  with pytest.raises(ConfigError, match="is a file: name a folder"):
    pipeline_check.check(toy_run.get_config(), path)
  with pytest.raises(ConfigError, match="cannot be written"):
    pipeline_check.check(toy_run.get_config(), path / "below")
  assert path.read_text() == "mine"


def test_a_run_folder_that_cannot_be_written(tmp_path, monkeypatch):
  def refuse(**_):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(pipeline_check.tempfile, "TemporaryFile", refuse)
  with pytest.raises(ConfigError, match="cannot be written.*[Rr]ead-only.*--workdir=DIR"):
    pipeline_check.check(toy_run.get_config(), tmp_path / "run")


def test_a_run_folder_in_which_another_process_runs(tmp_path, toy_environment):
  """Its metrics and checkpoints would be replaced while it writes them."""
  (tmp_path / "run").mkdir()
  with main.hold(str(tmp_path / "run")):
    done = toy_run.launch(tmp_path / "run", toy_environment)
    assert done.returncode == 2 and "is in use: another process is running in it" in done.stderr, done.stderr
    assert os.listdir(tmp_path / "run") == [main.IN_USE]
  main.hold(str(tmp_path / "run")).close()  # nobody has it now


# --- what lies in it ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_device(monkeypatch):
  """The run sees one device, as the run folder's did; the tests have eight."""
  make = sharding.make_mesh
  monkeypatch.setattr(sharding, "make_mesh", lambda sizes: make({"data": 1}, devices=jax.devices()[:1]))


@pytest.fixture
def folder(tmp_path, uninterrupted, one_device) -> pathlib.Path:
  return shutil.copytree(uninterrupted, tmp_path / "run")


def contents(workdir: pathlib.Path) -> dict[str, str]:
  files = (path for path in sorted(workdir.rglob("*")) if path.is_file())
  return {path.relative_to(workdir).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refused(workdir: pathlib.Path, error: type[Exception], *words: str, keep: bool = True, **changes) -> None:
  """The run ends with this error, which has these words, and leaves the folder as it was."""
  config = toy_run.get_config()
  config.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  before = contents(workdir)
  with pytest.raises(error) as caught:
    pipeline.run(config, workdir)
  assert isinstance(caught.value, pipeline.USER_ERRORS)
  assert all(word in str(caught.value) for word in words), caught.value
  after = contents(workdir)
  assert not keep or after == before
  assert {name: after.get(name) for name in before} == before or not keep


def test_a_checkpoint_of_another_configuration(folder):
  refused(
    folder, ConfigMismatchError, "imitation.optimiser.learning_rate", "--workdir", "nothing was changed",
    imitation__optimiser__learning_rate=0.5,
  )  # fmt: skip
  refused(folder, ConfigMismatchError, "interaction.hp.clip", "0.4", interaction__hp__clip=0.4)


def test_a_later_phase_may_be_configured_anew_where_it_does_not_run(folder):
  """Only the phases that run, and those that they start from, have to agree."""
  with pytest.raises(ConfigMismatchError, match="preference.margin"):
    config = toy_run.get_config()
    config.preference.margin, config.phases = 0.5, ("preference",)
    pipeline.run(config, folder)
  this = pipeline.Run(toy_run.get_config(), folder)
  this.config.phases, this.config.interaction.hp.clip = ("imitation",), 0.5
  pipeline.open_folder(this)


def newest(workdir: pathlib.Path, phase: str) -> pathlib.Path:
  return max(path for path in (workdir / "checkpoints" / phase).iterdir() if path.name.isdecimal())


def test_a_truncated_checkpoint(folder):
  largest = max((path for path in newest(folder, "imitation").rglob("*") if path.is_file()), key=os.path.getsize)
  os.truncate(largest, largest.stat().st_size // 2)
  refused(folder, CheckpointError, "damaged", largest.name, "remove it and run again: step 4")


def test_a_checkpoint_without_its_table(folder):
  (newest(folder, "imitation") / "checkpoint.json").unlink()
  refused(folder, CheckpointError, "incomplete", "checkpoint.json", "remove it and run again")


def test_a_truncated_data_set(folder):
  path = folder / "data" / "demonstrations" / "00000.episodes"
  os.truncate(path, path.stat().st_size // 2)
  shutil.rmtree(newest(folder, "imitation"))  # a phase that is finished reads none
  refused(folder, DatasetError, "00000.episodes", "truncated", "rerun")


def test_data_of_another_configuration(folder):
  """Killed before the first checkpoint: the demonstrations alone tell what they were made with."""
  shutil.rmtree(folder / "checkpoints")
  (folder / "config.json").unlink()
  refused(folder, DatasetError, "seed: 0", "1 now", "--workdir", keep=False, seed=1)


def test_a_phase_that_was_not_finished_is_no_start(folder):
  for phase in ("preference", "interaction"):
    shutil.rmtree(folder / "checkpoints" / phase)
  shutil.rmtree(newest(folder, "imitation"))
  refused(folder, ConfigError, "imitation at 4 of 6", "finish that phase first", phases=("preference",))


def test_init_from_that_is_missing(tmp_path, one_device):
  (tmp_path / "run").mkdir()
  refused(tmp_path / "run", CheckpointError, "no checkpoint in", "nowhere", init_from=str(tmp_path / "nowhere"))
  assert not any((tmp_path / "run").iterdir())


def test_init_from_of_another_model(tmp_path, uninterrupted, one_device):
  (tmp_path / "run").mkdir()
  refused(
    tmp_path / "run", CheckpointError, "this run expects", "configured otherwise", keep=False, phases=("preference",),
    policy__options__llm_mlp=128, init_from=str(uninterrupted / "checkpoints" / "imitation"),
  )  # fmt: skip


def test_a_policy_option_that_does_not_exist(tmp_path, one_device):
  config = toy_run.get_config()
  with config.unlocked():
    config.policy.options.llm_dept = 2
  with pytest.raises(ValueError, match="'llm_dept' is unknown; did you mean 'llm_depth'"):
    pipeline.run(config, tmp_path / "run")
  assert not any((tmp_path / "run").iterdir())


def test_devices_that_do_not_divide(tmp_path):
  """Eight devices here."""
  (tmp_path / "run").mkdir()
  refused(tmp_path / "run", ValueError, "mesh", "8", mesh__data=3)
  refused(tmp_path / "run", ConfigError, "preference.batch = 2", "8 devices", "--config.mesh")


# --- a full disk --------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 400 KiB: the demonstrations fit, a checkpoint does not."""
  disk = tmp_path / "disk"
  disk.mkdir()
  mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
  if mounted.returncode:
    pytest.skip("a file system cannot be mounted here")
  yield disk
  subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk(small_disk, toy_environment):
  done = toy_run.launch(small_disk / "run", toy_environment)
  assert done.returncode == 2, done.stdout + done.stderr
  assert "disk full" in done.stderr and "Traceback" not in done.stderr
  assert "Free" in done.stderr and "again" in done.stderr
  checkpoints = small_disk / "run" / "checkpoints"
  assert not list(checkpoints.rglob("checkpoint.json")) and not list(checkpoints.glob("*/.tmp*"))
  assert list((small_disk / "run" / "data").rglob("*.episodes"))
