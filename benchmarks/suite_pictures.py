"""What every evaluation suite changes, in one picture: a row per suite, first pictures of a few episodes per task.

  python -m benchmarks.suite_pictures [--tasks pick_cube put_carrot_on_plate] [--episodes 3] [--out docs/suites.jpg]

A suite that a task cannot have leaves its place empty. The moved object is shown after it moved.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageDraw

from stare_jax import sims, suites, tasks

BAR = 14  # pixels of a row's title


def column(task: tasks.Task, size: int, episodes: int, first: int) -> list[np.ndarray | None]:
  """For each suite uint8[size, episodes * size, 3], or None where the task cannot have it."""
  rest = np.array([0, 0, 0, 0, 0, 0, 1], np.float32)
  strips: list[np.ndarray | None] = []
  with sims.make(task=task, num_envs=1, num_workers=1, image_size=size) as sim:
    for suite in suites.SUITES:
      if suites.why_not(suite, task, task.simulator):
        strips.append(None)
        continue
      sim.suite = suites.for_worker(suite, task) if suite.changes else None
      frames = []
      for seed in range(first, first + episodes):
        frame = sim.reset([0], [seed])
        for _ in range(max(suite.shown)):
          frame = sim.step([0], rest[None])
        frames.append(frame.images[0])
      strips.append(np.concatenate(frames, axis=1))
  return strips


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", nargs="+", default=["pick_cube", "put_carrot_on_plate"])
  parser.add_argument("--episodes", type=int, default=3)
  parser.add_argument("--first", type=int, default=0, help="seed of the first episode")
  parser.add_argument("--size", type=int, default=96, help="of a picture, pixels")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/suites.jpg"))
  arguments = parser.parse_args()
  size, episodes = arguments.size, arguments.episodes
  columns = [column(tasks.get(name), size, episodes, arguments.first) for name in arguments.tasks]
  picture = Image.new("RGB", (len(columns) * episodes * size, len(suites.SUITES) * (size + BAR)), "white")
  draw = ImageDraw.Draw(picture)
  for row, suite in enumerate(suites.SUITES):
    draw.text((3, row * (size + BAR) + 1), f"{suite.name} ({suite.family})", fill="black")
    for x, strips in enumerate(columns):
      if strips[row] is not None:
        picture.paste(Image.fromarray(strips[row]), (x * episodes * size, row * (size + BAR) + BAR))
  picture.save(arguments.out, quality=65, optimize=True)
  print(f"{arguments.out}: {picture.width} x {picture.height}, {arguments.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
  main()
