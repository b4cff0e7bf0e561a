"""The front door.

  python -m stare_jax.main --config=configs/ipi.py[:preset[,task=...][,seed=...]] [--workdir=DIR] [--config.field=value]

Running the same command again continues where the run stands. Ctrl-C or SIGTERM writes a checkpoint first.
Status 0: finished or stopped; 2: a mistake in the input, a full disk or a refused update, with one message that says
what to do.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import logging
import os
import pathlib
import shlex
import signal
import sys
import traceback
from typing import Any, NoReturn

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/ipi.py.", lock_config=True)
log = logging.getLogger("stare_jax")
WORKDIR = flags.DEFINE_string("workdir", "", "The run folder; by default runs/<task>-<preset>-seed<seed>.")


def main(argv: list[str]) -> None:
  # absl has put its own handler and level there; ours is plain, and the libraries' chatter stays at warnings.
  logging.basicConfig(format="%(message)s", stream=sys.stderr, level=logging.WARNING, force=True)
  log.setLevel(logging.INFO)
  if len(argv) > 1:
    fail(f"unexpected arguments {argv[1:]}; settings are flags, such as --config.seed=1")
  if CONFIG.value is None:
    fail("--config is missing; the main job is --config=configs/ipi.py")
  config = CONFIG.value
  workdir = WORKDIR.value or os.path.join("runs", f"{config.task}-{config.preset}-seed{config.seed}")
  stopping: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda got, frame: stopping.append(got))
  command = shlex.join(["python", "-m", "stare_jax.main", *sys.argv[1:]])

  from stare_jax import pipeline_check  # light: a typo is answered before anything heavy is loaded

  try:
    pipeline_check.check(config, workdir)
  except (ValueError, OSError) as error:
    fail(describe(error))

  from stare_jax import pipeline

  log.info("run folder: %s", workdir)
  try:
    pipeline.run(config, workdir, command=command, stop=lambda: bool(stopping))
  except pipeline.Stop:
    log.info("stopped on %s; the same command continues from the last checkpoint", signal.Signals(stopping[0]).name)
    return
  except pipeline.USER_ERRORS as error:
    with contextlib.suppress(OSError):  # for whoever must find out where it came from
      pathlib.Path(workdir, "error.log").write_text(traceback.format_exc())
    fail(describe(error))
  print(f"\nDone. Results are in {workdir}:\n  report.html    open it in a browser\n  summary.json   the figures\n"
        f"  metrics.jsonl, tensorboard/, checkpoints/, videos/")


def describe(error: BaseException) -> str:
  """One message for the user; a full disk gets its advice wherever it was noticed."""
  text = f"{type(error).__name__}: {error}"
  if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT) and "ree s" not in text:
    text += ". Free space on that disk and run the same command again: it continues from the last checkpoint"
  return text


def fail(message: str) -> NoReturn:
  print(message, file=sys.stderr, flush=True)
  sys.exit(2)


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, where a mistake is one message instead of a traceback."""
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # ml_collections puts the whole traceback of a config file into its message; what was raised is the last line.
    text = str(error).strip()
    text = text.splitlines()[-1] if "Traceback" in text else text
    fail(unknown_field(argv) or f"{text}\nFor the flags: python -m stare_jax.main --help")


def unknown_field(argv: list[str]) -> str:
  """What to write instead of a --config.<field> that the configuration does not have; empty if all of them exist."""
  known: list[str] = []

  def walk(prefix: str, node: Any) -> None:
    for key, value in node.items():
      known.append(f"{prefix}{key}")
      if hasattr(value, "items"):
        walk(f"{prefix}{key}.", value)

  path = next((item.partition("=")[2] for item in argv if item.lstrip("-").startswith("config=")), "")
  if path:
    with contextlib.suppress(Exception):  # a file that cannot be read is another mistake than the one looked for
      walk("", flags.FLAGS["config"].parser.parse(path))
  for item in argv if known else ():
    field = item.lstrip("-").partition("=")[0].removeprefix("config.")
    if item.lstrip("-").startswith("config.") and field.partition("[")[0] not in known:
      near = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
      return f"unknown field --config.{field}; did you mean --config.{near}? The config file lists all of them"
  return ""


if __name__ == "__main__":
  app.run(main, flags_parser=parse_flags)
