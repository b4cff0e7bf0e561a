"""Several processes as one run: who takes part, what they tell each other, and how they learn that one is gone.

Every process runs the same program on the same numbers, so that all of them take the same decisions: what only one of
them can know (a signal, a file, the episodes of its own simulators) is told to all before anybody acts on it. With one
process everything here returns at once, and no device is touched.

A process that dies is noticed at once, as its connection breaks (`Watch`), and one whose machine falls silent after the
heartbeat time-out of jax.distributed; the others end with status `GONE`, or are aborted by JAX, which misses its
coordinator as soon as process 0 is dead. None waits for ever.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import glob
import itertools
import json
import logging
import os
import pathlib
import pickle
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, BinaryIO

import jax
import numpy as np
from jax._src import distributed  # the only place that knows the coordinator, and its barrier that needs no device
from jax.experimental import multihost_utils

GONE = 3  # exit status of a process that ends because another one did
TOGETHER = 300  # seconds until all processes must have come together
LONGEST_ROLLOUT = 24 * 3600  # seconds that others may be at theirs
GATHERED_BYTES = 256 << 20  # what one exchange may take on a device
PATIENCE = 90.0  # seconds until a file that another process wrote must be seen; network folders cache what is absent

log = logging.getLogger("stare_jax")
_meetings = itertools.count()


class ProcessError(RuntimeError):
  """The processes do not form one run; the message says how they differ and what to do."""


# This one ---------------------------------------------------------------------------------------------------


def keep_memory() -> None:
  """Memory that XLA frees after a program stays with the process: call it before a CPU is touched as a device.

  The C library gives back what is large, and the next update gets every page of it anew from the kernel, zeroed, one
  fault each: a sixth of an update's time. Nothing to do where there is an accelerator, or another C library.
  """
  accelerators = ("/dev/nvidia[0-9]*", "/dev/accel[0-9]*", "/dev/vfio/[0-9]*", "/dev/kfd")
  if os.environ.get("JAX_PLATFORMS") != "cpu" and any(glob.glob(path) for path in accelerators):
    return
  with contextlib.suppress(OSError, AttributeError):
    adjust = ctypes.CDLL(None).mallopt
    adjust(-8, 1)  # M_ARENA_MAX: only the first arena may grow without end, others map what is large
    adjust(-4, 0)  # M_MMAP_MAX: so it is not mapped
    adjust(-1, -1)  # M_TRIM_THRESHOLD: and never given back


def keep_compilation_cache(folder: str | os.PathLike) -> None:
  """Compiled programs lie in `folder` for the launch that goes on from this one: call it before any is compiled.

  That launch then waits for no compiler, minutes at 7B, and computes with the very same programs: a GPU's compiler
  times what is fastest, and may choose anew. Nothing to do on a CPU, which compiles in seconds; where the user says
  something else (JAX_COMPILATION_CACHE_DIR); or with several processes, which tune programs together or not at all.
  """
  if count() == 1 and jax.config.jax_compilation_cache_dir is None and jax.default_backend() != "cpu":
    jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
    jax.config.update("jax_persistent_cache_enable_xla_caches", "none")  # which would tie an entry to the folder's name


# Who takes part ---------------------------------------------------------------------------------------------


def initialize(address: str, num_processes: int, process_id: int, *, heartbeat: int = 100) -> None:
  """Joins the run, before any device is touched; returns once all processes have.

  address: "auto" where JAX can find the others by itself (TPU pods, Slurm, Open MPI), or HOST:PORT of process 0.
  heartbeat: seconds of silence after which a process counts as lost.
  """
  # JAX's own SIGTERM handler would take the place of ours, which agrees on the update to stop after (`any_of`).
  jax.config.update("jax_enable_preemption_service", False)
  options: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat}
  if address != "auto":
    options |= dict(coordinator_address=address, num_processes=num_processes, process_id=process_id)
    options |= dict(cluster_detection_method="deactivate")
  late = threading.Timer(TOGETHER - 10, _missing, [address])  # after `TOGETHER` JAX aborts, with a stack and no advice
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(**options, initialization_timeout=TOGETHER)
  finally:
    late.cancel()
  if count() > 1:
    # The first exchange connects the devices, on CPUs with 30 seconds of patience: start it together.
    distributed.global_state.client.wait_at_barrier("stare_jax", 1000 * TOGETHER)
    _watch.start(address)


def _missing(address: str) -> None:
  with contextlib.suppress(OSError):
    print(f"the processes did not come together. --distributed={address}: start all of them within five minutes, with "
          f"the same address and --num_processes; docs/launching.md has a script for each machine", file=sys.stderr,
          flush=True)  # fmt: skip
  os._exit(2)


def count() -> int:
  """Processes in this run."""
  return jax.process_count()


def index() -> int:
  """This process among them, from 0."""
  return jax.process_index()


def first() -> bool:
  """Whether this is the process that writes what the run leaves: metrics, evaluations, videos, report, summary."""
  return index() == 0


# What they tell each other ----------------------------------------------------------------------------------


def everyone(value: Any) -> list[Any]:
  """The value of every process, by index, in every process; any value that can be pickled. All have to call it."""
  if count() == 1:
    return [value]
  mine = np.frombuffer(pickle.dumps(value, protocol=5), np.uint8)
  halves = multihost_utils.process_allgather(np.array(divmod(len(mine), 1 << 31), np.int32))  # JAX has no int64
  sizes = [int(high) << 31 | int(low) for high, low in halves]
  longest = max(sizes)
  step = min(1 << (longest - 1).bit_length(), GATHERED_BYTES // count())  # few shapes, as each is compiled
  parts: list[list[np.ndarray]] = [[] for _ in sizes]
  for at in range(0, longest, step):
    piece = np.zeros(step, np.uint8)
    here = mine[at : at + step]
    piece[: len(here)] = here
    for part, size, row in zip(parts, sizes, multihost_utils.process_allgather(piece), strict=True):
      part.append(row[: max(size - at, 0)])
  return [pickle.loads(np.concatenate(part).data) for part in parts]


def agreed(value: Any) -> Any:
  """The value of the first process, in every process."""
  return everyone(value if first() else None)[0] if count() > 1 else value


def any_of(flag: bool) -> bool:
  """Whether it is true in any process; one small exchange, for every update."""
  return bool(flag) if count() == 1 else bool(np.any(multihost_utils.process_allgather(np.int32(bool(flag)))))


def meet(asked: Callable[[], bool]) -> None:
  """Waits for the processes that still are in their own time, for hours; an exchange gives up after half an hour.

  asked: whether this process was asked to end, meanwhile too; the others are then told.
  """
  if count() == 1:
    return
  wait = distributed.global_state.client.wait_at_barrier
  with concurrent.futures.ThreadPoolExecutor(1) as aside:  # signals are heard between two calls of the main thread
    there = aside.submit(wait, f"meeting {next(_meetings)}", 1000 * LONGEST_ROLLOUT)
    while not concurrent.futures.wait([there], timeout=0.5).done:
      if asked():
        stop()
    there.result()


def barrier(name: str) -> None:
  """Returns once every process is here."""
  if count() > 1:
    multihost_utils.sync_global_devices(name)


def same(value: Any, what: str, advice: str) -> None:
  """Raises ProcessError, in every process, where the processes have different values: going on, they would hang."""
  values = everyone(value)
  other = next((i for i, x in enumerate(values) if x != values[0]), None)
  if other is not None:
    raise ProcessError(
      f"the processes differ in {what}: process 0 has {values[0]!r}, process {other} has {values[other]!r}; {advice}"
    )


def appear(path: pathlib.Path, writer: int = 0) -> None:
  """Waits until this process sees a file that another one, by default the first, has written (before a barrier)."""
  until = time.monotonic() + PATIENCE
  while not path.exists():
    if time.monotonic() > until:
      raise ProcessError(
        f"process {index()} does not see {path}, which process {writer} has written: --workdir has to be a folder that "
        f"all processes share, under the same name (NFS or Lustre, say)"
      )
    with contextlib.suppress(OSError):
      os.listdir(path.parent)  # makes a network file system look again
    time.sleep(0.05)


# Who is gone ------------------------------------------------------------------------------------------------


class Watch:
  """One connection from every process to the first, which closes when either end dies, however it died.

  A line of JSON on it is news: {"stop": true} from a process that was asked to end, {} from one that is done, else who
  is gone and the error it left, if any. The first process passes on what it hears.
  """

  def __init__(self) -> None:
    self._peers: dict[int, socket.socket] = {}
    self._leaving = False
    self.stopping = False  # whether some process was asked to end
    self._lock = threading.Lock()

  def start(self, address: str) -> None:
    """Called by all processes together. Where a connection is not allowed, the heartbeat of JAX is what is left."""
    server = socket.create_server(("", 0), backlog=count()) if first() else None
    port, token = agreed((server.getsockname()[1] if server else 0, secrets.token_hex(16)))
    target, arguments = (self._join, (_host_of(address), port, token)) if server is None else (
      self._accept, (server, token))  # fmt: skip
    threading.Thread(target=target, args=arguments, daemon=True).start()

  def _hear(self, who: int, lines: BinaryIO) -> dict[str, Any]:
    """The next news; where there is no more, that the other end is gone."""
    try:
      line = lines.readline()
    except OSError:  # a reset is an end as well
      line = b""
    return json.loads(line) if line.endswith(b"\n") else {"gone": who, "error": ""}

  def leave(self, error: str = "") -> None:
    """Tells the others that this process ends on purpose: it is finished, or failed with `error`."""
    self._leaving = True
    self._tell({"gone": index(), "error": error[:4000]} if error else {})

  def stop(self) -> None:
    """Tells the others that this process was asked to end: they leave what they do in their own time."""
    if not self.stopping:
      self.stopping = True
      self._tell({"stop": True})

  def _tell(self, news: dict[str, Any], but: int = -1) -> None:
    with self._lock:
      for who, peer in self._peers.items():
        if who != but:
          with contextlib.suppress(OSError):
            peer.sendall(json.dumps(news).encode() + b"\n")

  def _join(self, host: str, port: int, token: str) -> None:
    try:
      connection = socket.create_connection((host, port), timeout=60)
    except OSError as error:
      log.warning("process 0 cannot be watched at %s:%d (%s); its death is noticed by missing heartbeats only",
                  host, port, error)  # fmt: skip
      return
    connection.settimeout(None)
    connection.sendall(f"{token} {index()}\n".encode())
    self._listen(0, connection, connection.makefile("rb"))

  def _accept(self, server: socket.socket, token: str) -> None:
    while len(self._peers) < count() - 1:
      connection, _ = server.accept()
      threading.Thread(target=self._greet, args=(connection, token), daemon=True).start()

  def _greet(self, connection: socket.socket, token: str) -> None:
    lines = connection.makefile("rb")  # which may have read ahead: the news is heard through it, too
    hello = lines.readline(200).split()
    if len(hello) == 2 and secrets.compare_digest(hello[0], token.encode()):
      self._listen(int(hello[1]), connection, lines)

  def _listen(self, who: int, connection: socket.socket, lines: BinaryIO) -> None:
    """Until the other end has something to say, or is no more."""
    with self._lock:
      self._peers[who] = connection
    while (news := self._hear(who, lines)).get("stop"):
      known, self.stopping = self.stopping, True
      if first() and not known:
        self._tell(news, but=who)
    if not news or self._leaving:
      return
    if first():
      self._tell(news, but=who)
    how = f"failed: {news['error']}" if news["error"] else "is gone: killed, or its machine was lost."
    with contextlib.suppress(OSError):  # nobody may be reading any more
      print(
        f"process {news['gone']} of {count()} {how}\nProcess {index()} cannot go on without it and ends too (status "
        f"{GONE}). The last checkpoints are whole: start all processes again with the same command and the run "
        f"continues", file=sys.stderr, flush=True,
      )  # fmt: skip
    os._exit(GONE)  # the main thread may wait in an exchange that nobody will answer


def _host_of(address: str) -> str:
  if address == "auto":
    address = distributed.global_state.coordinator_address
  return address.rpartition(":")[0].strip("[]")


_watch = Watch()


def stop() -> None:
  """Says that this process was asked to end; see `stopping`."""
  if count() > 1:
    _watch.stop()


def stopping() -> bool:
  """Whether another process was asked to end, for what this one does in its own time; `any_of` is exact."""
  return _watch.stopping


def leave(status: int = 0, error: str = "", details: str = "") -> None:
  """Says that this process ends. Returns where all is well, or where there is no other process.

  After a failure it says so and ends here and now: an orderly shutdown would wait for processes that wait for this one.
  Before, a moment is given to `Watch`: an error in an exchange mostly means that another process is gone, which it
  reports in better words.
  """
  if count() == 1:
    return
  if status:
    time.sleep(2.0)
    with contextlib.suppress(OSError):  # the others have to learn of it though nobody reads here any more
      print(details or error, file=sys.stderr, flush=True)
  _watch.leave(error)
  if status:
    os._exit(status)
