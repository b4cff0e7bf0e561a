"""Where arrays live: a mesh with three axes, rules in words, and the only host-to-device door.

  data    copies of the model; each sees its own rows of the batch
  fsdp    rows of the batch as well, and the parameters (with their optimiser moments) cut in pieces
  tensor  wide layers cut in pieces; every device sees the same rows

A backbone names the axes of its weights in the words of `RULES` (`Policy.param_axes`); model code never sees a mesh.
The optimiser's moments follow their parameter, by path. A parameter that no line of the table matches is an error
that names it.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

MESH = ("data", "fsdp", "tensor")
RULES: dict[str, Any] = {  # word -> mesh axis (or axes), None = not cut
  "batch": ("data", "fsdp"),
  "embed": "fsdp",
  "heads": "tensor",
  "mlp": "tensor",
  "vocab": "tensor",
  "layers": None,
}
# What the compiler is told on some chips. On v4 it would turn every gather of an operand above this size (MiB) into a
# ring that multiplies piece by piece, and reads the activations again for each piece.
COMPILER_OPTIONS = {"TPU v4": {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}}
# On NVIDIA GPUs the compiler would make one product of those of x with a kernel and with its adapter, and copy both
# side by side in every call.
NVIDIA = {"xla_gpu_dot_merger_threshold_mb": 0}
# For updates and log-probabilities on one NVIDIA GPU, beside that: products in cuBLAS, which adds to what is there,
# where one that the compiler writes itself needs an addition of its own; weights copied out of their stack once, and
# kernels launched one by one: what would spare these copies and launches costs the host more time than the GPU gains.
# And nothing computed early to hide the latency of collectives that are not there: over micro-batches, JAX 0.11 would
# so compute all of `remat` again before any of it is used.
ONE_GPU = NVIDIA | {
  "xla_gpu_enable_triton_gemm": False,
  "xla_gpu_enable_dynamic_slice_fusion": False,
  "xla_gpu_enable_command_buffer": "",
  "xla_gpu_enable_latency_hiding_scheduler": False,
}
ParamAxes = Sequence[tuple[str, tuple[str | None, ...]]]  # (pattern of the whole path, words of the last axes)


def make_mesh(sizes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """The mesh of this run. `sizes` maps `MESH` names to device counts; -1 (at most one) takes what is left."""
  sizes = dict({"data": -1} if sizes is None else sizes)
  if unknown := [name for name in sizes if name not in MESH]:
    raise ValueError(f"mesh: unknown axes {unknown}; the axes are {list(MESH)}")
  devices = list(jax.devices() if devices is None else devices)
  sizes = {name: int(sizes.get(name, 1)) for name in MESH}
  if bad := {n: s for n, s in sizes.items() if s < 1 and s != -1}:
    raise ValueError(f"mesh: {bad} must be a positive device count, or -1 for the rest")
  rest = [name for name in MESH if sizes[name] == -1]
  fixed = math.prod(s for s in sizes.values() if s != -1)
  if len(rest) > 1:
    raise ValueError(f"mesh: only one axis may be -1, got {rest}")
  if len(devices) % fixed or (not rest and fixed != len(devices)):
    raise ValueError(
      f"mesh: {sizes} needs {'a multiple of ' if rest else ''}{fixed} devices, this machine shows {len(devices)}; "
      f"change config.mesh (data=-1 takes the rest) or the number of devices"
    )
  if rest:
    sizes[rest[0]] = len(devices) // fixed
  shape = tuple(sizes[name] for name in MESH)
  types = (AxisType.Auto,) * len(MESH)
  try:
    return jax.make_mesh(shape, MESH, axis_types=types, devices=devices)
  except NotImplementedError:  # no whole axes of a TPU's torus give these sizes, such as 16 on 8 x 8: cut one
    return Mesh(mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True), MESH, axis_types=types)


def compiler_options(mesh: Mesh | None, *, acting: bool = False) -> dict[str, str | bool | int] | None:
  """Of `jax.jit`, for the programs of this mesh with `Policy.apply` in them; without a mesh, of one device.

  acting: for those with `Policy.act`.
  """
  device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
  if on_nvidia(device):
    return ONE_GPU if one_gpu(mesh) and not acting else NVIDIA
  return None if acting else COMPILER_OPTIONS.get(device.device_kind)


def on_nvidia(device: jax.Device | None = None) -> bool:
  """Whether a device, by default those that the function being traced is for, is an NVIDIA GPU."""
  if device is None:
    mesh = jax.sharding.get_abstract_mesh()
    device = jax.devices()[0] if mesh.empty or mesh.abstract_device is None else mesh.abstract_device
  return device.platform == "gpu" and "NVIDIA" in device.device_kind


def path_name(path: Any) -> str:
  """A tree path as one string, "layers/attn/q/kernel"."""
  return jax.tree_util.keystr(path, simple=True, separator="/")


def batch_shards(mesh: Mesh | None) -> int:
  """In how many pieces the batch axis is cut."""
  return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in RULES["batch"])


def batch_sharding(mesh: Mesh, lead: int = 0) -> NamedSharding:
  """Rows over data and fsdp; the batch axis is axis number `lead`."""
  return NamedSharding(mesh, P(*([None] * lead), RULES["batch"]))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, P())


def param_spec(path: str, shape: tuple[int, ...], param_axes: ParamAxes, mesh: Mesh) -> P:
  """The rule of one parameter. Words name its last axes, so a stack of scanned layers needs no rule of its own."""
  words = next((words for pattern, words in param_axes if re.fullmatch(pattern, path)), None)
  if words is None:
    raise ValueError(
      f'no sharding rule for {path} {shape}; add one line to PARAM_AXES, such as (r"{re.escape(path)}", '
      f"{(None,) * max(len(shape), 1)}), with words out of {list(RULES)} or None"
    )
  known = [word for word in RULES if word != "batch"]
  if unknown := [w for w in words if w is not None and w not in known]:
    raise ValueError(f"sharding rule of {path}: unknown words {unknown}; the words are {known}")
  if len(words) > len(shape) and any(words):
    raise ValueError(f"sharding rule of {path} {shape}: {len(words)} words {words} for {len(shape)} axes")
  spec = [None] * (len(shape) - len(words)) + [None if w is None else RULES[w] for w in words]
  spec = [axis if axis is not None and mesh.shape[axis] > 1 else None for axis in spec[: len(shape)]]
  for size, axis in zip(shape, spec, strict=True):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(
        f"{path} {shape}: an axis of {size} does not divide over {mesh.shape[axis]} {axis} devices; "
        f"change config.mesh.{axis} or give this parameter a line of None in PARAM_AXES"
      )
  while spec and spec[-1] is None:
    spec.pop()
  return P(*spec)


def shardings(params: Any, param_axes: ParamAxes | None, mesh: Mesh) -> Any:
  """A NamedSharding for every parameter (arrays or ShapeDtypeStructs); without a table all are replicated."""
  if param_axes is None:
    return jax.tree.map(lambda _: replicated(mesh), params)
  rule = lambda path, x: NamedSharding(mesh, param_spec(path_name(path), tuple(x.shape), param_axes, mesh))
  return jax.tree_util.tree_map_with_path(rule, params)


def like_params(tree: Any, params: Any, param_shardings: Any, mesh: Mesh) -> Any:
  """Shardings of a tree that holds copies of the parameter tree (moments): the same rule by path and shape.

  A leaf follows the parameter whose path ends its own path; other scalars (counters, scales) are replicated.

  Raises: ValueError for an array that follows no parameter: whole on every device, it might not fit.
  """
  paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  shapes = [tuple(x.shape) for x in jax.tree.leaves(params)]
  rules = dict(zip(zip(paths, shapes, strict=True), jax.tree.leaves(param_shardings), strict=True))

  def follow(path: Any, x: Any) -> NamedSharding:
    parts, shape = path_name(path).split("/"), tuple(x.shape)
    for end in ("/".join(parts[i:]) for i in range(len(parts))):
      if (end, shape) in rules:
        return rules[end, shape]
    if shape:
      raise ValueError(
        f"no sharding rule for {path_name(path)} {shape} of the optimiser's state: no parameter has this path and "
        f"shape; choose an optimiser whose arrays are each like a parameter, or add a rule to sharding.like_params"
      )
    return replicated(mesh)

  return jax.tree_util.tree_map_with_path(follow, tree)


@contextlib.contextmanager
def activations(mesh: Mesh | None) -> Iterator[None]:
  """While a function is traced in here, `constrain` and `constrain_params` mean this mesh; outside they do nothing."""
  with contextlib.nullcontext() if mesh is None else jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    yield


def spread() -> bool:
  """Whether the function being traced runs on several devices (`activations`)."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and mesh.size > 1


