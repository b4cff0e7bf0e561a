"""A study: which cells there are and what they share, how they are run, and what is computed from their folders."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import subprocess
import sys
from types import SimpleNamespace

import ml_collections
import numpy as np
import pytest
import scipy.stats

from configs import ipi
from configs import study as study_config
from stare_jax import evaluate, report, study, study_cells, study_report
from stare_jax.config import STOPPED, ConfigError
from stare_jax.study_cells import Cell
from tests import toy_run

# What a cell would write, without any learning; it waits for its start as a real one would miss it.
RUN = """
import json, os, pathlib, sys, time
folder, phase, total, success, needs, command = sys.argv[1:]
folder = pathlib.Path(folder)
assert not needs or (pathlib.Path(needs) / "summary.json").exists(), "started before its start was finished"
print("cores", len(os.sched_getaffinity(0)))
if success == "broken":
  sys.exit("no such policy")
while success == "slow":
  time.sleep(0.01)
rate = {"count": int(success), "n": 10, "rate": int(success) / 10, "low": 0.0, "high": 1.0}
evaluation = {"label": phase, "episodes": 10, "temperature": 1.0, "success_once": rate, "success_at_end": rate,
              "stages": [{"name": "Reach", "marginal": rate, "conditional": rate}]}
(folder / "evaluations").mkdir(exist_ok=True)
(folder / "evaluations" / f"{phase}.json").write_text(json.dumps(evaluation))
with (folder / "metrics.jsonl").open("a") as file:
  for i in range(int(total)):
    row = {"phase": phase, "step": i + 1, "env_steps": 10 * (i + 1), "time": 0.0, "success": i / int(total)}
    file.write(json.dumps(row) + "\\n")
(folder / "summary.json").write_text(json.dumps({"command": command, "phases": {phase: evaluation},
                                                "env_steps": {phase: 40}}))
