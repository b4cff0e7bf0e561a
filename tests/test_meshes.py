"""One run, whatever the mesh: what start-up says of it, its actions, and its checkpoints on every other mesh."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from meshes import MESHES, mesh_of, quick_compile  # noqa: F401 - a fixture of every test here

from stare_jax import checkpoint, pipeline_policy, policies, sharding, train, train_critic
from stare_jax.losses import ops
from stare_jax.policies import lora, openvla


def equal(a, b):
  """The same numbers to the last bit, whatever holds them."""
  bits = lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes())
  assert jax.tree.structure(a) == jax.tree.structure(b)
  assert list(map(bits, jax.tree.leaves(a))) == list(map(bits, jax.tree.leaves(b)))


# What start-up says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainable", [None, lambda path: path.startswith(("head", "value"))], ids=["all", "heads"])
@pytest.mark.parametrize("name", ["one", "fsdp", "mixed"])
def test_the_table_of_a_run_counts_what_lies_on_a_device(name, trainable):
  """Parameters, moments and critic against the buffers of a state that is there."""
  mesh, tx = mesh_of(name), train.make_optimizer(learning_rate=1e-3)
  policy = types.SimpleNamespace(param_axes=small_model.PARAM_AXES, trainable=trainable)
  critic = train_critic.init(jax.random.key(1), 4000)
  params = {  # of MiB, which the table shows tenths of
    "embed": {"table": jnp.zeros((2048, 512))}, "layers": {"up": {"bias": jnp.zeros((2, 1 << 17))}},
    "head": {"kernel": jnp.zeros((512, 4096))}, "value": {"kernel": jnp.zeros((1 << 17, 4))},
  }  # fmt: skip
  state = train.new_state(params, tx, mesh=mesh, param_axes=policy.param_axes, critic=critic, trainable=trainable)
  text = pipeline_policy.table(policy, params, mesh, tx, critic)
  device = mesh.devices.flat[0]

  def here(tree):
    leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
    return sum(x.size for x in leaves), sum(s.data.nbytes for x in leaves for s in x.addressable_shards
                                            if s.device == device)  # fmt: skip

  total = 0
  for label, tree in {"parameters": state.params, "moments": state.opt, "critic": state.critic}.items():
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    count, size = here(tree)
    assert size > 2**20 and f" {count:,} in " in line and f"; {size / 2**20:,.1f} MiB on each device" in line
    total += size
  assert f"  value head {here(state.params['value'])[0]:,} in 2.0 MiB; 2.0 MiB on each device" in text
  assert f"together     {total / 2**20:,.1f} MiB on each device" in text
  assert here(state.opt)[0] == 2 * sum(x.size for x in jax.tree.leaves(train.split(state.params, trainable)[0]))
  whole = {
    label: sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim and x.sharding.is_fully_replicated)
    for label, tree in {"parameters": state.params, "moments": state.opt, "critic": state.critic}.items()
  }
  told = re.findall(r"([\d.]+) MiB \(([\d.]+) %\) of the (\w+)", text)
  assert told == ([] if name == "one" else [
    (f"{size / 2**20:.2f}", f"{100 * size / sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim):.1f}", label)
    for (label, size), tree in zip(whole.items(), (state.params, state.opt, state.critic), strict=True)
  ])  # fmt: skip
  assert ("the rest is frozen" in text) == (trainable is not None)


# Actions ---------------------------------------------------------------------------------------------------

STATS = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.arange(7) < 6)
NANO = dict(
  image_size=8, patch_size=4, dino=dict(width=8, head_size=4, mlp=12), siglip=dict(width=8, head_size=4, mlp=16),
  projector=16, llm_width=16, llm_head_size=8, llm_depth=2, llm_mlp=24, value_hidden=(8, 8), unroll=False,
)  # fmt: skip


@functools.cache
def nano():
  """(policy, parameters that leave no zeros and ones to hide behind)."""
  policy = policies.make(name="openvla", size="tiny", stats=STATS, **NANO)
  rng = np.random.default_rng(0)
  draw = lambda spec: np.float32(spec.fill + rng.normal(0, (spec.std or 0) + 0.2, spec.shape))
  return policy, jax.tree.map(draw, openvla.specs(policy.config), is_leaf=lambda x: isinstance(x, openvla.Spec))


@functools.cache
def actions(name):
  """Sampled and most likely actions of eight rows, the parameters cut by their rules and the rows over the mesh."""
  policy, params = nano()
  mesh = None if name is None else mesh_of(name)
  rng = np.random.default_rng(3)
  obs = policy.encode(rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), ["pull the cube", "push the red cube"] * 4)
  keys = sharding.put(np.asarray(jax.random.key_data(jax.random.split(jax.random.key(5), 8))), mesh)
  placed = jax.device_put(params, None if mesh is None else sharding.shardings(params, policy.param_axes, mesh))

  @jax.jit
  def act(params, obs, keys, temperature):
    with sharding.activations(mesh):
      return policy.act(params, obs, keys, temperature)

  out = [act(placed, sharding.put(obs, mesh), keys, jnp.float32(temperature)) for temperature in (0.7, 0.0)]
  return placed, jax.device_get(out)


@pytest.mark.parametrize("name", ["fsdp", "tensor", "mixed"])
def test_actions_on_every_mesh_are_those_of_one_device(name):
  """Tokens to the bit, log-probs and value to rounding; with no parameter whole that its rule cuts."""
  placed, found = actions(name)
  _, expected = actions(None)
  cut = [x for x in jax.tree.leaves(placed) if not x.sharding.is_fully_replicated]
  assert sum(x.size for x in cut) > 0.8 * sum(x.size for x in jax.tree.leaves(placed))
  for ours, alone in zip(found, expected, strict=True):
    np.testing.assert_array_equal(ours.tokens, alone.tokens)
    np.testing.assert_allclose(ours.log_prob, alone.log_prob, atol=2e-5)
    np.testing.assert_allclose(ours.value, alone.value, rtol=1e-4, atol=1e-5)
  sampled, greedy = expected
  assert np.any(sampled.tokens != greedy.tokens) and len(np.unique(greedy.tokens)) > 6  # something to get wrong
  assert np.all(sampled.log_prob < -0.1) and np.ptp(sampled.value) > 0.01


# Checkpoints -----------------------------------------------------------------------------------------------

TX = train.make_optimizer(learning_rate=3e-2, warmup_steps=2, weight_decay=0.1)
BEFORE, AFTER = 3, 2  # updates before and after a checkpoint


@functools.cache
def update_of(name):
  return train.make_update(small_model.loss_fn, TX, mesh=mesh_of(name), param_axes=small_model.PARAM_AXES)


def go_on(name, state, first, count):
  """(state, what each of `count` updates said), on the batches from number `first` on."""
  told = []
  for i in range(first, first + count):
    batch = small_model.batch(np.random.default_rng([11, i]))
    state, metrics = update_of(name)(state, sharding.put(batch, mesh_of(name)))
    told.append(train.fetch(metrics, state.params))
  return state, told


def abstract(name):
  """Of a state with a critic, on a mesh."""
  params = jax.eval_shape(small_model.init, jax.random.key(0))
  critic = jax.eval_shape(functools.partial(train_critic.init, features=5), jax.random.key(1))
  return train.abstract_state(params, TX, mesh=mesh_of(name), param_axes=small_model.PARAM_AXES, critic=critic)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(folder, state, metrics of the updates that follow) by the mesh that wrote it; moments and counters are not 0."""

  @functools.cache
  def of(name):
    params, critic = jax.jit(small_model.init)(jax.random.key(0)), train_critic.init(jax.random.key(1), 5)
    state = train.new_state(params, TX, mesh=mesh_of(name), param_axes=small_model.PARAM_AXES, critic=critic)
    state, _ = go_on(name, state, 0, BEFORE)
    state = train.set_learning_rate_scale(state, 0.7)
    folder = tmp_path_factory.mktemp(name)
    with pytest.MonkeyPatch.context() as patch:
      if name != "tensor":  # as a large state is written: from its devices, each its pieces
        patch.setattr(checkpoint, "FETCHED_BYTES", 0)
      checkpoint.save(folder, BEFORE, state)
    kept = jax.device_get(state)
    return folder, kept, go_on(name, state, BEFORE, AFTER)[1]

  return of


