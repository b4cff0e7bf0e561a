"""How much of a policy gradient is signal: the cosine between the gradients of two disjoint sets of rollouts.

  python -m benchmarks.gradient_signal --workdir=runs/pull_cube-default-seed0

Rolls a run's imitation policy out from fresh starts, once, and splits the environments in two halves. For each way of
estimating advantages it prints the cosine between the halves' gradients of E[A log pi(a|o)], over all parameters and by
part of the network: near 0 the step is noise, whatever its size. `gain` is what a step of 0.03 nats along one half's
gradient brings on the other half: the mean of (ratio - 1) * A there, A standardised. One JSON line per estimator.
Values are those of the policy's own head, untrained after imitation: the potential alone is the baseline.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from stare_jax import stages
from stare_jax.losses import ops
from stare_jax.pipeline_interaction import advantages, with_success_reward
from stare_jax.pipeline_run import Run, starting_params
from stare_jax.rollout import Start

ESTIMATORS = {  # offset, success reward, discount, lambda
  "as configured": {},
  "next step only": {"lam": 0.0},
  "long horizon": {"lam": 0.95, "discount": 0.98},
  "offset 1": {"offset": 1.0},
  "success alone": {"reward": "success", "lam": 0.95, "discount": 0.98},
}
PARTS = {"all": "", "vision": "vision", "projector": "projector", "decoder": "llm/layers", "head": "llm/head"}
SLICE = 400


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--steps", type=int, default=200, help="per environment")
  arguments = parser.parse_args()
  config = ml_collections.ConfigDict(json.loads((arguments.workdir / "config.json").read_text()))
  run = Run(config, arguments.workdir)
  try:
    params = starting_params(run, "preference")
    first = run.seeds("gradient signal", 1)[0]
    collector = run.collector(run.actor(params, "gradient", config.interaction.temperature))
    rows = collector.rows(lambda n, j: Start(first + 1000 * n + j), arguments.steps)
    report(run, params, [rows[::2], rows[1::2]])
  finally:
    run.close()


def report(run: Run, params, halves) -> None:
  temperature = run.config.interaction.temperature
  logits = lambda p, b: run.policy.apply(p, b["obs"], b["tokens"]).logits
  log_prob = lambda p, b: ops.token_log_prob(logits(p, b), b["tokens"], temperature)
  action = jax.jit(lambda p, b: log_prob(p, b).sum(-1))
  gradient = jax.jit(jax.grad(lambda p, b: jnp.mean(log_prob(p, b).sum(-1) * b["advantage"])))
  for name, changes in ESTIMATORS.items():
    c = copy.deepcopy(run.config.interaction)
    with c.unlocked():
      for key, value in changes.items():
        (c.hp if key in c.hp else c)[key] = value
    c = with_success_reward(c, len(run.task.stages))
    batches = [slices(run, half, c) for half in halves]
    grads = [mean([gradient(params, b) for b in half]) for half in batches]
    line = {"estimator": name, "steps_per_half": sum(len(b["tokens"]) for b in batches[0])}
    line |= {part: round(cosine(*(pick(g, pattern) for g in grads)), 3) for part, pattern in PARTS.items()}
    gains = [gain(action, params, grads[i], batches[1 - i]) for i in (0, 1)]
    print(json.dumps(line | {"gain": round(float(np.mean(gains)), 4)}), flush=True)


def slices(run: Run, rows, c) -> list[dict]:
  """Batches of `SLICE` steps with standardised advantages."""
  staged = [stages.annotate(run.task, row, offset=c.offset) for row in rows]
  data = advantages(staged, c)
  obs = run.obs(np.concatenate([item.episode.images for row in staged for item in row]))
  keep = {"obs": obs, "tokens": data["tokens"], "advantage": data["advantage"], "log_prob": data["log_prob"]}
  whole = len(data["tokens"]) // SLICE * SLICE
  cut = lambda i: jax.tree.map(lambda x: x[i : i + SLICE], keep)
  return [cut(i) for i in range(0, whole, SLICE)]


def gain(action, params, direction, batches, kl: float = 0.03) -> float:
  """Mean of (ratio - 1) * A on `batches` after a step along `direction` that moves the policy by `kl` nats there."""
  size, log_ratio = 0.05 / norm(direction), np.zeros(1)
  for _ in range(3):
    moved = jax.tree.map(lambda p, d: p + size * d, params, direction)  # noqa: B023 - called at once
    log_ratio = np.concatenate([np.asarray(action(moved, b)) - b["log_prob"].sum(-1) for b in batches])
    size *= np.sqrt(kl / max(float(np.mean(np.expm1(log_ratio) - log_ratio)), 1e-9))
  return float(np.mean(np.expm1(log_ratio) * np.concatenate([b["advantage"] for b in batches])))


def mean(trees):
  return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


def pick(tree, pattern: str) -> np.ndarray:
  """The leaves whose path begins with `pattern`, as one vector."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
  return np.concatenate([np.ravel(x) for path, x in leaves if re.match(pattern, name(path))])


def norm(tree) -> float:
  return float(jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree))))


def cosine(a: np.ndarray, b: np.ndarray) -> float:
  return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


if __name__ == "__main__":
  main()
