"""N environments in worker processes: requests over a pipe, images and signals through shared memory, workers replaced.

A worker is a fresh interpreter (never a fork: the renderer's threads do not survive one) that imports the environment
class and, of what the learner needs, numpy alone. It may be another Python than ours, for a simulator whose packages
cannot live beside the learner's. Each environment owns one slot of the shared memory: the parent writes its action, the
worker writes its image and signals, and a message on the pipe says when. A worker that dies, hangs or raises is
replaced: its environments come back as lost, the event is recorded and logged, and the run goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from multiprocessing import connection
from typing import Any

import numpy as np

from stare_jax.sims import Frame, SimulatorError
from stare_jax.sims.worker import Slots

_LOG = logging.getLogger(__name__)
MAX_LOSSES = 5  # of one episode in a row, after which it is taken to fail whenever it is played
_LOG_TAIL = 1500  # characters of a dead worker's output that an event carries


def _anonymous_file() -> int:
  """A descriptor above the standard ones: where those are closed, a worker's own would take its place."""
  with tempfile.TemporaryFile() as file:
    found = os.memfd_create("stare_jax") if hasattr(os, "memfd_create") else os.dup(file.fileno())
  try:
    return fcntl.fcntl(found, fcntl.F_DUPFD_CLOEXEC, 3)
  finally:
    os.close(found)


class _Worker:
  """One process, its pipe and its captured output."""

  def __init__(
    self, index: int, envs: list[int], start: dict[str, Any], memory_fd: int, num_workers: int, python: str | None
  ):
    self.index, self.envs = index, envs
    self.ready = False
    self.log = tempfile.TemporaryFile()
    ours, theirs = socket.socketpair()
    # Blocked signals are inherited: one sent to all processes of a job must not end a worker that is still starting.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
      self.process = subprocess.Popen(
        [python or sys.executable, _BOOT, _PACKAGE, str(theirs.fileno()), str(memory_fd)],
        pass_fds=(theirs.fileno(), memory_fd),
        env=_environment_variables(num_workers, python),
        stdin=subprocess.DEVNULL,
        stdout=self.log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # signals meant for the learner's group end the learner, which then ends us
      )
    finally:
      signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    theirs.close()
    self.pipe = connection.Connection(ours.detach())
    with contextlib.suppress(OSError):  # already dead: `receive` will notice, and has what it wrote
      self.pipe.send({**start, "envs": envs})

  def output(self) -> str:
    self.log.seek(0)
    lines = self.log.read().decode(errors="replace").splitlines()
    # After a crash in native code faulthandler lists all modules, which would leave no room for the stack.
    return "\n".join(line for line in lines if not line.startswith("Extension modules:")).strip()[-_LOG_TAIL:]

  def stop(self) -> None:
    """Ends the process at once; safe to call twice, also on a stopped or dead one."""
    self.pipe.close()
    if self.process.poll() is None:
      self.process.kill()
    self.process.wait()
    self.log.close()


_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_BOOT = os.path.join(_PACKAGE, "sims", "boot.py")


def interpreter(python: str) -> str:
  """The interpreter that sim.python names, a path or a command. Raises SimulatorError where there is none."""
  path = os.path.expanduser(python)
  if found := shutil.which(path):
    return os.path.abspath(found)  # links are not followed: they are how a virtual environment's python knows it
  hint = "no such file" if not os.path.lexists(path) else "not an executable file"
  if os.path.isdir(path):
    inside = os.path.join(path, "bin", "python")
    hint = f"a folder (did you mean {inside}?)" if shutil.which(inside) else "a folder without bin/python"
  raise SimulatorError(
    f"sim.python = {python!r} is {hint}. Expected a Python interpreter that has numpy and the simulator's packages, "
    f"such as FOLDER/bin/python of a virtual environment; docs/simpler_env.md makes one"
  )


