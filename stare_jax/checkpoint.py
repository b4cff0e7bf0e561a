"""Checkpoints: everything a run is, written whole or not at all, restored onto any mesh.

  <directory>/00000120/state/            arrays, by Orbax
  <directory>/00000120/checkpoint.json   format, step, configuration, the caller's meta, leaves, files

A checkpoint is written under a name that begins with a dot, made durable, and renamed: a folder named by a number is
complete, and a process killed at any point leaves the previous ones as they were. `checkpoint.json` holds the size and
CRC-32 of every file (of large ones, of a 32nd of their blocks), so a copy that broke off later, or has large holes, is
found out before anything is read into a run.

State is any tree of device arrays (sharded as they are), numpy arrays, numbers and random keys; meta is any JSON:
phase, iteration, counters, seeds, data cursors.
"""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

FORMAT = 1
META = "checkpoint.json"
STATE = "state"
CHECKED_BYTES = 256 << 20  # of a larger file every `SAMPLED`-th block is checked, the first and the last
BLOCK, SAMPLED = 1 << 22, 32
FETCHED_BYTES = 1 << 30  # a smaller state is fetched whole before it is written, in half the time
CHUNK_BYTES, MOST_CHUNKS = 2 << 30, 256  # a device's larger part of an array: a chunk per layer, if these are no more
HASHED_BYTES = 256 << 20  # a larger array is gathered for its digest in parts of this size
TMP, OLD = ".tmp-", ".old-"


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written or used; the message says why and what to do."""


class ConfigMismatchError(CheckpointError):
  """The checkpoint belongs to another configuration; the message names the keys that differ."""


# Configuration -------------------------------------------------------------------------------------------


def flatten_config(config: Any, prefix: str = "") -> dict[str, Any]:
  """{"a.b": value}, with values as JSON would return them. config: a mapping or an ml_collections ConfigDict."""
  out: dict[str, Any] = {}
  for key, value in config.items():
    if hasattr(value, "items"):
      out |= flatten_config(value, f"{prefix}{key}.")
    else:
      out[f"{prefix}{key}"] = json.loads(json.dumps(value, default=_jsonable))
  return out


def config_digest(config: Any) -> str:
  """SHA-256 of the flattened configuration: equal settings in any order have one digest."""
  return hashlib.sha256(json.dumps(flatten_config(config), sort_keys=True).encode()).hexdigest()


def config_differences(saved: Mapping[str, Any], config: Any, ignore: tuple[str, ...] = ()) -> list[str]:
  """One line for each key that differs between a flattened configuration and `config`; `ignore`: beginnings of keys."""
  now = flatten_config(config)
  show = lambda flat, key: repr(flat[key]) if key in flat else "absent"
  spelled = lambda k, x: os.path.realpath(x) if k == "init_from" and x else x  # one folder has many names
  differs = lambda k: spelled(k, saved.get(k)) != spelled(k, now.get(k))  # a field that is newer and left open is none
  keys = sorted(k for k in {*saved, *now} if differs(k) and not k.startswith(ignore))
  return [f"{key}: {show(saved, key)} there, {show(now, key)} now" for key in keys]


def _jsonable(x: Any) -> Any:
  if isinstance(x, (np.ndarray, np.generic)):
    return x.tolist()
  if isinstance(x, os.PathLike):
    return os.fspath(x)
  raise TypeError(f"checkpoint meta: {type(x).__name__} is not JSON; put arrays into the state instead")


# Trees as flat tables ------------------------------------------------------------------------------------


def _leaves(tree: Any) -> dict[str, Any]:
  """{"train/params/head/kernel": leaf} in tree order."""
  pairs = jax.tree_util.tree_leaves_with_path(tree)
  table = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}
  if len(table) != len(pairs):
    raise ValueError("state: two leaves have one path; a key of the tree contains '/'")
  return table


def _nested(table: Mapping[str, Any]) -> dict[str, Any]:
  out: dict[str, Any] = {}
  for path, leaf in table.items():
    *parents, name = path.split("/")
    at = out
    for parent in parents:
      at = at.setdefault(parent, {})
    at[name] = leaf
  return out


def _is_key(x: Any) -> bool:
  return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def _storable(path: str, leaf: Any) -> Any:
  """Device arrays as they are, random keys as their uint32 data, the rest as numpy."""
  if _is_key(leaf):
    return jax.random.key_data(leaf)
  if isinstance(leaf, jax.Array):
    return leaf
  array = np.asarray(leaf)
  if array.dtype.kind in "OUSMm":
    raise TypeError(f"state {path}: {type(leaf).__name__} is not numeric; put it into meta")
  return array


def _shape_of(leaf: Any) -> tuple[tuple[int, ...], str]:
  """Shape and dtype as stored."""
  if _is_key(leaf):
    leaf = jax.eval_shape(jax.random.key_data, leaf)
  leaf = leaf if hasattr(leaf, "shape") else np.asarray(leaf)
  return tuple(leaf.shape), str(leaf.dtype)


# The folder ----------------------------------------------------------------------------------------------


def _name(step: int) -> str:
  return f"{step:08d}"


def steps(directory: str | os.PathLike) -> list[int]:
  """Steps of the complete checkpoints, ascending; an absent directory has none."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return []
  if _primary():  # killed while one step replaced itself: both are whole, the old one still has its dot
    for old in directory.glob(f"{OLD}*"):
      if not (directory / old.name.removeprefix(OLD)).exists():
        old.rename(directory / old.name.removeprefix(OLD))
  return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def latest(directory: str | os.PathLike) -> int | None:
  """The newest complete step, or None."""
  return max(steps(directory), default=None)


