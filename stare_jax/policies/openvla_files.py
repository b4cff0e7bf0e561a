"""Public OpenVLA checkpoints: a folder to (policy, parameters) on any mesh, and back to a folder of the same format.

Reading goes tensor by tensor: each is cut as its parameter is sharded, this process reads its own pieces, and the
device writes them into the stacked parameter in place. The host holds one tensor at a time, whatever the mesh, and the
small parameters (norms, biases), which are put together there: a program each would take longer to compile. All
names, shapes, dtypes and file lengths are checked before the first one is read.

Writing goes tensor by tensor too, into a folder beside the target that takes its name when it is complete. What was not
trained comes back bit for bit; the parts of the public network that do not exist here are read again from `source`.

  value_head.safetensors      ours: the value head, if there is one
"""

from __future__ import annotations

import collections
import functools
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from stare_jax import sharding
from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import ActionStats, Policy, openvla, openvla_config, tensor_files
from stare_jax.policies import openvla_names as names
from stare_jax.policies.openvla_names import Tensor, to_params, to_public
from stare_jax.policies.sizes import Config
from stare_jax.policies.tensor_files import Entry, Plan

__all__ = ["folder_config", "load", "make_policy", "read_params", "save", "to_params", "to_public"]

VALUE_FILE = "value_head.safetensors"
SHARD_BYTES = 5_000_000_000
STAGED_BYTES = 16 << 20  # parameters up to this size are put together, and taken apart, on the host
Params = dict[str, Any]


# Reading -------------------------------------------------------------------------------------------------


def load(
  folder: str | os.PathLike,
  *,
  mesh: Mesh | None = None,
  unnorm_key: str | None = None,
  stats: ActionStats | None = None,
  tokenizer: Callable[[str], list[int]] | None = None,
  key: jax.Array | None = None,
  **options: Any,
) -> tuple[Policy, Params]:
  """(policy, parameters) of a folder such as openvla/openvla-7b.

    mesh: where the parameters go, by the policy's own rules; None for the default device.
    unnorm_key: the data set whose action statistics apply; may be left out where there is only one.
    stats: other action statistics, instead.
    tokenizer: text to ids without begin token, instead of the folder's tokenizer.json.
    key: for a value head, if the folder has none of ours.
    options: fields of `sizes.Config`, such as prompt_length=64. param_dtype is the files' unless it is given.
  Raises: CheckpointError for a folder that is not a whole checkpoint of this kind, before anything is read from it.
  """
  policy = make_policy(folder, unnorm_key=unnorm_key, stats=stats, tokenizer=tokenizer, **options)
  return policy, read_params(folder, policy.config, mesh=mesh, key=key)


def make_policy(
  folder: str | os.PathLike,
  *,
  unnorm_key: str | None = None,
  stats: ActionStats | None = None,
  tokenizer: Callable[[str], list[int]] | None = None,
  **options: Any,
) -> Policy:
  """The policy of a folder without its parameters; arguments as in `load`."""
  if stats is None:
    _, stats = openvla_config.read_statistics(folder, unnorm_key)
  options = {"action_size": len(stats.q01), **options}
  config = folder_config(folder, options)
  if tokenizer is None:
    tokenizer = openvla_config.read_tokenizer(folder, config)
    config = folder_config(folder, {"start": tokenizer.start, **options})
  return openvla.make(size=config, stats=stats, tokenizer=tokenizer)


def folder_config(folder: str | os.PathLike, options: Mapping[str, Any] | None = None) -> Config:
  """The configuration of a folder, with what only its tensors know: their dtype, and the sizes of a value head."""
  options = dict(options or {})
  if "param_dtype" not in options:
    options["param_dtype"] = _dtype_of(folder, openvla_config.read_config(folder, options))
  options.setdefault("compute_dtype", options["param_dtype"])
  if "value_hidden" not in options and (value := _value_entries(folder)):
    options["value_hidden"] = _value_sizes(value)
  return openvla_config.read_config(folder, options)


