"""What shaping pays where a stage is completed, by the offset of the potential. JSON lines on standard output.

  python -m benchmarks.stage_rewards --workdir=runs/pull_cube-default-seed0 --data demonstrations --offset 0.5 1

Reads a run's recorded episodes (data/<DATA>/*.episodes), nothing is simulated. For every change of stage: how often it
happened, the mean of Phi(s', g + 1) - Phi(s, g), the mean of the shaped reward gamma Phi' - Phi (Eq. Shape), and how
often that is a penalty. "inside" is all steps that change no stage. An offset is too small for a task whose stage
changes are penalised.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import numpy as np

from stare_jax import dataset, stages, tasks
from stare_jax.pipeline_rewards import stage_of


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--data", default="demonstrations", help="a folder of RUN/data")
  parser.add_argument("--offset", default=[0.5, 1.0], type=float, nargs="+")
  parser.add_argument("--discount", default=0.0, type=float, help="0: the run's")
  arguments = parser.parse_args()
  config = json.loads((arguments.workdir / "config.json").read_text())
  paths = sorted((arguments.workdir / "data" / arguments.data).glob("*.episodes"))
  if not paths:
    sys.exit(f"{arguments.workdir / 'data' / arguments.data} has no *.episodes: name a run and one of its data folders")
  task, discount = tasks.get(config["task"]), arguments.discount or config["interaction"]["hp"]["discount"]
  episodes = [episode for path in paths for episode in dataset.open(path)[0]]
  for offset in arguments.offset:
    for row in changes(task, stages.annotate(task, episodes, offset=offset), discount):
      print(json.dumps({"task": task.name, "episodes": len(episodes), "offset": offset, "discount": discount} | row))


def changes(task: tasks.Task, annotated: list, discount: float) -> list[dict]:
  """One row for every change of stage, and one for all other steps."""
  potential = [np.asarray(item.potential, float) for item in annotated]
  before, rise = (np.concatenate([f(stage_of(item)) for item in annotated]) for f in (lambda g: g[:-1], np.diff))
  now, then = (np.concatenate([p[part] for p in potential]) for part in (slice(None, -1), slice(1, None)))
  reward = discount * then - now
  names = [stage.name for stage in task.stages]
  where = {f"{a} -> {b}": (rise > 0) & (before == k) for k, (a, b) in enumerate(zip(names, names[1:]))}
  return [
    {"change": change, "steps": int(at.sum()), "rise": mean(then[at] - now[at]), "reward": mean(reward[at]),
     "penalised": mean(reward[at] < 0)}
    for change, at in {**where, "inside": rise == 0}.items()
  ]  # fmt: skip


def mean(values: np.ndarray) -> float | None:
  return round(float(values.mean()), 4) if len(values) else None


if __name__ == "__main__":
  main()
