"""Policies: what the rest of the house may know about a backbone, and the registry of backbones.

A backbone is the values of `Policy`, not a base class. Parameters are nested dicts of arrays; everything that runs on
the device is a pure function of them, so the caller decides what to jit, donate and shard.
"""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

REGISTRY: dict[str, str] = {
  "openvla": "stare_jax.policies.openvla:make",
}
LOADERS: dict[str, str] = {  # of public checkpoint folders
  "openvla": "stare_jax.policies.openvla_files:load",
}


class Obs(NamedTuple):
  """What the policy sees, N steps.

  Attributes:
    image: uint8[N, H, W, 3]; normalised on the device.
    prompt: int32[N, L], token ids of the instruction in its template, padded by the policy's own `encode`.
    prompt_mask: bool[N, L], True where `prompt` is a token.
  """

  image: jax.Array
  prompt: jax.Array
  prompt_mask: jax.Array


class Output(NamedTuple):
  """Teacher-forced prediction: raw action logits float32[N, A, V] (no temperature) and value float32[N]."""

  logits: jax.Array
  value: jax.Array


class Act(NamedTuple):
  """A sampled action: bins int32[N, A], their log-probabilities float32[N, A] in nats, value float32[N]."""

  tokens: jax.Array
  log_prob: jax.Array
  value: jax.Array


class ActionStats(NamedTuple):
  """How actions are normalised to [-1, 1] before they are cut into bins (BOUNDS_Q99).

  Attributes:
    q01, q99: float32[D], the range that maps to [-1, 1]; equal where the dimension never varies.
    mask: bool[D], False where the action is already in [-1, 1] and is kept as it is (the gripper).
  """

  q01: np.ndarray
  q99: np.ndarray
  mask: np.ndarray

  @classmethod
  def from_actions(
    cls, actions: np.ndarray, *, mask: Sequence[bool] | None = None, tolerance: float = 1e-4
  ) -> ActionStats:
    """Statistics of demonstrations, float[N, D].

    Normalised dimensions take the 1st and 99th percentile; the others (by default the last one, the gripper) take
    minimum and maximum, which only say whether they vary. A range below `tolerance` counts as constant.
    """
    actions = np.asarray(actions, np.float32)
    if actions.ndim != 2 or not len(actions):
      raise ValueError(f"ActionStats.from_actions: got shape {actions.shape}, expected [N, D] with N >= 1")
    if not np.isfinite(actions).all():
      raise ValueError("ActionStats.from_actions: the actions contain NaN or infinity; drop those episodes first")
    size = actions.shape[1]
    mask = np.arange(size) < size - 1 if mask is None else np.asarray(mask, bool)
    if mask.shape != (size,):
      raise ValueError(f"ActionStats.from_actions: mask has shape {mask.shape}, expected ({size},) like the actions")
    low = np.where(mask, np.quantile(actions, 0.01, axis=0), actions.min(0)).astype(np.float32)
    high = np.where(mask, np.quantile(actions, 0.99, axis=0), actions.max(0)).astype(np.float32)
    constant = high - low < tolerance
    middle = np.median(actions, axis=0).astype(np.float32)
    return cls(q01=np.where(constant, middle, low), q99=np.where(constant, middle, high), mask=mask)

  @property
  def free(self) -> tuple[bool, ...]:
    """Which dimensions vary (q99 > q01); the others carry no choice and no gradient."""
    return tuple(bool(x) for x in np.asarray(self.q99) > np.asarray(self.q01))


class Policy(NamedTuple):
  """A backbone.

  Attributes:
    init: (key) -> params.
    apply: (params, obs, tokens int32[N, A]) -> Output; teacher-forced.
    act: (params, obs, keys [N], temperature float32[]) -> Act; keys are one PRNG key per row (typed keys [N] or
      uint32[N, 2]), so that a row's sample depends on its own key and observation only. Temperature is traced and
      scales sampling and log-probability alike; 0 takes the argmax, with log-probability 0.
    value: (params, obs) -> float32[N].
    encode: (uint8[N, H, W, 3], N instructions) -> Obs; host, numpy.
    decode: int32[N, A] -> float32[N, D], actions for the simulator; host, numpy.
    tokenize: float32[N, D] -> int32[N, A], its inverse up to the bin; host, numpy.
    param_axes: ((path pattern, axis words), ...), the weights in sharding words, of their last axes.
    config: the backbone's own frozen configuration.
    free: bool per action dimension, False where the action never varies.
    trainable: by the path of a parameter ("lora/llm/head/a"), whether it is trained; None trains all.
    reference: params -> the parameters of the policy without what was added to it (its adapters), sharing every array;
      None where nothing was.
    acts_in: (path of a parameter, array) -> the type in which `act` uses it: a copy in that type acts the same.
  """

  init: Callable[[jax.Array], Any]
  apply: Callable[[Any, Obs, jax.Array], Output]
  act: Callable[[Any, Obs, jax.Array, jax.Array], Act]
  value: Callable[[Any, Obs], jax.Array]
  encode: Callable[[np.ndarray, Sequence[str]], Obs]
  decode: Callable[[np.ndarray], np.ndarray]
  tokenize: Callable[[np.ndarray], np.ndarray]
  param_axes: tuple[tuple[str, tuple[str | None, ...]], ...]
  config: Any
  free: tuple[bool, ...]
  trainable: Callable[[str], bool] | None = None
  reference: Callable[[Any], Any] | None = None
  acts_in: Callable[[str, Any], Any] | None = None


def make(name: str = "openvla", *, stats: ActionStats, **options: Any) -> Policy:
  """Build a backbone by name; `options` are its own (size, overrides of its configuration)."""
  return _find(REGISTRY, name)(stats=stats, **options)


def load(folder: str | os.PathLike, *, name: str = "openvla", **options: Any) -> tuple[Policy, Any]:
  """(policy, params) of a public checkpoint folder, such as one of openvla/openvla-7b; see docs/checkpoints.md.

    options: of the backbone's loader, such as mesh and unnorm_key.
  Raises: CheckpointError for a folder that is not a whole checkpoint of this kind, before anything is read from it.
  """
  return _find(LOADERS, name)(folder, **options)


def _find(registry: dict[str, str], name: str) -> Callable[..., Any]:
  if name not in registry:
    near = difflib.get_close_matches(name, registry, n=1, cutoff=0.0)
    raise ValueError(f"unknown policy {name!r}; did you mean {near[0]!r}? known: {', '.join(registry)}")
  module, attribute = registry[name].split(":")
  return getattr(importlib.import_module(module), attribute)
