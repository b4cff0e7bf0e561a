"""Checkpoints: whole or not at all, on any mesh, and never silently the wrong one."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import pytest
import small_model

from stare_jax import checkpoint, sharding, train

pytestmark = pytest.mark.usefixtures("quick_compile")

CONFIG = {"seed": 3, "interaction": {"clip": 0.2, "betas": (0.9, 0.99)}, "task": "pull_cube"}


@pytest.fixture(scope="module")
def tx():
  return train.make_optimizer(learning_rate=1e-2)


def train_state(tx, mesh=None):
  return small_model.state(tx, mesh)


def everything(state):
  """All kinds of leaves that a run is made of."""
  return {
    "train": state,
    "key": jax.random.key(7),
    "old_key": jax.random.PRNGKey(8),
    "cursor": np.array([2, 17]),
    "epoch": 4,
    "best": 0.25,
    "done": True,
    "empty": np.zeros((0, 3), np.float32),
    "half": jnp.arange(4, dtype=jnp.bfloat16),
  }


def small(value=0.0):
  return {"w": np.full(5, value, np.float32)}


def same(a, b):
  unwrap = lambda x: jax.random.key_data(x) if checkpoint._is_key(x) else x
  chex.assert_trees_all_equal(jax.tree.map(unwrap, a), jax.tree.map(unwrap, b))
  assert [type(x) for x in jax.tree.leaves(a)] == [type(x) for x in jax.tree.leaves(b)]
  dtypes = lambda tree: [getattr(x, "dtype", None) for x in jax.tree.leaves(tree)]
  assert dtypes(a) == dtypes(b)


# Round trips -----------------------------------------------------------------------------------------------


def test_everything_comes_back(tmp_path, tx):
  state = everything(train_state(tx))
  meta = {"phase": "imitation", "iteration": 12, "seeds": np.arange(3), "nested": {"rate": np.float32(0.5)}}
  folder = checkpoint.save(tmp_path / "run", 12, state, meta, config=CONFIG)
  assert folder == tmp_path / "run" / "00000012" and folder.is_dir()
  checkpoint.check_config(tmp_path / "run", CONFIG)
  restored, told = checkpoint.restore(tmp_path / "run", state)
  same(restored, state)
  assert told == {"phase": "imitation", "iteration": 12, "seeds": [0, 1, 2], "nested": {"rate": 0.5}}
  assert checkpoint.read_meta(tmp_path / "run") == told
  assert checkpoint.read_config(tmp_path / "run")["interaction.betas"] == [0.9, 0.99]
  assert jax.random.bits(restored["key"]) == jax.random.bits(state["key"])


def test_restored_state_trains_on_without_a_trace(tmp_path, tx, rng):
  """Bit for bit the run that never stopped, and the compiled update takes what comes back as it is."""
  mesh = sharding.make_mesh({"data": 1}, jax.devices()[:1])
  update = train.make_update(small_model.loss_fn, tx, mesh=mesh, param_axes=small_model.PARAM_AXES)
  batches = [sharding.put(small_model.batch(rng), mesh) for _ in range(4)]
  state = train_state(tx, mesh)
  for i, batch in enumerate(batches):
    if i == 2:
      checkpoint.save(tmp_path, i, state)
    state, _ = update(state, batch)
  abstract = train.abstract_state(state.params, tx, mesh=mesh, param_axes=small_model.PARAM_AXES)
  again, _ = checkpoint.restore(tmp_path, abstract)
  for batch in batches[2:]:
    again, _ = update(again, batch)
  same(jax.device_get(again), jax.device_get(state))
  assert checkpoint.params_sha256(again.params) == checkpoint.params_sha256(state.params)
  assert update.traces == 1 and update._compiled._cache_size() == 1


def test_part_of_a_checkpoint(tmp_path, tx):
  """The next phase takes the parameters and leaves the optimiser."""
  state = train_state(tx)
  checkpoint.save(tmp_path, 1, state)
  part, _ = checkpoint.restore(tmp_path, {"params": state.params}, partial=True)
  same(part["params"], state.params)
  with pytest.raises(checkpoint.CheckpointError, match=r"it lacks \[\], and has \['step'.*besides"):
    checkpoint.restore(tmp_path, {"params": state.params})


def test_large_arrays_are_stored_layer_by_layer(tmp_path, monkeypatch):
  """Orbax would cut across all layers, and then holds copies of 9 GB of 7B's parameters instead of 5."""
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1 << 10)
  monkeypatch.setattr(checkpoint, "FETCHED_BYTES", 0)
  wide = np.arange(8 * 4 * 64, dtype=np.float32).reshape(8, 4, 64)  # 8 KB, widest in the last axis
  state = {"wide": jnp.asarray(wide), "long": jnp.ones((512, 4)), "small": jnp.ones(3), "step": 7}
  folder = checkpoint.save(tmp_path, 0, state)
  (stored,) = (folder / checkpoint.STATE / "array_metadatas").iterdir()
  chunks = {x["array_metadata"]["param_name"]: x["array_metadata"]["chunk_shape"] for x in
            json.loads(stored.read_text())["array_metadatas"]}  # fmt: skip
  assert chunks == {"wide": [1, 4, 64], "long": [64, 4], "small": [3]}  # not 512 chunks of one row
  np.testing.assert_array_equal(checkpoint.restore(tmp_path, state)[0]["wide"], wide)


