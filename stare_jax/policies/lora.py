"""LoRA as data: adapters in a second tree beside a frozen base (Hu et al. 2021), on any linear layer of OpenVLA.

  {"base": the backbone's parameters without its value head,    frozen, in the backbone's param_dtype
   "lora": {path of a kernel or table: {"a": ..., "b": ...}},   trained, float32
   "value": the value head}                                      trained, float32

`attach` puts an `Adapter` beside each adapted kernel, and the layers add scale * (x a) b to what they compute: no
second copy of a weight exists in training or acting. Without its adapters (`reference`) the policy is its base again.

A module is what the public checkpoint calls one (`language_model.model.layers.3.self_attn.q_proj`); targets are
patterns of such names. Several modules may be one leaf here: layers are stacked, q/k/v and gate/up share a kernel.
Modules that no output depends on (the last block of both vision transformers, SigLIP's pooling) do not exist here, see
`unused`.

Shapes, with L adapted layers and g adapted modules of a shared kernel: a [L, I, (g,) r], b [L, (g,) r, *O]. Where
modules that share a kernel are adapted in different layers, those left out are zeros in both: neither factor has a
gradient while the other is zero, so they stay what they are.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.policies import Policy
from stare_jax.policies import openvla_names as names
from stare_jax.policies.layers import Adapter, apart
from stare_jax.policies.openvla import PARAM_AXES, specs
from stare_jax.policies.sizes import Config

Params = dict[str, Any]
ALL_LINEAR = "all-linear"


class Module(NamedTuple):
  """A linear module (or convolution over patches) of the public checkpoint, and where it lies here.

  Attributes:
    name: in the public checkpoint, without ".weight".
    path: of our leaf, such as ("llm", "layers", "attn", "qkv").
    layer, group: index in the stack and in the shared kernel; None where there is none.
    outputs: features.   inputs: the public shape of one output's weights, [I], or [channel, row, column].
  """

  name: str
  path: tuple[str, ...]
  layer: int | None
  group: int | None
  outputs: int
  inputs: tuple[int, ...]


def modules(config: Config) -> list[Module]:
  """Every linear module of the forward pass, in the order of the public model."""
  found = []
  for t in names.tensors(config):
    *path, leaf = t.path.split("/")
    if leaf == "kernel" or path[-1:] == ["head"]:
      shared = len(t.block) == 4 and t.block[2] == 1  # one of the modules in a kernel [L, I, G, O]
      layer, group = t.start[0] if "layers" in path else None, t.start[2] if shared else None
      found.append(Module(t.name.removesuffix(".weight"), tuple(path), layer, group, t.shape[0], t.shape[1:]))
  return found


def unused(config: Config) -> dict[str, tuple[int, int]]:
  """{name: (outputs, inputs)} of the linear modules in the public file that no output depends on."""
  weights = (t for t in names.tensors(config) if not t.path and t.name.endswith(".weight") and len(t.shape) == 2)
  return {t.name.removesuffix(".weight"): t.shape for t in weights}


def matches(name: str, targets: str | Iterable[str]) -> bool:
  """PEFT's rule: a string is a regular expression of the whole name, of a list each is a name or its last parts."""
  if isinstance(targets, str):
    return targets == ALL_LINEAR or re.fullmatch(targets, name) is not None
  return any(name == target or name.endswith(f".{target}") for target in targets)


def parse_targets(targets: str | Iterable[str]) -> str | tuple[str, ...]:
  """A string of plain names, "q_proj,v_proj", is a list of them; other strings stay patterns."""
  if isinstance(targets, str):
    plain = targets != ALL_LINEAR and re.fullmatch(r"[\w.]+(,\s*[\w.]+)*", targets)
    return tuple(re.split(r",\s*", targets)) if plain else targets
  return tuple(targets)


def select(config: Config, targets: str | Iterable[str]) -> list[Module]:
  """The modules that `targets` names: "all-linear", a regular expression, or names such as ("q_proj", "v_proj").

  Raises: ValueError, with the nearest names, where a name (or the expression) matches nothing.
  """
  targets, table = parse_targets(targets), modules(config)
  each = [targets] if isinstance(targets, str) else [(name,) for name in targets]
  known = sorted({module.name.split(".")[-1] for module in table} | {m.name for m in table})
  for one in each or [""]:
    try:
      found = any(matches(name, one) for name in (*(m.name for m in table), *unused(config)))
    except re.error as error:
      raise ValueError(f"lora targets {one!r}: not a regular expression ({error})") from error
    if not found:
      word = one if isinstance(one, str) else one[0]
      near = difflib.get_close_matches(word, known, n=3, cutoff=0.0)
      raise ValueError(f"lora targets: {word!r} matches no linear module; nearest: {', '.join(near)}; or all-linear")
  chosen = [module for module in table if matches(module.name, targets)]
  if not chosen:
    raise ValueError(f"lora targets {targets!r} name only modules that no output depends on; choose others")
  return chosen


