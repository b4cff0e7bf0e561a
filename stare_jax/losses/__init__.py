"""Loss kernels: pure functions of arrays. A kernel is named by a string, so that a config can choose one.

A kernel takes arrays and keyword numbers and returns `(loss, metrics)`: a float32 scalar, and `{name: Mean}`
where `metrics["loss"]` is the same loss kept as its two sums. No model, config or random key is inside, so
the same kernel serves every backbone, and shards and micro-batches add exactly. Nothing is imported until a
kernel is asked for.

Keyword numbers are constants of a program. Bind them before `jax.jit`:

  jax.jit(functools.partial(losses.get("stage_tpo"), beta=0.1))
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable

REGISTRY: dict[str, str] = {  # name -> its room, which is that of the phase it is for, and the function
  "cross_entropy": "stare_jax.losses.imitation:cross_entropy",
  "tpo": "stare_jax.losses.preference:tpo",
  "stage_tpo": "stare_jax.losses.preference:stage_tpo",
  "window_tpo": "stare_jax.losses.preference:window_tpo",
  "ppo": "stare_jax.losses.ppo:objective",
}


def names(phase: str = "") -> tuple[str, ...]:
  """The kernels that a config may name; of one phase ("imitation", "preference") or all."""
  return tuple(name for name, target in REGISTRY.items() if phase in target)


def get(name: str) -> Callable:
  """The kernel called `name`."""
  if name not in REGISTRY:
    near = difflib.get_close_matches(name, REGISTRY, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown loss {name!r}; {hint}known: {', '.join(REGISTRY)}")
  module, attribute = REGISTRY[name].split(":")
  return getattr(importlib.import_module(module), attribute)