def _primary() -> bool:
  return jax.process_index() == 0


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"checkpoint {name}")


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  return (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != META)


def sync(path: pathlib.Path) -> None:
  """Makes a file, or the names in a folder, durable."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  finally:
    os.close(descriptor)


def _crc(path: pathlib.Path, size: int) -> int:
  blocks = range(0, size, BLOCK)
  crc = 0
  with path.open("rb") as f:
    for at in blocks if size <= CHECKED_BYTES else sorted({*blocks[::SAMPLED], blocks[-1]}):
      f.seek(at)
      crc = zlib.crc32(f.read(BLOCK), crc)
  return crc


def _fingerprint(path: pathlib.Path) -> list[int]:
  size = path.stat().st_size
  return [size, _crc(path, size)]


def _disk_full(error: BaseException | None) -> bool:
  """Whether this error, or what it came from, is a full disk; Orbax's storage layer says so in words only."""
  while error is not None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      return True
    if "No space left on device" in str(error):
      return True
    error = error.__cause__ or error.__context__
  return False


# Writing -------------------------------------------------------------------------------------------------


def _handler() -> ocp.Checkpointer:
  # Weights barely compress, and compressing them is most of the time of a save.
  return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False))


def save(
  directory: str | os.PathLike,
  step: int,
  state: Any,
  meta: Mapping[str, Any] | None = None,
  *,
  config: Any = None,
  keep: int | None = 3,
) -> pathlib.Path:
  """Writes a checkpoint of `step` and returns its folder; every process of the run calls it.

  meta: JSON. config: what a resuming run must share, kept flat with its digest. keep: the newest complete checkpoints
  that stay; None keeps all. An existing checkpoint of the same step is replaced.
  """
  directory = pathlib.Path(directory).absolute()
  table = {path: _storable(path, leaf) for path, leaf in _leaves(state).items()}
  head = {
    "format": FORMAT,
    "step": step,
    "config": None if config is None else flatten_config(config),
    "meta": dict(meta or {}),
    "leaves": {path: [list(x.shape), str(x.dtype)] for path, x in table.items()},
  }
  json.dumps(head, default=_jsonable)  # before anything is written
  tmp = directory / f"{TMP}{_name(step)}"
  try:
    _write(directory, tmp, table, head)
    if _primary():
      _commit(directory, tmp, step)
  except BaseException as error:
    if _primary():
      shutil.rmtree(tmp, ignore_errors=True)
    if _disk_full(error):
      raise _no_space(directory, step, table) from error
    raise
  _barrier("committed")
  if _primary() and keep is not None:
    for old in steps(directory)[: -max(keep, 1)]:
      _remove(directory / _name(old))
  return directory / _name(step)


