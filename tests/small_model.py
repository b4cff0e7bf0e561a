"""A model small enough to read, with a table, scanned layers and two heads, for tests of training (no tests here)."""

from __future__ import annotations

import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from stare_jax import train
from stare_jax.losses.ops import Mean, token_log_prob
from stare_jax.train import PreferenceBatch

WIDTH, HIDDEN, LAYERS, WORDS, TOKENS, BINS = 16, 32, 2, 8, 3, 16

PARAM_AXES = (
  (r".*/table", ("vocab", "embed")),
  (r".*/up/kernel", ("embed", "mlp")),
  (r".*/down/kernel", ("mlp", "embed")),
  (r"head/kernel", ("embed", "vocab")),
  (r"value/kernel|.*/(bias|scale)", (None,)),
)


def init(key: jax.Array) -> dict[str, Any]:
  """Float32 parameters, kernels of about +-0.4; a sine of a counter, which compiles faster than real random bits."""
  phase = jnp.sum(jax.random.key_data(key)).astype(jnp.float32)
  count = itertools.count(1)

  def normal(*shape: int) -> jax.Array:
    counter = jnp.arange(math.prod(shape), dtype=jnp.float32)
    return 0.4 * jnp.sin(phase + next(count) + 37.7 * counter).reshape(shape)

  return {
    "embed": {"table": normal(WORDS, WIDTH)},
    "layers": {
      "mlp": {
        "up": {"kernel": normal(LAYERS, WIDTH, HIDDEN), "bias": jnp.zeros((LAYERS, HIDDEN))},
        "down": {"kernel": normal(LAYERS, HIDDEN, WIDTH)},
      }
    },
    "head": {"kernel": normal(WIDTH, TOKENS * BINS)},
    "value": {"kernel": normal(WIDTH, 1)},
  }


def state(tx: optax.GradientTransformation, mesh: Mesh | None = None) -> train.TrainState:
  """Before the first update, on the mesh."""
  return train.new_state(jax.jit(init)(jax.random.key(0)), tx, mesh=mesh, param_axes=PARAM_AXES)


def hidden(params: Any, obs: dict[str, jax.Array]) -> jax.Array:
  """float32[N, WIDTH]. obs: word int32[N], image uint8[N, WIDTH]."""
  x = params["embed"]["table"][obs["word"]] + obs["image"].astype(jnp.float32) / 255

  def layer(x: jax.Array, weights: Any) -> tuple[jax.Array, None]:
    return x + jnp.tanh(x @ weights["up"]["kernel"] + weights["up"]["bias"]) @ weights["down"]["kernel"], None

  return jax.lax.scan(layer, x, params["layers"]["mlp"])[0]


def log_prob(params: Any, obs: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
  """float32[N, TOKENS], nats."""
  logits = (hidden(params, obs) @ params["head"]["kernel"]).reshape(-1, TOKENS, BINS)
  return token_log_prob(logits, tokens)


def loss_fn(params: Any, batch: dict[str, Any]) -> tuple[Mean, dict[str, Mean]]:
  """Negative log-likelihood and a value error over the valid rows."""
  nll = Mean.of(-jnp.sum(log_prob(params, batch["obs"], batch["tokens"]), axis=-1), batch["valid"])
  error = (hidden(params, batch["obs"]) @ params["value"]["kernel"])[:, 0] - batch["returns"]
  value = Mean.of(jnp.square(error), batch["valid"])
  loss = Mean(total=nll.total + batch["value_weight"] * value.total, weight=nll.weight)
  return loss, {"nll": nll, "value": value}


def batch(rng: np.random.Generator, rows: int = 48) -> dict[str, Any]:
  """Rows of which about two thirds are valid."""
  return {
    "obs": {
      "word": rng.integers(0, WORDS, rows, dtype=np.int32),
      "image": rng.integers(0, 256, (rows, WIDTH), dtype=np.uint8),
    },
    "tokens": rng.integers(0, BINS, (rows, TOKENS), dtype=np.int32),
    "returns": rng.normal(size=rows).astype(np.float32),
    "valid": rng.random(rows) < 0.7,
    "value_weight": np.float32(0.5),
  }


def pairs(rng: np.random.Generator, pairs: int = 4, steps: int = 10, stages: int = 3) -> PreferenceBatch:
  """Pairs of episodes of unequal length, cut into stages; some stages are no pair."""
  rows = 2 * pairs
  length = rng.integers(max(steps // 2, 1), steps + 1, rows)
  at = np.arange(steps)[None]
  valid = at < length[:, None]
  stage_id = np.where(valid, np.minimum(at * stages // np.maximum(length[:, None], 1), stages - 1), -1)
  return PreferenceBatch(
    obs={
      "word": rng.integers(0, WORDS, (rows, steps), dtype=np.int32),
      "image": rng.integers(0, 256, (rows, steps, WIDTH), dtype=np.uint8),
    },
    tokens=rng.integers(0, BINS, (rows, steps, TOKENS), dtype=np.int32),
    valid=valid,
    ref_log_prob=rng.normal(-8, 0.5, (rows, steps)).astype(np.float32),
    pairs={
      "stage_id": stage_id.astype(np.int32),
      "cost": rng.random((rows, stages)).astype(np.float32),
      "sign": rng.integers(-1, 2, (pairs, stages), dtype=np.int8),
    },
  )