def test_digest_is_of_names_shapes_and_bytes():
  params = {"b": {"w": np.ones((2, 3), np.float32)}, "a": np.zeros(4, np.float32)}
  digest = checkpoint.params_sha256(params)
  assert digest == checkpoint.params_sha256(jax.device_put({"a": params["a"], "b": params["b"]}))
  assert len(digest) == 64
  others = [
    {"b": {"w": np.ones((3, 2), np.float32)}, "a": params["a"]},
    {"b": {"v": params["b"]["w"]}, "a": params["a"]},
    {"b": {"w": np.nextafter(params["b"]["w"], np.float32(2))}, "a": params["a"]},
    {"b": params["b"], "a": params["a"].astype(np.float16)},
  ]
  assert digest not in {checkpoint.params_sha256(other) for other in others}


@pytest.mark.parametrize("limit", [1, 100, 300])
def test_a_digest_needs_no_array_whole(monkeypatch, limit):
  """Parts of rows, of which the last is shorter, from arrays that are cut along any axis: the same digest."""
  params = {"up": np.arange(7 * 4 * 6, dtype=np.float32).reshape(7, 4, 6), "table": np.ones((10, 6), np.float16)}
  digest = checkpoint.params_sha256(params)
  rules = ((r"up", ("embed", "mlp")), (r"table", ("vocab", "embed")))
  mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
  fetched = []

  def parts(x, real=checkpoint._parts):
    for part in real(x):
      fetched.append((part.nbytes, x[:1].nbytes))
      yield part

  monkeypatch.setattr(checkpoint, "HASHED_BYTES", limit)
  monkeypatch.setattr(checkpoint, "_parts", parts)
  for placed in (jax.device_put(params), jax.device_put(params, sharding.shardings(params, rules, mesh))):
    assert checkpoint.params_sha256(placed) == digest
  assert len(fetched) > 4 and all(size <= max(limit, row) for size, row in fetched)


# Keeping and replacing -------------------------------------------------------------------------------------


def test_the_newest_stay(tmp_path):
  assert checkpoint.latest(tmp_path / "none") is None and checkpoint.steps(tmp_path) == []
  for step in (1, 2, 10, 9):
    checkpoint.save(tmp_path, step, small(step), keep=3)
  assert checkpoint.steps(tmp_path) == [2, 9, 10] and checkpoint.latest(tmp_path) == 10
  checkpoint.save(tmp_path, 11, small(), keep=None)
  assert checkpoint.steps(tmp_path) == [2, 9, 10, 11]
  assert checkpoint.restore(tmp_path, small(), 9)[0]["w"][0] == 9.0
  assert sorted(p.name for p in tmp_path.iterdir()) == ["00000002", "00000009", "00000010", "00000011"]


def test_the_same_step_is_replaced_whole(tmp_path, monkeypatch):
  checkpoint.save(tmp_path, 5, small(1.0), keep=1)
  checkpoint.save(tmp_path, 5, small(2.0), keep=1)
  assert checkpoint.restore(tmp_path, small())[0]["w"][0] == 2.0
  # Killed between the two renames: the old one waits under another name and comes back.
  (tmp_path / "00000005").rename(tmp_path / ".old-00000005")
  assert checkpoint.latest(tmp_path) == 5
  assert checkpoint.restore(tmp_path, small())[0]["w"][0] == 2.0


def test_an_unfinished_one_is_not_there(tmp_path):
  checkpoint.save(tmp_path, 1, small(1.0))
  shutil.copytree(tmp_path / "00000001", tmp_path / ".tmp-00000002")
  assert checkpoint.steps(tmp_path) == [1]
  checkpoint.save(tmp_path, 3, small(3.0))
  assert not list(tmp_path.glob(".tmp-*")), "what a killed process left is swept"


