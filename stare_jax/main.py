"""The front door.

  python -m stare_jax.main --config=configs/ipi.py[:preset[,task=...][,seed=...]] [--workdir=DIR] [--config.field=value]

Running the same command again continues where the run stands. Ctrl-C, SIGTERM or SIGHUP writes a checkpoint first; a
Ctrl-C after that ends the run at once.

A run of several processes (docs/launching.md) starts this in each of them, with the same --config and --workdir and

  --distributed=auto                                            TPU pods, Slurm, Open MPI: JAX finds the others
  --distributed=HOST:PORT --num_processes=N --process_id=I      anywhere else; HOST is where process 0 runs

Status 0: finished; 75: stopped by a signal, and the same command continues; 2: a mistake in the input, a full disk or a
refused update, with one message that says what to do; 3: another process of the run is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import pathlib
import shlex
import signal
import sys
import time
import traceback
from typing import Any, NoReturn, TextIO

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from ml_collections import config_flags

from stare_jax.config import STOPPED, ConfigError
from stare_jax.config_command import fail, parse

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/ipi.py.", lock_config=True)
log = logging.getLogger("stare_jax")
WORKDIR = flags.DEFINE_string("workdir", "", "The run folder; by default runs/<task>-<preset>-seed<seed>.")
DISTRIBUTED = flags.DEFINE_string("distributed", "off", "Several processes as one run: off, auto, or HOST:PORT.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many; with --distributed=HOST:PORT.", lower_bound=1)
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", lower_bound=0)
IN_USE = ".in_use"  # in the run folder: a lock
HEARTBEAT = flags.DEFINE_integer("heartbeat", 100, "Seconds of silence until a process counts as lost.", lower_bound=5)


def main(argv: list[str]) -> int | None:
  # absl has put its own handler and level there; ours is plain, and the libraries' chatter stays at warnings.
  logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
  log.setLevel(logging.INFO)
  atexit.register(drop_what_nobody_reads)
  if len(argv) > 1:
    fail(f"unexpected arguments {argv[1:]}; settings are flags, such as --config.seed=1")
  if CONFIG.value is None:
    fail("--config is missing; the main job is --config=configs/ipi.py")
  config = CONFIG.value
  workdir = WORKDIR.value or os.path.join("runs", run_name(config))
  stopping = signals()
  command = shlex.join(["python", "-m", "stare_jax.main", *sys.argv[1:]])

  if mistake := wrong_processes(DISTRIBUTED.value, NUM_PROCESSES.value, PROCESS_ID.value):
    fail(mistake)

  from stare_jax import pipeline_check  # light: a typo is answered before anything heavy is loaded

  try:
    pipeline_check.check(config, workdir)
  except (ValueError, OSError) as error:
    fail(describe(error))

  from stare_jax import processes

  processes.keep_memory()
  if DISTRIBUTED.value != "off":
    join()

  from stare_jax import pipeline, pipeline_suites

  if processes.first():
    try:
      atexit.register(hold(workdir, processes.PATIENCE if DISTRIBUTED.value != "off" else 0.0).close)
    except (ValueError, OSError) as error:
      give_up(error)
  processes.keep_compilation_cache(pathlib.Path(workdir, "compilation_cache"))
  log.info("run folder: %s", workdir)
  errors = pathlib.Path(workdir, "error.log" if processes.first() else f"error-{processes.index()}.log")
  job = pipeline_suites if "suites" in config else pipeline
  try:
    job.run(config, workdir, command=command, stop=lambda: bool(stopping))
  except pipeline.Stop:
    why = signal.Signals(stopping[0]).name if stopping else "a signal to another process"
    log.info("stopped on %s; the same command continues from the last checkpoint", why)
    processes.leave()
    return STOPPED
  except pipeline.USER_ERRORS as error:
    with contextlib.suppress(OSError):  # for whoever must find out where it came from
      errors.write_text(traceback.format_exc())
    give_up(error)
  except BaseException as error:
    processes.leave(1, describe(error), traceback.format_exc())
    raise
  processes.leave()
  errors.unlink(missing_ok=True)  # of an earlier launch
  if processes.first():
    show_files(workdir, suites=job is pipeline_suites)


def signals() -> list[int]:
  """SIGTERM, SIGINT and SIGHUP (unless under nohup) as they come in: the run looks, and ends with a checkpoint.

  A Ctrl-C after the first of them ends it at once.
  """
  got: list[int] = []

  def hear(number: int, frame: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which no long program delays; every file is whole whenever it comes
    if not got:
      with contextlib.suppress(OSError):  # a print could be inside another one
        os.write(2, b"stopping as soon as a checkpoint is written; Ctrl-C ends the run at once\n")
    got.append(number)

  for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, hear)
  return got


def hold(workdir: str, patience: float = 0.0) -> TextIO:
  """Keeps the run folder for this process as long as the file is open; a second one would replace its files.

    patience: seconds to wait for another process to end, or for a file server to notice that it has.
  Raises: ConfigError where another process has it. Where the file system has no locks nothing is kept.
  """
  file, until = open(os.path.join(workdir, IN_USE), "w"), time.monotonic() + patience
  while True:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      if time.monotonic() < until:
        time.sleep(0.5)
        continue
      raise ConfigError(f"--workdir={workdir} is in use: another process is running in it. Wait for that one, stop it "
                        f"(the same command then goes on), or name another folder") from None
    except OSError:
      pass
    return file


def show_files(workdir: str, *, suites: bool) -> None:
  files = ("report.html    open it in a browser", "summary.json   the figures",
           "metrics.jsonl, tensorboard/, checkpoints/, videos/")  # fmt: skip
  if suites:
    files = ("suites.html    open it in a browser", "suites.md, suites.json")
  with contextlib.suppress(OSError):
    print(f"\nDone. Results are in {workdir}:", *files, sep="\n  ")


def run_name(config: Any) -> str:
  """<task>-<preset>-seed<seed>, with the method before the preset where it is not all of IPI.

  Suites of a checkpoint end in a digest of where that is: two runs of one name keep two tables.
  """
  method, of = config.get("method", "ipi"), config.init_from or config.policy.checkpoint
  digest = hashlib.sha256(os.path.abspath(of).encode()).hexdigest()[:6] if "suites" in config and of else ""
  parts = [config.task, method if method != "ipi" else "", config.preset, f"seed{config.seed}", digest]
  return "-".join(filter(None, parts))


def wrong_processes(address: str, count: int | None, index: int | None) -> str:
  """What is wrong with the flags of a run of several processes; empty if nothing is."""
  given = f"--distributed={address} --num_processes={count} --process_id={index}"
  host, _, port = address.rpartition(":")
  if address in ("off", "auto"):
    if (count, index) == (None, None):
      return ""
    return (f"{given}: --num_processes and --process_id go with --distributed=HOST:PORT, where HOST is the machine of "
            f"process 0")
  if not host or not port.isdigit():
    return f"--distributed={address}: expected off, auto, or HOST:PORT of process 0, such as --distributed=node1:8476"
  if count is None or index is None or index >= count:
    return f"{given}: expected both, such as --num_processes=4 and one of --process_id=0 to --process_id=3"
  return ""


def join() -> None:
  """Makes this process one of several, and lets its log say which."""
  from stare_jax import processes

  log.info("waiting for all processes, up to five minutes (--distributed=%s)", DISTRIBUTED.value)
  try:
    processes.initialize(
      DISTRIBUTED.value, NUM_PROCESSES.value, PROCESS_ID.value, heartbeat=HEARTBEAT.value
    )  # fmt: skip
  except (RuntimeError, ValueError, OSError) as error:
    with contextlib.suppress(OSError):
      print(f"the processes did not come together ({error}). --distributed={DISTRIBUTED.value}: start all of them "
            f"within five minutes, with the same address and --num_processes; docs/launching.md has a script for each "
            f"machine", file=sys.stderr, flush=True)  # fmt: skip
    os._exit(2)  # an orderly end would wait for the others
  here = f"[process {processes.index()} of {processes.count()}] %(message)s"
  logging.basicConfig(format=here, stream=sys.stderr, level=logging.WARNING, force=True)
  log.setLevel(logging.INFO if processes.first() else logging.WARNING)  # the same lines from each would only repeat


def describe(error: BaseException) -> str:
  """One message for the user; a full disk gets its advice wherever it was noticed."""
  text = f"{type(error).__name__}: {error}"
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and "ree s" not in text:
    text += ". Free space on that disk and run the same command again: it continues from the last checkpoint"
  return text


def give_up(error: Exception) -> NoReturn:
  """`fail`, once the other processes of the run know."""
  from stare_jax import processes

  processes.leave(2, describe(error))
  fail(describe(error))


def drop_what_nobody_reads() -> None:
  """What a closed pipe did not take would fail again at the interpreter's end, and make of any status a 120."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except OSError:
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