def _size(table: Mapping[str, Any]) -> int:
  return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in table.values())


def _no_space(directory: pathlib.Path, step: int, table: Mapping[str, Any]) -> CheckpointError:
  left = "there is no earlier one" if (old := latest(directory)) is None else f"step {old} is complete and untouched"
  return CheckpointError(
    f"disk full: checkpoint {step} needs about {_size(table) / 2**20:.0f} MiB in {directory}, where "
    f"{shutil.disk_usage(directory).free / 2**20:.0f} MiB are free. No checkpoint was lost: {left}. Free some "
    f"space (or give a --workdir on another disk) and run the same command again"
  )


def _fetched(table: dict[str, Any]) -> dict[str, Any]:
  """Device arrays cost Orbax a millisecond each, which is most of the save of a small model."""
  return jax.device_get(table) if jax.process_count() == 1 and _size(table) < FETCHED_BYTES else table


def _save_args(x: Any) -> ocp.SaveArgs:
  """Orbax would cut an array of stacked layers across its widest axis, and hold copies of all of it meanwhile."""
  shape = x.sharding.shard_shape(x.shape) if isinstance(x, jax.Array) else x.shape
  large = math.prod(shape) * x.dtype.itemsize > CHUNK_BYTES and shape[0] <= MOST_CHUNKS
  return ocp.SaveArgs(shard_axes=(0,) if large else ())


def _write(directory: pathlib.Path, tmp: pathlib.Path, table: dict[str, Any], head: dict[str, Any]) -> None:
  """Everything into `tmp`, durable; not yet a checkpoint."""
  if _primary():
    directory.mkdir(parents=True, exist_ok=True)
    for stale in directory.glob(f"{TMP}*"):  # left by a process that was killed; a directory has one writer
      shutil.rmtree(stale, ignore_errors=True)
    if shutil.disk_usage(directory).free < 1.05 * _size(table):
      raise OSError(errno.ENOSPC, "No space left on device")
    tmp.mkdir()
  _barrier("begin")
  stored = {path: x for path, x in table.items() if math.prod(x.shape)}  # an empty array is its shape
  with _handler() as handler:
    how = _nested({path: _save_args(x) for path, x in stored.items()})
    handler.save(tmp / STATE, args=ocp.args.PyTreeSave(_nested(_fetched(stored)), how, CHUNK_BYTES))
  if not _primary():
    return
  head["files"] = {p.relative_to(tmp).as_posix(): _fingerprint(p) for p in _files(tmp)}
  (tmp / META).write_text(json.dumps(head, indent=1, default=_jsonable))
  for path in (*_files(tmp), tmp / META, *(p for p in tmp.rglob("*") if p.is_dir()), tmp):
    sync(path)


def _commit(directory: pathlib.Path, tmp: pathlib.Path, step: int) -> None:
  """The rename that makes it a checkpoint. One of the same step waits under another name until it is replaced."""
  final, old = directory / _name(step), directory / f"{OLD}{_name(step)}"
  if final.exists():
    shutil.rmtree(old, ignore_errors=True)
    final.rename(old)
  tmp.rename(final)
  sync(directory)
  shutil.rmtree(old, ignore_errors=True)


def _remove(folder: pathlib.Path) -> None:
  """Takes its number away first: a folder half deleted must not look complete."""
  gone = folder.with_name(f"{TMP}{folder.name}")
  folder.rename(gone)
  shutil.rmtree(gone, ignore_errors=True)


# Reading -------------------------------------------------------------------------------------------------