PAIRS = [(a, b) for a in MESHES for b in MESHES]


@pytest.mark.parametrize("there, here", PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_a_state_restored_onto_another_mesh_goes_on_as_before(saved, there, here):
  """Parameters, moments, counters, critic: bit for bit, each where this mesh's rules say; then the same losses."""
  folder, state, expected = saved(there)
  restored, _ = checkpoint.restore(folder, abstract(here))
  equal(jax.device_get(restored), state)
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, abstract(here))
  assert checkpoint.params_sha256(restored.params) == checkpoint.params_sha256(state.params)
  assert all(np.any(x) for x in jax.tree.leaves((state.opt, state.params)) if x.ndim) and state.step == BEFORE
  assert train.learning_rate_scale(restored) == np.float32(0.7)
  _, told = go_on(here, restored, BEFORE, AFTER)
  for ours, theirs in zip(told, expected, strict=True):
    assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6) if there != here else ours == theirs
  assert update_of(here).traces == 1


PROCESS = """
import sys
import jax
jax.config.update("jax_disable_most_optimizations", True)
import json
from stare_jax import checkpoint
from tests import test_meshes
folder, name, first = sys.argv[1], sys.argv[2], int(sys.argv[3])
assert jax.device_count() == test_meshes.mesh_of(name).size
state, _ = checkpoint.restore(folder, test_meshes.abstract(name))
state, told = test_meshes.go_on(name, state, first, 1)
checkpoint.save(folder, first + 1, state)
print(json.dumps(told))
"""