"""


def settings(**changes) -> ml_collections.ConfigDict:
  c = study_config.get_config()
  c.update_from_flattened_dict({name.replace("__", "."): value for name, value in changes.items()})
  return c


# --- cells ---


def test_all_methods_of_a_task_and_seed_go_on_from_one_start(tmp_path):
  c = settings(tasks=("pull_cube",), seeds=(0, 3), interaction__iterations=7, evaluation__episodes=9,
               changes=("preference.starts=11", "interaction.hp.lam=0.9"))  # fmt: skip
  cells = study_cells.make(c, tmp_path, ipi)
  assert [(cell.method, cell.seed) for cell in cells] == [
    (method, seed) for seed in (0, 3) for method in ("sft", "ppo_clean", "sta_ppo", "tpo", "sta_tpo")
  ]
  assert len({cell.folder for cell in cells}) == len(cells)
  for start, *others in (cells[:5], cells[5:]):
    assert start.needs is None and start.phases == ("imitation",)
    for cell in others:
      assert cell.needs is start and "imitation" not in cell.phases
      assert f"--config.init_from={start.folder}/checkpoints/imitation" in cell.command
  by_method = {cell.method: cell for cell in cells}
  assert by_method["sta_ppo"].phases == ("interaction",) and by_method["sta_ppo"].total == 7
  assert by_method["tpo"].phases == ("preference",) and by_method["tpo"].total == 60
  for cell in cells:
    for flag in ("--config.interaction.iterations=7", "--config.evaluation.episodes=9",
                 "--config.preference.starts=11", "--config.interaction.hp.lam=0.9"):  # fmt: skip
      assert flag in cell.command


@pytest.mark.parametrize("changes, words", [
  (dict(methods=("sta_pp",)), ("sta_pp", '"sta_ppo"')),
  (dict(methods=("rl4vla_faithful",)), ("pull_cube rl4vla_faithful seed 0", "Grasp")),
  (dict(tasks=("pull_cub",)), ('"pull_cube"',)),
  (dict(changes=("preference.start=3",)), ('"preference.start"', '"preference.starts"')),
  (dict(changes=("preference.starts",)), ('"preference.starts"', "preference.starts=80")),
  (dict(changes=("pull_cub:preference.starts=3",)), ('"pull_cub"', '"pull_cube"')),
  (dict(changes=("preference.starts=few",)), ('preference.starts="few"', "int")),
  (dict(changes=("preference.samples=1",)), ("preference.samples = 1",)),
  (dict(compare=("tpo",)), ('"tpo"', "ppo_clean:sta_ppo")),
  (dict(compare=("ppo_claen:sta_ppo",)), ('"ppo_claen"', '"ppo_clean"')),
  (dict(seeds=()), ("seeds",)),
])  # fmt: skip
def test_a_cell_that_could_not_run_is_refused_before_any_is_started(tmp_path, changes, words):
  with pytest.raises(ConfigError) as caught:
    study_cells.make(settings(**changes), tmp_path, ipi)
  assert all(word in str(caught.value) for word in words), caught.value


def test_a_change_may_be_of_one_task(tmp_path):
  c = settings(tasks=("pull_cube", "put_carrot_on_plate"), seeds=(0,), changes=(
    "policy.options.resize=lanczos3", "policy.options.center_crop=True",  # which the preset leaves open
    "preference.starts=11", "put_carrot_on_plate:preference.starts=12", "pick_cube:preference.starts=13",
  ))  # fmt: skip
  for cell in study_cells.make(c, tmp_path, ipi):
    starts = [flag for flag in cell.command if flag.startswith("--config.preference.starts=")]
    assert starts == [f"--config.preference.starts={11 if cell.task == 'pull_cube' else 12}"]


def test_cells_share_rollouts_that_are_the_same(tmp_path):
  """tpo and sta_tpo compare the same ones; grape makes others, and so does another seed."""
  c = settings(tasks=("pull_cube",), seeds=(0, 1), methods=("tpo", "sta_tpo", "grape", "ppo_clean"))
  cells = {(cell.method, cell.seed): cell for cell in study_cells.make(c, tmp_path, ipi)}
  rollouts = {key: (cell.needs and cell.needs.folder, cell.rollouts) for key, cell in cells.items() if cell.rollouts}
  assert set(rollouts) == {(method, seed) for method in ("tpo", "sta_tpo", "grape") for seed in (0, 1)}
  assert rollouts["tpo", 0] == rollouts["sta_tpo", 0] != rollouts["grape", 0]
  assert rollouts["tpo", 0] != rollouts["tpo", 1]


def made_cells(folder: pathlib.Path, successes: dict[str, str], seeds=(0,)) -> list[Cell]:
  """sft and the methods of `successes`, each of which is `RUN`."""
  cells: list[Cell] = []
  script = folder / "run.py"
  script.parent.mkdir(parents=True, exist_ok=True)
  script.write_text(RUN)
  for seed in seeds:
    start = None
    for method, success in {"sft": "3", **successes}.items():
      where, phase = folder / "toy" / method / f"seed{seed}", "imitation" if start is None else "interaction"
      arguments = [str(script), str(where), phase, "4", success, str(start.folder) if start else ""]
      command = ("python", *arguments, shlex.join(["python", *arguments]))
      cell = Fake("toy", method, seed, where, command, (phase,), 4, start)
      start = start or cell
      cells.append(cell)
  return cells


class Fake(Cell):
  """A cell whose script notes the command as it was given to it."""

  def finished(self) -> bool:
    path = self.folder / "summary.json"
    if path.exists() and not self.busy() and (summary := json.loads(path.read_text()))["command"] == self.command[-1]:
      path.write_text(json.dumps(summary | {"command": shlex.join(self.command)}))
    return super().finished()


CONFIG = SimpleNamespace(tasks=("toy",), compare=("a:b",))


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(study, "LOOK", 0.02)


def run(cells, folder, *, jobs=1, threads=0) -> study.Runner:
  runner = study.Runner(cells, folder, CONFIG, jobs=jobs, threads=threads)
  runner.run()
  return runner


def test_cells_run_side_by_side_once_after_their_start(tmp_path, quick):
  cells = made_cells(tmp_path, {"a": "4", "b": "6"}, seeds=(0, 1))
  before = os.sched_getaffinity(0)
  runner = run(cells, tmp_path, jobs=2, threads=1)
  assert not runner.failed and all(cell.finished() for cell in cells)
  assert all((cell.folder / "log.txt").read_text() == "cores 1\n" for cell in cells)
  assert os.sched_getaffinity(0) == before
  written = {cell: (cell.folder / "summary.json").stat().st_mtime_ns for cell in cells}
  assert run(cells, tmp_path).running == {}  # nothing is left to do
  assert {cell: (cell.folder / "log.txt").read_text() for cell in cells} == dict.fromkeys(cells, "cores 1\n")
  assert written == {cell: (cell.folder / "summary.json").stat().st_mtime_ns for cell in cells}
  assert "b − a" in (tmp_path / "results.md").read_text()


def test_a_cell_takes_over_the_rollouts_of_a_finished_one(tmp_path, quick):
  cells = [dataclasses.replace(cell, rollouts=made) for cell, made in zip(
    made_cells(tmp_path, {"a": "4", "b": "6", "c": "5"}), ((), ("x",), ("x",), ("y",)), strict=True)]  # fmt: skip
  cells = [dataclasses.replace(cell, needs=cells[0] if i else None) for i, cell in enumerate(cells)]
  data = cells[1].folder / "data" / "preference"
  data.mkdir(parents=True)
  for name, text in (("00000.episodes", "one"), ("00001.episodes", "two"), ("pairs.json", "a's own")):
    (data / name).write_text(text)
  cells[2].adopt(cells)
  assert not (cells[2].folder / "data").exists()  # the other one is not finished
  run(cells, tmp_path)
  taken = {path.name: path.read_text() for path in (cells[2].folder / "data" / "preference").iterdir()}
  assert taken == {"00000.episodes": "one", "00001.episodes": "two"}
  assert not (cells[3].folder / "data").exists()


def test_a_cell_that_somebody_else_stopped_goes_on(tmp_path, quick):
  """It was the last one to run, and ended with the status that says: the same command continues."""
  (cell,) = made_cells(tmp_path, {})
  (tmp_path / "run.py").write_text(
    "import pathlib, sys\nonce = pathlib.Path(sys.argv[1]) / 'once'\n"
    f"if not once.exists():\n  once.touch()\n  sys.exit({STOPPED})\n" + RUN
  )
  runner = run([cell], tmp_path)
  assert (cell.folder / "once").exists() and cell.finished() and not runner.failed


def test_a_cell_that_fails_leaves_the_others_alone(tmp_path, quick):
  cells = made_cells(tmp_path, {"a": "broken", "b": "6"})
  runner = run(cells, tmp_path)
  assert [cell.method for cell in runner.failed] == ["a"] and "no such policy" in runner.failed[cells[1]]
  assert cells[2].finished() and "Not finished: toy a seed 0" in (tmp_path / "results.md").read_text()


def test_a_start_that_fails_takes_its_methods_with_it(tmp_path, quick):
  cells = made_cells(tmp_path, {"sft": "broken", "a": "4"})
  assert list(run(cells, tmp_path).failed) == cells


def test_stopping_ends_the_running_cells(tmp_path, quick, monkeypatch):
  cells = made_cells(tmp_path, {"a": "slow", "b": "6"})
  runner = study.Runner(cells, tmp_path, CONFIG, jobs=1, threads=0)
  look = runner._look

  def stop_once_it_runs():
    if cells[1] in runner.running and not runner.stopping:
      runner.stop()
    look()

  monkeypatch.setattr(runner, "_look", stop_once_it_runs)
  runner.run()
  assert runner.running == {} and not runner.failed and not cells[1].finished() and not cells[2].finished()


def test_a_cell_that_another_process_runs_is_not_run_twice(tmp_path, quick):
  (cell, *_) = made_cells(tmp_path, {})
  runner = study.Runner([cell], tmp_path, CONFIG, jobs=1, threads=0)
  assert not cell.busy() and runner._launch(cell) and cell.busy()
  assert not study.Runner([cell], tmp_path, CONFIG, jobs=1, threads=0)._launch(cell)
  runner.running[cell].process.wait()
  assert not cell.busy() and cell.finished()


def test_a_cell_is_finished_when_this_command_came_to_its_end(tmp_path, quick):
  (cell,) = made_cells(tmp_path, {})
  assert not cell.finished()
  run([cell], tmp_path)
  assert cell.finished() and "success 30.0 %" in cell.result() and cell.progress().startswith("cores ")
  rows = (cell.folder / "metrics.jsonl").read_text().splitlines()
  (cell.folder / "metrics.jsonl").write_text("\n".join(rows[:-1]) + "\n")  # it was extended, and killed on the way
  assert not cell.finished()
  (cell.folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")
  assert cell.finished()
  other = Cell(cell.task, cell.method, cell.seed, cell.folder, (*cell.command, "--more"), cell.phases, 4, None)
  assert not other.finished() and other.of_others() and not cell.of_others()


# --- results ---


@pytest.mark.parametrize("n", [2, 3, 8])
def test_the_interval_over_seeds_is_students(n):
  values = np.random.default_rng(n).uniform(0.3, 0.7, n)
  found = study_report.estimate(values)
  low, high = scipy.stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy.stats.sem(values))
  assert (found.mean, found.low, found.high) == pytest.approx((values.mean(), max(low, 0), min(high, 1)))
  assert study_report.estimate([0.4]).low is None


def test_a_difference_is_paired_by_seed():
  a, b = {0: 0.2, 1: 0.5, 2: 0.4}, {1: 0.6, 2: 0.5, 3: 0.9}
  found = study_report.difference(a, b)
  assert found.values == pytest.approx((0.1, 0.1)) and (found.low, found.high) == pytest.approx((0.1, 0.1))
  assert study_report.difference({0: 0.1}, {1: 0.2}) is None


def test_a_learning_curve_is_the_mean_of_smoothed_seeds():
  rng = np.random.default_rng(0)
  runs = [[{"env_steps": 10 * (i + 1), "success": x} for i, x in enumerate(rng.random(n))] for n in (20, 17)]
  found = study_report.learning_curve(runs)
  half = study_report.SMOOTHING // 2
  smoothed = np.array([[np.mean([row["success"] for row in rows[:17]][max(0, i - half) : i + half + 1])
                        for i in range(17)] for rows in runs])  # fmt: skip
  np.testing.assert_allclose(found.mean, smoothed.mean(0), rtol=1e-6)
  np.testing.assert_allclose(found.x, 10 * np.arange(1, 18))
  width = scipy.stats.t.ppf(0.975, 1) * smoothed.std(0, ddof=1) / np.sqrt(2)
  np.testing.assert_allclose(found.high, np.clip(smoothed.mean(0) + width, 0, 1), rtol=1e-6)
  assert found.seeds == 2 and study_report.learning_curve([[], []]) is None
  one = study_report.learning_curve([runs[0][:2], []])  # shorter than the smoothing, and alone
  assert len(one.x) == 2 and np.isnan(one.low).all() and one.seeds == 1


def test_a_curve_is_of_finished_seeds_where_there_are_any(tmp_path, quick):
  cells = made_cells(tmp_path, {"a": "4"}, seeds=(0, 1))
  run(cells[:2], tmp_path)
  row = {"phase": "interaction", "step": 1, "env_steps": 10, "time": 0.0, "success": 0.5}
  (cells[3].folder).mkdir(parents=True)
  (cells[3].folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  line = study_report.curves(cells, "toy")["a"]
  assert (len(line.x), line.seeds) == (4, 1)
  assert len(study_report.curves(cells[2:], "toy")["a"].x) == 1  # nothing else is there


def test_a_seed_that_never_reached_a_stage_says_nothing_of_it():
  of = lambda reached, done: {"stages": evaluate.stage_rates(
    np.array([[i < reached, i < done] for i in range(4)]), ("Reach", "Place")
  )}  # fmt: skip
  found = study_report.stage_rates({0: of(4, 1), 1: of(0, 0), 2: of(2, 1)})
  assert found["P(Reach)"].values == (1.0, 0.0, 0.5) and found["P(Place | Reach)"].values == (0.25, 0.5)


def test_differences_tell_in_which_stage_they_are():
  """Of all episodes, paired by seed; the last stage is success itself."""

  def evaluation(reach, success):
    count = lambda n: {"count": n, "n": 10, "rate": n / 10}
    both = {"Reach": count(reach), "Push": count(success)}
    return dict(episodes=10, temperature=1.0, env_steps=0, success_once=count(success), success_at_end=count(0),
                stages=[{"name": name, "marginal": n, "conditional": n} for name, n in both.items()])  # fmt: skip

  found = {"sft": {0: evaluation(5, 2), 1: evaluation(6, 2)}, "sta_tpo": {0: evaluation(8, 3), 1: evaluation(9, 1)}}
  _, (_, header, (row,)) = study_report.tables("push_cube", found, [])
  assert header[1:] == ("success once", "at end", "Reach completed")
  assert row[0] == "sta_tpo − sft" and row[-1] == "+30.0 [+30.0, +30.0] (+30.0, +30.0)"
  assert row[1].endswith("(+10.0, -10.0)")


def test_results_are_written_from_what_is_there(tmp_path, quick):
  cells = made_cells(tmp_path, {"a": "4", "b": "6"}, seeds=(0, 1, 2))
  assert {path.name for path in study_report.write(tmp_path, CONFIG, cells)} == {"results.md", "results.html"}
  run(cells, tmp_path)
  names = {path.name for path in study_report.write(tmp_path, CONFIG, cells)}
  assert names == {"results.md", "results.html", "curves-toy.svg", "curves-toy.png"}
  text = (tmp_path / "results.md").read_text()
  assert "| b | 3 | 40 | 60.0 [60.0, 60.0] (60.0, 60.0, 60.0) | 18/30 [42.3, 75.4] |" in text
  assert "| b − a | +20.0 [+20.0, +20.0]" in text
  assert text.count("| sft |") == 1 and "| a − sft | +10.0" in text and "Not finished" not in text
  page = (tmp_path / "results.html").read_text()
  assert page.count("<table") == 2 and "fill-opacity" in page and "environment steps" in page
  assert (tmp_path / "curves-toy.svg").read_text().startswith("<?xml")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_study_on_the_toy_simulator(tmp_path, toy_environment):
  """Through the front door; the second time nothing is run again."""
  command = [sys.executable, "-m", "stare_jax.study", "--config=configs/study.py", f"--workdir={tmp_path}/s",
             "--jobs=2", "--threads=1", "--config.base=tests/toy_run.py", "--config.tasks=('pull_cube',)",
             "--config.seeds=(0,)", "--config.methods=('sta_ppo','sta_tpo')",
             "--config.interaction.iterations=2",
             "--config.changes=('report.videos=0','preference.loss=window_tpo','preference.both_failed=True')"]
  for _ in range(2):
    done = subprocess.run(command, cwd=toy_run.ROOT, env=toy_environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
  assert "3 cells, 3 of them finished before" in done.stderr and "started" not in done.stderr
  text = (tmp_path / "s" / "results.md").read_text()
  assert "| sta_ppo | 1 |" in text and "| sta_tpo | 1 |" in text and "Not finished" not in text
  rows = report.read_metrics(tmp_path / "s" / "pull_cube" / "sta_tpo" / "seed0" / "metrics.jsonl")
  assert {row["phase"] for row in rows} == {"preference"} and "windows" in rows[-1]
  # Without the changes its cells are refused, or go on as another study's; the tables of this one are still there.
  told = dict(cwd=toy_run.ROOT, env=toy_environment, capture_output=True, text=True, check=False)
  done = subprocess.run(command[:-1], **told)
  assert done.returncode == 1 and "3 cells were run before with other settings" in done.stderr, done.stderr
  assert (tmp_path / "s" / "results-before-1.md").read_text() == text != (tmp_path / "s" / "results.md").read_text()
