"""The tensors of a public OpenVLA checkpoint, and where each of them lies in the parameter tree here.

A public checkpoint has one tensor per layer, in torch's layout: Linear [out, in], convolution [out, in, row, column].
Here layers are stacked, kernels are [in, *out], and query/key/value, like gate/up, are one kernel. `tensors` is the
table of both, for any configuration; everything that reads or writes the public format goes through it.

The public network computes parts whose results it never uses: the last block and the final norm of both vision
transformers, and SigLIP's pooling. They are in the table without a path ("dead").
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import openvla
from stare_jax.policies.sizes import Config, Vision

VALUE_HEAD = "value_head."  # not in the public format: a file of its own, see openvla_files


class Tensor(NamedTuple):
  """A tensor of the public format and its place here.

  Attributes:
    name, shape: as in the file.
    path: of the parameter that holds it, "llm/layers/attn/qkv/kernel"; empty if nothing here does.
    split: a view of `shape`, whose axes are then permuted by `axes`.
    block, start: shape and first index of the part of the parameter that it fills, one number per axis.
  """

  name: str
  shape: tuple[int, ...]
  path: str = ""
  split: tuple[int, ...] = ()
  axes: tuple[int, ...] = ()
  block: tuple[int, ...] = ()
  start: tuple[int, ...] = ()

  @property
  def size(self) -> int:
    return math.prod(self.shape)


def from_public(tensor: Tensor, x: Any) -> Any:
  """numpy or jax array of the public shape (or its split view) -> the block of the parameter."""
  return x.reshape(tensor.split).transpose(tensor.axes).reshape(tensor.block)


def from_block(tensor: Tensor, x: Any) -> Any:
  """The inverse: a block of the parameter -> array of the public shape."""
  inverse = tuple(int(i) for i in np.argsort(tensor.axes))
  return x.reshape([tensor.split[a] for a in tensor.axes]).transpose(inverse).reshape(tensor.shape)


def _tensor(name, shape, path, *, split=None, axes=None, block=None, start=None, layer=None) -> Tensor:
  split = shape if split is None else split
  axes = tuple(range(len(split))) if axes is None else axes
  block = tuple(split[a] for a in axes) if block is None else block
  start = (0,) * len(block) if start is None else start
  if layer is not None:
    block, start = (1, *block), (layer, *start)
  return Tensor(name, tuple(shape), path, tuple(split), tuple(axes), tuple(block), tuple(start))


def _linear(name: str, path: str, size: int, out: int, *, layer=None, bias=True, parts=1) -> list[Tensor]:
  """A Linear. parts: of its output, which are an axis of their own here."""
  split = (out, size) if parts == 1 else (parts, out // parts, size)
  axes = (1, 0) if parts == 1 else (2, 0, 1)
  kernel = _tensor(f"{name}.weight", (out, size), f"{path}/kernel", split=split, axes=axes, layer=layer)
  if not bias:
    return [kernel]
  return [kernel, _tensor(f"{name}.bias", (out,), f"{path}/bias", split=split[:-1], layer=layer)]


def _fused(name: str, path: str, size: int, out: int, part: int, layer: int) -> Tensor:
  """A Linear without bias that is number `part` of a fused kernel [layer, in, part, out]."""
  return _tensor(
    f"{name}.weight", (out, size), f"{path}/kernel", axes=(1, 0), block=(size, 1, out), start=(0, part, 0), layer=layer
  )


def _norm(name: str, path: str, width: int, layer=None) -> list[Tensor]:
  pairs = (("weight", "scale"), ("bias", "bias"))
  return [_tensor(f"{name}.{theirs}", (width,), f"{path}/{ours}", layer=layer) for theirs, ours in pairs]


def _vit_block(name: str, path: str, v: Vision, layer: int) -> list[Tensor]:
  out = _norm(f"{name}.norm1", f"{path}/norm1", v.width, layer)
  out += _linear(f"{name}.attn.qkv", f"{path}/attn/qkv", v.width, 3 * v.width, layer=layer, parts=3)
  out += _linear(f"{name}.attn.proj", f"{path}/attn/out", v.width, v.width, layer=layer)
  scale = lambda i: _tensor(f"{name}.ls{i}.scale_factor", (v.width,), f"{path}/scale{i}", layer=layer)
  scales = [] if v.layer_scale is None else [scale(1), scale(2)]
  out += scales[:1]
  out += _norm(f"{name}.norm2", f"{path}/norm2", v.width, layer)
  out += _linear(f"{name}.mlp.fc1", f"{path}/mlp/up", v.width, v.mlp, layer=layer)
  out += _linear(f"{name}.mlp.fc2", f"{path}/mlp/down", v.mlp, v.width, layer=layer)
  return out + scales[1:]


def _pooling(name: str, v: Vision) -> list[Tensor]:
  """SigLIP's attention pooling."""
  out = [Tensor(f"{name}.latent", (1, 1, v.width))]
  out += _linear(f"{name}.q", "", v.width, v.width) + _linear(f"{name}.kv", "", v.width, 2 * v.width)
  out += _linear(f"{name}.proj", "", v.width, v.width) + _norm(f"{name}.norm", "", v.width)
  return out + _linear(f"{name}.mlp.fc1", "", v.width, v.mlp) + _linear(f"{name}.mlp.fc2", "", v.mlp, v.width)


