"""PEFT adapter folders in and out: adapter_config.json, adapter_model.safetensors, and the value head beside them.

  base_model.model.<module>.lora_A.weight   [r, I], of the patch embedding's convolution [r, 3, p, p]
  base_model.model.<module>.lora_B.weight   [O, r], there [O, r, 1, 1]
  value_head.safetensors                    ours, where a value head is saved; peft does not read it

peft.PeftModel.from_pretrained takes what `save` writes, and `load` what peft writes. Adapters on modules that no output
depends on ("all-linear" makes some) have no place here: `load` hands them back as they were, and `save` writes them
again. Where lm_head is adapted, peft stores its frozen weights as well: they must be the base's. A pickle is never
opened.
"""

from __future__ import annotations

import difflib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import lora as adapters
from stare_jax.policies import openvla_names as names
from stare_jax.policies import tensor_files
from stare_jax.policies.lora import Lora, Module
from stare_jax.policies.sizes import Config
from stare_jax.policies.tensor_files import Plan

CONFIG, WEIGHTS, VALUE = "adapter_config.json", "adapter_model.safetensors", "value_head.safetensors"
PREFIX = "base_model.model."
READ = ("peft_type", "r", "lora_alpha", "use_rslora", "init_lora_weights")
IGNORED = (  # which modules (the tensors' names say it), how it was trained, and by whom
  "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "inference_mode",
  "task_type", "auto_mapping", "base_model_name_or_path", "revision", "peft_version", "runtime_config",
  "eva_config", "corda_config", "lora_ga_config", "loftq_config",  # of a start: `init_lora_weights` says which it was
  "megatron_config", "megatron_core", "qalora_group_size",
)  # fmt: skip
INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # others change the base's weights as well


class Loaded(NamedTuple):
  """An adapter folder.

  Attributes:
    lora: which modules, rank and scale.
    adapters: the "lora" part of the parameters, numpy float32.
    value: the "value" part, numpy, or None where the folder has no value head.
    bases: {path of a parameter: its frozen weights as the file has them}, which `params_of` holds against the base's.
    kept: {name: array as in the file} of these, and of adapters on modules that no output depends on; for `save`.
  """

  lora: Lora
  adapters: dict[str, Any]
  value: dict[str, Any] | None
  bases: dict[str, np.ndarray]
  kept: dict[str, np.ndarray]