def one_gpu(mesh: Mesh | None = None) -> bool:
  """Whether what runs on this mesh, or the function being traced, runs on an NVIDIA GPU and no device beside it."""
  if mesh is None:
    return on_nvidia() and not spread()
  return mesh.size == 1 and on_nvidia(mesh.devices.flat[0])


def constrain(x: jax.Array, *words: str | None) -> jax.Array:
  """Says in words where the axes of an activation lie, such as ("batch", None, "heads") of [N, Q, W].

  Left to itself the compiler may cut an activation as the weights are and copy rows to every device. An axis that does
  not divide stays whole; without a mesh (`activations`) this is x.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return x
  if len(words) != x.ndim:
    raise ValueError(f"constrain: {len(words)} words {words} for an array of shape {x.shape}")

  def axis(size: int, word: str | None) -> Any:
    rule = None if word is None else RULES[word]
    names = (rule,) if isinstance(rule, str) else rule or ()
    return None if size % math.prod(mesh.shape[name] for name in names) else rule

  return jax.lax.with_sharding_constraint(x, P(*map(axis, x.shape, words)))


def constrain_params(params: Any, param_axes: ParamAxes, prefix: str = "") -> Any:
  """Pins a part of the parameters, such as one layer inside a scan, and so its gradient, to the pieces of its rule.

  An axis that does not divide stays whole; where parameters are trained, `shardings` has refused it before.

  prefix: the path of this part. Without a mesh this is `params`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return params

  def pin(path: Any, x: jax.Array) -> jax.Array:
    spec = _spec_or_whole(prefix + path_name(path), tuple(x.shape), param_axes, mesh)
    return jax.lax.with_sharding_constraint(x, spec)

  return jax.tree_util.tree_map_with_path(pin, params)


