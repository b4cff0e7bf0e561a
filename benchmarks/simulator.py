"""Environment steps per second of the simulator, with RGB images, beside stock ManiSkill.

  python -m benchmarks.simulator [--task pick_cube] [--sizes 64 128 224] [--workers 1 2] [--envs 2] [--seconds 5]

Prints one JSON line per figure, each measured after a warm-up:
  stock   gym.make with ManiSkill's own meshes, shader and step, random actions, in a process of its own
  pool    `sims.make`: environments on worker processes, a reset every `horizon` steps included; with `actions` of the
          task's scripted expert, recorded beforehand, as in real episodes, or random ones, as in stock
  parts   milliseconds of one control step of the expert's inside a worker: action (controller), physics, drawing (by
          the renderer, until its layers are here), picture (made of them), signals; and reset
  suite   with --suite NAME ... (or all), nothing else: the expert's episodes of an evaluation suite beside its
          in-distribution ones, in pairs in one worker; `over` is the share of processor time that it costs more, resets
          included (the pairs' median, and quartiles)
Random actions can lead an arm to where it cannot go on, and there it stays (a WidowX after 14 of 60 steps). Then
nothing moves, so they say little about episodes.
Meant for idle cores: a busy machine halves the figures. `cpu_ms_per_step` is the processor time of one step of one
environment in its worker and suffers less.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import numpy as np

from stare_jax import sims, suites, tasks
from stare_jax.episode import unpack_signals

_STOCK = """
import json, sys, time, warnings; warnings.filterwarnings("ignore")
import gymnasium as gym, mani_skill.envs, numpy as np
env_id, size, seconds, bridge = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), sys.argv[4] == "bridge"
unit, horizon = float(sys.argv[5]), int(sys.argv[6])
common = dict(num_envs=1, sim_backend="physx_cpu", render_backend="cpu")
if bridge:  # its own robot, control and camera, 640 x 480
  env = gym.make(env_id, obs_mode="rgb+segmentation", **common)
else:
  env = gym.make(env_id, robot_uids="panda", obs_mode="rgb", control_mode="pd_ee_delta_pose",
                 sensor_configs=dict(width=size, height=size), **common)
rng = np.random.default_rng(0)
draw = lambda: rng.uniform(-1, 1, 7).astype(np.float32) * np.float32(unit)
env.reset(seed=0)
for _ in range(3): env.step(draw())
start, cpu, steps = time.perf_counter(), time.process_time(), 0
while time.perf_counter() - start < seconds:
  if steps % horizon == 0: env.reset(seed=steps)
  env.step(draw())
  steps += 1
wall = time.perf_counter() - start
print(json.dumps(dict(steps_per_second=round(steps / wall, 1),
                      cpu_ms_per_step=round(1e3 * (time.process_time() - cpu) / steps, 2))))