def save(
  folder: str | os.PathLike,
  config: Config,
  lora: Lora,
  params: Any,
  *,
  base: str = "",
  kept: Mapping[str, np.ndarray] | None = None,
) -> pathlib.Path:
  """Writes the adapters (and the value head) of `params`, on devices of this process or numpy, as float32.

    folder: must not exist yet; it appears when it is complete.
    base: name or folder of the base model, for whoever opens it.
    kept: of `load`, written again as they were.
  Raises: CheckpointError; nothing is left behind then.
  """
  folder = pathlib.Path(folder)
  if folder.exists():
    raise CheckpointError(f"{folder} exists already; name a new folder, or remove that one")
  arrays = dict(_public(lora, jax.device_get(params["lora"])))
  arrays |= dict(kept or {})
  modules = sorted({_module(name) for name in arrays if ".lora_" in name})
  alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
  described = {
    "peft_type": "LORA", "task_type": None, "base_model_name_or_path": base or None, "inference_mode": True,
    "r": lora.rank, "lora_alpha": alpha, "lora_dropout": 0.0, "target_modules": modules,
    "init_lora_weights": "gaussian", "use_rslora": lora.rslora, "use_dora": False, "bias": "none",
    "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
  }  # fmt: skip
  value = lambda t: np.asarray(jax.device_get(names.leaf(params, t.path)))
  head = {t.name: names.from_block(t, value(t)) for t in names.value_tensors(config)}
  with tensor_files.appearing(folder) as partial:
    (partial / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
    _write(partial / WEIGHTS, arrays)
    _write(partial / VALUE, head)
  return folder


def _write(path: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
  tensor_files.write(path, [Plan(name, x.dtype, x.shape) for name, x in arrays.items()], arrays.values())


def _public(lora: Lora, tree: Any):
  """(name, float32 array) of every adapted module, in PEFT's layout."""
  for module in lora.modules:
    place, at_a, at_b = lora.index(module)
    pair = names.leaf(tree, "/".join(place.path))
    a, b = np.asarray(pair["a"], np.float32)[at_a], np.asarray(pair["b"], np.float32)[at_b]
    a, b = a.T, b.reshape(lora.rank, -1).T
    if len(module.inputs) == 3:  # pixels are (row, column, channel) here
      channels, *window = module.inputs
      a, b = a.reshape(-1, *window, channels).transpose(0, 3, 1, 2), b[:, :, None, None]
    yield f"{PREFIX}{module.name}.lora_A.weight", np.ascontiguousarray(a)
    yield f"{PREFIX}{module.name}.lora_B.weight", np.ascontiguousarray(b)


def load(folder: str | os.PathLike, config: Config) -> Loaded:
  """The adapters of a folder that peft or `save` wrote, for a policy of this configuration.

  Raises: CheckpointError, naming the tensor or the setting, for what is missing, unknown, misshapen or not plain LoRA.
  """
  folder = pathlib.Path(folder)
  rank, alpha, rslora = _settings(folder)
  entries = {name: tensor_files.view(e) for name, e in tensor_files.read_header(folder / WEIGHTS).items()}
  stored = _stored(folder, config, entries)
  pairs = _pairs(folder, {name: x for name, x in entries.items() if name not in stored})
  known = {module.name: module for module in adapters.modules(config)}
  dead = adapters.unused(config)
  if unknown := [name for name in pairs if name not in known and name not in dead]:
    near = difflib.get_close_matches(unknown[0], [*known, *dead], n=1, cutoff=0.0)[0]
    raise CheckpointError(f"{folder / WEIGHTS} adapts {unknown[0]} ({len(unknown)} such modules), which this policy "
                          f"does not have; nearest: {near}. Load it with the policy that it was trained on")
  chosen = [module for module in known.values() if module.name in pairs]
  if not chosen:
    raise CheckpointError(f"{folder / WEIGHTS} adapts no module that an output depends on")
  lora = adapters.of_modules(config, chosen, rank=rank, alpha=alpha, rslora=rslora)
  shapes = {place.path: (np.zeros(place.a, np.float32), np.zeros(place.b, np.float32)) for place in lora.places}
  for module in chosen:
    _check(folder, module, pairs[module.name], rank)
    a, b = (np.asarray(x, np.float32) for x in pairs[module.name])
    if len(module.inputs) == 3:
      a = a.transpose(0, 2, 3, 1)
    place, at_a, at_b = lora.index(module)
    target_a, target_b = shapes[place.path]
    target_a[at_a] = a.reshape(rank, -1).T
    target_b[at_b] = b.reshape(module.outputs, rank).T.reshape(target_b[at_b].shape)
  tree = names.nest({f"{'/'.join(path)}/{name}": x for path, pair in shapes.items() for name, x in zip("ab", pair)})
  kept = {name: np.array(x) for name, x in entries.items() if _module(name) in dead or name in stored}
  bases = {tensor.path: names.from_public(tensor, kept[name]) for name, tensor in stored.items()}
  return Loaded(lora, tree, _value(folder, config), bases, kept)


def _settings(folder: pathlib.Path) -> tuple[int, float, bool]:
  """Rank, alpha and whether the scale is alpha / sqrt(rank).

  A setting that is not known here and is set at all may change the forward pass, so it is refused.
  """
  found = tensor_files.read_json(folder / CONFIG)
  if found.get("peft_type") != "LORA":
    raise CheckpointError(f'{folder / CONFIG}: peft_type is {found.get("peft_type")!r}, expected "LORA"')
  odd = [key for key, x in found.items() if key not in READ + IGNORED and x not in (None, False, "none", [], {})]
  start = found.get("init_lora_weights")
  odd += ["init_lora_weights"] if (start.lower() if isinstance(start, str) else start) not in INITS else []
  if odd:
    raise CheckpointError(f"{folder / CONFIG}: {odd[0]} = {found[odd[0]]!r} is not read, only plain LoRA is: merge "
                          f"this adapter with peft's merge_and_unload and load the merged model")
  rank, alpha = found.get("r"), found.get("lora_alpha")
  if not (isinstance(rank, int) and rank >= 1 and isinstance(alpha, int | float) and alpha > 0):
    raise CheckpointError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}, expected a whole number of at "
                          f"least 1 and a number above 0; fetch it again")
  return rank, float(alpha), bool(found.get("use_rslora", False))