WRITER = """
import sys
import numpy as np
from stare_jax import checkpoint
for step in range(1, 10_000):
  state = {f"w{i}": np.full(20_000, step, np.float32) for i in range(8)}
  checkpoint.save(sys.argv[1], step, state, {"step": step}, keep=2)
  print(step, flush=True)
"""


@pytest.mark.parametrize("kill_after", [0.0, 0.013, 0.031, 0.047])
def test_kill_leaves_a_whole_checkpoint(tmp_path, root, kill_after):
  """kill -9 somewhere inside a save: the newest complete checkpoint is whole and recent, and the next save works."""
  env = {**os.environ, "PYTHONPATH": str(root)}
  with subprocess.Popen(
    [sys.executable, "-c", WRITER, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True
  ) as writer:
    told = [int(writer.stdout.readline()) for _ in range(2)][-1]
    time.sleep(kill_after)
    writer.send_signal(signal.SIGKILL)
    told = max([told, *map(int, writer.stdout.read().split())])
  newest = checkpoint.latest(tmp_path)
  assert newest in (told, told + 1)  # reported after the rename, perhaps killed between the two
  abstract = {f"w{i}": np.zeros(20_000, np.float32) for i in range(8)}
  for step in checkpoint.steps(tmp_path):
    state, meta = checkpoint.restore(tmp_path, abstract, step)
    assert meta == {"step": step} and all((x == step).all() for x in state.values())
  checkpoint.save(tmp_path, newest + 1, abstract, keep=2)
  assert checkpoint.latest(tmp_path) == newest + 1


# Errors ----------------------------------------------------------------------------------------------------


def test_missing(tmp_path):
  with pytest.raises(checkpoint.CheckpointError, match="no checkpoint in .*; run the phase that writes it"):
    checkpoint.restore(tmp_path / "none", small())
  checkpoint.save(tmp_path, 4, small())
  with pytest.raises(checkpoint.CheckpointError, match=r"no checkpoint of step 7 in .*; there are \[4\]"):
    checkpoint.restore(tmp_path, small(), 7)


def test_another_configuration_names_the_keys(tmp_path):
  checkpoint.save(tmp_path, 1, small(), config=CONFIG)
  other = {"seed": 3, "interaction": {"clip": 0.1, "betas": (0.9, 0.99), "gamma": 1.0}, "task": "stack_cube"}
  with pytest.raises(checkpoint.ConfigMismatchError) as error:
    checkpoint.check_config(tmp_path, other)
  message = str(error.value)
  assert "interaction.clip: 0.2 there, 0.1 now" in message
  assert "interaction.gamma: absent there, 1.0 now" in message
  assert "task: 'pull_cube' there, 'stack_cube' now" in message
  assert "seed" not in message and "--workdir" in message
  checkpoint.check_config(tmp_path, other, ignore=("interaction.", "task"))  # such as what changes no number


def test_configurations_compare_by_value(tmp_path):
  """A ConfigDict, in another order, with lists for tuples, is the same configuration."""
  again = ml_collections.ConfigDict(
    {"task": "pull_cube", "interaction": {"betas": [0.9, 0.99], "clip": 0.2}, "seed": 3}
  )
  assert checkpoint.config_digest(CONFIG) == checkpoint.config_digest(again)
  assert checkpoint.config_digest(CONFIG) != checkpoint.config_digest({**CONFIG, "seed": 4})
  checkpoint.save(tmp_path, 1, small(), config=CONFIG)
  checkpoint.check_config(tmp_path, again)


def largest(folder):
  return max((p for p in (folder / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def truncate(folder):
  path = largest(folder)
  path.write_bytes(path.read_bytes()[:-3])
  return f"{path.relative_to(folder)} has .* bytes instead of"


def flip(folder):
  path = largest(folder)
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)
  return "has other contents than were written"


def lose(folder):
  path = largest(folder)
  path.unlink()
  return f"{path.relative_to(folder)} is missing"


def behead(folder):
  (folder / "checkpoint.json").unlink()
  return "is incomplete: checkpoint.json is missing or unreadable"


def halve_head(folder):
  path = folder / "checkpoint.json"
  path.write_text(path.read_text()[:100])
  return "is incomplete: checkpoint.json is missing or unreadable"


@pytest.mark.parametrize("damage", [truncate, flip, lose, behead, halve_head])
def test_damage_is_found_and_the_one_before_named(tmp_path, damage):
  for step in (1, 2):
    checkpoint.save(tmp_path, step, {"w": np.arange(3000, dtype=np.float32)})
  abstract = {"w": np.zeros(3000, np.float32)}
  message = damage(tmp_path / "00000002")
  with pytest.raises(checkpoint.CheckpointError, match=f"{message}.*remove it and run again: step 1 takes its place"):
    checkpoint.restore(tmp_path, abstract)
  checkpoint.restore(tmp_path, abstract, 1)
  shutil.rmtree(tmp_path / "00000001")
  with pytest.raises(checkpoint.CheckpointError, match="no other checkpoint here: remove it and start again"):
    checkpoint.restore(tmp_path, abstract)


def test_a_hole_in_a_large_file_is_found(tmp_path, monkeypatch):
  for name, value in (("CHECKED_BYTES", 1000), ("BLOCK", 256), ("SAMPLED", 4)):
    monkeypatch.setattr(checkpoint, name, value)
  state = {"w": np.arange(1, 3001, dtype=np.float32)}
  path = largest(checkpoint.save(tmp_path, 1, state))
  whole = path.read_bytes()
  checkpoint.restore(tmp_path, state)
  for at in range(0, len(whole) - 1024, 512):
    path.write_bytes(whole[:at] + bytes(1024) + whole[at + 1024 :])
    with pytest.raises(checkpoint.CheckpointError, match="has other contents than were written"):
      checkpoint.restore(tmp_path, state)


def test_another_format_or_model(tmp_path):
  folder = checkpoint.save(tmp_path, 1, small())
  with pytest.raises(checkpoint.CheckpointError, match=r"w is float32\[5\], this run expects float32\[6\]"):
    checkpoint.restore(tmp_path, {"w": np.zeros(6, np.float32)})
  with pytest.raises(checkpoint.CheckpointError, match=r"it lacks \['v'\], and has \['w'\] besides"):
    checkpoint.restore(tmp_path, {"v": np.zeros(5, np.float32)})
  head = json.loads((folder / "checkpoint.json").read_text())
  (folder / "checkpoint.json").write_text(json.dumps(head | {"format": 99}))
  with pytest.raises(checkpoint.CheckpointError, match="has format 99, this version reads 1; use the version that"):
    checkpoint.restore(tmp_path, small())


def orbax_error():
  return ValueError("RESOURCE_EXHAUSTED: Error writing /x/d/1f: [OS error 28: ENOSPC No space left on device]")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), orbax_error()])