def read_params(
  folder: str | os.PathLike,
  config: Config,
  *,
  mesh: Mesh | None = None,
  key: jax.Array | None = None,
  progress: Callable[[int, int], None] = lambda done, total: None,
) -> Params:
  """The parameters of a folder in config.param_dtype, placed on the mesh; see `load`.

  The value head comes from the folder's value_head.safetensors, in that file's dtype, or starts anew from `key`.

    progress: called after each tensor with the bytes of the files that were read, and of all that will be.
  """
  table, entries = names.tensors(config), tensor_files.read_folder(folder)
  names.check_shapes(str(folder), table, {name: e.shape for name, e in entries.items()})
  jobs = [(t, entries[t.name], jnp.dtype(config.param_dtype)) for t in table if t.path]
  if value := _value_entries(folder):
    head = names.value_tensors(config)
    names.check_shapes(str(pathlib.Path(folder) / VALUE_FILE), head, {name: e.shape for name, e in value.items()})
    jobs += [(t, value[t.name], value[t.name].dtype) for t in head]
  full = names.shapes(config)
  where = {path: _place(path, shape, mesh) for path, shape in full.items()}
  leaves: dict[str, jax.Array] = {}
  staged: dict[str, np.ndarray] = {}
  done, total = 0, sum(entry.nbytes for _, entry, _ in jobs)
  for t, entry, dtype in jobs:
    path, shape = t.path, full[t.path]
    if math.prod(shape) * dtype.itemsize <= STAGED_BYTES:
      names.fill(staged.setdefault(path, np.zeros(shape, dtype)), t, tensor_files.view(entry))
    else:
      # Waiting keeps the host from reading ahead of the device: every tensor on its way is a copy in memory.
      leaves[path] = jax.block_until_ready(_fill(leaves.get(path), t, entry, shape, dtype, where[path]))
    progress(done := done + entry.nbytes, total)
  places = {path: where[path] for path in staged}
  params = names.nest(leaves | (jax.device_put(staged) if mesh is None else sharding.place(staged, places)))
  if "value" not in params:
    start = _fresh_value(config, mesh)
    params["value"] = start(sharding.replicate(jax.random.key(0) if key is None else key, mesh))
  return params


@functools.lru_cache(maxsize=16)
def _fresh_value(config: Config, mesh: Mesh | None) -> Callable[[jax.Array], Params]:
  """key -> a value head as `openvla.init` makes it, where it belongs."""
  shapes = names.shapes(config, "value/")
  places = {path.removeprefix("value/"): _place(path, shape, mesh) for path, shape in shapes.items()}
  return jax.jit(functools.partial(openvla.init, config, part="value"), out_shardings=names.nest(places))


def _dtype_of(folder: str | os.PathLike, config: Config) -> str:
  """The one dtype of a folder's tensors; of those that exist here, as `save` leaves the others in the source's."""
  dead = {t.name for t in names.tensors(config) if not t.path}
  found = {str(entry.dtype) for name, entry in tensor_files.read_folder(folder).items() if name not in dead}
  if len(found) != 1:
    raise CheckpointError(f"{folder} mixes {', '.join(sorted(found))}: choose with param_dtype=, such as "
                          f'param_dtype="bfloat16" (of a run, --config.policy.options.param_dtype)')
  return found.pop()


def _value_entries(folder: str | os.PathLike) -> dict[str, Entry]:
  path = pathlib.Path(folder) / VALUE_FILE
  return tensor_files.read_header(path) if path.exists() else {}


def _value_sizes(entries: Mapping[str, Entry]) -> tuple[int, ...]:
  """The hidden widths of the value head in a file."""
  weights = (f"{names.VALUE_HEAD}fc{i}.weight" for i in range(1, len(entries) + 1))
  return tuple(entries[name].shape[0] for name in weights if name in entries and len(entries[name].shape) == 2)[:-1]