def _spec_or_whole(path: str, shape: tuple[int, ...], param_axes: ParamAxes, mesh: Any) -> P:
  try:
    return param_spec(path, shape, param_axes, mesh)
  except ValueError:
    return P()


def local_batch_shards(mesh: Mesh) -> int:
  """How many of the batch's pieces live on this process."""
  axes = [mesh.axis_names.index(axis) for axis in RULES["batch"]]
  mine = [
    tuple(at[a] for a in axes) for at, d in np.ndenumerate(mesh.devices) if d.process_index == jax.process_index()
  ]
  return len(set(mine))


def local_rows(count: int, mesh: Mesh) -> np.ndarray:
  """int64[n]: which of the batch's `count` rows this process passes to `put`, ascending."""
  (at,) = zip(*batch_sharding(mesh).addressable_devices_indices_map((count,)).values(), strict=True)
  mine = sorted({s.indices(count)[:2] for s in at})
  return np.concatenate([np.arange(a, b) for a, b in mine])


def check_batch(batch: Any, mesh: Mesh | None) -> None:
  """Host only: every array's rows divide over this process's pieces of the batch."""
  pieces = 1 if mesh is None else local_batch_shards(mesh)
  for path, x in jax.tree_util.tree_leaves_with_path(batch):
    if np.ndim(x) and np.shape(x)[0] % pieces:
      raise ValueError(
        f"batch: {path_name(path) or 'array'} {np.shape(x)} has {np.shape(x)[0]} rows, which do not divide over "
        f"{pieces} devices (data x fsdp = {batch_shards(mesh)}); make the batch a multiple of {pieces}, or change "
        f"config.mesh"
      )


def _own(x: Any) -> Any:
  """A CPU device may alias a numpy buffer, and the caller is free to write the next batch into it: copy first."""
  return x if isinstance(x, jax.Array) else np.array(x)


