"""Simulator workers under another Python: what they may import, what crosses the border, and what is said when not.

The other Python here is a virtual environment of this one with numpy and nothing else, made without a network.
"""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sysconfig
import types
import venv

import numpy as np
import pytest

from configs import ipi
from stare_jax import sims, tasks
from stare_jax.config import ConfigError
from stare_jax.episode import SIGNAL_SIZE
from stare_jax.pipeline_check import check_simulator, resolved
from stare_jax.sims import boot
from stare_jax.sims import pool as pools
from stare_jax.sims.toy import Toy

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASK = types.SimpleNamespace(env_id="Toy", actors=("cube", None), camera=None, env_options={})
SIMS = sorted((ROOT / "stare_jax" / "sims").glob("*.py"))
WORKER_SIDE = ("episode.py", "suites.py", *(f"sims/{path.name}" for path in SIMS))


def make_python(folder: pathlib.Path, *packages: str) -> str:
  """The interpreter of a new virtual environment that has those packages of this one."""
  try:
    venv.create(folder, with_pip=False, symlinks=True)
  except (OSError, subprocess.CalledProcessError) as error:
    pytest.skip(f"no virtual environment can be made here: {error}")
  site = pathlib.Path(sysconfig.get_path("purelib", vars=dict(base=str(folder), platbase=str(folder))))
  for name in packages:
    here = pathlib.Path(__import__(name).__file__).parent
    for part in (here, here.with_name(f"{name}.libs")):
      if part.is_dir():
        (site / part.name).symlink_to(part)
  return str(folder / "bin" / "python")


@pytest.fixture(scope="module")
def bare(tmp_path_factory) -> str:
  return make_python(tmp_path_factory.mktemp("bare"), "numpy")


def toy(python: str, **options) -> pools.Pool:
  return sims.make("toy", task=TASK, num_envs=4, num_workers=2, image_size=16, python=python, **options)


def test_numpy_is_all_that_a_worker_needs(bare, tmp_path, monkeypatch):
  """The whole contract under a Python that has nothing else, beside the same environment in this process."""
  (tmp_path / "numpy.py").write_text("raise RuntimeError('the learner\\'s import path')")
  monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # meant for the learner's Python: not for another
  plan = np.random.default_rng(0).uniform(-1, 1, (6, 4, 7)).astype(np.float32)
  image, signals = np.zeros((16, 16, 3), np.uint8), np.zeros(SIGNAL_SIZE, np.float32)
  with toy(bare) as sim:
    alone = [Toy(image_size=16) for _ in range(4)]
    frame = sim.reset(range(4), [3, 2**31, 5, 7])
    for env, seed in zip(alone, [3, 2**31, 5, 7], strict=True):
      env.reset(seed)
    for actions in plan:
      for i, env in enumerate(alone):
        env.observe(image, signals)
        np.testing.assert_array_equal(frame.images[i], image)
        np.testing.assert_array_equal(frame.signals[i], signals)
        env.step(actions[i])
      frame = sim.step(range(4), actions)
    (saved,) = sim.snapshot([0])
    np.testing.assert_array_equal(sim.restore([3], [saved]).signals[0], frame.signals[0])
    sim._workers[1].process.kill()
    assert sim.step(range(4), plan[0]).lost.tolist() == [False, True, False, True]
    assert not sim.reset([1, 3], [1, 2]).lost.any() and sim.restarts == 1
    assert sim.about["numpy"] == np.__version__ and sim.about["python"].startswith("3.")


def test_the_other_python_sees_nothing_of_the_learners(bare):
  """Else the test above would prove nothing: no package of the learner's can be imported there."""
  code = "import importlib.util as u; print([n for n in ('jax', 'ml_collections', 'torch', 'absl') if u.find_spec(n)])"
  seen = subprocess.run([bare, "-c", code], env=pools._environment_variables(1, bare), capture_output=True, text=True)
  assert seen.stdout.strip() == "[]", seen.stderr


def test_a_hung_worker_of_another_python_is_replaced(bare):
  import signal

  with toy(bare, timeout=1.0) as sim:
    sim.reset(range(4), range(4))
    sim._workers[0].process.send_signal(signal.SIGSTOP)
    assert sim.step(range(4), np.zeros((4, 7), np.float32)).lost.tolist() == [True, False, True, False]
    assert not sim.reset([0, 2], [1, 2]).lost.any()


@pytest.mark.parametrize("file", WORKER_SIDE)
def test_the_workers_side_is_written_for_the_oldest_python(file):
  ast.parse((ROOT / "stare_jax" / file).read_text(), feature_version=boot.PYTHON)


