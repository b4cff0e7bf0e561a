"""Episodes on disk: one file, one format, whole or absent.

Layout of version 1, little-endian:

  bytes       content
  8           magic, b"STAREJAX"
  8           uint64, the version
  8           uint64, the length of the header
  header      JSON, UTF-8, sorted keys:
                bytes       length of the whole file
                signals     {name: shape}, the signal table that the episodes were written with
                strings     {"task": [...], "instruction": [...]}, the distinct values
                meta        the caller's JSON values
                arrays      {name: {"dtype", "shape", "offset"}}, offsets from the start of the file,
                multiples of 64
  arrays      C order, zeros between them
  32          SHA-256 of everything before

Episodes lie one after another. The arrays of E episodes, with R the sum of their T:

  length int64[E] · seed int64[E] · task int32[E] · instruction int32[E] · last_value float64[E] · terminated
  bool[E] images uint8[R, H, W, 3] · signals float32[R + E, S] · actions float32[R, D] · tokens int32[R, A]
  log_prob float32[R, A] · value float32[R] · "meta/<name>": numpy arrays given in meta (reference log-probs,
  say)

Equal content gives equal bytes. A file appears under its name only when it is complete and on the disk.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from stare_jax.episode import SIGNALS, Episode

MAGIC = b"STAREJAX"
VERSION = 1
PREFIX = len(MAGIC) + 16
DIGEST = 32
ALIGN = 64
BLOCK = 1 << 22  # bytes hashed or written at once

# Per-step arrays of an episode: dtype, axes after time, states (T + 1) rather than steps (T).
STEPS: dict[str, tuple[type, int, bool]] = {
  "images": (np.uint8, 3, False),
  "signals": (np.float32, 1, True),
  "actions": (np.float32, 1, False),
  "tokens": (np.int32, 1, False),
  "log_prob": (np.float32, 1, False),
  "value": (np.float32, 0, False),
}


class DatasetError(ValueError):
  """The file is not what was asked for; the message says what it is and what to do."""


def write(path: str | os.PathLike, episodes: Sequence[Episode], meta: Mapping[str, Any] | None = None) -> None:
  """Writes episodes and meta to `path`, atomically.

  Args:
    meta: JSON values, and numpy arrays at the top level.
  Raises: OSError if the disk is full or refuses; the file that was at `path` is then still there, untouched.
  """
  path = Path(path)
  strings, arrays = _pack(episodes)
  values = {}
  for name, value in (meta or {}).items():
    if isinstance(value, np.ndarray):
      arrays[f"meta/{name}"] = [_little(value)]
    else:
      values[name] = value
  header, size = _header(strings, values, arrays)
  temporary = path.with_name(f".{path.name}.partial")  # one name, so that a killed write leaves at most one behind
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_file(temporary, _layout(header, arrays))
    os.replace(temporary, path)
  except OSError as error:
    free = _remove_and_measure(temporary)
    raise OSError(error.errno, _disk_message(error, path, size, free)) from error
  except BaseException:
    temporary.unlink(missing_ok=True)
    raise
  _sync_folder(path.parent)


def open(path: str | os.PathLike) -> tuple[list[Episode], dict[str, Any]]:
  """Reads a file back after checking version, length and checksum.

  The arrays are read-only views of the mapped file: images are read from the disk when they are used.

  Returns: (episodes, meta), as given to `write`.
  """
  path = Path(path)
  if not path.is_file():
    raise FileNotFoundError(errno.ENOENT, f"no dataset at {path}; run the phase that writes it first")
  raw = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
  header = _read_header(path, raw)
  arrays = {name: _view(raw, entry) for name, entry in header["arrays"].items()}
  meta = dict(header["meta"])
  meta.update({name.removeprefix("meta/"): a for name, a in arrays.items() if name.startswith("meta/")})
  return _unpack(header["strings"], arrays), meta


def _pack(episodes: Sequence[Episode]) -> tuple[dict[str, list[str]], dict[str, list[np.ndarray]]]:
  """Distinct strings, and every array as the list of its pieces (the images are not copied together)."""
  if not episodes:
    raise ValueError("dataset: got no episodes, expected at least one; a phase that collected nothing has failed")
  strings: dict[str, list[str]] = {
    name: sorted({getattr(e, name) for e in episodes}) for name in ("task", "instruction")
  }
  arrays: dict[str, list[np.ndarray]] = {
    "length": [np.array([len(e) for e in episodes], np.int64)],
    "seed": [np.array([e.seed for e in episodes], np.int64)],
    "last_value": [np.array([e.last_value for e in episodes], np.float64)],
    "terminated": [np.array([e.terminated for e in episodes], bool)],
  }
  for name, known in strings.items():
    arrays[name] = [np.array([known.index(getattr(e, name)) for e in episodes], np.int32)]
  for name, (dtype, axes, states) in STEPS.items():
    pieces = [getattr(e, name) for e in episodes]
    for episode, piece in zip(episodes, pieces, strict=True):
      rows = len(episode) + states
      if piece.dtype != dtype or piece.shape != (rows, *pieces[0].shape[1:]) or piece.ndim != axes + 1:
        raise ValueError(
          f"dataset: episode of {episode.task}, seed {episode.seed}: {name} is {piece.dtype}{list(piece.shape)}, "
          f"expected {np.dtype(dtype)}{[rows, *pieces[0].shape[1:]]} like the first episode's; see stare_jax.episode"
        )
    arrays[name] = pieces
  return strings, arrays


def _unpack(strings: dict[str, list[str]], arrays: dict[str, np.ndarray]) -> list[Episode]:
  length = arrays["length"]
  stop = np.cumsum(length)
  episodes = []
  for e, (b, n) in enumerate(zip(stop.tolist(), length.tolist(), strict=True)):
    a = b - n
    steps = {name: arrays[name][a + e : b + e + 1] if s else arrays[name][a:b] for name, (_, _, s) in STEPS.items()}
    episodes.append(
      Episode(
        task=strings["task"][arrays["task"][e]],
        seed=int(arrays["seed"][e]),
        instruction=strings["instruction"][arrays["instruction"][e]],
        last_value=float(arrays["last_value"][e]),
        terminated=bool(arrays["terminated"][e]),
        **steps,
      )
    )
  return episodes


def _little(array: np.ndarray) -> np.ndarray:
  if array.dtype.kind not in "biuf":
    raise TypeError(f"dataset: a meta array is {array.dtype}, expected bool, integer or float; use a list for text")
  return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _header(strings: dict, meta: dict, arrays: dict[str, list[np.ndarray]]) -> tuple[bytes, int]:
  """The header and the length of the whole file. Offsets depend on the header's length: it is padded to a block."""
  entries: dict[str, tuple[str, list[int], int]] = {}
  at = 0
  for name, pieces in sorted(arrays.items()):
    shape = [sum(len(p) for p in pieces), *pieces[0].shape[1:]] if pieces[0].ndim else []
    entries[name] = pieces[0].dtype.newbyteorder("<").str, shape, at
    at += _aligned(sum(p.nbytes for p in pieces))
  signals = {name: list(shape) for name, shape in SIGNALS.items()}
  room = 0
  while True:
    begin = PREFIX + room
    size = begin + at + DIGEST
    table = {name: {"dtype": d, "shape": s, "offset": begin + o} for name, (d, s, o) in entries.items()}
    tree = {"bytes": size, "signals": signals, "strings": strings, "meta": meta, "arrays": table}
    try:
      header = json.dumps(tree, sort_keys=True, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
      raise TypeError(f"dataset: meta must be JSON values or numpy arrays at the top level: {error}") from error
    if len(header) <= room:
      return header.ljust(room), size
    room = _aligned(PREFIX + len(header)) - PREFIX


def _aligned(size: int) -> int:
  return -(-size // ALIGN) * ALIGN


def _layout(header: bytes, arrays: dict[str, list[np.ndarray]]) -> Iterator[bytes | memoryview]:
  """The file's bytes up to the checksum, in order."""
  yield MAGIC + VERSION.to_bytes(8, "little") + len(header).to_bytes(8, "little") + header
  for _, pieces in sorted(arrays.items()):
    size = 0
    for piece in pieces:
      size += piece.nbytes
      if piece.nbytes:
        yield np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data
    yield bytes(_aligned(size) - size)


def _write_file(path: Path, content: Iterable[bytes | memoryview]) -> None:
  digest = hashlib.sha256()
  with path.open("wb", buffering=BLOCK) as file:
    for part in content:
      digest.update(part)
      file.write(part)
    file.write(digest.digest())
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
  """Makes the new name itself durable."""
  handle = os.open(folder, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _remove_and_measure(temporary: Path) -> int | None:
  """Removes what was written so far; returns the bytes that are free then, where that can be known."""
  with contextlib.suppress(OSError):
    temporary.unlink(missing_ok=True)
  with contextlib.suppress(OSError):
    return shutil.disk_usage(temporary.parent).free
  return None


def _disk_message(error: OSError, path: Path, size: int, free: int | None) -> str:
  kept = f"{path} is as it was and nothing was left behind"
  if error.errno in (errno.ENOSPC, errno.EDQUOT):
    have = "" if free is None else f", {free / 1e6:.1f} MB are free"
    return f"disk full: dataset {path} needs {size / 1e6:.1f} MB{have}; {kept}. Free space or choose another workdir"
  reason = error.strerror or error
  return f"dataset {path} could not be written ({reason}); {kept}. Check the folder and its permissions"


def _read_header(path: Path, raw: np.ndarray) -> dict:
  """The header, once magic, version, length, checksum and signal table hold."""
  again = "delete it and rerun the phase that writes it"
  if raw[: len(MAGIC)].tobytes() != MAGIC:
    raise DatasetError(f"{path}: not a stare_jax dataset: it starts with {raw[:8].tobytes()!r}, expected {MAGIC!r}")
  version, room = (int.from_bytes(raw[a : a + 8].tobytes(), "little") for a in (8, 16))
  if version != VERSION:
    raise DatasetError(f"{path}: dataset version {version}, this program reads version {VERSION}; {again}")
  if raw.size < PREFIX + room + DIGEST:
    raise DatasetError(f"{path}: truncated: {raw.size} bytes, its header alone needs {PREFIX + room}; {again}")
  try:
    header = json.loads(raw[PREFIX : PREFIX + room].tobytes())
    expected = header["bytes"]
  except (ValueError, KeyError, TypeError) as error:
    raise DatasetError(f"{path}: damaged: its header cannot be read ({error}); {again}") from error
  if raw.size != expected:
    state = "truncated" if raw.size < expected else "too long"
    raise DatasetError(f"{path}: {state}: {raw.size} bytes, its header says {expected}; {again}")
  digest = hashlib.sha256()
  for at in range(0, raw.size - DIGEST, BLOCK):
    digest.update(raw[at : min(at + BLOCK, raw.size - DIGEST)].data)
  if digest.digest() != raw[-DIGEST:].tobytes():
    raise DatasetError(
      f"{path}: damaged: SHA-256 of its content is {digest.hexdigest()[:16]}..., "
      f"it carries {raw[-DIGEST:].tobytes().hex()[:16]}...; {again}"
    )
  signals = {name: tuple(shape) for name, shape in header["signals"].items()}
  if signals != SIGNALS:
    differ = sorted(dict(signals.items() ^ SIGNALS.items()))
    raise DatasetError(f"{path}: written with another signal table (differs in {differ}); {again}")
  return header


def _view(raw: np.ndarray, entry: Mapping[str, Any]) -> np.ndarray:
  """One array of the mapped file, read-only, without a copy."""
  dtype, shape, at = np.dtype(entry["dtype"]), entry["shape"], entry["offset"]
  size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
  return np.asarray(raw[at : at + size]).view(dtype).reshape(shape)
