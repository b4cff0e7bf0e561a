"""The worker's side of the pool: the environments of one process, and the requests that it answers.

Imported by `boot.py` under whichever Python the simulator needs, so it imports nothing of the learner's.
"""

from __future__ import annotations

import mmap
import os
import platform
import signal
import traceback
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any, Protocol

import numpy as np

from stare_jax.episode import SIGNAL_SIZE
from stare_jax.sims import SimulatorError, load


class Environment(Protocol):
  """What a simulator's class offers inside the worker; built as `Class(**spec)`."""

  def reset(self, seed: int, suite: Any = None) -> None:
    """Starts the episode that `seed` names, whatever happened before in this process.

    One that never gets a suite (`suites.CAN_CHANGE` says which simulators do) need not take it.
    """

  def step(self, action: np.ndarray) -> None:
    """One control step with float32[D]."""

  def observe(self, image: np.ndarray, signals: np.ndarray) -> None:
    """Writes the state's view into uint8[H, W, 3] and its signals into float32[S]."""

  def snapshot(self) -> bytes:
    """Everything needed to continue from here."""

  def restore(self, data: bytes) -> str | None:
    """Continues from a snapshot; returns a note for the events where that was not exact."""

  # And, where it has them:
  # versions() -> dict[str, str]: the packages behind it, for the record.
  # start_picture() -> None: asks for the picture of the state and returns at once.
  # fetch_picture() -> None: waits for it and takes it, so that the renderer is free for another environment's.


class Slots:
  """The shared memory, as arrays over one anonymous file: no name that could leak or collide."""

  def __init__(self, fd: int, num_envs: int, image_size: int, action_size: int):
    shapes = {
      "signals": ((num_envs, SIGNAL_SIZE), np.float32),
      "actions": ((num_envs, action_size), np.float32),
      "images": ((num_envs, image_size, image_size, 3), np.uint8),
    }
    sizes = {name: int(np.prod(shape)) * np.dtype(dtype).itemsize for name, (shape, dtype) in shapes.items()}
    total = sum(sizes.values())
    if os.fstat(fd).st_size < total:
      os.ftruncate(fd, total)
    memory = mmap.mmap(fd, total)
    at = 0
    for name, (shape, dtype) in shapes.items():
      array = np.frombuffer(memory, dtype, count=int(np.prod(shape)), offset=at).reshape(shape)
      setattr(self, name, array)
      at += sizes[name]

  signals: np.ndarray
  actions: np.ndarray
  images: np.ndarray


def worker_main(pipe_fd: int, memory_fd: int) -> None:
  """The worker process: build the environments, then answer requests until the pipe closes."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # the parent's business, also where a whole job is
    signal.signal(number, signal.SIG_IGN)  # signalled; we end with the pipe
  pipe = connection.Connection(pipe_fd)
  try:
    start = pipe.recv()
    slots = Slots(memory_fd, start["num_envs"], start["image_size"], start["action_size"])
    environments = {env: load(start["environment"])(**start["spec"]) for env in start["envs"]}
    pipe.send(("ready", None, _about(environments.values())))
    while True:
      kind, requests = pipe.recv()
      for env, answer in _serve(environments, slots, kind, requests):
        pipe.send(("done", env, answer))
  except (EOFError, ConnectionError):
    pass
  except SimulatorError as error:
    pipe.send(("failed", None, str(error)))
  except BaseException:
    pipe.send(("failed", None, traceback.format_exc()))
  os._exit(0)  # the renderer's destructors may crash; nothing of ours is left to flush


def _about(environments: Iterable[Environment]) -> dict[str, str]:
  """Versions of what this process runs on, as strings: objects of one numpy need not mean anything to another."""
  about = {"python": platform.python_version(), "numpy": np.__version__}
  for environment in environments:
    about |= getattr(environment, "versions", dict)()
  return about


def _serve(
  environments: dict[int, Environment], slots: Slots, kind: str, requests: list[tuple[int, Any]]
) -> Iterator[tuple[int, Any]]:
  """Does what is asked of each environment; yields (env, answer) in the same order.

  A renderer draws in threads of its own, or on another device. While it draws what one environment shows, another gets
  its picture into shape and the next one moves. It draws one at a time: of two that were asked for, the first could be
  fetched only once both are drawn. Two pictures are left to be got into shape while the last one is drawn.
  """
  if kind == "snapshot":
    yield from ((env, environments[env].snapshot()) for env, _ in requests)
    return
  drawn, drawing = None, None  # environments, each with its answer
  for env, argument in requests:
    now = env, _move(environments[env], slots, kind, env, argument)
    if drawing:
      _try(environments[drawing[0]], "fetch_picture")
    _try(environments[env], "start_picture")
    if drawn:
      yield _seen(environments, slots, drawn)
    drawn, drawing = drawing, now
  yield from (_seen(environments, slots, answer) for answer in (drawn, drawing) if answer)


def _seen(environments: dict[int, Environment], slots: Slots, answer: tuple[int, Any]) -> tuple[int, Any]:
  """The answer of an environment, once what it shows is in its slots."""
  env = answer[0]
  environments[env].observe(slots.images[env], slots.signals[env])
  return answer


def _try(environment: Environment, name: str) -> None:
  """Calls a method that not every environment has: some draw when they are looked at."""
  getattr(environment, name, lambda: None)()


def _move(environment: Environment, slots: Slots, kind: str, env: int, argument: Any) -> Any:
  if kind == "restore":
    return environment.restore(argument)
  if kind == "reset":
    return environment.reset(*argument)
  return environment.step(slots.actions[env].copy())
