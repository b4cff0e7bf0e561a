"""The real thing, small: the `smoke` preset on ManiSkill through the front door."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from benchmarks import stage_labels
from stare_jax import checkpoint, tasks

pytestmark = [pytest.mark.sim, pytest.mark.timeout(1200)]
PHASES = ("imitation", "preference", "interaction")


BRIDGE = ("put_carrot_on_plate", "put_spoon_on_towel", "stack_green_on_yellow", "put_eggplant_in_basket")


def smoke(workdir: pathlib.Path, env: dict[str, str], root: pathlib.Path, arg: str = "smoke", changed=()) -> str:
  command = [sys.executable, "-m", "stare_jax.main", f"--config=configs/ipi.py:{arg}", f"--workdir={workdir}"]
  command += [f"--config.{field}" for field in changed]
  done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout + done.stderr


def test_smoke_leaves_a_complete_run_folder(tmp_path, user_environment, root):
  workdir = tmp_path / "run"
  said = smoke(workdir, user_environment, root)
  assert "report.html" in said and "compiled again" not in said  # one program per update, whatever the data
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["task"] == "pull_cube" and summary["preset"] == "smoke" and summary["simulator_events"] == []
  assert len(summary["params_sha256"]) == 64 and set(summary["phases"]) == set(PHASES)
  assert json.loads((workdir / "config.json").read_text()) == summary["config"]
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  for phase in PHASES:
    here = [row for row in rows if row["phase"] == phase]
    assert [row["step"] for row in here] == list(range(1, len(here) + 1))
    assert checkpoint.latest(workdir / "checkpoints" / phase) == len(here)
    assert all(row["loss"] is not None and row["grad_norm"] is not None for row in here)
    figures = json.loads((workdir / "evaluations" / f"{phase}.json").read_text())
    for name in ("success_once", "success_at_end"):
      assert figures[name]["n"] == summary["config"]["evaluation"]["episodes"]
      assert figures[name]["low"] <= figures[name]["rate"] <= figures[name]["high"]
    assert [stage["name"] for stage in figures["stages"]] == ["Reach", "Pull"]
    videos = list((workdir / "videos").glob(f"{phase}_*.mp4"))
    assert videos and all(path.stat().st_size > 1000 and path.with_suffix(".json").exists() for path in videos)
  assert summary["env_steps"]["interaction"] == 3 * 8 * 20
  page = (workdir / "report.html").read_text()
  assert "<video" in page and summary["params_sha256"][:12] in page
  assert any((workdir / "tensorboard").rglob("events*"))
  labelled_alike(workdir)


def labelled_alike(workdir: pathlib.Path) -> None:
  """Every recorded episode has online the stages, completions and potentials that the phases gave it as a whole."""
  rows = stage_labels.compared(workdir)
  assert {row["data"] for row in rows} == {"demonstrations", "preference"}
  assert all(row["episodes"] and row["states_differ"] == row["episodes_differ"] == 0 for row in rows), rows


@pytest.mark.slow
def test_smoke_twice_gives_the_same_parameters(tmp_path, user_environment, root):
  for name in ("first", "second"):
    smoke(tmp_path / name, user_environment, root)
  first, second = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("first", "second"))
  assert first["params_sha256"] == second["params_sha256"]


# What a task cannot change is done less often, so that a dozen of them take minutes each; and of so few
# demonstrations some must succeed, which PegInsertionSide's expert seldom does when it is disturbed as usual.
FEWER = (
  "imitation.demonstrations=8", "imitation.expert_noise=0.1", "imitation.updates=20",
  "imitation.optimiser.warmup_steps=5", "preference.starts=3", "preference.updates=2", "interaction.iterations=2",
  "evaluation.episodes=4", "report.videos=1",
)  # fmt: skip
OTHERS = [pytest.param(name, marks=[pytest.mark.assets] if name in BRIDGE else [])
          for name in tasks.names("maniskill") if name != "pull_cube"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_smoke_of_a_task_takes_what_it_needs_from_it(name, tmp_path, user_environment, root):
  """Nothing is set for the task but its name: the horizon and the evaluation's starts are its own."""
  smoke(tmp_path / "run", user_environment, root, f"smoke,task={name}", FEWER)
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  task = tasks.get(name)
  assert summary["task"] == name and set(summary["phases"]) == set(PHASES) and summary["simulator_events"] == []
  assert summary["config"]["sim"]["horizon"] == task.horizon
  assert summary["config"]["preference"]["buckets"] == [summary["config"]["preference"]["tail"]]
  figures = summary["phases"]["interaction"]
  first = summary["config"]["evaluation"]["seed"] if task.starts is None else 0
  assert figures["seeds"] == [first, first + 3] and figures["max_length"] == task.horizon
  assert [stage["name"] for stage in figures["stages"]] == [stage.name for stage in task.stages]
  labelled_alike(tmp_path / "run")