def _place(path: str, shape: tuple[int, ...], mesh: Mesh | None) -> NamedSharding | None:
  return None if mesh is None else NamedSharding(mesh, sharding.param_spec(path, shape, openvla.PARAM_AXES, mesh))


def _split_spec(t: Tensor, spec: P) -> P:
  """How the split view of a tensor is cut, given how its parameter is: every cut axis is an axis of both.

  An axis keeps its place when its axes are merged or get unit ones beside them: as many numbers follow it.
  """
  after = lambda shape, i: math.prod(shape[i + 1 :])
  moved = [t.split[a] for a in t.axes]
  out: list[Any] = [None] * len(t.split)
  for i, axis in enumerate(spec):
    if axis is not None:
      same = [k for k, n in enumerate(moved) if n == t.block[i] and after(moved, k) == after(t.block, i)]
      out[t.axes[same[0]]] = axis
  return P(*out)


def _piece(t: Tensor, entry: Entry, where: NamedSharding | None) -> jax.Array:
  """The tensor's split view on the devices; this process reads what its own devices hold, each piece once."""
  source = tensor_files.view(entry).reshape(t.split)
  if where is None:
    return jax.device_put(np.array(source))
  cut = NamedSharding(where.mesh, _split_spec(t, where.spec))
  read = functools.cache(lambda *bounds: np.array(source[tuple(slice(*b) for b in bounds)]))
  at = lambda index: [s.indices(n)[:2] for s, n in zip(index, t.split)]
  return jax.make_array_from_callback(t.split, cut, lambda index: read(*at(index)))


def _fill(leaf: jax.Array | None, t: Tensor, entry: Entry, full: tuple[int, ...], dtype: Any, where: Any) -> jax.Array:
  """The parameter with this tensor in; a new one, zero elsewhere, if there is none yet. `leaf` is used up."""
  form, piece = t._replace(name="", shape=(), path="", start=()), _piece(t, entry, where)
  start = [np.int32(a) for a, n, m in zip(t.start, t.block, full) if n != m]
  if leaf is None:
    return _first(form, full, np.dtype(dtype), where)(piece, *start)
  return _next(form, full, where)(leaf, piece, *start)


def _starts(t: Tensor, full: tuple[int, ...], moving: tuple[Any, ...]) -> list[Any]:
  """Indices for an update; constant 0 on whole axes, which may be cut over devices."""
  rest = iter(moving)
  return [0 if n == m else next(rest) for n, m in zip(t.block, full)]


@functools.lru_cache(maxsize=512)
def _first(t: Tensor, full: tuple[int, ...], dtype: np.dtype, where: Any) -> Callable[..., jax.Array]:
  def first(piece: jax.Array, *start: Any) -> jax.Array:
    block = names.from_public(t, piece).astype(dtype)
    return block if t.block == full else jax.lax.dynamic_update_slice(
      jnp.zeros(full, dtype), block, _starts(t, full, start)
    )  # fmt: skip

  return jax.jit(first, out_shardings=where)


@functools.lru_cache(maxsize=512)
def _next(t: Tensor, full: tuple[int, ...], where: Any) -> Callable[..., jax.Array]:
  def following(leaf: jax.Array, piece: jax.Array, *start: Any) -> jax.Array:
    block = names.from_public(t, piece).astype(leaf.dtype)
    return jax.lax.dynamic_update_slice(leaf, block, _starts(t, full, start))

  return jax.jit(following, out_shardings=where, donate_argnums=0)


# Writing -------------------------------------------------------------------------------------------------


