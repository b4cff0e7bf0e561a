"""How often the scripted experts succeed, undisturbed and disturbed, on seeds that were never used for development.

  python -m benchmarks.experts [--tasks pull_cube push_cube] [--noise 0.0 0.3] [--episodes 200] [--seed 40000] [--own]

One JSON line per task and noise: success with its 95 % Wilson interval, steps of the successful episodes (mean, least,
most), and how many episodes completed each stage. Noise disturbs the three translations on their way to the simulator,
as imitation.expert_noise does; with --own it is the expert's, on all six motion dimensions.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from stare_jax import evaluate, sims, stages, tasks
from stare_jax.rollout import Collector, ExpertActor, Start


class Noisy:
  """A task whose expert adds its own noise."""

  def __init__(self, task: tasks.Task, noise: float):
    self.expert = lambda rng, _: task.expert(rng, noise)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", nargs="+", default=list(tasks.names()))
  parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.3])
  parser.add_argument("--episodes", type=int, default=200)
  parser.add_argument("--seed", type=int, default=40_000, help="of the first episode")
  parser.add_argument("--own", action="store_true", help="the expert's own noise, instead of a disturbance behind it")
  arguments = parser.parse_args()
  for name in arguments.tasks:
    task = tasks.get(name)
    with sims.make(task=task, num_envs=16, num_workers=2, image_size=16) as sim:
      for noise in arguments.noise:
        actor = ExpertActor(Noisy(task, noise), 0.0) if arguments.own else ExpertActor(task, noise)
        collector = Collector(sim, task, actor, horizon=task.horizon)
        episodes = collector.episodes([Start(arguments.seed + i) for i in range(arguments.episodes)])
        print(json.dumps(dict(task=name, noise=noise, own=arguments.own) | figures(task, episodes)), flush=True)


def figures(task: tasks.Task, episodes: list) -> dict:
  count = sum(episode.terminated for episode in episodes)
  low, high = evaluate.wilson(count, len(episodes))
  steps = [len(episode) for episode in episodes if episode.terminated] or [0]
  completed = np.stack([item.completed for item in stages.annotate(task, episodes)]).sum(0)
  return dict(
    success=f"{count}/{len(episodes)}", interval=[round(low, 3), round(high, 3)],
    steps=[round(float(np.mean(steps)), 1), min(steps), max(steps)],
    stages={stage.name: int(n) for stage, n in zip(task.stages, completed, strict=True)},
  )  # fmt: skip


if __name__ == "__main__":
  main()