def put(batch: Any, mesh: Mesh | None = None) -> Any:
  """The door down: a tree of host arrays [rows, ...] becomes device arrays, rows over data and fsdp.

  Each process passes its own rows; scalars are replicated. The host's memory may be reused as soon as this returns.
  """
  check_batch(batch, mesh)
  batch = jax.tree.map(_own, batch)
  if mesh is None:
    return jax.device_put(batch)
  rows, whole = batch_sharding(mesh), replicated(mesh)
  places = jax.tree.map(lambda x: rows if np.ndim(x) else whole, batch)
  if jax.process_count() == 1:
    return jax.device_put(batch, places)
  return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, np.asarray(x)), batch, places)


def place(tree: Any, places: Any) -> Any:
  """Moves a tree whose value every process holds whole (parameters just read from a file) to its shardings."""
  tree = jax.tree.map(_own, tree)
  if jax.process_count() == 1:
    return jax.device_put(tree, places)

  def piece(x: Any, where: NamedSharding) -> jax.Array:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:  # lies on the mesh already
      return jax.device_put(x, where)
    if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
      return jax.random.wrap_key_data(piece(jax.random.key_data(x), where), impl=jax.random.key_impl(x))
    return jax.make_array_from_callback(np.shape(x), where, lambda index: np.asarray(x)[index])

  return jax.tree.map(piece, tree, places)


def replicate(tree: Any, mesh: Mesh | None = None) -> Any:
  """The whole value on every device of the mesh."""
  if mesh is None:
    return jax.device_put(jax.tree.map(_own, tree))
  return place(tree, jax.tree.map(lambda _: replicated(mesh), tree))


# A copy to act with ------------------------------------------------------------------------------------------


def acting_mesh(mesh: Mesh | None, process: int | None = None) -> Mesh | None:
  """Where a process acts in its own time: heads and hidden units over its own devices, every device all rows.

  Then an action reads each weight once, where it lies, and only activations travel. None where the run's mesh cuts no
  parameter (neither fsdp nor tensor): every device can act with what it has.

  process: whose devices; by default this process's.
  """
  if mesh is None or mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
    return None
  process = jax.process_index() if process is None else process
  own = [d for d in mesh.devices.flat if d.process_index == process]
  if len(own) < mesh.size:
    return make_mesh({"tensor": len(own)}, sorted(own, key=lambda device: device.id))
  # All of them stay in the run's order: then one compiled program cuts an array anew, without a way through the host.
  return Mesh(np.array(own).reshape(1, 1, -1), MESH, axis_types=(AxisType.Auto,) * len(MESH))


def acting_shardings(params: Any, param_axes: ParamAxes | None, own: Mesh) -> Any:
  """A NamedSharding on an acting mesh for every parameter; whole on each device where an axis does not divide."""
  spec = lambda path, x: _spec_or_whole(path_name(path), tuple(x.shape), param_axes or (), own)
  return jax.tree_util.tree_map_with_path(lambda path, x: NamedSharding(own, spec(path, x)), params)


def local_copy(
  tree: Any, param_axes: ParamAxes | None, mesh: Mesh | None, dtype_of: Callable[[str, Any], Any] | None = None
) -> Any:
  """The parameters on this process's own devices, for programs that it runs in its own time (`act`).

  With one process whose devices hold all of them, nothing is moved or copied. Otherwise they lie as `acting_shardings`
  says. What is cut over several processes is put together and cut again one stacked layer, or one unstacked parameter,
  at a time; all processes have to call.

    mesh: the run's.
    dtype_of: (path, array) -> the type of the copy.
  """
  own, several = acting_mesh(mesh), jax.process_count() > 1
  if own is None and not several:
    return tree
  own = make_mesh({"data": -1}, jax.local_devices()) if own is None else own

  def copy(path: Any, x: jax.Array, where: NamedSharding) -> jax.Array:
    dtype = dtype_of(path_name(path), x) if dtype_of else x.dtype
    if x.is_fully_addressable:  # never left this process
      if x.sharding.device_set != where.device_set:
        return jax.device_put(x.astype(dtype), where)
      return jax.jit(_cast, static_argnames="dtype", out_shardings=where)(x, dtype=dtype)
    whole = functools.partial(jax.jit, out_shardings=replicated(x.sharding.mesh), static_argnames="dtype")
    if x.is_fully_replicated or x.ndim < 3 or any(s.spec and s.spec[0] for s in (x.sharding, where)):
      return _cut(whole(_cast)(x, dtype=dtype), where)
    out = jax.jit(jnp.zeros, static_argnums=(0, 1), out_shardings=where)(x.shape, dtype)
    layer = NamedSharding(own, P(*where.spec[1:]))
    for i in range(len(x)):
      out = _set_layer(out, _cut(whole(_layer)(x, i, dtype=dtype), layer), i)
    return out

  return jax.tree_util.tree_map_with_path(copy, tree, acting_shardings(tree, param_axes, own))


