"""What every test shares: the devices JAX sees, when simulator, GPU and browser tests can run, and common fixtures.

Tests run on eight fake CPU devices, so that sharding is tested wherever the tests are; `python -m pytest -m gpu` on
whatever JAX finds.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# What ManiSkill downloads, where it lies beside the checkout: read by every simulator worker that starts.
if (ROOT.parent / "shared" / "assets" / "data").is_dir():
  os.environ.setdefault("MS_ASSET_DIR", str(ROOT.parent / "shared" / "assets"))

# Before anything imports jax: both are read once. A pytest-xdist worker inherits what its controller set here, so the
# user's own settings travel beside them.
FAKE_DEVICES = "--xla_force_host_platform_device_count=8"
_USERS_OWN = "STARE_JAX_TEST_USERS_OWN"
os.environ.setdefault(_USERS_OWN, json.dumps({name: os.environ.get(name) for name in ("XLA_FLAGS", "JAX_PLATFORMS")}))
USER_ENVIRONMENT = {name: value for name, value in os.environ.items() if name != _USERS_OWN}
for _name, _value in json.loads(os.environ[_USERS_OWN]).items():
  USER_ENVIRONMENT.pop(_name, None)
  USER_ENVIRONMENT.update({} if _value is None else {_name: _value})
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
  os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAKE_DEVICES}".strip()

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def load_script(path: pathlib.Path):
  """A script outside the package (launch/, benchmarks/) as a module."""
  spec = importlib.util.spec_from_file_location(path.stem, path)
  assert spec is not None and spec.loader is not None, path
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module  # dataclasses look their module up by name
  spec.loader.exec_module(module)
  return module


def why_no_simulator() -> str:
  """Empty when ManiSkill can render here; the first call of a machine's set-up may take seconds, later ones do not."""
  missing = [name for name in ("mani_skill", "sapien", "torch") if importlib.util.find_spec(name) is None]
  if missing:
    return f"not installed: {', '.join(missing)}; run `make setup`"
  rendering = load_script(ROOT / "launch" / "rendering.py")
  try:
    rendering.ensure(check_only=True)
  except rendering.RenderingError as error:
    return str(error).splitlines()[0] + " Run `make setup`."
  return ""


def why_no_assets() -> str:
  """Empty when the WidowX and its scenes are here."""
  folder = pathlib.Path(os.environ.get("MS_ASSET_DIR") or pathlib.Path.home() / ".maniskill") / "data"
  missing = [name for name in ("robots/widowx", "tasks/bridge_v2_real2sim_dataset") if not (folder / name).is_dir()]
  return f"{folder} has no {' and no '.join(missing)}; set MS_ASSET_DIR" if missing else ""


def why_no_simpler() -> str:
  """Empty when STARE_JAX_SIMPLER_PYTHON names an interpreter that has SimplerEnv's package."""
  python = os.environ.get("STARE_JAX_SIMPLER_PYTHON", "")
  if not python:
    return "STARE_JAX_SIMPLER_PYTHON names no interpreter with SimplerEnv's package (docs/simpler_env.md makes one)"
  code = "import importlib.util, sys; sys.exit(importlib.util.find_spec('simpler_env') is None)"
  try:
    found = subprocess.run([python, "-c", code], timeout=60, capture_output=True).returncode == 0
  except (OSError, subprocess.TimeoutExpired) as error:
    return f"STARE_JAX_SIMPLER_PYTHON={python}: {error}"
  return "" if found else f"STARE_JAX_SIMPLER_PYTHON={python} has no simpler_env (docs/simpler_env.md)"


def why_no_accelerator() -> str:
  """Empty when JAX runs on something other than the CPU."""
  import jax
  platform = jax.default_backend()
  return "" if platform != "cpu" else "JAX sees only the CPU; with an accelerator ask for these tests alone (-m gpu)"


def why_no_browser() -> str:
  """Empty when a Chromium is on the path."""
  return "" if any(map(shutil.which, BROWSERS)) else f"none of {', '.join(BROWSERS)} is on the path"


NEEDS = {"sim": why_no_simulator, "assets": why_no_assets, "simpler": why_no_simpler, "gpu": why_no_accelerator,
         "browser": why_no_browser}  # fmt: skip


# The longest files: last of all, one of them would leave the other cores idle.
LONGEST_FIRST = ("test_resume.py", "test_smoke.py", "test_pipeline.py", "test_lora_run.py", "test_bad_input.py",
                 "test_multiprocess.py", "test_bridge.py", "test_sims.py")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
  """Nothing has imported jax yet."""
  if config.option.markexpr != "gpu":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
  """Files that take longest come first; pytest-xdist keeps the order if told `--no-loadscope-reorder`."""
  place = {name: index for index, name in enumerate(LONGEST_FIRST)}
  items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish(session: pytest.Session) -> None:
  """Asks for each need once, after deselection, and skips with the reason what cannot run here."""
  for marker, why_not in NEEDS.items():
    needing = [item for item in session.items if item.get_closest_marker(marker)]
    reason = why_not() if needing else ""
    for item in needing:
      if reason:
        item.add_marker(pytest.mark.skip(reason=f"{marker}: {reason}"))


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
  """For files whose time is mostly compilation: without most of XLA's optimisations."""
  import jax
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
  """A generator whose stream depends on the test's name alone, so that tests can be added and reordered."""
  return np.random.default_rng(list(request.node.nodeid.encode()))


@pytest.fixture
def user_environment() -> dict[str, str]:
  """The environment as the user has it, without the eight fake devices: for subprocesses that run the front door."""
  return {**USER_ENVIRONMENT, "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="session")
def toy_environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
  """For launches of tests/toy_run.py: the user's environment, with compiled programs shared between launches.

  STARE_JAX_TEST_CACHE names a folder that keeps them from one test session to the next.
  """
  from tests import toy_run
  cache = os.environ.get("STARE_JAX_TEST_CACHE") or tmp_path_factory.mktemp("compiled")
  return toy_run.environment({**USER_ENVIRONMENT, "PYTHONPATH": str(ROOT)}, pathlib.Path(cache))


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, toy_environment: dict[str, str]) -> pathlib.Path:
  """The run folder of all three phases on the toy simulator, never to be changed: copy it.

  It takes minutes, so the first of the session's processes that needs it makes it for all of them.
  """
  from tests import toy_run
  shared = tmp_path_factory.getbasetemp()
  if "PYTEST_XDIST_WORKER" in os.environ:
    shared = shared.parent
  workdir = shared / "uninterrupted" / "run"
  with open(shared / "uninterrupted.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not workdir.exists():
      done = toy_run.launch(workdir, toy_environment)
      assert done.returncode == 0, done.stdout + done.stderr
      assert "compiled again" not in done.stderr  # one program per update
  assert (workdir / "summary.json").exists(), "the process that made the run failed"
  return workdir


@pytest.fixture(scope="session")
def root() -> pathlib.Path:
  """The checkout."""
  return ROOT
