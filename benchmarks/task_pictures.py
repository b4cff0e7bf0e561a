"""A strip of pictures per task with the timeline of its stages, from one episode of the scripted expert, for the docs.

  python -m benchmarks.task_pictures [--tasks put_carrot_on_plate] [--seed 2] [--out docs/tasks]

Writes OUT/TASK.jpg: frames evenly spaced from the reset to a few steps after the first success, and below them one
coloured bar per stage over the steps in which the episode was in it.
"""

from __future__ import annotations

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageDraw

from stare_jax import sims, stages, tasks
from stare_jax.episode import unpack_signals

COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2")
AFTER = 6  # steps shown after the first success
BAR = 18  # height of the timeline, pixels


def demonstrate(task: tasks.Task, seed: int, size: int, python: str = "") -> tuple[np.ndarray, np.ndarray]:
  """Images uint8[T+1, size, size, 3] and signals float32[T+1, S] of one episode of the expert."""
  expert = task.expert(np.random.default_rng(0), 0.0)
  with sims.make(task=task, num_envs=1, num_workers=1, image_size=size, python=python) as sim:
    frames, left = [sim.reset([0], [seed])], AFTER
    while len(frames) <= task.horizon and left:
      frames.append(sim.step([0], expert.act(unpack_signals(frames[-1].signals[0]))[None]))
      left -= bool(unpack_signals(np.concatenate([f.signals for f in frames]))["success"].any())
  return np.concatenate([f.images for f in frames]), np.concatenate([f.signals for f in frames])


def strip(task: tasks.Task, images: np.ndarray, signals: np.ndarray, count: int) -> Image.Image:
  """`count` frames side by side over the timeline of the stages; what lies after the last stage is grey."""
  size, last = images.shape[1], len(images) - 1
  shown = np.linspace(0, last, count).round().astype(int)
  picture = Image.new("RGB", (count * size, size + BAR), "#dddddd")
  for column, t in enumerate(shown):
    picture.paste(Image.fromarray(images[t]), (column * size, 0))
  draw, at = ImageDraw.Draw(picture), 0.0
  for stage, done, colour in zip(task.stages, stages.label(task, signals)[1], COLOURS, strict=False):
    end = (done if done >= 0 else last) / last * picture.width
    draw.rectangle([at, size, end, size + BAR], fill=colour)
    draw.text((at + 3, size + 3), stage.name, fill="white")
    at = end
    if done < 0:
      break
  return picture


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", nargs="+", default=list(tasks.names("maniskill")))
  parser.add_argument("--seed", type=int, default=2)
  parser.add_argument("--size", type=int, default=144, help="of a frame, pixels")
  parser.add_argument("--frames", type=int, default=6)
  parser.add_argument("--python", default="", help="the simulator's interpreter, as sim.python")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("docs/tasks"))
  arguments = parser.parse_args()
  arguments.out.mkdir(parents=True, exist_ok=True)
  for name in arguments.tasks:
    task = tasks.get(name)
    picture = strip(task, *demonstrate(task, arguments.seed, arguments.size, arguments.python), arguments.frames)
    path = arguments.out / f"{name}.jpg"
    picture.save(path, quality=85, optimize=True)
    print(f"{path}: {picture.width} x {picture.height}, {path.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
  main()