def _cut(x: jax.Array, where: NamedSharding) -> jax.Array:
  """What lies whole on every device, in pieces on some of them: nothing travels."""
  data = {s.device: s.data for s in x.addressable_shards}
  pieces = [
    data[device] if where.is_fully_replicated else data[device][at]
    for device, at in where.devices_indices_map(x.shape).items()
  ]
  return jax.make_array_from_single_device_arrays(x.shape, where, pieces)


# Functions with names, so that each is compiled once for every shape.


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
  return x.astype(dtype)


def _layer(x: jax.Array, i: int, dtype: Any) -> jax.Array:
  return jax.lax.dynamic_index_in_dim(x, i, keepdims=False).astype(dtype)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(x: jax.Array, layer: jax.Array, i: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(x, layer, i, axis=0)


def _sizes(tree: Any, places: Any) -> tuple[int, int, int, list[tuple[int, str, tuple[int, ...]]]]:
  """(numbers, bytes, bytes on each device, the leaves that are whole on every device)."""
  count = total = on_device = 0
  whole = []
  for (path, x), where in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(places), strict=True):
    item = np.dtype(x.dtype).itemsize
    size, local = math.prod(x.shape) * item, math.prod(where.shard_shape(tuple(x.shape))) * item
    count, total, on_device = count + math.prod(x.shape), total + size, on_device + local
    if local == size:
      whole.append((size, path_name(path), tuple(x.shape)))
  return count, total, on_device, whole


def table(params: Any, places: Any, mesh: Mesh, *, rows: int = 12, more: Mapping[str, Any] | None = None) -> str:
  """What start-up prints: the mesh, bytes on each device, and what is not cut, with the largest such parameters.

  more: other parts of the state by name, trees of shapes with their sharding, such as the optimiser's moments; a part
  whose name is indented belongs to the one before and is not counted again.
  """
  mib = lambda size, digits=1: f"{size / 2**20:,.{digits}f} MiB"
  parts = {"parameters": _sizes(params, places)}
  parts |= {name: _sizes(tree, jax.tree.map(lambda x: x.sharding, tree)) for name, tree in (more or {}).items()}
  shape = " x ".join(f"{name} {mesh.shape[name]}" for name in mesh.axis_names)
  lines = [f"mesh         {shape} = {mesh.size} {mesh.devices.flat[0].platform} devices"]
  for name, (count, total, on_device, _) in parts.items():
    lines.append(f"{name:12} {count:,} in {mib(total)}; {mib(on_device)} on each device")
  own = {name: sizes for name, sizes in parts.items() if not name.startswith(" ")}
  if len(own) > 1:
    together = sum(on_device for _, _, on_device, _ in own.values())
    lines.append(f"together     {mib(together)} on each device, beside gradients and activations")
  if mesh.size > 1:
    uncut = {name: (sum(size for size, *_ in whole), total) for name, (_, total, _, whole) in own.items()}
    share = lambda size, total: f"{mib(size, 2)} ({100 * size / max(total, 1):.1f} %)"
    lines.append(f"replicated   {', '.join(f'{share(*sizes)} of the {name}' for name, sizes in uncut.items())}")
    largest = sorted(parts["parameters"][-1], key=lambda row: (-row[0], row[1]))[:rows]
    lines += [f"  {size / 2**20:9.3f} MiB  {path} {dims}" for size, path, dims in largest]
  return "\n".join(lines)