def _vision(name: str, path: str, v: Vision, config: Config, pooled: bool) -> list[Tensor]:
  width, patch = v.width, config.patch_size
  prefix = [
    (f"{name}.cls_token", min(v.prefix_tokens, 1), 0),
    (f"{name}.reg_token", max(v.prefix_tokens - 1, 0), 1),
  ]
  out = [
    _tensor(key, (1, count, width), f"{path}/prefix", block=(count, width), start=(first, 0))
    for key, count, first in prefix if count
  ]  # fmt: skip
  out.append(
    _tensor(f"{name}.pos_embed", (1, config.patches, width), f"{path}/position", block=(config.patches, width))
  )
  out.append(
    _tensor(
      f"{name}.patch_embed.proj.weight", (width, 3, patch, patch), f"{path}/patch/kernel", axes=(2, 3, 1, 0),
      block=(3 * patch**2, width),
    )
  )  # fmt: skip
  out.append(_tensor(f"{name}.patch_embed.proj.bias", (width,), f"{path}/patch/bias"))
  for i in range(v.depth - 1):
    out += _vit_block(f"{name}.blocks.{i}", f"{path}/layers", v, i)
  dead = _vit_block(f"{name}.blocks.{v.depth - 1}", "", v, 0) + _norm(f"{name}.norm", "", width)
  dead += _pooling(f"{name}.attn_pool", v) if pooled else []
  return out + [Tensor(t.name, t.shape) for t in dead]


def _llama(name: str, path: str, config: Config) -> list[Tensor]:
  width, mlp = config.llm_width, config.llm_mlp
  table = (config.vocabulary, width)
  out = [_tensor(f"{name}.model.embed_tokens.weight", table, f"{path}/embed/table")]
  for i in range(config.llm_depth):
    theirs, ours = f"{name}.model.layers.{i}", f"{path}/layers"
    out += [
      _fused(f"{theirs}.self_attn.{part}_proj", f"{ours}/attn/qkv", width, width, j, i) for j, part in enumerate("qkv")
    ]
    out += _linear(f"{theirs}.self_attn.o_proj", f"{ours}/attn/out", width, width, layer=i, bias=False)
    out += [
      _fused(f"{theirs}.mlp.{part}_proj", f"{ours}/mlp/gate_up", width, mlp, j, i)
      for j, part in enumerate(("gate", "up"))
    ]
    out += _linear(f"{theirs}.mlp.down_proj", f"{ours}/mlp/down", mlp, width, layer=i, bias=False)
    out.append(_tensor(f"{theirs}.input_layernorm.weight", (width,), f"{ours}/norm1/scale", layer=i))
    out.append(_tensor(f"{theirs}.post_attention_layernorm.weight", (width,), f"{ours}/norm2/scale", layer=i))
  out.append(_tensor(f"{name}.model.norm.weight", (width,), f"{path}/norm/scale"))
  return [*out, _tensor(f"{name}.lm_head.weight", table, f"{path}/head/table")]


def tensors(config: Config) -> list[Tensor]:
  """Every tensor of the public checkpoint of this configuration, dead ones too, in the order of its modules."""
  out: list[Tensor] = []
  for name, (view, v) in zip(("featurizer", "fused_featurizer"), config.views.items()):
    out += _vision(f"vision_backbone.{name}", f"vision/{view}", v, config, pooled=view == "siglip")
  features = sum(v.width for v in config.views.values())
  hidden = (config.projector, config.llm_width) if config.projector else (config.llm_width,)
  widths = (features, *hidden, config.llm_width)
  for i, (a, b) in enumerate(zip(widths[:-1], widths[1:]), 1):
    out += _linear(f"projector.fc{i}", f"projector/fc{i}", a, b)
  return out + _llama("language_model", "llm", config)


