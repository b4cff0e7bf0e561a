"""Evaluation suites on one checkpoint: every suite x evaluation seed through the pipeline's own evaluation, one table.

A finished (suite, seed) is a file under evaluations/ with a digest of all that decides it, parameters included, and is
not run again; the table is written anew after every suite.
"""

from __future__ import annotations

import logging
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from stare_jax import checkpoint, evaluate, pipeline, processes, report_suites, suites
from stare_jax.pipeline_check import check, chosen_suites
from stare_jax.pipeline_policy import for_acting_alone
from stare_jax.pipeline_run import Run, starting_folder, starting_params

log = logging.getLogger("stare_jax")
PHASE = "interaction"  # what an evaluation starts from is what this phase would


def run(
  config: Any, workdir: str | os.PathLike, *, command: str = "", stop: Callable[[], bool] = lambda: False
) -> dict:
  """Evaluate a checkpoint under the suites of `config.suites`; returns what suites.json holds.

  Raises: as `pipeline.run`.
  """
  check(config, workdir)
  wanted = chosen_suites(config)
  this = Run(config, workdir, stop=stop)
  pipeline.open_folder(this)
  folder = starting_folder(this, PHASE)
  began, rows, found = time.monotonic(), [], {}
  meta = checkpoint.read_meta(folder) if folder else {}
  about = dict(
    task=this.task.name, checkpoint=str(folder or config.policy.checkpoint), after=meta.get("iteration"),
    seeds=config.suites.seeds, episodes=this.config.evaluation.episodes, horizon=this.config.sim.horizon,
    temperature=this.config.evaluation.temperature, command=command,
  )  # fmt: skip
  try:
    params = starting_params(this, PHASE)
    about["params_sha256"] = this.base.sha256(this.policy, params)
    params = for_acting_alone(this.policy, params, this.mesh)
    actor = this.actor(params, "evaluation", about["temperature"])
    for suite, why in [(suite, why or too_long(this, suite)) for suite, why in wanted]:
      if why:
        log.info("%s: not run: %s", suite.name, why)
        rows.append(report_suites.missing(suite, why))
      else:
        rows.append(evaluated(this, suite, params, about["params_sha256"], actor))
      found = report_suites.table(rows, **about, seconds=time.monotonic() - began, events=list(this.events))
      if processes.first():
        report_suites.write(pathlib.Path(workdir), found)
  finally:
    this.close()
  return found


def evaluated(run: Run, suite: suites.Suite, params: Any, sha256: str, actor: Any) -> dict:
  """The row of a suite; those of its seeds that are on disk are read."""
  changed = None if suite is suites.IN_DISTRIBUTION else suite
  results = [
    pipeline.evaluation(
      run, f"{suite.name}-{block}", params, suite=changed, block=block, sha256=sha256, actor=actor,
      show=0 if block else run.config.suites.pictures,
    )
    for block in range(run.config.suites.seeds)
  ]
  row = report_suites.row(suite, results, evaluate.rate)
  once = row["success_once"]
  log.info("%s: success %.1f %% [%.1f, %.1f] over %d episodes", suite.name, 100 * once["rate"], 100 * once["low"],
           100 * once["high"], once["n"])  # fmt: skip
  return row


def too_long(run: Run, suite: suites.Suite) -> str:
  """Why the policy cannot be told a suite's instructions; empty if it can."""
  image = np.zeros((1, run.config.sim.image_size, run.config.sim.image_size, 3), np.uint8)
  try:
    for text in suites.instructions(suite, run.task):
      run.policy.encode(image, [text])
  except ValueError as error:
    return str(error)
  return ""