def _instead(directory: pathlib.Path, step: int) -> str:
  others = [s for s in steps(directory) if s != step]
  if not others:
    return "there is no other checkpoint here: remove it and start again"
  return f"remove it and run again: step {max(others)} takes its place"


def _find(directory: str | os.PathLike, step: int | None) -> tuple[pathlib.Path, int]:
  directory = pathlib.Path(directory).absolute()
  found = steps(directory)
  if not found:
    raise CheckpointError(f"no checkpoint in {directory}; run the phase that writes it, or correct the path")
  step = found[-1] if step is None else step
  if step not in found:
    raise CheckpointError(f"no checkpoint of step {step} in {directory}; there are {found}")
  return directory, step


def _head(directory: pathlib.Path, step: int) -> dict[str, Any]:
  folder = directory / _name(step)
  try:
    head = json.loads((folder / META).read_text())
    number = head["format"]
  except (OSError, ValueError, KeyError) as error:
    raise CheckpointError(
      f"checkpoint {folder} is incomplete: {META} is missing or unreadable ({error}); {_instead(directory, step)}"
    ) from error
  if number != FORMAT:
    raise CheckpointError(
      f"checkpoint {folder} has format {number}, this version reads {FORMAT}; use the version that wrote it"
    )
  return head


def read_meta(directory: str | os.PathLike, step: int | None = None) -> dict[str, Any]:
  """The caller's meta, without touching the arrays; `step` None is the newest."""
  return _head(*_find(directory, step))["meta"]


def read_config(directory: str | os.PathLike, step: int | None = None) -> dict[str, Any] | None:
  """The flattened configuration that was saved."""
  return _head(*_find(directory, step))["config"]


def read_leaves(directory: str | os.PathLike, step: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
  """{"params/head/kernel": shape and dtype} of what was saved, without touching the arrays."""
  leaves = _head(*_find(directory, step))["leaves"]
  return {path: jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for path, (shape, dtype) in leaves.items()}


def check_config(directory: str | os.PathLike, config: Any, ignore: tuple[str, ...] = ()) -> None:
  """Raises ConfigMismatchError, naming the keys, unless the newest checkpoint was saved with this configuration.

  ignore: beginnings of keys that need not be the same.
  """
  directory, step = _find(directory, None)
  if lines := config_differences(_head(directory, step)["config"] or {}, config, ignore):
    raise ConfigMismatchError(
      f"checkpoint {directory / _name(step)} belongs to another configuration:\n  " + "\n  ".join(lines[:12]) + "\n"
      "Run with that configuration, or start this one with another --workdir; nothing was changed"
    )


def _check_files(directory: pathlib.Path, step: int, files: Mapping[str, list[int | None]]) -> None:
  folder = directory / _name(step)
  for name, (size, crc) in files.items():
    path = folder / name
    came = path.stat().st_size if path.is_file() else None
    if came != size:
      what = "is missing" if came is None else f"has {came} bytes instead of {size}"
    elif crc is not None and _crc(path, size) != crc:
      what = "has other contents than were written"
    else:
      continue
    raise CheckpointError(f"checkpoint {folder} is damaged: {name} {what}; {_instead(directory, step)}")


def _check_leaves(folder: pathlib.Path, saved: Mapping[str, list], wanted: Mapping[str, Any], partial: bool) -> None:
  missing = [path for path in wanted if path not in saved]
  extra = [] if partial else [path for path in saved if path not in wanted]
  if missing or extra:
    raise CheckpointError(
      f"checkpoint {folder} holds another state: it lacks {missing[:5]}, and has {extra[:5]} besides "
      f"({len(missing)} and {len(extra)} leaves); the model or the optimiser was configured otherwise"
    )
  for path, leaf in wanted.items():
    shape, dtype = _shape_of(leaf)
    if (came := (tuple(saved[path][0]), saved[path][1])) != (shape, dtype):
      raise CheckpointError(
        f"checkpoint {folder}: {path} is {came[1]}{list(came[0])}, this run expects {dtype}{list(shape)}; "
        f"the model was configured otherwise"
      )


def _restore_args(leaf: Any) -> Any:
  if not isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return ocp.RestoreArgs(restore_type=np.ndarray)
  if _is_key(leaf):
    return ocp.ArrayRestoreArgs(sharding=jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
  where = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return ocp.ArrayRestoreArgs(sharding=where, global_shape=tuple(leaf.shape), dtype=leaf.dtype)


def _as_asked(leaf: Any, stored: Any) -> Any:
  """The restored array in the form of the abstract leaf."""
  if _is_key(leaf):
    return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(leaf))
  if isinstance(leaf, (jax.Array, jax.ShapeDtypeStruct)):
    return stored
  return np.asarray(stored) if isinstance(leaf, (np.ndarray, np.generic)) else type(leaf)(np.asarray(stored).item())


def restore(
  directory: str | os.PathLike,
  abstract: Any,
  step: int | None = None,
  *,
  partial: bool = False,
) -> tuple[Any, dict[str, Any]]:
  """(state, meta) of `step` (None: the newest), shaped and placed as `abstract` says.

  abstract: the state's tree of ShapeDtypeStructs with shardings (of any mesh; see train.abstract_state), or of arrays;
  numpy leaves come back as numpy. partial: `abstract` may leave out parts of the saved state, such as the optimiser.
  """
  directory, step = _find(directory, step)
  folder, head = directory / _name(step), _head(directory, step)
  wanted = _leaves(abstract)
  _check_leaves(folder, head["leaves"], wanted, partial)
  _check_files(directory, step, head["files"])
  read = {path: leaf for path, leaf in wanted.items() if math.prod(_shape_of(leaf)[0])}
  args = {path: _restore_args(leaf) for path, leaf in read.items()}
  with _handler() as handler:
    shapes = _nested({path: jax.ShapeDtypeStruct(*_shape_of(leaf)) for path, leaf in read.items()})
    request = ocp.args.PyTreeRestore(item=shapes, restore_args=_nested(args), partial_restore=True)
    stored = _leaves(handler.restore(folder / STATE, args=request))
  empty = lambda leaf: np.zeros(*_shape_of(leaf))
  leaves = [_as_asked(leaf, stored[path] if path in stored else empty(leaf)) for path, leaf in wanted.items()]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves), head["meta"]