def _environment_variables(num_workers: int, python: str | None) -> dict[str, str]:
  """The worker's environment: our import path, one thread per maths library, a renderer that keeps to its core.

  Another interpreter gets none of our import path, whose packages were built for ours.
  """
  env = dict(os.environ)
  if python is None:
    env["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([os.path.dirname(_PACKAGE), *(p for p in sys.path if p)]))
  else:
    for name in ("PYTHONPATH", "PYTHONHOME"):
      env.pop(name, None)
  env["PYTHONHASHSEED"] = "0"  # the order of sets must not differ between workers
  env["PYTHONFAULTHANDLER"] = "1"  # a crash in native code leaves its stack in the captured output
  for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    env.setdefault(name, "1")
  if num_workers > 1:
    env.setdefault("LP_NUM_THREADS", "0")  # lavapipe: rasterise in the calling thread; two workers fill two cores
  return env


class Pool:
  """The Simulator contract over worker processes. See `sims.make`."""

  def __init__(
    self,
    environment: str,
    spec: dict[str, Any],
    *,
    num_envs: int,
    num_workers: int,
    image_size: int,
    timeout: float = 60.0,
    start_timeout: float = 300.0,
    max_failures: int = 3,
    action_size: int = 7,
    wait: bool = True,
    python: str | None = None,
  ):
    """Starts the workers.

    Args:
      environment: "module:class" of an `Environment`.
      spec: its keyword arguments; must pickle, and be plain Python values where `python` is given.
      num_envs: N. num_workers: processes, at most N. image_size: H = W, pixels.
      timeout: seconds without an answer after which a worker counts as hung; it moves three environments before the
        first answer of a request (`worker`).
      start_timeout: the same for a worker that is still importing and building.
      max_failures: a worker that fails this often without one answer in between ends the run.
      action_size: D.
      wait: return when every worker is ready; otherwise the first `receive` waits.
      python: path or command of the interpreter that the workers run under; None or "": this one.
    """
    if not 1 <= num_workers <= num_envs:
      raise ValueError(f"num_workers={num_workers} and num_envs={num_envs}: expected 1 <= num_workers <= num_envs")
    if image_size < 1 or timeout <= 0:
      raise ValueError(f"image_size={image_size}, timeout={timeout}: both must be positive")
    importlib.util.find_spec(environment.partition(":")[0])  # a misspelt module fails here, not in every worker
    self.num_envs, self.num_workers, self.image_size, self.action_size = num_envs, num_workers, image_size, action_size
    self.timeout, self.start_timeout, self.max_failures = timeout, start_timeout, max_failures
    self.python = interpreter(python) if python else None
    if self.python:
      _check_plain(spec, "spec")
    self.restarts, self.events = 0, []
    self.about: dict[str, str] = {}  # versions of what the workers run on, once one is ready
    self.suite: Any = None  # what every reset from now on changes: see `suites.for_worker`; None: nothing
    self._start = dict(
      environment=environment, spec=spec, num_envs=num_envs, image_size=image_size, action_size=action_size
    )
    self._memory_fd = _anonymous_file()
    self._slots = Slots(self._memory_fd, num_envs, image_size, action_size)
    self._pending: dict[int, str] = {}  # env -> the request that waits for its answer
    self._results: dict[int, Any] = {}  # env -> the answer, until `receive` takes it
    self._lost = np.zeros(num_envs, bool)
    self._failures = [0] * num_workers
    self._seeds: dict[int, int] = {}  # env -> the seed of its episode
    self._losses = [0] * num_envs  # how often in a row that episode was lost
    self._closed = False
    self._workers = [self._launch(index) for index in range(num_workers)]
    self._finalizer = weakref.finalize(self, _stop_all, self._workers, self._memory_fd)
    if wait:
      self._wait_until_ready()

  # ----------------------------------------------------------------------------------------------------- requests

  def send_reset(self, envs: Sequence[int], seeds: Sequence[int]) -> None:
    """Asks each environment for the episode of its seed; ends what it was doing, heals a lost one."""
    if len(envs) != len(seeds):
      raise ValueError(f"reset: {len(envs)} environments but {len(seeds)} seeds")
    change = () if self.suite is None else (self.suite,)
    self._send("reset", {int(env): (int(seed), *change) for env, seed in zip(envs, seeds, strict=True)})

  def send_step(self, envs: Sequence[int], actions: np.ndarray) -> None:
    """Asks each environment for one control step; actions float32[n, D] in [-1, 1]."""
    actions = np.asarray(actions, np.float32)
    if actions.shape != (len(envs), self.action_size):
      raise ValueError(f"step: actions have shape {actions.shape}, expected ({len(envs)}, {self.action_size})")
    if not np.isfinite(actions).all():
      raise ValueError(f"step: actions of environments {np.asarray(envs)[~np.isfinite(actions).all(1)]} are not finite")
    self._check_free(envs)
    self._slots.actions[np.asarray(envs)] = actions
    self._send("step", {int(env): None for env in envs})

  def receive(self, envs: Sequence[int]) -> Frame:
    """Waits for the pending answer of each of `envs`; images and signals are copies."""
    results = self._collect(envs)
    index = np.asarray(list(envs), np.int64)
    frame = Frame(self._slots.images[index], self._slots.signals[index], np.array([r is _LOST for r in results], bool))
    frame.images[frame.lost] = 0
    frame.signals[frame.lost] = 0
    return frame

  def reset(self, envs: Sequence[int], seeds: Sequence[int]) -> Frame:
    """`send_reset`, then `receive`."""
    self.send_reset(envs, seeds)
    return self.receive(envs)

  def step(self, envs: Sequence[int], actions: np.ndarray) -> Frame:
    """`send_step`, then `receive`."""
    self.send_step(envs, actions)
    return self.receive(envs)

  def snapshot(self, envs: Sequence[int]) -> list[bytes]:
    """What `restore` needs to continue each environment from here; b"" for a lost one."""
    self._send("snapshot", {int(env): None for env in envs})
    return [b"" if result is _LOST else result for result in self._collect(envs)]

  def restore(self, envs: Sequence[int], snapshots: Sequence[bytes]) -> Frame:
    """Continues each environment from its snapshot (of any environment of the same task); b"" comes back lost."""
    if len(envs) != len(snapshots):
      raise ValueError(f"restore: {len(envs)} environments but {len(snapshots)} snapshots")
    pairs = {int(env): data for env, data in zip(envs, snapshots, strict=True)}
    self._send("restore", pairs)
    return self.receive(envs)

  def close(self) -> None:
    """Ends every worker; the pool cannot be used afterwards."""
    self._closed = True
    self._finalizer()

  def __enter__(self) -> Pool:
    return self

  def __exit__(self, *exc: object) -> None:
    self.close()

  # ---------------------------------------------------------------------------------------------------- mechanics

  def _launch(self, index: int) -> _Worker:
    envs = list(range(index, self.num_envs, self.num_workers))
    return _Worker(index, envs, self._start, self._memory_fd, self.num_workers, self.python)

  def _check_free(self, envs: Iterable[int]) -> None:
    if self._closed:
      raise SimulatorError("the simulator is closed")
    for env in envs:
      if not 0 <= env < self.num_envs:
        raise ValueError(f"environment {env} does not exist; there are {self.num_envs}")
      if env in self._pending or env in self._results:
        raise ValueError(f"environment {env} has an answer waiting; call receive([{env}]) before the next request")

  def _send(self, kind: str, requests: dict[int, Any]) -> None:
    """One message per worker; a lost environment is answered here, a broken pipe replaces the worker."""
    self._check_free(requests)
    by_worker: dict[int, list[tuple[int, Any]]] = {}
    for env, argument in requests.items():
      if kind == "reset":
        again = self._lost[env] and self._seeds.get(env) == argument[0]
        self._seeds[env], self._losses[env] = argument[0], self._losses[env] if again else 0
      elif kind == "restore":
        self._losses[env] = 0
      if kind == "reset" or kind == "restore":
        self._lost[env] = argument == b""
      if self._lost[env]:
        self._results[env] = _LOST
      else:
        self._pending[env] = kind
        by_worker.setdefault(env % self.num_workers, []).append((env, argument))
    for index, items in by_worker.items():
      try:
        self._workers[index].pipe.send((kind, items))
      except OSError:
        self._read(index)  # what it said before it died, if anything

  def _collect(self, envs: Sequence[int]) -> list[Any]:
    if idle := [env for env in envs if env not in self._pending and env not in self._results]:
      raise ValueError(f"receive: environments {idle} have no pending request")
    last = dict.fromkeys(range(self.num_workers), time.monotonic())  # when each worker last spoke
    while waiting := {env % self.num_workers for env in envs if env in self._pending}:
      for index in self._poll(waiting, last):
        self._read(index)
        last[index] = time.monotonic()
    return [self._results.pop(env) for env in envs]

  def _poll(self, waiting: set[int], last: dict[int, float]) -> list[int]:
    """Indices of the workers that have something to say; replaces those whose time is up."""
    limit = {i: self.timeout if self._workers[i].ready else self.start_timeout for i in waiting}
    pipes = {self._workers[i].pipe: i for i in waiting}
    began = time.monotonic()
    left = max(0.0, min(last[i] + limit[i] for i in waiting) - began)
    spoken = [pipes[pipe] for pipe in connection.wait(list(pipes), timeout=left)]
    if time.monotonic() - began > left + 1:  # all were stopped together, as Slurm suspends a job: wait anew
      last.update(dict.fromkeys(waiting, time.monotonic()))
    elif not spoken:
      for i in waiting:
        if time.monotonic() >= last[i] + limit[i]:
          self._replace(i, f"did not answer within {limit[i]:g} s")
          last[i] = time.monotonic()
    return spoken

  def _read(self, index: int) -> None:
    """Takes one message of a worker, or notices its death."""
    worker = self._workers[index]
    try:
      kind, env, result = worker.pipe.recv()
    except (EOFError, OSError):
      self._replace(index, _ending(worker.process))
      return
    if kind == "ready":
      worker.ready, self.about = True, result
    elif kind == "unfit":
      self.close()
      raise SimulatorError(f"sim.python = {self.python or sys.executable!r}: {result}")
    elif kind == "failed":
      self._replace(index, f"raised an exception:\n{result}")
    else:
      self._failures[index] = 0
      if self._pending.pop(env, None) == "restore" and result:
        self.events.append(f"environment {env}: {result}")
      self._results[env] = result

  def _replace(self, index: int, reason: str) -> None:
    """Ends a worker and starts the next; its environments are lost. Raises where a new one would fail as well."""
    worker = self._workers[index]
    output = worker.output()
    worker.stop()
    self._failures[index] += 1
    event = f"simulator worker {index} (process {worker.process.pid}, environments {worker.envs}) {reason}"
    if output:
      event += f"\nits last output:\n{output}"
    if not worker.ready and self.restarts == 0:
      self.close()
      under = f" Its workers run under sim.python = {self.python!r}." if self.python else ""
      raise SimulatorError(f"{event}\nThe simulator could not be started; nothing was run.{under}")
    if self._failures[index] >= self.max_failures:
      self.close()
      raise SimulatorError(f"{event}\nIt failed {self.max_failures} times without one answer in between; giving up.")
    losses = {env: self._losses[env] + 1 for env in worker.envs if env in self._pending}
    if worst := [env for env, count in losses.items() if count >= MAX_LOSSES]:
      self.close()
      seeds = [self._seeds.get(env) for env in worst]
      raise SimulatorError(f"{event}\nThe episodes of seeds {seeds}, which it plays side by side, were lost "
                           f"{MAX_LOSSES} times each. An episode depends on its seed and actions alone, so one of them "
                           f"fails whenever it is played; giving up. The output above says what fails")
    self.restarts += 1
    self.events.append(event)
    _LOG.warning("%s\nreplaced; the episodes of environments %s are discarded", event, worker.envs)
    for env in worker.envs:
      self._lost[env] = True
      if self._pending.pop(env, None):
        self._results[env], self._losses[env] = _LOST, losses[env]
    self._workers[index] = self._launch(index)

  def _wait_until_ready(self) -> None:
    last = dict.fromkeys(range(self.num_workers), time.monotonic())
    while waiting := {worker.index for worker in self._workers if not worker.ready}:
      for index in self._poll(waiting, last):
        self._read(index)


def _check_plain(value: Any, where: str) -> None:
  """Raises TypeError where a value is not made of plain Python types.

  A pickle names the module of everything else in it, and what the learner has (numpy 2, ml_collections) another
  interpreter may not have.
  """
  if type(value) is dict:
    for key, item in value.items():
      _check_plain(item, f"{where}[{key!r}]")
  elif type(value) in (tuple, list, set, frozenset):
    for item in value:
      _check_plain(item, where)
  elif type(value) not in (type(None), bool, int, float, str, bytes):
    raise TypeError(
      f"{where} holds a {type(value).__module__}.{type(value).__name__}, which a simulator under another Python need "
      f"not know; expected plain numbers, strings, tuples, lists and dicts (float(x), x.tolist())"
    )


def _ending(process: subprocess.Popen) -> str:
  """How a process that closed its pipe ended."""
  try:
    code = process.wait(timeout=5.0)
  except subprocess.TimeoutExpired:
    return "closed its pipe and stayed alive"
  return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"


_LOST = object()  # the answer of an environment whose worker is gone


def _stop_all(workers: list[_Worker], memory_fd: int) -> None:
  for worker in workers:
    worker.stop()
  os.close(memory_fd)
