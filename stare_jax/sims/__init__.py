"""Simulators behind one vector interface: N environments in worker processes, images and signals in shared memory.

The learner's process stays free of torch and ManiSkill: an environment class is named by a string, and only the worker
imports it. A new simulator is one file with an environment class (see `worker.Environment`) and one line in `REGISTRY`.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
  from stare_jax.sims.pool import Pool

# name -> environment class, or a function that picks one; imported in the worker process only.
REGISTRY: dict[str, str] = {
  "maniskill": "stare_jax.sims.maniskill:make",
  "simpler": "stare_jax.sims.simpler:Simpler",
  "toy": "stare_jax.sims.toy:Toy",
}


class SimulatorError(RuntimeError):
  """The simulator cannot go on; the message says what happened and what to do."""


class Frame(NamedTuple):
  """What `n` environments show after a request, in the order in which they were asked for.

  Attributes:
    images: uint8[n, H, W, 3], a copy.
    signals: float32[n, S], packed as in `episode.SIGNALS`, a copy.
    lost: bool[n]; the environment's worker died, hung or failed since its last reset. Its image and signals are zeros,
      its episode is to be discarded, and it answers every step in this way until it is reset.
  """

  images: np.ndarray
  signals: np.ndarray
  lost: np.ndarray


def resolve(name: str) -> str:
  """The "module:attribute" of an environment class; an unknown name is an error that suggests the nearest."""
  if name not in REGISTRY:
    near = difflib.get_close_matches(name, REGISTRY, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"unknown simulator {name!r}.{hint} Known simulators: {', '.join(sorted(REGISTRY))}")
  return REGISTRY[name]


def load(target: str) -> Any:
  """The object behind "module:attribute"."""
  module, _, attribute = target.partition(":")
  return getattr(importlib.import_module(module), attribute)


def spec(task: Any, image_size: int, **options: Any) -> dict[str, Any]:
  """The arguments of an environment class for `task`; `options` are the class's own."""
  return dict(
    env_id=task.env_id,
    actors=tuple(task.actors),
    camera=None if task.camera is None else (task.camera.eye, task.camera.target, task.camera.fov),
    env_options=dict(task.env_options),
    image_size=image_size,
    **options,
  )


def make(
  name: str = "",
  *,
  task: Any,
  num_envs: int,
  num_workers: int,
  image_size: int,
  timeout: float = 60.0,
  python: str = "",
  **options: Any,
) -> Pool:
  """Starts `num_workers` processes that share `num_envs` environments of `task`.

  Args:
    name: a key of `REGISTRY`; "": the task's own simulator.
    task: a `tasks.Task`, or anything with its `env_id`, `actors`, `camera` and `env_options`.
    num_envs: N; environment i lives on worker i % num_workers.
    num_workers: processes; one per core that the simulator may keep busy.
    image_size: H = W in pixels.
    timeout: seconds without an answer after which a worker counts as hung and is replaced.
    python: path or command of the interpreter that the workers run under; "": the learner's own. The other one needs
      numpy and the simulator's packages, and nothing of the learner's.
    **options: `pool.Pool`'s start_timeout, max_failures and wait; the rest goes to the environment class.

  Returns: a running `pool.Pool`; use it as a context manager, or call `close()`.
  """
  from stare_jax.sims import pool

  mine = {key: options.pop(key) for key in ("start_timeout", "max_failures", "wait", "action_size") if key in options}
  target = resolve(name or getattr(task, "simulator", "maniskill"))
  return pool.Pool(
    target, spec(task, image_size, **options), num_envs=num_envs, num_workers=num_workers, image_size=image_size,
    timeout=timeout, python=python or None, **mine,
  )  # fmt: skip