def save(
  folder: str | os.PathLike,
  policy: Policy | Config,
  params: Any,
  source: str | os.PathLike | None = None,
  *,
  stats: ActionStats | None = None,
  dataset: str = "stare_jax",
  dtype: str | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> pathlib.Path:
  """A public checkpoint folder; every process of a run calls it, and the first one writes.

    folder: must not exist yet; it appears when it is complete.
    params: as of `load`, on any mesh, or numpy arrays. The value head goes into a file of its own.
    source: the folder that the policy came from. Its other files are carried over, and the tensors that do not exist
      here re-emitted; without it the configuration is written anew, and there is no tokenizer.json.
    stats: action statistics that replace the source's, under the name `dataset`: of a policy fine-tuned here.
    dtype: of the tensors, "bfloat16", "float16" or "float32"; None as the parameters are (and the source's others).
    shard_bytes: files are no larger than this, but for a single larger tensor.
  Raises: CheckpointError; nothing is left behind then.
  """
  config, folder = getattr(policy, "config", policy), pathlib.Path(folder).absolute()
  dead = _check_save(folder, config, params, source)
  if jax.process_count() > 1:  # or a slow process would look once the first one has written
    multihost_utils.sync_global_devices("public checkpoint checked")
  cast = None if dtype is None else np.dtype(jnp.dtype(dtype))
  plan, value = [], []
  for t in names.tensors(config):
    if t.path:
      plan.append(Plan(t.name, cast or np.dtype(names.leaf(params, t.path).dtype), t.shape))
    elif t.name in dead:
      plan.append(Plan(t.name, cast or dead[t.name].dtype, t.shape))
  for t in names.value_tensors(config):
    value.append(Plan(t.name, np.dtype(names.leaf(params, t.path).dtype), t.shape))
  wide_first = sorted(plan, key=lambda row: -row.dtype.itemsize)  # keeps every tensor aligned; stable
  files = tensor_files.shards(wide_first, shard_bytes) | {VALUE_FILE: value}
  table = {t.name: t for t in (*names.tensors(config), *names.value_tensors(config))}

  @functools.cache
  def fetched(path: str) -> Any:
    x = names.leaf(params, path)
    return np.asarray(_whole(x)) if isinstance(x, jax.Array) and x.nbytes <= STAGED_BYTES else x

  def arrays(rows: list[Plan]) -> Iterator[np.ndarray]:
    for row in rows:
      t = table[row.name]
      kept = None if t.path else tensor_files.view(dead[t.name]).astype(row.dtype, copy=False)
      yield kept if kept is not None else _take(fetched(t.path), t, row.dtype)

  if jax.process_index() == 0:
    _write(folder, config, source, stats and openvla_config.statistics_json(dataset, stats), files, arrays)
  else:
    for rows in files.values():  # takes part in gathering
      for _ in arrays(rows):
        pass
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("public checkpoint written")
  return folder


def _check_save(folder: pathlib.Path, config: Config, params: Any, source: Any) -> dict[str, Entry]:
  """The source's dead tensors, once nothing stands against saving."""
  if folder.exists():
    raise CheckpointError(f"{folder} exists already; name a new folder, or remove that one")
  pairs = jax.tree_util.tree_leaves_with_path(params)
  came = {jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape) for path, x in pairs}
  full = names.shapes(config)
  if differ := sorted(path for path in {*came, *full} if came.get(path) != full.get(path)):
    path = differ[0]
    raise CheckpointError(f"parameters: {path} is {came.get(path, 'absent')}, expected {full.get(path, 'none')} "
                          f"({len(differ)} differ); merge adapters first, and pass the policy that they belong to")
  if source is None:
    openvla_config.config_json(config)
    return {}
  tensor_files.read_json(pathlib.Path(source) / "config.json")
  entries = tensor_files.read_folder(source)
  names.check_shapes(f"source {source}", names.tensors(config), {name: e.shape for name, e in entries.items()})
  return {t.name: entries[t.name] for t in names.tensors(config) if not t.path and t.name in entries}


def _whole(x: jax.Array) -> jax.Array:
  """On every device of its mesh, from where the host can read it in every process."""
  return jax.device_put(x, NamedSharding(x.sharding.mesh, P())) if isinstance(x.sharding, NamedSharding) else x


