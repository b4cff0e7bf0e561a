"""How often the scripted experts succeed, undisturbed and disturbed, on seeds that were never used for development.

  python -m benchmarks.experts [--tasks pull_cube push_cube] [--noise 0.0 0.3] [--episodes 200] [--seed 40000] [--own]
  python -m benchmarks.experts --tasks put_carrot_on_plate --noise 0.0 --to-the-end [--published]

One JSON line per task and noise: success with its 95 % Wilson interval, steps of the successful episodes (mean, least,
most), and how many episodes completed each stage. Noise disturbs the three translations on their way to the simulator,
as imitation.expert_noise does; with --own it is the expert's, on all six motion dimensions. With --published the seeds
are every start that was published for the task, once. With --to-the-end an episode runs on to the horizon, and success
is counted at its last state, with nothing held.
"""

from __future__ import annotations

import argparse
import json

import numpy as np

from stare_jax import evaluate, sims, stages, tasks
from stare_jax.episode import Episode, unpack_signals
from stare_jax.rollout import Collector, ExpertActor, Start


class Noisy:
  """A task whose expert adds its own noise."""

  def __init__(self, task: tasks.Task, noise: float):
    self.expert, self.unit = lambda rng, _: task.expert(rng, noise), task.unit


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", nargs="+", default=list(tasks.names("maniskill")))
  parser.add_argument("--noise", nargs="+", type=float, default=[0.0, 0.3])
  parser.add_argument("--episodes", type=int, default=200)
  parser.add_argument("--seed", type=int, default=40_000, help="of the first episode")
  parser.add_argument("--own", action="store_true", help="the expert's own noise, instead of a disturbance behind it")
  parser.add_argument("--published", action="store_true", help="every published start of the task instead of seeds")
  parser.add_argument("--to-the-end", action="store_true", help="count success at the horizon, after the release")
  parser.add_argument("--horizon", type=int, default=0, help="control steps; 0: the task's own")
  parser.add_argument("--envs", type=int, default=16)
  parser.add_argument("--workers", type=int, default=2)
  parser.add_argument("--python", default="", help="the simulator's interpreter, as sim.python")
  arguments = parser.parse_args()
  for name in arguments.tasks:
    task = tasks.get(name)
    seeds = range(arguments.seed, arguments.seed + arguments.episodes)
    if arguments.published:
      if task.starts is None:
        parser.error(f"--published: {name} has no published starts")
      seeds = range(task.starts)
    with sims.make(
      task=task, num_envs=arguments.envs, num_workers=arguments.workers, image_size=16, draw=False,
      python=arguments.python,
    ) as sim:
      for noise in arguments.noise:
        actor = ExpertActor(Noisy(task, noise), 0.0) if arguments.own else ExpertActor(task, noise)
        collector = Collector(
          sim, task, actor, horizon=arguments.horizon or task.horizon, groups=min(2, arguments.envs),
          stop_on_success=not arguments.to_the_end,
        )  # fmt: skip
        episodes = collector.episodes([Start(seed) for seed in seeds])
        row = dict(task=name, noise=noise, own=arguments.own, seeds=[seeds[0], seeds[-1]])
        print(json.dumps(row | figures(task, episodes, arguments.to_the_end)), flush=True)


def figures(task: tasks.Task, episodes: list, to_the_end: bool) -> dict:
  """`steps` are those to the first success, of the episodes that count as successful."""
  good = [released(episode) if to_the_end else episode.terminated for episode in episodes]
  count = sum(good)
  low, high = evaluate.wilson(count, len(episodes))
  steps = [1 + int(np.argmax(episode.success[1:])) for episode, ok in zip(episodes, good, strict=True) if ok] or [0]
  completed = np.stack([item.completed for item in stages.annotate(task, episodes)]).sum(0)
  return dict(
    success=f"{count}/{len(episodes)}", interval=[round(low, 3), round(high, 3)],
    steps=[round(float(np.mean(steps)), 1), min(steps), max(steps)],
    stages={stage.name: int(n) for stage, n in zip(task.stages, completed, strict=True)},
  )  # fmt: skip


def released(episode: Episode) -> bool:
  """Success at the last state, with nothing held."""
  return bool(episode.success[-1]) and not unpack_signals(episode.signals[-1])["grasped"]


if __name__ == "__main__":
  main()