def _module(name: str) -> str:
  return name.removeprefix(PREFIX).rsplit(".lora_", 1)[0]


def _stored(folder: pathlib.Path, config: Config, entries: Mapping[str, np.ndarray]) -> dict[str, names.Tensor]:
  """{name in the file: tensor} of the frozen tables that peft stores where adapters, or new words, touch them."""
  tables = {t.name: t for t in names.tensors(config) if t.path in ("llm/embed/table", "llm/head/table")}
  public = {name: name.removeprefix(PREFIX).replace(".base_layer.", ".") for name in entries}
  found = {name: tables[public[name]] for name in entries if public[name] in tables}
  for name, tensor in found.items():
    if entries[name].shape != tensor.shape:
      raise CheckpointError(f"{folder / WEIGHTS}: {name} is {list(entries[name].shape)}, expected "
                            f"{list(tensor.shape)}: it belongs to another network")
  return found


def _pairs(folder: pathlib.Path, entries: Mapping[str, np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{module: (A, B)}."""
  out = {}
  for name in entries:
    ends = [f"{PREFIX}{_module(name)}.lora_{x}.weight" for x in "AB"]
    if name not in ends:
      raise CheckpointError(f"{folder / WEIGHTS} holds {name}, expected {PREFIX}<module>.lora_A.weight or B")
    if lost := [end for end in ends if end not in entries]:
      raise CheckpointError(f"{folder / WEIGHTS} lacks {lost[0]}, the other half of {name}; fetch the file again")
    out[_module(name)] = tuple(entries[end] for end in ends)
  return out


def _check(folder: pathlib.Path, module: Module, pair: tuple[np.ndarray, np.ndarray], rank: int) -> None:
  ones = (1, 1) if len(module.inputs) == 3 else ()
  expected = {"A": (rank, *module.inputs), "B": (module.outputs, rank, *ones)}
  for (name, shape), x in zip(expected.items(), pair):
    if x.shape != shape:
      raise CheckpointError(f"{folder / WEIGHTS}: {module.name}.lora_{name} is {list(x.shape)}, expected {list(shape)} "
                            f"at rank {rank}: it belongs to another network, or its {CONFIG} to another adapter")


def _value(folder: pathlib.Path, config: Config) -> dict[str, Any] | None:
  if not (folder / VALUE).exists():
    return None
  table, entries = names.value_tensors(config), tensor_files.read_header(folder / VALUE)
  names.check_shapes(str(folder / VALUE), table, {name: e.shape for name, e in entries.items()})
  leaves = {t.path: names.from_public(t, np.array(tensor_files.view(entries[t.name]))) for t in table}
  return names.nest(leaves)["value"]


def params_of(loaded: Loaded, base: Any) -> dict[str, Any]:
  """{"base", "lora", "value"} of `lora.wrap(policy, loaded.lora)`: the folder's adapters on a backbone's parameters.

  base: as of `openvla_files.load`, shared and not copied; its value head serves where the folder has none.
  Raises: CheckpointError where the folder has weights of its base that are not those of this one.
  """
  for path, x in loaded.bases.items():
    ours = names.leaf(base, path)
    kind = min(ours.dtype, x.dtype, key=lambda dtype: dtype.itemsize)  # either may have been rounded
    if not jnp.array_equal(jnp.asarray(ours, kind), jnp.asarray(x, kind)):
      raise CheckpointError(f"the adapter's file holds {path} of the model that it was trained on, and this base has "
                            f"other values there: load it with its own base, or merge it there with peft first")
  full = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)
  rest = {name: x for name, x in base.items() if name != "value"}
  value = base["value"] if loaded.value is None else loaded.value
  return {"base": rest, "lora": full(loaded.adapters), "value": full(value)}