def test_boot_is_read_by_any_python():
  ast.parse((ROOT / "stare_jax" / "sims" / "boot.py").read_text(), feature_version=(3, 6))


# ---- what is said


def test_an_interpreter_that_is_not_there(bare, tmp_path):
  folder = pathlib.Path(bare).parents[1]
  (tmp_path / "text").write_text("")
  for python, words in (
    (str(tmp_path / "none"), "no such file"), (str(tmp_path / "text"), "not an executable"),
    (str(tmp_path), "folder without bin/python"), (str(folder), f"did you mean {folder}/bin/python"),
  ):  # fmt: skip
    with pytest.raises(sims.SimulatorError, match=f"(?s)sim.python = .*{words}.*docs/simpler_env.md"):
      toy(python)
  assert pools.interpreter(bare) == bare  # a link is not followed: it is what makes the environment


def test_an_interpreter_that_is_not_fit(tmp_path):
  python = make_python(tmp_path / "empty")
  with pytest.raises(sims.SimulatorError, match=r"without numpy[\s\S]*empty/bin/python -m pip install numpy"):
    toy(python)
  shell = tmp_path / "python"
  shell.write_text("#!/bin/sh\necho not a Python; exit 3\n")
  shell.chmod(0o755)
  with pytest.raises(sims.SimulatorError, match=r"exited with status 3[\s\S]*not a Python[\s\S]*sim\.python = "):
    toy(str(shell))
  assert "Python 3.8, expected 3.10 or newer" in boot.lacking((3, 8, 18), {"numpy": True})
  assert boot.lacking((3, 10), {"numpy": True}) == boot.lacking((3, 13), {"numpy": True}) == ""


def test_only_plain_values_cross(bare):
  """A numpy 2 scalar in a pickle is an ImportError under numpy 1.24; it is refused here, by its place."""
  for value, kind in ((np.float32(1), "numpy.float32"), ([np.zeros(2)], "numpy.ndarray"), (TASK, "SimpleNamespace")):
    with pytest.raises(TypeError, match=rf"spec\['x'\]\S* holds a \S*{kind}"):
      sims.make("toy", task=TASK, num_envs=1, num_workers=1, image_size=8, python=bare, x=value)


def test_a_simulator_without_its_package_says_how_to_get_it(bare):
  task = tasks.get("simpler_put_carrot_on_plate")
  with pytest.raises(sims.SimulatorError, match=r"has no simpler_env, [\s\S]*git clone[\s\S]*sapien==2\.2\.2") as error:
    sims.make(task=task, num_envs=1, num_workers=1, image_size=16, python=bare)
  assert bare in str(error.value) and "Traceback" not in str(error.value)


# ---- the configuration


def configured(task: str, **changes):
  config = ipi.get_config(f"smoke,task={task}")
  config.update_from_flattened_dict(changes)
  return resolved(config)


def test_a_task_brings_its_simulator(bare):
  config = configured("simpler_put_carrot_on_plate", **{"sim.python": bare})
  check_simulator(config)
  assert config.sim.name == "simpler" and configured("put_carrot_on_plate").sim.name == "maniskill"
  toy_config = configured("simpler_put_carrot_on_plate", **{"sim.name": "toy"})
  check_simulator(toy_config)  # the toy plays any task
  assert toy_config.sim.name == "toy"


def test_results_of_two_simulators_have_two_names():
  for name in tasks.names("simpler"):
    here, there = tasks.get(name), tasks.get(name.removeprefix("simpler_"))
    assert there.simulator == "maniskill" and here.stages is there.stages and here.instruction == there.instruction
    assert here.name != there.name and "scene" not in here.env_options
  assert len(tasks.names("simpler")) == 4 and len(tasks.names()) == 4 + len(tasks.names("maniskill"))


@pytest.mark.parametrize("task, changes, words", [
  ("simpler_put_carrot_on_plate", {}, r"--config\.sim\.python=FOLDER/bin/python; docs/simpler_env\.md"),
  ("put_carrot_on_plate", {"sim.name": "simpler"}, r'not in .* "simpler" but in "maniskill".*simpler_put_carrot'),
  ("pull_cube", {"sim.python": "no/such/python"}, "no such file"),
])  # fmt: skip
def test_a_simulator_that_does_not_fit_is_said_before_anything_starts(task, changes, words):
  with pytest.raises(ConfigError, match=words):
    check_simulator(configured(task, **changes))
