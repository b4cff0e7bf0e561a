"""Several processes of the front door as one run, on the toy simulator (no tests here)."""

from __future__ import annotations

import os
import pathlib
import socket
import subprocess
import time
from collections.abc import Callable

from tests import toy_run


def free_port() -> int:
  with socket.socket() as s:
    s.bind(("localhost", 0))
    return s.getsockname()[1]


def environment(toy_environment: dict[str, str], devices: int = 1) -> dict[str, str]:
  """Fake CPU devices in each process, and programs that are compiled fast rather than well."""
  flags = f"--xla_force_host_platform_device_count={devices}"
  return toy_environment | {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


class Together:
  """`count` processes of one run in the background; the output of process i goes to <workdir>.<i>.log."""

  def __init__(self, workdir: pathlib.Path, env: dict[str, str], *flags: str, count: int = 2, **options: str):
    self.workdir = workdir
    address = f"localhost:{free_port()}"
    self.logs = [workdir.with_name(f"{workdir.name}.{i}.log") for i in range(count)]
    self.processes = []
    for i, log in enumerate(self.logs):
      joined = (f"--distributed={address}", f"--num_processes={count}", f"--process_id={i}")
      with log.open("ab") as out:
        command = toy_run.command(workdir, *joined, *flags, **options)
        process = subprocess.Popen(command, cwd=toy_run.ROOT, env=env, stdout=out, stderr=subprocess.STDOUT)
      self.processes.append(process)

  def said(self, i: int) -> str:
    return self.logs[i].read_text(errors="replace")

  def everything(self) -> str:
    return "\n".join(f"--- process {i}\n{self.said(i)}" for i in range(len(self.logs)))

  def wait_for(self, condition: Callable[[], bool]) -> None:
    while not condition():
      assert all(process.poll() is None for process in self.processes), self.everything()
      time.sleep(0.005)

  def wait(self) -> list[int]:
    """The exit statuses."""
    return [process.wait() for process in self.processes]

  def finish(self, status: int = 0) -> None:
    """Waits until all have ended, with this status."""
    assert self.wait() == [status] * len(self.processes), self.everything()

  def simulators(self, i: int) -> set[int]:
    """The simulator workers of process i that run now."""
    pid = self.processes[i].pid
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    command = lambda child: pathlib.Path(f"/proc/{child}/cmdline").read_bytes()
    return {int(child) for child in children if b"boot.py" in command(child)}

  def __enter__(self) -> Together:
    return self

  def __exit__(self, *_) -> None:
    for process in self.processes:
      if process.poll() is None:
        os.kill(process.pid, 9)
        process.wait()
