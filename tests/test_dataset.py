"""Episodes on disk: what is read is what was written, and whatever goes wrong is said and loses nothing."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import shutil

import numpy as np
import pytest

from stare_jax import dataset
from stare_jax.episode import SIGNAL_SIZE, Episode


def episodes(count: int = 4, seed: int = 0, size: int = 6) -> list[Episode]:
  rng = np.random.default_rng(seed)
  made = []
  for i, steps in enumerate(rng.integers(1, 9, count)):
    made.append(
      Episode(
        task="push_cube",
        seed=10**12 + i,
        instruction=["push the cube", "schiebe den Würfel"][i % 2],
        images=rng.integers(0, 256, (steps, size, size + 1, 3), dtype=np.uint8),
        signals=rng.normal(size=(steps + 1, SIGNAL_SIZE)).astype(np.float32),
        actions=rng.normal(size=(steps, 7)).astype(np.float32),
        tokens=rng.integers(0, 256, (steps, 7), dtype=np.int32),
        log_prob=-rng.random((steps, 7)).astype(np.float32),
        value=rng.normal(size=steps).astype(np.float32),
        last_value=float(rng.normal()),
        terminated=bool(i % 2),
      )
    )
  return made


def assert_equal(a: list[Episode], b: list[Episode]) -> None:
  for x, y in zip(a, b, strict=True):
    for field in dataclasses.fields(Episode):
      left, right = getattr(x, field.name), getattr(y, field.name)
      np.testing.assert_array_equal(left, right)
      assert type(left) is type(right) or isinstance(right, np.ndarray)
      if isinstance(left, np.ndarray):
        assert left.dtype == right.dtype


@pytest.fixture
def written(tmp_path):
  path = tmp_path / "data" / "demos.stare"
  made = episodes()
  dataset.write(path, made, {"digest": "abc", "task": "push_cube"})
  return path, made


def patch(path, at: int, content: bytes) -> None:
  with path.open("r+b") as file:
    file.seek(at)
    file.write(content)


@pytest.mark.parametrize("count", [1, 2, 17])
def test_what_is_read_is_what_was_written(tmp_path, count):
  made = episodes(count, seed=count)
  steps = sum(map(len, made))
  meta = {
    "digest": "0f" * 32,
    "nested": {"b": [1, 2.5, None, True], "a": "ö"},
    "ref_log_prob": np.linspace(-9, 0, steps, dtype=np.float32),
    "count": np.array(count),
    "empty": np.zeros((0, 3)),
  }
  dataset.write(tmp_path / "d", made, meta)
  read, read_meta = dataset.open(tmp_path / "d")
  assert_equal(made, read)
  assert set(read_meta) == set(meta) and read_meta["nested"] == meta["nested"]
  for name in ("ref_log_prob", "count", "empty"):
    np.testing.assert_array_equal(read_meta[name], meta[name])
    assert read_meta[name].dtype == meta[name].dtype and read_meta[name].shape == meta[name].shape
  assert os.listdir(tmp_path) == ["d"]


def test_what_is_read_cannot_be_changed_and_outlives_its_file(written):
  path, made = written
  read, _ = dataset.open(path)
  with pytest.raises(ValueError, match="read-only"):
    read[0].images[0] = 0
  dataset.write(path, episodes(seed=9))
  assert_equal(made, read)


def test_equal_content_gives_equal_bytes(tmp_path):
  for name, order in (("a", 1), ("b", -1)):
    meta = dict([("x", 1), ("y", np.arange(3))][::order])
    dataset.write(tmp_path / name, episodes(), meta)
  assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
  strided = [dataclasses.replace(e, images=np.asfortranarray(e.images)) for e in episodes()]
  dataset.write(tmp_path / "c", strided, {"x": 1, "y": np.arange(3)})
  assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_the_layout_is_the_documented_one(written):
  raw, made = written[0].read_bytes(), written[1]
  assert raw[:8] == b"STAREJAX" and int.from_bytes(raw[8:16], "little") == dataset.VERSION
  room = int.from_bytes(raw[16:24], "little")
  header = json.loads(raw[24 : 24 + room])
  assert header["bytes"] == len(raw) and header["meta"] == {"digest": "abc", "task": "push_cube"}
  assert raw[-32:] == hashlib.sha256(raw[:-32]).digest()
  entry = header["arrays"]["tokens"]
  assert entry["offset"] % 64 == 0 and entry["dtype"] == "<i4"
  flat = np.frombuffer(raw, "<i4", count=int(np.prod(entry["shape"])), offset=entry["offset"])
  np.testing.assert_array_equal(flat.reshape(entry["shape"]), np.concatenate([e.tokens for e in made]))


def test_a_headers_length_that_crosses_a_block_still_fits(tmp_path):
  for size in range(130):
    dataset.write(tmp_path / "d", episodes(1), {"x": "-" * size})
    assert dataset.open(tmp_path / "d")[1] == {"x": "-" * size}


def test_every_truncation_is_noticed(written):
  path, _ = written
  raw = path.read_bytes()
  for keep in {0, 5, 8, 20, 100, len(raw) // 2, len(raw) - 33, len(raw) - 1}:
    path.write_bytes(raw[:keep])
    with pytest.raises(dataset.DatasetError, match="truncated|not a stare_jax dataset|version"):
      dataset.open(path)
  path.write_bytes(raw + b"x")
  with pytest.raises(dataset.DatasetError, match=f"too long: {len(raw) + 1} bytes, its header says {len(raw)}"):
    dataset.open(path)


def test_every_flipped_byte_is_noticed(written):
  path, _ = written
  raw = path.read_bytes()
  for at in np.random.default_rng(0).integers(0, len(raw), 60):
    patch(path, at, bytes([raw[at] ^ 0x10]))
    with pytest.raises(dataset.DatasetError):
      dataset.open(path)
    patch(path, at, raw[at : at + 1])
  dataset.open(path)
  patch(path, len(raw) // 2, bytes([raw[len(raw) // 2] ^ 1]))
  with pytest.raises(dataset.DatasetError, match="damaged: SHA-256 .* delete it and rerun the phase"):
    dataset.open(path)


def test_another_version_other_signals_and_other_files_are_refused(written, monkeypatch):
  path, _ = written
  patch(path, 8, (7).to_bytes(8, "little"))
  with pytest.raises(dataset.DatasetError, match="dataset version 7, this program reads version 1"):
    dataset.open(path)
  patch(path, 8, (1).to_bytes(8, "little"))
  monkeypatch.setattr(dataset, "SIGNALS", {**dataset.SIGNALS, "qpos": (8,)})
  with pytest.raises(dataset.DatasetError, match=r"another signal table \(differs in \['qpos'\]\)"):
    dataset.open(path)
  path.write_bytes(b"PK\x03\x04" * 100)
  with pytest.raises(dataset.DatasetError, match="not a stare_jax dataset"):
    dataset.open(path)
  with pytest.raises(FileNotFoundError, match="run the phase that writes it first"):
    dataset.open(path.parent / "none")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("existing", [True, False])
def test_a_full_disk_loses_nothing(tmp_path, monkeypatch, existing, code):
  path = tmp_path / "d"
  before = episodes(2, seed=1)
  if existing:
    dataset.write(path, before)

  def full(handle):
    raise OSError(code, os.strerror(code))

  monkeypatch.setattr(dataset.os, "fsync", full)
  with pytest.raises(OSError, match="disk full: dataset .* needs .* MB.* nothing was left behind") as caught:
    dataset.write(path, episodes(5, size=40))
  assert caught.value.errno == code
  assert os.listdir(tmp_path) == (["d"] if existing else [])
  if existing:
    assert_equal(before, dataset.open(path)[0])


def test_a_write_that_stops_half_way_leaves_the_old_file(written, monkeypatch):
  path, made = written
  layout = dataset._layout

  def stops(header, arrays):
    yield from list(layout(header, arrays))[:5]
    raise KeyboardInterrupt

  monkeypatch.setattr(dataset, "_layout", stops)
  with pytest.raises(KeyboardInterrupt):
    dataset.write(path, episodes(seed=3))
  assert os.listdir(path.parent) == [path.name]
  assert_equal(made, dataset.open(path)[0])


def test_what_a_killed_write_left_behind_is_overwritten(written):
  path, made = written
  leftover = path.with_name(f".{path.name}.partial")
  shutil.copy(path, leftover)
  patch(leftover, 0, b"garbage")
  assert_equal(made, dataset.open(path)[0])
  dataset.write(path, made)
  assert os.listdir(path.parent) == [path.name]


def test_a_folder_that_cannot_be_made_says_so(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(OSError, match="could not be written .* Check the folder"):
    dataset.write(tmp_path / "file" / "d", episodes(1))


def test_bad_content_is_refused_before_writing(tmp_path):
  path, (first, second) = tmp_path / "d", episodes(2)
  with pytest.raises(ValueError, match="got no episodes"):
    dataset.write(path, [])
  with pytest.raises(ValueError, match="seed 1000000000001: images is uint8"):
    dataset.write(path, [first, dataclasses.replace(second, images=second.images[:, :-1])])
  with pytest.raises(ValueError, match="tokens is int64.*expected int32"):
    dataset.write(path, [dataclasses.replace(first, tokens=first.tokens.astype(np.int64))])
  with pytest.raises(ValueError, match="signals is float32"):
    dataset.write(path, [dataclasses.replace(first, signals=first.signals[1:])])
  for meta in ({"x": {1, 2}}, {"x": float("nan")}, {"x": [np.zeros(2)]}):
    with pytest.raises(TypeError, match="meta must be JSON values or numpy arrays"):
      dataset.write(path, [first], meta)
  with pytest.raises(TypeError, match="expected bool, integer or float"):
    dataset.write(path, [first], {"x": np.array(["text"])})
  assert os.listdir(tmp_path) == []