@pytest.mark.slow
def test_a_run_moves_from_eight_devices_to_four_to_one_and_back(tmp_path, root, saved):
  """Each in a process that has no more devices than that."""
  folder, _, expected = saved("mixed")
  state, _ = checkpoint.restore(folder, abstract("mixed"))
  checkpoint.save(tmp_path, BEFORE, state)
  told = []
  for i, (name, devices) in enumerate({"fsdp": 4, "one": 1}.items()):
    env = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu",
           "PYTHONPATH": f"{root}:{root / 'tests'}"}  # fmt: skip
    command = [sys.executable, "-c", PROCESS, str(tmp_path), name, str(BEFORE + i)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told += json.loads(done.stdout.splitlines()[-1])
  for ours, theirs in zip(told, expected, strict=True):
    assert ours == pytest.approx(theirs, rel=2e-5, abs=1e-6)
  back, _ = checkpoint.restore(tmp_path, abstract("mixed"))
  stayed, _ = go_on("mixed", state, BEFORE, AFTER)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
  jax.tree.map(close, jax.device_get(back), jax.device_get(stayed))


@functools.cache
def adapted():
  """(policy with adapters, its parameters, an optimiser)."""
  policy, params = nano()
  wrapped = lora.wrap(policy, lora.make(policy.config, rank=2))
  shapes = jax.eval_shape(wrapped.init, jax.random.key(0))
  draw = lambda s: 0.3 * np.cos(17.3 * np.arange(s.size, dtype=np.float32)).reshape(s.shape).astype(s.dtype)
  params = {**jax.tree.map(draw, shapes), "base": {k: v for k, v in params.items() if k != "value"}}
  return wrapped, params, train.make_optimizer(learning_rate=1e-2, value_lr_scale=2.0)


def adapter_state(name):
  """With moments as after some updates: 0 nowhere."""
  wrapped, params, tx = adapted()
  mesh = mesh_of(name)
  abstract = train.abstract_state(params, tx, mesh=mesh, param_axes=wrapped.param_axes, trainable=wrapped.trainable)
  count = iter(range(1, 10_000))
  fill = lambda s: np.asarray(np.sin(next(count) + 3.1 * np.arange(s.size)) + 2).reshape(s.shape).astype(s.dtype)
  state = dataclasses.replace(abstract, step=np.int32(7), params=params, opt=jax.tree.map(fill, abstract.opt))
  return abstract, sharding.place(state, jax.tree.map(lambda x: x.sharding, abstract))


@pytest.mark.parametrize("there, here, whole", [
  ("fsdp", "tensor", True), ("mixed", "one", True),
  ("fsdp", "tensor", False), ("tensor", "mixed", False), ("mixed", "one", False), ("one", "fsdp", False),
])  # fmt: skip
def test_adapters_and_their_moments_restore_onto_another_mesh(tmp_path, monkeypatch, there, here, whole):
  """A checkpoint that holds all, and one that leaves the base to `policy.checkpoint`."""
  monkeypatch.setattr(checkpoint, "FETCHED_BYTES", 0)
  wrapped, *_ = adapted()
  part = lambda state: state if whole else train.split_state(state, wrapped.trainable)[0]
  _, state = adapter_state(there)
  wanted, _ = adapter_state(here)
  checkpoint.save(tmp_path, 7, part(state))
  restored, _ = checkpoint.restore(tmp_path, part(wanted))
  equal(jax.device_get(restored), jax.device_get(part(state)))
  assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, part(wanted))
  assert ("base" in str([*checkpoint.read_leaves(tmp_path)])) == whole
  assert here == "one" or not all(x.sharding.is_fully_replicated for x in jax.tree.leaves(restored.opt))


@pytest.mark.slow
def test_adapters_go_on_with_the_same_losses_on_another_mesh(tmp_path):
  wrapped, params, tx = adapted()
  rng = np.random.default_rng(2)
  obs = wrapped.encode(rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), ["pull the cube"] * 8)
  batches = [{"obs": obs, "tokens": rng.integers(0, 256, (8, 7), dtype=np.int32)} for _ in range(3)]

  def loss_fn(params, batch):
    out = wrapped.apply(params, batch["obs"], batch["tokens"])
    nll = -jnp.sum(ops.token_log_prob(out.logits, batch["tokens"]), axis=-1)
    return ops.Mean.of(nll + jnp.square(out.value), jnp.ones(nll.shape, bool)), {}

  def on(name, state, batches):
    where = dict(mesh=mesh_of(name), param_axes=wrapped.param_axes, trainable=wrapped.trainable)
    update, told = train.make_update(loss_fn, tx, **where), []
    for batch in batches:
      state, metrics = update(state, sharding.put(batch, mesh_of(name)))
      told.append(train.fetch(metrics, state.params, wrapped.trainable))
    return state, told

  at = lambda name: dict(mesh=mesh_of(name), param_axes=wrapped.param_axes, trainable=wrapped.trainable)
  state, _ = on("fsdp", train.new_state(params, tx, **at("fsdp")), batches[:1])
  checkpoint.save(tmp_path, 1, state)
  _, expected = on("fsdp", state, batches[1:])
  for name in ("tensor", "mixed", "one"):
    restored, _ = checkpoint.restore(tmp_path, train.abstract_state(params, tx, **at(name)))
    _, told = on(name, restored, batches[1:])
    for ours, theirs in zip(told, expected, strict=True):
      assert ours == pytest.approx(theirs, rel=1e-4)
