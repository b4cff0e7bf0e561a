"""Speed of StARe on the host: segmentation + cost + potential + shaping, in environment steps per second on
one core.

  python -m benchmarks.stages [--tasks push_cube stack_cube] [--episodes 4000] [--steps 50]

Signals are random: a slow random walk from random starts, so that stages are entered and left at all times.
Prints one JSON line per task and mode: "offline" judges whole trajectories (`annotate` + `shaped_reward`),
"loop" does the same one trajectory at a time, "online" steps a `Separator` over 64 environments and shapes as
it goes. The best of three.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np

from stare_jax import stages, tasks
from stare_jax.episode import SIGNALS, Episode, pack_signals


def make_episodes(task: str, count: int, steps: int, rng: np.random.Generator) -> list[Episode]:
  """Random walks with plausible magnitudes: unit quaternions, centimetres per step, flags that flip now and then."""
  lead = (count, steps + 1)
  signals = {name: rng.normal(0, 0.3, (*lead, *shape)).astype(np.float32) for name, shape in SIGNALS.items()}
  for name in ("tcp_pose", "object_pose", "goal_pose"):
    position = 0.1 * rng.normal(size=(count, 1, 3)) + np.cumsum(0.02 * rng.normal(size=(*lead, 3)), axis=1)
    quaternion = rng.normal(size=(*lead, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    signals[name] = np.concatenate([position, quaternion], axis=-1)
  for name, rate in (("grasped", 0.3), ("success", 0.02)):
    signals[name] = (rng.random(lead) < rate).astype(np.float32)
  packed = pack_signals(signals)
  zeros = np.zeros((steps, 7), np.float32)
  images = np.zeros((steps, 1, 1, 3), np.uint8)
  return [
    Episode(task, i, "", images, packed[i], zeros, zeros.astype(np.int32), zeros, zeros[:, 0], 0.0, bool(i % 2))
    for i in range(count)
  ]


def shape(staged: list, rewards: list) -> None:
  for item, reward in zip(staged, rewards, strict=True):
    stages.shaped_reward(reward, item.potential, item.episode.terminated, discount=0.99)


def offline(task, episodes: list[Episode], rewards: list, regress: bool = False) -> None:
  shape(stages.annotate(task, episodes, regress=regress), rewards)


def loop(task, episodes: list[Episode], rewards: list) -> None:
  for episode, reward in zip(episodes, rewards, strict=True):
    shape(stages.annotate(task, [episode]), [reward])


def online(task, signals: np.ndarray, reward: np.ndarray) -> None:
  """signals float32[T+1, N, S], reward float32[N, T]."""
  separator = stages.Separator(task, signals.shape[1])
  separator.reset(range(signals.shape[1]), signals[0])
  phi = [separator.potential(signals[0])]
  for now in signals[1:]:
    separator.step(now)
    phi.append(separator.potential(now))
  terminated = np.zeros(len(reward), bool)
  stages.shaped_reward(reward, np.stack(phi, axis=-1), terminated, discount=0.99)


def best(run, *args, repeats: int = 3, **options) -> float:
  times = []
  for _ in range(repeats):
    begin = time.process_time()
    run(*args, **options)
    times.append(time.process_time() - begin)
  return min(times)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--tasks", nargs="+", default=["push_cube", "stack_cube", "lift_peg_upright"])
  parser.add_argument("--episodes", type=int, default=4000)
  parser.add_argument("--steps", type=int, default=50)
  args = parser.parse_args()
  for name in args.tasks:
    task = tasks.get(name)
    episodes = make_episodes(name, args.episodes, args.steps, np.random.default_rng(0))
    rewards = [e.success[1:].astype(np.float32) for e in episodes]
    few, envs = args.episodes // 10, 64
    stacked = np.stack([e.signals for e in episodes[:envs]], axis=1)
    timed = {
      "offline": (args.episodes, best(offline, task, episodes, rewards)),
      "offline_regress": (args.episodes, best(offline, task, episodes, rewards, regress=True)),
      "loop": (few, best(loop, task, episodes[:few], rewards[:few])),
      "online": (stacked.shape[1], best(online, task, stacked, np.stack(rewards[:envs]))),
    }
    for mode, (count, seconds) in timed.items():
      rate = count * args.steps / seconds
      row = {
        "benchmark": "stages",
        "task": name,
        "mode": mode,
        "stages": len(task.stages),
        "steps_per_s": round(rate),
      }
      print(json.dumps({**row, "steps": count * args.steps, "core_seconds": round(seconds, 4)}), flush=True)


if __name__ == "__main__":
  main()
