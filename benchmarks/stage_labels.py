"""Whether the stages of a run's recorded episodes are those that they would have been given online. JSON lines.

  python -m benchmarks.stage_labels runs/pull_cube-default-seed0 [RUN ...]

Reads every recorded episode of the runs (data/**/*.episodes), nothing is simulated: each is labelled as a whole
(`stages.annotate`, what the phases do) and again by a `stages.Separator`, one step at a time. A line for each folder of
data counts the states and those with another stage or another potential, and the episodes in which a stage was
completed at another step; the exit status is 1 if there is one.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys

import numpy as np

from stare_jax import dataset, stages, tasks
from stare_jax.episode import Episode
from stare_jax.pipeline_rewards import stage_of


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("runs", type=pathlib.Path, nargs="+")
  rows = [row | {"run": str(run)} for run in parser.parse_args().runs for row in compared(run)]
  for row in rows:
    print(json.dumps(row))
  sys.exit(any(row["states_differ"] or row["episodes_differ"] for row in rows))


def compared(run: pathlib.Path) -> list[dict]:
  """One row for each folder of recorded episodes.

  Raises: SystemExit where there is none.
  """
  task = tasks.get(json.loads((run / "config.json").read_text())["task"])
  paths = sorted((run / "data").rglob("*.episodes"))
  if not paths:
    raise SystemExit(f"{run / 'data'} has no *.episodes: name the folder of a run that recorded some")
  rows = []
  for folder in sorted({path.parent for path in paths}):
    episodes = [episode for path in paths if path.parent == folder for episode in dataset.open(path)[0]]
    states, *differ = count(task, episodes)
    rows.append({"task": task.name, "data": str(folder.relative_to(run / "data")), "episodes": len(episodes),
                 "states": states, "states_differ": differ[0], "episodes_differ": differ[1]})  # fmt: skip
  return rows


def count(task: tasks.Task, episodes: list[Episode]) -> tuple[int, int, int]:
  """(states of all episodes, those that are judged otherwise online, episodes with other completions)."""
  states = differ = otherwise = 0
  for item in stages.annotate(task, episodes):
    signals = np.asarray(item.episode.signals)
    online = stages.Separator(task, 1)
    online.reset([0], signals[:1])
    stage, potential = [int(online.stage[0])], [online.potential(signals[:1])[0]]
    for now in signals[1:]:
      stage.append(int(online.step(now[None])[0]))
      potential.append(online.potential(now[None])[0])
    other = (np.array(stage) != stage_of(item)) | ~np.isclose(potential, item.potential, rtol=0, atol=1e-6)
    states, differ = states + len(signals), differ + int(other.sum())
    otherwise += not np.array_equal(online.completed_at[0], item.completed_at)
  return states, differ, otherwise


if __name__ == "__main__":
  main()