def test_full_disk_loses_nothing(tmp_path, monkeypatch, failure):
  checkpoint.save(tmp_path, 1, small(1.0))

  def fail(self, directory, *args, **kwargs):
    pathlib.Path(directory).mkdir()
    (pathlib.Path(directory) / "part").write_bytes(b"some")
    raise failure

  with monkeypatch.context() as patch:
    patch.setattr(ocp.Checkpointer, "save", fail)
    with pytest.raises(checkpoint.CheckpointError, match="disk full: checkpoint 2 needs .*step 1 is complete"):
      checkpoint.save(tmp_path, 2, small(2.0))
  assert [p.name for p in tmp_path.iterdir()] == ["00000001"], "the half is removed"
  assert checkpoint.restore(tmp_path, small())[0]["w"][0] == 1.0
  checkpoint.save(tmp_path, 2, small(2.0))


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
  usage = shutil.disk_usage(tmp_path)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
  with pytest.raises(checkpoint.CheckpointError, match="disk full.*there is no earlier one.*--workdir on another disk"):
    checkpoint.save(tmp_path, 1, small())
  assert list(tmp_path.iterdir()) == []


def test_other_failures_pass_through_and_leave_nothing(tmp_path, monkeypatch):
  def fail(*args, **kwargs):
    raise KeyboardInterrupt

  monkeypatch.setattr(checkpoint, "_commit", fail)
  with pytest.raises(KeyboardInterrupt):
    checkpoint.save(tmp_path, 1, small())
  assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_stored_is_refused_before_writing(tmp_path):
  with pytest.raises(TypeError, match="state name: str is not numeric; put it into meta"):
    checkpoint.save(tmp_path, 1, {"name": "pull_cube"})
  with pytest.raises(TypeError, match="checkpoint meta: set is not JSON"):
    checkpoint.save(tmp_path, 1, small(), {"seeds": {1, 2}})
  with pytest.raises(ValueError, match="two leaves have one path"):
    checkpoint.save(tmp_path, 1, {"a/b": np.ones(1), "a": {"b": np.ones(1)}})
  assert list(tmp_path.iterdir()) == []
