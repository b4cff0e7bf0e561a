r"""Evaluation suites on any checkpoint: in-distribution, vision, semantics, execution. One table (docs/evaluation.md).

  python -m stare_jax.main --config=configs/eval.py:run=runs/pull_cube-default-seed0                # its last phase
  python -m stare_jax.main --config=configs/eval.py:run=RUN,phase=imitation --config.suites.names="('vision',)"
  python -m stare_jax.main --config=configs/eval.py:openvla_7b,task=put_carrot_on_plate \
    --config.policy.checkpoint=FOLDER --config.policy.unnorm_key=bridge_orig                        # a public folder

`run` takes task, policy, simulator and evaluation from that run's config.json, so that in-distribution is its own
evaluation. Without it, a preset of configs/ipi.py says what they are and --config.init_from names a checkpoint.
"""

import json
import pathlib
import sys
from typing import Any

import ml_collections

from stare_jax.config import PHASES, ConfigError, parse_arg

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a config file is loaded by its path

from configs import ipi

PRESETS = dict(ipi.PRESETS)
PRESETS["openvla_7b"] = PRESETS["openvla_7b_lora"] | {"policy.lora.rank": 0}  # bfloat16, on one GPU of 80 GB


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  preset, chosen = parse_arg(arg, PRESETS, run="", phase="", task="pull_cube", seed=0)
  given = [item for item in arg.split(",") if item and not item.startswith(("run=", "phase="))]
  if chosen["run"] and given:
    raise ConfigError(f"{given[0]} and run={chosen['run']}: preset, task and seed are the run's own; leave them out")
  if chosen["phase"] and not chosen["run"]:
    raise ConfigError(f"phase={chosen['phase']} is of a run: name it, as in run=runs/x,phase={chosen['phase']}; "
                      f"without one, --config.init_from names a checkpoint")
  c = ipi.get_config(f"default,task={chosen['task']},seed={chosen['seed']}")
  with c.unlocked(), c.ignore_type():
    if chosen["run"]:
      of_run(c, pathlib.Path(chosen["run"]), chosen["phase"])
    else:
      ipi.change(c, dict(PRESETS[preset]))
      c.preset = f"{preset}-eval"
    c.phases = ("interaction",)  # whose starting point is what is evaluated
    c.report.videos = 0  # for each suite and seed
    c.suites = dict(
      names=("all",),  # suites, families, or all
      seeds=3,  # each takes the next evaluation.episodes starts; the first are those of the run's own evaluation
      pictures=6,  # first pictures shown of each suite
    )
  c.lock()
  return c


def of_run(c: ml_collections.ConfigDict, run: pathlib.Path, phase: str) -> None:
  """What a run's config.json says, and the last checkpoint of one of its phases."""
  if not (run / "config.json").is_file():
    raise ConfigError(f"run={run}: there is no config.json; name a run folder, such as runs/pull_cube-default-seed0")
  there = [p for p in PHASES if any((run / "checkpoints" / p).glob("[0-9]*"))]
  if not there or phase not in ("", *there):
    raise ConfigError(f"run={run}, phase={phase or 'the last one'}: it has checkpoints of {', '.join(there) or 'none'}")
  saved = json.loads((run / "config.json").read_text(), object_hook=_with_tuples)
  c.policy.options = ipi.options(saved["policy"].pop("options"))
  c.update(saved)
  phase = phase or there[-1]
  c.preset, c.init_from = f"{saved['preset']}-eval-{phase}", str(run / "checkpoints" / phase)


def _with_tuples(fields: dict[str, Any]) -> dict[str, Any]:
  return {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
