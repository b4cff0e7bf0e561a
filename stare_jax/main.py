"""The front door.

  python -m stare_jax.main --config=configs/ipi.py[:preset[,task=...][,seed=...]] [--workdir=DIR] [--config.field=value]

Running the same command again continues where the run stands. Ctrl-C or SIGTERM writes a checkpoint first.
"""

from __future__ import annotations

import logging
import os
import shlex
import signal
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/ipi.py.", lock_config=True)
log = logging.getLogger("stare_jax")
WORKDIR = flags.DEFINE_string("workdir", "", "The run folder; by default runs/<task>-<preset>-seed<seed>.")


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments {argv[1:]}; settings are flags, such as --config.seed=1")
  if CONFIG.value is None:
    raise app.UsageError("--config is missing; the main job is --config=configs/ipi.py")
  log.setLevel(logging.INFO)  # ours; the libraries' own chatter stays at warnings
  config = CONFIG.value
  workdir = WORKDIR.value or os.path.join("runs", f"{config.task}-{config.preset}-seed{config.seed}")
  stopping: list[int] = []
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda got, frame: stopping.append(got))
  command = shlex.join(["python", "-m", "stare_jax.main", *sys.argv[1:]])

  from stare_jax import pipeline  # after the flags: a typo is answered before anything heavy is loaded
  from stare_jax.rollout import Stop

  log.info("run folder: %s", workdir)
  try:
    pipeline.run(config, workdir, command=command, stop=lambda: bool(stopping))
  except Stop:
    log.info("stopped on %s; the same command continues from the last checkpoint", signal.Signals(stopping[0]).name)
    return
  except pipeline.USER_ERRORS as error:
    log.error("%s: %s", type(error).__name__, error)
    sys.exit(2)
  print(f"\nDone. Results are in {workdir}:\n  report.html    open it in a browser\n  summary.json   the figures\n"
        f"  metrics.jsonl, tensorboard/, checkpoints/, videos/")


if __name__ == "__main__":
  logging.basicConfig(format="%(message)s", stream=sys.stderr)
  app.run(main)
