"""The first lines of a worker process, run as a script by whichever Python the simulator needs.

Usage: PYTHON boot.py PACKAGE_FOLDER PIPE_FD MEMORY_FD. Before anything of ours is imported it says through the pipe
what this interpreter lacks, so nothing here needs more than Python 3.6 and its standard library. Our package is
loaded from its folder alone: another interpreter must not see what else lies beside it, such as the learner's numpy.
"""

import importlib.util
import os
import sys

PYTHON = (3, 10)  # the oldest that the worker's side of the package is written for


def lacking(version, modules):
  """What an interpreter of `version` (major, minor) lacks, with the way out; empty where nothing does.

  modules: name -> whether it can be imported.
  """
  found = f"it is Python {version[0]}.{version[1]}"
  if tuple(version[:2]) < PYTHON:
    oldest = ".".join(map(str, PYTHON))
    return f"{found}, expected {oldest} or newer. Make a virtual environment of one:\n  python{oldest} -m venv FOLDER"
  missing = [name for name, there in modules.items() if not there]
  if missing:
    names = " and ".join(missing)
    command = " ".join([sys.executable, "-m pip install", *missing])
    return f"{found} without {names}, which a simulator's worker needs. Install it with\n  {command}"
  return ""


def main(folder, pipe_fd, memory_fd):
  """Never returns: serves the pool, or says why it cannot."""
  reason = lacking(sys.version_info, {"numpy": importlib.util.find_spec("numpy") is not None})
  if reason:
    from multiprocessing import connection

    pipe = connection.Connection(pipe_fd)
    pipe.recv_bytes()  # the pool's first message, which would else break its pipe
    pipe.send(("unfit", None, reason))
    os._exit(0)
  spec = importlib.util.spec_from_file_location(
    "stare_jax", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
  )
  package = importlib.util.module_from_spec(spec)
  sys.modules["stare_jax"] = package
  spec.loader.exec_module(package)
  from stare_jax.sims.worker import worker_main

  worker_main(pipe_fd, memory_fd)


if __name__ == "__main__":
  if os.path.realpath(sys.path[0]) == os.path.dirname(os.path.realpath(__file__)):
    del sys.path[0]  # this script's own folder: its files are not top-level modules
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