def params_sha256(params: Any) -> str:
  """One digest of parameter names, shapes, dtypes and bytes, whatever the mesh; every process of the run calls it."""
  digest = hashlib.sha256()
  for path, x in sorted(_leaves(params).items()):
    x = x if isinstance(x, jax.Array) else np.asarray(x)
    digest.update(f"{path} {np.dtype(x.dtype)} {list(x.shape)}\n".encode())
    for part in _parts(x):
      digest.update(np.ascontiguousarray(part).tobytes())
  return digest.hexdigest()


def _parts(x: Any) -> Iterator[np.ndarray]:
  """An array's rows in order, on the host, at most HASHED_BYTES of them at a time (or one row, where that is more).

  So no process ever holds a whole stack of layers that is cut over several.
  """
  if isinstance(x, jax.Array) and x.is_fully_replicated:
    x = x.addressable_data(0)
  if not isinstance(x, jax.Array) or x.nbytes <= HASHED_BYTES:
    here = not isinstance(x, jax.Array) or x.is_fully_addressable
    yield np.asarray(x) if here else multihost_utils.process_allgather(x, tiled=True)
    return
  rows = max(1, HASHED_BYTES * len(x) // x.nbytes)
  where = None if x.is_fully_addressable else NamedSharding(x.sharding.mesh, PartitionSpec())
  for at in range(0, len(x), rows):
    start = min(at, len(x) - rows)  # of the last part, which is as long as the others, only the end is new
    yield np.asarray(_rows(rows, where)(x, start))[at - start :]


@functools.cache
def _rows(count: int, where: NamedSharding | None) -> Callable[[jax.Array, int], jax.Array]:
  return jax.jit(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, count), out_shardings=where)