class Place(NamedTuple):
  """The adapted part of one of our leaves: every module of `groups` in every one of `layers`, zeros if not adapted.

  Attributes:
    path: of the leaf; its adapter is "lora" / path / "a" and "b".
    layers: those of the stack with an adapted module, None for all of them or where there is no stack.
    groups: the modules of a shared kernel that are adapted in some layer; None where it is one module.
    a, b: shapes.
    depth: of the whole stack, None where there is none.
  """

  path: tuple[str, ...]
  layers: tuple[int, ...] | None
  groups: tuple[int, ...] | None
  a: tuple[int, ...]
  b: tuple[int, ...]
  depth: int | None


def _place(path: tuple[str, ...], chosen: list[Module], leaf: Any, rank: int) -> Place:
  shape = leaf["table"].shape[::-1] if "table" in leaf else leaf["kernel"].shape
  layers = sorted({m.layer for m in chosen} - {None})
  groups = tuple(sorted({m.group for m in chosen} - {None})) or None
  depth, (inputs, *out) = (shape[0], shape[1:]) if layers else (None, shape)
  lead = (len(layers),) if layers else ()
  shared = (len(groups),) if groups else ()
  a, b = (*lead, inputs, *shared, rank), (*lead, *shared, rank, *(out[1:] if groups else out))
  return Place(path, tuple(layers) if layers and len(layers) < depth else None, groups, a, b, depth)


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which modules are adapted, and how strongly: host constants.

  Attributes:
    rank: r. alpha: the adapters' sum is scaled by alpha / r.
    modules: the adapted ones. places: the same by leaf of ours.
    rslora: alpha / sqrt(r) instead (PEFT's use_rslora).
  """

  rank: int
  alpha: float
  modules: tuple[Module, ...]
  places: tuple[Place, ...]
  rslora: bool = False

  @property
  def scale(self) -> float:
    return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

  @property
  def size(self) -> int:
    """The number of trained values, the value head's not among them."""
    return sum(self.rank * (module.outputs + math.prod(module.inputs)) for module in self.modules)

  def index(self, module: Module) -> tuple[Place, tuple[Any, ...], tuple[Any, ...]]:
    """The place of an adapted module, and its index into that place's a and b."""
    place = next(place for place in self.places if place.path == module.path)
    layer = module.layer if place.layers is None or module.layer is None else place.layers.index(module.layer)
    lead = () if layer is None else (layer,)
    group = () if module.group is None else (place.groups.index(module.group),)
    return place, (*lead, slice(None), *group), (*lead, *group)


def make(
  config: Config, *, rank: int, alpha: float | None = None, targets: Any = ALL_LINEAR, rslora: bool = False
) -> Lora:
  """The adapters of `targets` (see `select`); alpha None is OpenVLA's min(rank, 16)."""
  alpha = min(rank, 16) if alpha is None else alpha
  if rank < 1 or not alpha > 0:
    raise ValueError(f"lora: rank {rank} and alpha {alpha}; expected a rank of at least 1 and an alpha above 0")
  return of_modules(config, select(config, targets), rank=rank, alpha=alpha, rslora=rslora)


def of_modules(config: Config, chosen: Sequence[Module], *, rank: int, alpha: float, rslora: bool = False) -> Lora:
  """The adapters of exactly these modules."""
  table = specs(config)
  by_path = collections.defaultdict(list)
  for module in chosen:
    by_path[module.path].append(module)
  places = [_place(path, some, functools.reduce(dict.__getitem__, path, table), rank) for path, some in by_path.items()]
  return Lora(rank, float(alpha), tuple(chosen), tuple(places), rslora)


# The tree ---------------------------------------------------------------------------------------------------


def _put(tree: Any, path: Sequence[str], value: Any) -> Any:
  """The tree with one entry more, sharing everything else; of a list of layers, each gets its own of a stack."""
  if isinstance(tree, list):
    return [_put(layer, path, own) for layer, own in zip(tree, apart(value), strict=True)]
  head, *rest = path
  return {**tree, head: _put(tree.get(head, {}), rest, value) if rest else value}


def _at(tree: Params, path: Iterable[str]) -> Any:
  return functools.reduce(dict.__getitem__, path, tree)


def init(lora: Lora, key: jax.Array) -> Params:
  """Fresh adapters, float32: a ~ N(0, 1/r^2), b = 0, so that the policy starts as its base."""
  held: dict[tuple[str, ...], np.ndarray] = {place.path: np.zeros(place.a[:-1], bool) for place in lora.places}
  for module in lora.modules:
    place, at_a, _ = lora.index(module)
    held[place.path][at_a] = True
  tree: Params = {}
  for place, draw in zip(lora.places, jax.random.split(key, len(lora.places))):
    a = jax.random.normal(draw, place.a) / lora.rank
    a = a if held[place.path].all() else jnp.where(held[place.path][..., None], a, 0.0)
    tree = _put(tree, place.path, {"a": a, "b": jnp.zeros(place.b)})
  return tree


def start(lora: Lora, params: Params, key: jax.Array) -> Params:
  """{"base", "lora", "value"} from a backbone's parameters, which are shared and not copied."""
  base = {name: x for name, x in params.items() if name != "value"}
  value = jax.tree.map(lambda x: x.astype(jnp.float32), params["value"])
  return {"base": base, "lora": init(lora, key), "value": value}


def reference(params: Params) -> Params:
  """The same policy without its adapters: no array is copied."""
  return {name: x for name, x in params.items() if name != "lora"}


def attach(lora: Lora, params: Params) -> Params:
  """The backbone's parameters with an `Adapter` beside each adapted kernel; without "lora" the base alone."""
  out = {**params["base"], "value": params["value"]}
  if "lora" not in params:
    return out
  for place in lora.places:
    a, b = (_at(params["lora"], place.path)[name] for name in "ab")
    if place.layers is not None:  # the layers are scanned over: those without an adapter get one of zeros
      a, b = (jnp.zeros((place.depth, *x.shape[1:]), x.dtype).at[jnp.array(place.layers)].set(x) for x in (a, b))
    out = _put(out, (*place.path, "lora"), Adapter(a, b, lora.scale, place.groups))
  return out


def merge(lora: Lora, params: Params, *, donate: bool = False) -> Params:
  """The backbone's parameters with W + scale a b in place of each W, added in float32 and rounded once.

  For export, not for training. A second copy of the adapted weights, unless `donate` gives those of `params` away.
  """

  def one(weight: jax.Array, a: jax.Array, b: jax.Array, place: Place, table: bool) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if place.groups is None:
      delta = jnp.einsum("ir,r...->i...", a, b, precision="highest")
    else:
      some = jnp.einsum("igr,gro->igo", a, b, precision="highest")
      delta = jnp.zeros(weight.shape, jnp.float32).at[:, place.groups].set(some)
    delta = lora.scale * (delta.T if table else delta)
    return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

  def stack(weight: jax.Array, a: jax.Array, b: jax.Array, place: Place, table: bool) -> jax.Array:
    """A layer at a time: float32 of one layer, not of all."""
    layers = jnp.arange(place.depth) if place.layers is None else jnp.array(place.layers)
    add = lambda k, w: w.at[layers[k]].set(one(w[layers[k]], a[k], b[k], place, table))
    return jax.lax.fori_loop(0, len(layers), add, weight)

  out = {**params["base"], "value": params["value"]}
  for place in lora.places:
    adapter, leaf = _at(params["lora"], place.path), _at(out, place.path)
    name = "table" if "table" in leaf else "kernel"
    add = functools.partial(one if place.depth is None else stack, place=place, table=name == "table")
    add = jax.jit(add, donate_argnums=(0,) if donate else ())
    out = _put(out, (*place.path, name), add(leaf[name], adapter["a"], adapter["b"]))
  return out


def param_axes(lora: Lora, axes: Any = PARAM_AXES) -> tuple[tuple[str, tuple[str | None, ...]], ...]:
  """Sharding words of the whole tree: an adapter is cut where its kernel is, and never along the rank."""
  adapters = []
  for place in lora.places:
    path = "/".join(place.path)
    name = "table" if place.path[-1] == "head" else "kernel"
    words = next(words for pattern, words in axes if re.fullmatch(pattern, f"{path}/{name}"))
    inputs, *out = words[::-1] if name == "table" else words
    shared = (None,) if place.groups else ()
    adapters.append((re.escape(f"lora/{path}/a"), (inputs, *shared, None)))
    adapters.append((re.escape(f"lora/{path}/b"), (*shared, None, *(out[1:] if place.groups else out))))
  base = tuple((f"base/(?:{pattern})", words) for pattern, words in axes)
  return (*adapters, *base, *((pattern, words) for pattern, words in axes if pattern.startswith("value/")),
          (r"value/.*/bias", (None,)))  # fmt: skip


def trainable(path: str) -> bool:
  """By the path of a parameter: the adapters and the value head."""
  return path.startswith(("lora/", "value/"))


def wrap(policy: Policy, lora: Lora) -> Policy:
  """The policy on {"base", "lora", "value"}; `policy.reference` drops the adapters, `policy.trainable` picks them."""

  def init_all(key: jax.Array) -> Params:
    return start(lora, policy.init(key), jax.random.fold_in(key, 1))

  return policy._replace(
    init=init_all,
    apply=lambda params, obs, tokens: policy.apply(attach(lora, params), obs, tokens),
    act=lambda params, obs, keys, temperature: policy.act(attach(lora, params), obs, keys, temperature),
    value=lambda params, obs: policy.value(attach(lora, params), obs),
    param_axes=param_axes(lora, policy.param_axes),
    trainable=trainable,
    reference=reference,
  )
