"""A made-up run folder for the tests of the report. Every number and picture in it is synthetic."""

from __future__ import annotations

import json
import pathlib

import numpy as np

from stare_jax import evaluate, report

STAGES = ("Reach", "Grasp", "Transport", "Place")
PER_STAGE = {  # made-up P(k | k-1) after each phase
  "imitation": (0.96, 0.72, 0.80, 0.70),
  "preference": (0.97, 0.82, 0.88, 0.80),
  "interaction": (0.99, 0.97, 0.98, 0.97),
}
WALL = {"imitation": 402.0, "preference": 251.5, "interaction": 958.0}
SEED0 = 10_000


def completed(label: str, episodes: int, rng: np.random.Generator) -> np.ndarray:
  """bool[N, K]: stages pass one after another with the phase's made-up chances."""
  return np.logical_and.accumulate(rng.random((episodes, len(STAGES))) < np.array(PER_STAGE[label]), axis=1)


def evaluation(label: str, episodes: int = 128, seed: int = 0) -> dict:
  done = completed(label, episodes, np.random.default_rng([seed, len(label)]))
  success = int(done[:, -1].sum())
  return {
    "label": label, "task": "place_sphere", "episodes": episodes, "seeds": [SEED0, SEED0 + episodes - 1],
    "distinct_seeds": episodes, "temperature": 0.0, "mean_length": 43.2, "max_length": 50,
    "stopped_at_success": 0, "env_steps": episodes * 50, "seconds": 96.4,
    "success_once": evaluate.rate(success, episodes),
    "success_at_end": evaluate.rate(max(success - 3, 0), episodes),
    "stages": evaluate.stage_rates(done, STAGES),
  }