"""

_PARTS = """
import json, sys, time
import numpy as np
from stare_jax import sims, tasks
from stare_jax.episode import SIGNAL_SIZE, unpack_signals
from stare_jax.sims import maniskill
task, size, steps = tasks.get(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
env = maniskill.make(**sims.spec(task, size))
times = {}
def timed(name, call):
  start = time.perf_counter(); result = call()
  times.setdefault(name, []).append(1e3 * (time.perf_counter() - start))
  return result
for t in range(steps):
  if t % task.horizon == 0:
    timed("reset", lambda: env.reset(t))
    expert, signals = task.expert(np.random.default_rng(t), 0.0), env._signals()
  action = expert.act(unpack_signals(signals))
  timed("action", lambda: env._set_action(action))
  timed("physics", env._simulate)
  timed("drawing", lambda: (env.start_picture(), env.fetch_picture()))
  timed("picture", env._picture)
  signals = timed("signals", env._signals)
print(json.dumps({f"{name}_ms": round(float(np.median(value)), 2) for name, value in times.items()}))
"""


def report(**row) -> None:
  print(json.dumps(row), flush=True)


def in_process(script: str, *arguments: object) -> dict:
  """The last line that a script prints, as JSON."""
  command = [sys.executable, "-c", script, *map(str, arguments)]
  done = subprocess.run(command, check=True, capture_output=True, text=True)
  return json.loads(done.stdout.splitlines()[-1])


def cpu_seconds(sim: sims.pool.Pool) -> float:
  """Processor time of the workers so far."""
  clocks = [(~worker.process.pid << 3) | 2 for worker in sim._workers]  # Linux: that of all threads of a process, in ns
  return sum(map(time.clock_gettime, clocks))


def demonstrated(task: tasks.Task, sim: sims.pool.Pool, seeds: list[int]) -> np.ndarray:
  """float32[horizon, len(seeds), 7]: what the task's expert does from the starts of `seeds`, one per environment."""
  envs = range(len(seeds))
  experts = [task.expert(np.random.default_rng(seed), 0.0) for seed in seeds]
  frame, actions = sim.reset(envs, seeds), np.zeros((task.horizon, len(seeds), 7), np.float32)
  for t in range(task.horizon):
    actions[t] = [expert.act(unpack_signals(row)) for expert, row in zip(experts, frame.signals, strict=True)]
    frame = sim.step(envs, actions[t])
  return actions


def pool(task: tasks.Task, size: int, num_workers: int, num_envs: int, seconds: float, by: str) -> dict:
  """Figures of episodes from the starts 0 to num_envs - 1, again and again, with actions `by` "expert" or "random"."""
  envs = range(num_envs)
  with sims.make(task=task, num_envs=num_envs, num_workers=num_workers, image_size=size) as sim:
    if by == "expert":
      actions = demonstrated(task, sim, [*envs])
    else:
      drawn = np.random.default_rng(0).uniform(-1, 1, (task.horizon, num_envs, 7))
      actions = (drawn * task.unit).astype(np.float32)
      sim.reset(envs, envs)
    start, cpu, steps = time.perf_counter(), cpu_seconds(sim), 0
    while steps % task.horizon or time.perf_counter() - start < seconds:  # whole episodes
      if steps % task.horizon == 0:
        sim.reset(envs, envs)
      sim.step(envs, actions[steps % task.horizon])
      steps += 1
    wall, total = time.perf_counter() - start, steps * num_envs
    busy = cpu_seconds(sim) - cpu
  return dict(steps_per_second=round(total / wall, 1), cpu_ms_per_step=round(1e3 * busy / total, 2))


def suite_costs(task: tasks.Task, size: int, names: list[str], rounds: int) -> None:
  """The expert's episodes, `horizon` steps each, in one process.

  Every episode of a suite has one in distribution right before or after it, from the same seed, and only such pairs are
  compared: what else a machine does makes it faster or slower over seconds.
  """
  chosen = [s for s in suites.choose(names)[0] if not suites.why_not(s, task, task.simulator)]
  pairs: dict[str, list[list[float]]] = {s.name: [] for s in chosen if s.changes}
  with sims.make(task=task, num_envs=1, num_workers=1, image_size=size) as sim:

    def episode(suite: suites.Suite, seed: int) -> float:
      sim.suite = suites.for_worker(suite, task) if suite.changes else None
      before = cpu_seconds(sim)
      demonstrated(task, sim, [seed])
      return 1e3 * (cpu_seconds(sim) - before) / task.horizon

    for i in range(-1, rounds):  # the first is a warm-up
      for suite in (s for s in chosen if s.changes):
        order = (suites.IN_DISTRIBUTION, suite) if i % 2 else (suite, suites.IN_DISTRIBUTION)
        ms = {s.name: episode(s, 1000 + i) for s in order}
        if i >= 0:
          pairs[suite.name].append([ms[suites.IN_DISTRIBUTION.name], ms[suite.name]])
  for name, found in pairs.items():
    usual, changed = np.transpose(found)
    report(what="suite", task=task.name, image_size=size, suite=name, in_distribution_ms=round(np.median(usual), 2),
           cpu_ms_per_step=round(np.median(changed), 2), over=round(np.median(changed / usual) - 1, 3),
           quartiles=np.round(np.quantile(changed / usual, [0.25, 0.75]) - 1, 3).tolist(), pairs=rounds)  # fmt: skip


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--task", default="pick_cube")
  parser.add_argument("--sizes", type=int, nargs="+", default=[64, 128, 224])
  parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
  parser.add_argument("--envs", type=int, default=2, help="environments per worker")
  parser.add_argument("--seconds", type=float, default=5.0)
  parser.add_argument(
    "--actions", nargs="+", choices=["expert", "random"], default=["expert", "random"], help="of the pool"
  )
  parser.add_argument("--no-stock", action="store_true", help="skip the comparison")
  parser.add_argument("--suite", nargs="+", default=[], help="names or families of evaluation suites, or all")
  parser.add_argument("--rounds", type=int, default=20, help="episodes of each suite")
  arguments = parser.parse_args()
  task = tasks.get(arguments.task)
  if arguments.suite:
    try:
      suites.choose(arguments.suite)
    except ValueError as error:
      parser.error(str(error))
    for size in arguments.sizes:
      suite_costs(task, size, arguments.suite, arguments.rounds)
    return
  scene = task.env_options.get("scene", "table")
  for size in arguments.sizes:
    common = dict(task=task.name, image_size=size)
    report(what="parts", **common, **in_process(_PARTS, task.name, size, 100))
    if not arguments.no_stock:
      stock = in_process(_STOCK, task.env_id, size, arguments.seconds, scene, task.unit, task.horizon)
      report(what="stock", **common, num_workers=1, **stock)
    for num_workers in arguments.workers:
      for by in arguments.actions:
        figures = pool(task, size, num_workers, arguments.envs * num_workers, arguments.seconds, by)
        report(what="pool", **common, num_workers=num_workers, actions=by, **figures)


if __name__ == "__main__":
  main()