def value_tensors(config: Config) -> list[Tensor]:
  """The value head in the same layout, "value_head.fc1.weight" and so on; no public checkpoint has it."""
  sizes = (config.llm_width, *config.value_hidden, 1)
  out: list[Tensor] = []
  for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:]), 1):
    out += _linear(f"{VALUE_HEAD}fc{i}", f"value/fc{i}", a, b, bias=b != 1)
  return out


def nest(table: Mapping[str, Any]) -> dict[str, Any]:
  """{"llm/norm/scale": x} -> {"llm": {"norm": {"scale": x}}}."""
  tree: dict[str, Any] = {}
  for path, leaf in table.items():
    *parents, last = path.split("/")
    at = tree
    for parent in parents:
      at = at.setdefault(parent, {})
    at[last] = leaf
  return tree


def leaf(params: Any, path: str) -> Any:
  """The parameter at "llm/norm/scale"."""
  for part in path.split("/"):
    params = params[part]
  return params


def shapes(config: Config, part: str = "") -> dict[str, tuple[int, ...]]:
  """{"llm/norm/scale": shape} of the parameter tree, or of one part of it."""
  pairs = jax.tree_util.tree_leaves_with_path(openvla.specs(config), is_leaf=lambda x: isinstance(x, openvla.Spec))
  table = {jax.tree_util.keystr(path, simple=True, separator="/"): spec.shape for path, spec in pairs}
  return {path: shape for path, shape in table.items() if path.startswith(part)}


def check_shapes(where: str, table: list[Tensor], found: Mapping[str, tuple[int, ...]]) -> None:
  """Raises CheckpointError unless `found` {name: shape} is exactly the table; dead tensors may be absent."""
  expected = {t.name: t for t in table}
  missing = [t.name for t in table if t.path and t.name not in found]
  extra = [name for name in found if name not in expected]
  if missing or extra:
    raise CheckpointError(
      f"{where}: {len(missing)} tensors are missing {missing[:3]} and {len(extra)} are unknown {extra[:3]}"
      f"{_hint(missing, extra)}. Its config.json describes another network, or it is not a whole OpenVLA checkpoint"
    )
  for name, shape in found.items():
    if tuple(shape) != expected[name].shape:
      raise CheckpointError(
        f"{where}: {name} is {list(shape)}, expected {list(expected[name].shape)}: its config.json describes another "
        f"network"
      )


def _hint(missing: list[str], extra: list[str]) -> str:
  if any("lora_" in name for name in extra):
    return " (adapters: merge them into their base model first)"
  if any(name.endswith(".gamma") for name in extra):
    return ' (LayerScale is called "scale_factor" in this format, not "gamma")'
  near = difflib.get_close_matches(extra[0], missing, n=1) if missing and extra else []
  return f" (is {extra[0]!r} meant to be {near[0]!r}?)" if near else ""


def to_params(config: Config, arrays: Mapping[str, np.ndarray], *, key: jax.Array | None = None) -> dict[str, Any]:
  """A public state dict as the parameter tree, on the host.

    arrays: numpy arrays by public name, in the public layout and of any one dtype, which stays; dead ones may be
      there. "value_head.*" of `value_tensors` too; without them the value head starts anew from `key`.
  Returns: nested dict of numpy arrays. Raises: CheckpointError for missing, unknown or misshapen tensors.
  """
  names = {name: np.shape(x) for name, x in arrays.items()}
  has_value = any(name.startswith(VALUE_HEAD) for name in names)
  table = tensors(config) + (value_tensors(config) if has_value else [])
  check_shapes("state dict", table, names)
  full = shapes(config)
  out: dict[str, np.ndarray] = {}
  for t in table:
    if t.path:
      x = np.asarray(arrays[t.name])
      target = out.setdefault(t.path, np.zeros(full[t.path], x.dtype))
      target[tuple(slice(a, a + n) for a, n in zip(t.start, t.block))] = from_public(t, x)
  params = nest(out)
  if not has_value:
    params["value"] = jax.tree.map(np.asarray, openvla.init(config, jax.random.key(0) if key is None else key, "value"))
  return params


def to_public(config: Config, params: Any, *, value: bool = False) -> Iterator[tuple[str, np.ndarray]]:
  """The inverse of `to_params`, one tensor at a time: (public name, numpy array). Dead tensors are not among them.

  value: the value head as well.
  """
  for t in tensors(config) + (value_tensors(config) if value else []):
    if t.path:
      block = np.asarray(leaf(params, t.path)[tuple(slice(a, a + n) for a, n in zip(t.start, t.block))])
      yield t.name, np.ascontiguousarray(from_block(t, block))
