"""The main job on the toy simulator with a very small policy: all three phases in seconds (no tests here).

  python -m stare_jax.main --config=tests/toy_run.py --workdir=DIR [--config.field=value]
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from typing import Any

import ml_collections

ROOT = pathlib.Path(__file__).resolve().parent.parent

SMALL = {
  "sim.name": "toy", "sim.num_envs": 4, "sim.num_workers": 2, "sim.image_size": 16, "sim.horizon": 12,
  "imitation.demonstrations": 8, "imitation.expert_noise": 0.05, "imitation.updates": 6, "imitation.batch": 8,
  "imitation.checkpoint_every": 2, "imitation.optimiser.warmup_steps": 1,
  "preference.starts": 6, "preference.samples": 2, "preference.updates": 4, "preference.checkpoint_every": 2,
  "preference.parts_before": 2, "preference.tail": 8, "preference.batch": 2, "preference.micro_batch": 8,
  "preference.buckets": (12,), "preference.margin": 0.0,
  "preference.optimiser.warmup_steps": 1,
  "interaction.iterations": 4, "interaction.steps": 10, "interaction.epochs": 1, "interaction.batch": 20,
  "interaction.hp.kl_weight": 0.01, "interaction.micro_batches": 1, "interaction.critic_warmup": 1,
  "interaction.checkpoint_every": 2,
  "evaluation.episodes": 4, "report.videos": 2,
}  # fmt: skip

VISION = dict(width=16, depth=2, head_size=8, mlp=32)
POLICY = dict(
  patch_size=8, llm_width=32, llm_depth=2, llm_head_size=16, llm_mlp=64, projector=32, value_hidden=(16,),
  dino=VISION, siglip=VISION, remat="none", faithful=False,
)  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  sys.path.insert(0, str(ROOT))  # a config file is loaded by its path
  from configs import ipi

  config = ipi.get_config(arg)
  config.update_from_flattened_dict(SMALL)
  with config.unlocked():
    config.policy.options = ml_collections.ConfigDict(POLICY)
  return config


def environment(user_environment: dict[str, str], cache: pathlib.Path) -> dict[str, str]:
  """The user's environment, with compiled programs shared between the launches of a test session."""
  return user_environment | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
  }


def command(workdir: Any, *flags: str, config: str = "tests/toy_run.py") -> list[str]:
  return [sys.executable, "-m", "stare_jax.main", f"--config={config}", f"--workdir={workdir}", *flags]


def launch(workdir: Any, env: dict[str, str], *flags: str, **options: str) -> subprocess.CompletedProcess:
  """The front door, to its end; its output is text."""
  return subprocess.run(command(workdir, *flags, **options), cwd=ROOT, env=env, capture_output=True, text=True)


def results(workdir: pathlib.Path) -> dict[str, Any]:
  """What two equal runs have in common, bit for bit: everything but the clock."""
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  timed = ("time", "rollout_seconds", "update_seconds", "steps_per_second")
  evaluations = {path.stem: json.loads(path.read_text()) for path in sorted((workdir / "evaluations").glob("*.json"))}
  summary = json.loads((workdir / "summary.json").read_text())
  return {
    "params_sha256": summary["params_sha256"],
    "env_steps": summary["env_steps"],
    "metrics": [{name: x for name, x in row.items() if name not in timed} for row in rows],
    "evaluations": {k: {name: x for name, x in v.items() if name != "seconds"} for k, v in evaluations.items()},
    "videos": {p.name: p.read_text() for p in sorted((workdir / "videos").glob("*.json"))},
  }
