"""Safetensors files, one tensor at a time in either direction, and everything about a file checked before it is used.

  8 bytes       length of the header, little-endian
  header        JSON: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, ..., "__metadata__": {...}}
  data          the tensors, C order, without gaps

A tensor is mapped when it is read and unmapped when it is dropped, so the host never holds more than one; a file is
written as its tensors come, for which the library's own writer wants all of them at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from stare_jax.checkpoint import CheckpointError, sync

DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
CODES = {dtype: code for code, dtype in DTYPES.items()}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
HEADER_LIMIT = 100_000_000  # the format's own


class Entry(NamedTuple):
  """Where a tensor lies. offset: bytes from the start of the file."""

  file: pathlib.Path
  dtype: np.dtype
  shape: tuple[int, ...]
  offset: int

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def read_json(path: str | os.PathLike) -> dict[str, Any]:
  """A JSON object. Raises CheckpointError if it is missing, damaged, or something else."""
  path = pathlib.Path(path)
  try:
    found = json.loads(path.read_text())
  except FileNotFoundError as error:
    raise CheckpointError(f"{path.parent} has no {path.name}; name the folder of a whole public checkpoint") from error
  except (OSError, ValueError) as error:
    raise CheckpointError(f"{path} cannot be read as JSON ({error}); fetch the file again") from error
  if not isinstance(found, dict):
    raise CheckpointError(f"{path} holds a {type(found).__name__}, expected an object; fetch the file again")
  return found


# Reading -------------------------------------------------------------------------------------------------


def read_header(path: pathlib.Path) -> dict[str, Entry]:
  """The tensors of one file by name. Raises CheckpointError unless the file is whole and holds what it says."""
  again = "the file is damaged or only partly there: fetch it again"
  try:
    size = path.stat().st_size
    with path.open("rb") as file:
      begin = 8 + (length := int.from_bytes(file.read(8), "little"))
      if size < 8 or length > min(HEADER_LIMIT, size - 8):
        raise CheckpointError(f"{path}: {size} bytes are no safetensors file with a header of {length}; {again}")
      header = json.loads(file.read(length))
    if not isinstance(header, dict):
      raise CheckpointError(f"{path}: its header is a {type(header).__name__}, expected an object; {again}")
  except FileNotFoundError as error:
    raise CheckpointError(f"{path} is missing; fetch every file of the checkpoint") from error
  except (OSError, ValueError) as error:
    raise CheckpointError(f"{path}: its header cannot be read ({error}); {again}") from error
  out, spans = {}, []
  for name, row in header.items():
    if name == "__metadata__":
      continue
    try:
      (first, end), shape, code = row["data_offsets"], tuple(row["shape"]), row["dtype"]
      if not isinstance(code, str) or any(type(x) is not int for x in (first, end, *shape)):
        raise TypeError(row)
    except (KeyError, TypeError, ValueError) as error:
      raise CheckpointError(f"{path}: the header's entry of {name} is malformed ({error!r}); {again}") from error
    if code not in DTYPES:
      raise CheckpointError(f"{path}: {name} is {code}, expected one of {', '.join(DTYPES)}; quantised and integer "
                            f"checkpoints are not read: take the original, or convert it")
    out[name] = Entry(path, DTYPES[code], shape, begin + first)
    if end - first != out[name].nbytes or min(shape, default=0) < 0:
      raise CheckpointError(f"{path}: {name} {code}{list(shape)} takes {end - first} bytes, expected "
                            f"{out[name].nbytes}; {again}")
    spans.append((first, end))
  spans.sort()
  ends = [0, *(end for _, end in spans)]
  if [first for first, _ in spans] != ends[:-1]:
    raise CheckpointError(f"{path}: its tensors overlap or leave gaps; {again}")
  if begin + ends[-1] != size:
    raise CheckpointError(f"{path} is {'truncated' if size < begin + ends[-1] else 'too long'}: {size} bytes, its "
                          f"header says {begin + ends[-1]}; {again}")
  return out


def read_folder(folder: str | os.PathLike) -> dict[str, Entry]:
  """The tensors of a checkpoint, of one file or of the shards of an index.

  Raises: CheckpointError where a file is missing, damaged, or holds other tensors than the index says.
  """
  folder = pathlib.Path(folder)
  if not (folder / INDEX).exists():
    if not (folder / SINGLE).exists():
      raise CheckpointError(_no_weights(folder))
    return read_header(folder / SINGLE)
  weight_map = read_json(folder / INDEX).get("weight_map")
  if not isinstance(weight_map, dict) or not weight_map:
    raise CheckpointError(f'{folder / INDEX} has no "weight_map" from tensors to files; fetch the file again')
  if odd := sorted({repr(f) for f in weight_map.values() if not isinstance(f, str) or pathlib.Path(f).name != f}):
    raise CheckpointError(f"{folder / INDEX} names {odd[0]}, expected files of its own folder")
  if pickled := sorted({f for f in weight_map.values() if not f.endswith(".safetensors")}):
    raise CheckpointError(_pickle(folder / pickled[0]))
  found: dict[str, Entry] = {}
  for file in sorted(set(weight_map.values())):
    for name, entry in read_header(folder / file).items():
      if weight_map.get(name) != file:
        raise CheckpointError(f"{folder / file} holds {name}, which the index puts into {weight_map.get(name)!r}; the "
                              f"files are of different checkpoints: fetch all of them again")
      found[name] = entry
  if lost := sorted(set(weight_map) - set(found)):
    raise CheckpointError(f"{folder / weight_map[lost[0]]} lacks {lost[0]} ({len(lost)} tensors of the index are in no "
                          f"file); the files are of different checkpoints: fetch all of them again")
  return found


def _no_weights(folder: pathlib.Path) -> str:
  if not folder.is_dir():
    return f"no folder {folder}; name the folder of a public checkpoint, with its config.json"
  if pickles := sorted(p for p in folder.iterdir() if p.suffix in PICKLES):
    return _pickle(pickles[0])
  if (folder / "adapter_config.json").exists():
    return f"{folder} holds adapters, not a model; name the folder of their base model"
  return f"{folder} has neither {SINGLE} nor {INDEX}; fetch every file of the checkpoint"


def _pickle(path: pathlib.Path) -> str:
  return (f"{path} is a pickle, which can run code and is never opened: convert it with "
          f"transformers' save_pretrained(..., safe_serialization=True), where you trust it")  # fmt: skip


def view(entry: Entry) -> np.ndarray:
  """The tensor, read-only and mapped: what is sliced is read, and dropping it unmaps it. Copy before keeping it."""
  if not entry.nbytes:
    return np.zeros(entry.shape, entry.dtype)
  raw = np.memmap(entry.file, np.uint8, mode="r", offset=entry.offset, shape=(entry.nbytes,))
  return np.asarray(raw).view(entry.dtype).reshape(entry.shape)


# Writing -------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
  """A tensor to be written."""

  name: str
  dtype: np.dtype
  shape: tuple[int, ...]

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


def write(
  path: pathlib.Path, plan: Sequence[Plan], arrays: Iterable[np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
  """One file, durable. arrays: in the order of the plan, taken one by one. metadata: strings for the header."""
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}  # "pt": what transformers looks for
  at = 0
  for row in plan:
    code = CODES[np.dtype(row.dtype)]
    header[row.name] = {"dtype": code, "shape": list(row.shape), "data_offsets": [at, at + row.nbytes]}
    at += row.nbytes
  text = json.dumps(header, separators=(",", ":")).encode()
  text = text.ljust(-(-len(text) // 8) * 8)
  with path.open("wb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for row, array in zip(plan, arrays, strict=True):
      if array.shape != row.shape or array.dtype != row.dtype:
        raise ValueError(f"{row.name}: got {array.dtype}{array.shape}, planned {row.dtype}{row.shape}")
      if row.nbytes:
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def appearing(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """Where to write what `folder` will hold: a place beside it, which takes its name once all is there and durable.

  Raises: CheckpointError where the disk refuses. After any error nothing is left.
  """
  partial = folder.with_name(f".{folder.name}.partial")
  try:
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    partial.mkdir(parents=True)
    yield partial
    for path in (*partial.iterdir(), partial):
      sync(path)
    partial.rename(folder)
    sync(folder.parent)
  except BaseException as error:
    shutil.rmtree(partial, ignore_errors=True)
    if isinstance(error, OSError):
      raise CheckpointError(f"{folder} could not be written ({error.strerror or error}); nothing was left behind. "
                            f"Check space and permissions, or choose another folder") from error
    raise


def shards(plan: Sequence[Plan], limit: int) -> dict[str, list[Plan]]:
  """Files of at most `limit` bytes of tensors (or of one larger tensor), in order; one file has the short name."""
  groups: list[list[Plan]] = [[]]
  for row in plan:
    if groups[-1] and sum(r.nbytes for r in groups[-1]) + row.nbytes > limit:
      groups.append([])
    groups[-1].append(row)
  if len(groups) == 1:
    return {SINGLE: groups[0]}
  return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def index_of(files: Mapping[str, Sequence[Plan]]) -> dict[str, Any]:
  """What the index file says of several shards."""
  return {
    "metadata": {"total_size": sum(row.nbytes for group in files.values() for row in group)},
    "weight_map": {row.name: file for file, group in files.items() for row in group},
  }