def frames(steps: int, success: bool, size: int = 64) -> np.ndarray:
  """uint8[T, H, W, 3]: a square that slides towards a disc on a plain table."""
  y, x = np.mgrid[:size, :size]
  out = np.empty((steps, size, size, 3), np.uint8)
  for t in range(steps):
    image = np.full((size, size, 3), (171, 166, 158), np.uint8)
    image[: size // 4] = (94, 99, 107)
    image[(x - size * 0.72) ** 2 + (y - size * 0.62) ** 2 < (size * 0.11) ** 2] = (199, 72, 64)
    reach = t / max(steps - 1, 1) * (1.0 if success else 0.6)
    cx, cy = size * (0.2 + 0.52 * reach), size * (0.5 + 0.12 * reach)
    image[(abs(x - cx) < size * 0.06) & (abs(y - cy) < size * 0.06)] = (52, 104, 190)
    image[(abs(x - cx) < size * 0.02) & (y < cy - size * 0.06)] = (232, 232, 232)
    out[t] = image
  return out


def sample(workdir: pathlib.Path, label: str, index: int, success: bool, steps: int = 48) -> None:
  """A made-up episode: stages end at fixed fractions of it, a failure stops in the third stage."""
  ends = [0.22, 0.45, 0.8, 1.0] if success else [0.3, 0.62]
  done = np.full(len(STAGES), -1)
  done[: len(ends)] = np.round(np.array(ends) * steps).astype(int)
  stage = np.searchsorted(done[done >= 0], np.arange(steps + 1), side="right").clip(max=len(STAGES) - 1)
  start = np.concatenate([[0], done[done >= 0]])
  since = np.arange(steps + 1) - start[np.minimum(stage, len(start) - 1)]
  potential = stage + 1 / (1 + np.exp(-(since / 8 - 0.7 + 0.15 * np.sin(np.arange(steps + 1)))))
  report.write_sample(
    workdir, label=label, index=index, frames=frames(steps, success), fps=10, task="place_sphere",
    instruction="place the ball in the bin", seed=SEED0 + index, success=success, stages=STAGES,
    stage_id=stage[:-1], completed_at=done, potential=potential,
  )


def metrics(logger: report.MetricsLogger, phase: str, rng: np.random.Generator) -> None:
  """Made-up learning curves of one phase."""
  if phase == "imitation":
    for step in range(10, 801, 10):
      row = {"loss": 3.4 * np.exp(-step / 220) + 0.9 + rng.normal(0, 0.03),
             "nll": 3.3 * np.exp(-step / 220) + 0.8 + rng.normal(0, 0.03),
             "l1": 14 * np.exp(-step / 180) + 2.5 + rng.normal(0, 0.1),
             "accuracy": 0.72 - 0.6 * np.exp(-step / 260) + rng.normal(0, 0.008),
             "grad_norm": 1.2 + rng.exponential(0.2),
             "learning_rate": 5e-4 * (1 + np.cos(np.pi * step / 800)),
             "steps_per_second": 4.1 + rng.normal(0, 0.1)}
      logger.log(phase, step, row, env_steps=3000)
  if phase == "preference":
    for step in range(1, 121):
      row = {"loss": 0.7 * np.exp(-step / 90) + rng.normal(0, 0.02),
             "accuracy": 0.5 + 0.38 * (1 - np.exp(-step / 40)) + rng.normal(0, 0.02),
             "margin": step / 60 + rng.normal(0, 0.1), "grad_norm": 0.8,
             "chosen": step / 800 + rng.normal(0, 0.01), "rejected": -step / 300 + rng.normal(0, 0.01),
             "cost_gap": 0.11 + rng.normal(0, 0.01),
             "learning_rate": 1e-5}
      logger.log(phase, step, row, env_steps=12_800)
  if phase == "interaction":
    for step in range(1, 61):
      gain = 1 - np.exp(-step / 18)
      row = {"success": 0.56 + 0.36 * gain + rng.normal(0, 0.03), "return_raw": 0.55 + 0.37 * gain,
             "return_shaped": 1.9 + 1.1 * gain + rng.normal(0, 0.05), "kl": 0.008 + abs(rng.normal(0, 0.003)),
             "clip_fraction": 0.06 + rng.normal(0, 0.01), "explained_variance": 0.2 + 0.6 * gain,
             "entropy": 9.1 - 2 * gain, "steps_per_second": 52 + rng.normal(0, 2), "learning_rate": 2e-5}
      for k, (low, high) in enumerate(zip(PER_STAGE["preference"], PER_STAGE["interaction"], strict=True)):
        row[f"stage_{k + 1}"] = low + (high - low) * gain + rng.normal(0, 0.015)
      if step == 7:
        row["explained_variance"] = float("nan")
      logger.log(phase, step, row, env_steps=12_800 + step * 800)


def make(workdir: pathlib.Path, phases: tuple[str, ...] = report.PHASES, videos: bool = True) -> pathlib.Path:
  """Fill `workdir` as a finished run of these phases would."""
  rng = np.random.default_rng(0)
  with report.MetricsLogger(workdir, tensorboard=False) as logger:
    for phase in phases:
      metrics(logger, phase, rng)
  evaluations = {phase: evaluation(phase) for phase in phases}
  for phase, result in evaluations.items():
    report.write_evaluation(workdir, result)
    if videos:
      sample(workdir, phase, 0, True)
      sample(workdir, phase, 1, False)
  if "preference" in phases:
    report.write_json(workdir / "data" / "preference" / "pairs.json", {
      "episodes": 256, "starts": 64, "starts_paired": 51,
      "starts_by_rollouts": {"4": 60, "7": 4}, "pairs": 180, "stage_pairs": [160, 120, 90, 61],
      "by_completion": [20, 70, 40, 41], "by_cost": [140, 50, 50, 20]})
  config = {"task": "place_sphere", "preset": "default", "seed": 0, "sim": {"num_envs": 8, "image_size": 64},
            "policy": {"name": "openvla", "size": "tiny"}, "phases": list(phases)}
  (workdir / "config.json").write_text(json.dumps(config))
  report.write_summary(workdir, {
    "task": "place_sphere", "preset": "default", "seed": 0, "phases": evaluations,
    "parameters": 1_234_567, "simulator_events": ["worker 1 did not answer for 60 s and was replaced (made up)"],
    "params_sha256": "0123456789abcdef" * 4, "config": config,
    "versions": {"python": "3.11.2", "jax": "0.10.2", "mani_skill": "3.0.1", "torch": "2.13.0"},
    "wall_seconds": {"demonstrations rollouts": 31.0, **{p: s for p, s in WALL.items() if p in phases},
                     "this launch": 1931.0},
    "env_steps": {p: n for p, n in {"imitation": 3000, "preference": 12_800, "interaction": 48_000}.items()
                  if p in phases},
    "hardware": {"cpu": "a made-up processor", "cores": 2, "memory_gb": 8, "devices": "cpu"},
    "command": "python -m stare_jax.main --config=configs/ipi.py --workdir=runs/ipi",
  })
  return workdir