def _take(leaf: Any, t: Tensor, dtype: np.dtype) -> np.ndarray:
  """One public tensor out of a parameter, on the host."""
  if not isinstance(leaf, jax.Array):
    return names.take(leaf, t).astype(dtype, copy=False)
  where = leaf.sharding
  whole = NamedSharding(where.mesh, P()) if isinstance(where, NamedSharding) else None
  start = [np.int32(a) for a, n, m in zip(t.start, t.block, leaf.shape) if n != m]
  return np.asarray(_taker(t._replace(name="", path="", start=()), leaf.shape, dtype, whole)(leaf, *start))


@functools.lru_cache(maxsize=512)
def _taker(t: Tensor, full: tuple[int, ...], dtype: np.dtype, where: Any) -> Callable[..., jax.Array]:
  def take(leaf: jax.Array, *start: Any) -> jax.Array:
    return names.from_block(t, jax.lax.dynamic_slice(leaf, _starts(t, full, start), t.block)).astype(dtype)

  return jax.jit(take, out_shardings=where)


def _write(
  folder: pathlib.Path,
  config: Config,
  source: Any,
  statistics: dict[str, Any] | None,
  files: Mapping[str, list[Plan]],
  arrays: Callable[[list[Plan]], Iterator[np.ndarray]],
) -> None:
  """Everything beside the target, which then takes its name (`tensor_files.appearing`)."""
  size = sum(row.nbytes for rows in files.values() for row in rows)
  with tensor_files.appearing(folder) as partial:
    if (free := shutil.disk_usage(partial).free) < 1.01 * size:
      raise CheckpointError(f"disk full: {folder} needs {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; free "
                            f"some space, or choose a folder on another disk. Nothing was written")
    for name, text in _side_files(config, source, statistics, files).items():
      if isinstance(text, pathlib.Path):
        shutil.copyfile(text, partial / name)
      else:
        (partial / name).write_text(json.dumps(text, indent=2) + "\n")
    for name, rows in files.items():
      tensor_files.write(partial / name, rows, arrays(rows))


def _with_dtype(
  given: pathlib.Path | dict[str, Any], files: Mapping[str, list[Plan]]
) -> pathlib.Path | dict[str, Any]:
  """A config.json that names the type of most of what is written; as it was given where it does or names none."""
  size = collections.Counter()
  for row in (row for name, rows in files.items() if name != VALUE_FILE for row in rows):
    size[row.dtype.name] += row.nbytes
  (dtype, _), *_ = size.most_common(1)
  c = given if isinstance(given, dict) else tensor_files.read_json(given)
  parts = [part for part in (c, c.get("text_config")) if isinstance(part, dict)]
  wrong = [(part, key) for part in parts for key in ("torch_dtype", "dtype") if part.get(key, dtype) != dtype]
  for part, key in wrong:  # transformers 5 calls it dtype
    part[key] = dtype
  return c if wrong else given


def _side_files(
  config: Config, source: Any, statistics: dict[str, Any] | None, files: Mapping[str, list[Plan]]
) -> dict[str, pathlib.Path | dict[str, Any]]:
  """The other files: name -> a file to copy, or the JSON to write."""
  out: dict[str, Any] = {}
  if source is None:
    out["config.json"], out["preprocessor_config.json"] = openvla_config.config_json(config)
  else:
    weights = (*tensor_files.PICKLES, ".safetensors", ".index.json")
    out = {p.name: p for p in pathlib.Path(source).iterdir() if p.is_file() and not p.name.endswith(weights)}
  out["config.json"] = _with_dtype(out["config.json"], files)
  if statistics is not None:
    out["dataset_statistics.json"] = statistics
  shards = {name: rows for name, rows in files.items() if name != VALUE_FILE}
  return out | ({tensor_files.INDEX: tensor_files.index_of(shards)} if len(shards) > 1 else {})
