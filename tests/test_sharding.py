"""Sharding: the same loss and gradient on every mesh as on one device, and errors before devices are touched."""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys

import chex
import inspecting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from jax.sharding import PartitionSpec as P
from meshes import MESHES, mesh_of, quick_compile  # noqa: F401 - a fixture of every test here

from stare_jax import checkpoint, policies, rollout, roofline_hlo, sharding, train, train_preference
from stare_jax.losses import ops, preference
from stare_jax.policies import lora

SGD = optax.sgd(1.0)
@functools.cache
def parameters():
  return jax.device_get(jax.jit(small_model.init)(jax.random.key(0)))


def stage_kernel(log_ratio, batch):
  p = batch.pairs
  return preference.stage_tpo(log_ratio, p["stage_id"], p["cost"], p["sign"], beta=0.7, cost_weight=0.3)


def shapes(**sizes):
  return {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in sizes.items()}


# The mesh --------------------------------------------------------------------------------------------------


def test_mesh_takes_the_rest():
  assert dict(sharding.make_mesh().shape) == {"data": 8, "fsdp": 1, "tensor": 1}
  assert dict(sharding.make_mesh({"data": 1, "fsdp": -1, "tensor": 2}).shape) == {"data": 1, "fsdp": 4, "tensor": 2}
  assert sharding.make_mesh({"data": -1}, jax.devices()[:1]).size == 1


@pytest.mark.parametrize("sizes, message", [
  (dict(data=3), "needs 3 devices, this machine shows 8; change config.mesh"),
  (dict(data=-1, tensor=3), "needs a multiple of 3 devices, this machine shows 8"),
  (dict(data=-1, fsdp=-1), "only one axis may be -1"),
  (dict(data=0), "must be a positive device count"),
  (dict(model=2), r"unknown axes \['model'\]; the axes are \['data', 'fsdp', 'tensor'\]"),
])
def test_meshes_that_cannot_be(sizes, message):
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(sizes)


# The table of rules ----------------------------------------------------------------------------------------


def test_rules_become_specs():
  mesh = mesh_of("mixed")
  specs = jax.tree.map(lambda s: s.spec, sharding.shardings(parameters(), small_model.PARAM_AXES, mesh))
  assert specs == {
    "embed": {"table": P("tensor", "fsdp")},
    "layers": {"mlp": {
      "up": {"kernel": P(None, "fsdp", "tensor"), "bias": P()},  # words name the last axes: layers are not cut
      "down": {"kernel": P(None, "tensor", "fsdp")},
    }},
    "head": {"kernel": P("fsdp", "tensor")},
    "value": {"kernel": P()},
  }


def test_moments_follow_their_parameter_and_counters_are_replicated():
  mesh = mesh_of("mixed")
  tx = train.make_optimizer(learning_rate=1e-3)
  state = train.abstract_state(parameters(), tx, mesh=mesh, param_axes=small_model.PARAM_AXES)
  specs = {sharding.path_name(p): x.sharding.spec for p, x in jax.tree_util.tree_leaves_with_path(state.opt)}
  follows = {path: spec for path, spec in specs.items() if re.search(r"(mu|nu)/head/kernel", path)}
  assert len(follows) == 2 and set(follows.values()) == {P("fsdp", "tensor")}
  assert {spec for path, spec in specs.items() if "/mu/" not in path and "/nu/" not in path} == {P()}


def test_an_array_of_the_optimiser_that_follows_no_parameter_is_named():
  """Of another shape than its parameter, as factored moments are; counters of any depth stay replicated."""
  mesh, params = mesh_of("mixed"), shapes(w=(8, 8), b=(8,))
  places = sharding.shardings(params, ((r"w", ("embed", "mlp")), (r"b", (None,))), mesh)
  state = {"count": jax.ShapeDtypeStruct((), np.int32), "mu": params}
  found = sharding.like_params(state, params, places, mesh)
  assert found == {"count": sharding.replicated(mesh), "mu": places}
  with pytest.raises(ValueError, match=r"no sharding rule for row/w \(8,\) of the optimiser's state.*like_params"):
    sharding.like_params({**state, "row": shapes(w=(8,))}, params, places, mesh)
  with pytest.raises(ValueError, match=r"no sharding rule for 1/noise \(8, 8\)"):
    sharding.like_params((state, shapes(noise=(8, 8))), params, places, mesh)


@pytest.mark.parametrize("params, axes, message", [
  (shapes(odd=(3,)), (), r"no sharding rule for odd \(3,\); add one line to PARAM_AXES, such as .*\(None,\)"),
  (shapes(w=(8, 8)), ((r"w", ("embed", "wings")),), r"w: unknown words \['wings'\]; the words are \['embed', "),
  (shapes(w=(8,)), ((r"w", ("batch",)),), "unknown words"),
  (shapes(w=(8,)), ((r"w", ("embed", "mlp")),), r"rule of w \(8,\): 2 words .* for 1 axes"),
  (shapes(w=(7, 8)), ((r"w", ("embed", None)),), r"an axis of 7 does not divide over 2 fsdp devices; change config"),
])
def test_rules_that_cannot_be(params, axes, message):
  with pytest.raises(ValueError, match=message):
    sharding.shardings(params, axes, mesh_of("mixed"))


def test_first_rule_wins_and_a_table_is_optional():
  mesh = mesh_of("fsdp")
  axes = ((r"w", (None, "embed")), (r".*", ("embed", None)))
  assert sharding.shardings(shapes(w=(8, 8)), axes, mesh)["w"].spec == P(None, "fsdp")
  assert sharding.shardings(shapes(w=(7, 8)), None, mesh)["w"].spec == P()


def test_table_counts_bytes_per_device():
  mesh = mesh_of("mixed")
  params = parameters()
  places = sharding.shardings(params, small_model.PARAM_AXES, mesh)
  text = sharding.table(params, places, mesh)
  total = sum(x.size for x in jax.tree.leaves(params))
  assert f"{total:,} in " in text and "data 2 x fsdp 2 x tensor 2 = 8 cpu devices" in text
  assert "layers/mlp/up/bias (2, 32)" in text and "head/kernel" not in text  # the replicated ones are named
  assert len(sharding.table(params, places, mesh_of("one")).splitlines()) == 2  # nothing to say on one device


# The door down ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, *MESHES])
def test_put_round_trips(rng, name):
  mesh = None if name is None else mesh_of(name)
  batch = small_model.batch(rng)
  on_device = sharding.put(batch, mesh)
  chex.assert_trees_all_equal(jax.device_get(on_device), batch)
  if mesh is not None:
    rows = on_device["tokens"].sharding.shard_shape((48, 3))[0]
    assert rows == 48 // sharding.batch_shards(mesh)
    assert on_device["value_weight"].sharding.is_fully_replicated


@pytest.mark.parametrize("name", [None, "one", "data"])
def test_put_does_not_share_the_hosts_memory(name):
  """A CPU device may alias an aligned numpy buffer: the loader's next batch would then change the last one."""
  raw = np.zeros(4096 + 64, np.uint8)
  start = -raw.ctypes.data % 64
  batch = raw[start : start + 4096]
  mesh = None if name is None else mesh_of(name)
  on_device, kept = sharding.put(batch, mesh), sharding.replicate(batch, mesh)
  batch[:] = 1
  assert not np.asarray(on_device).any() and not np.asarray(kept).any()


def test_rows_that_do_not_divide_are_named(rng):
  batch = small_model.batch(rng, rows=12)
  with pytest.raises(ValueError, match=r"batch: obs/image \(12, 16\) has 12 rows.*over 8 devices.*multiple of 8"):
    sharding.put(batch, mesh_of("data"))
  sharding.put(batch, mesh_of("mixed"))  # four pieces: tensor devices see the same rows


# The update on a mesh --------------------------------------------------------------------------------------


# Micro-batches of steps: two passes below 2 * 6, one from there on, and all 96 at once.
PREFERENCE = {"two passes": 8, "preference": 16, "all pairs": 96}


@functools.cache
def on_one_device(kind):
  """Two updates without any mesh."""
  return run(kind, None)


def run(kind, mesh):
  """Two updates of SGD with step 1: (the sum of their gradients, metrics of each, update, state)."""
  rng = np.random.default_rng(7)
  if kind in PREFERENCE:
    batches = [small_model.pairs(rng, pairs=8, steps=6) for _ in range(2)]
    where = dict(mesh=mesh, param_axes=small_model.PARAM_AXES)
    update = train.make_preference_update(
      small_model.log_prob, stage_kernel, SGD, micro_batch=PREFERENCE[kind], **where
    )
  else:
    batches = [small_model.batch(rng) for _ in range(2)]
    update = train.make_update(
      small_model.loss_fn, SGD, mesh=mesh, param_axes=small_model.PARAM_AXES, micro_batches=3 if kind == "cut" else 1
    )
  state = small_model.state(SGD, mesh)
  first, told = state, []
  with jax.transfer_guard("disallow"):
    for batch in batches:
      state, metrics = update(state, sharding.put(batch, mesh))
      told.append(train.fetch(metrics, state.params))
  assert all(x.is_deleted() for x in jax.tree.leaves(first.params)), "the state is donated"
  gradients = jax.tree.map(np.subtract, parameters(), jax.device_get(state.params))
  return gradients, told, update, state


CASES = [(name, kind) for name in MESHES for kind in ("whole" if name == "data" else "cut", "preference")]
CASES += [("mixed", kind) for kind in ("two passes", "all pairs")]


@pytest.mark.parametrize("name, kind", CASES)
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(name, kind):
  mesh = mesh_of(name)
  gradients, told, update, state = run(kind, mesh)
  expected, told_alone, *_ = on_one_device(kind)
  chex.assert_trees_all_close(gradients, expected, rtol=2e-4, atol=2e-6)
  for ours, alone in zip(told, told_alone, strict=True):
    assert ours == pytest.approx(alone, rel=1e-4, abs=1e-6)
  assert update.traces == 1 and update._compiled._cache_size() == 1
  places = train.state_shardings(state, mesh, small_model.PARAM_AXES)
  assert jax.tree.map(lambda x: x.sharding, state) == places  # what comes out lies where the rules say


def test_update_on_a_mesh_is_in_place_and_keeps_rows_where_they_are():
  """Every state buffer is aliased. Images do not travel, but for those of a micro-batch of pairs."""
  mesh = mesh_of("data")
  rng = np.random.default_rng(0)
  state = small_model.state(SGD, mesh)
  cut = train.make_update(small_model.loss_fn, SGD, mesh=mesh, param_axes=small_model.PARAM_AXES, micro_batches=3)
  pairs = train.make_preference_update(small_model.log_prob, stage_kernel, SGD, micro_batch=16, mesh=mesh)
  for update, batch in ((cut, small_model.batch(rng)), (pairs, small_model.pairs(rng, pairs=8, steps=6))):
    text = update.lower(state, sharding.put(batch, mesh)).compile().as_text()
    aliased = text.split("input_output_alias=")[1].split("entry_computation_layout")[0].count("may-alias")
    assert aliased == len(jax.tree.leaves(state))
    assert "all-reduce" in inspecting.collectives(text)
    moved = re.findall(r"= \(?u8\[([\d,]*)\]\S* (?:all-gather|all-to-all|all-reduce|collective-permute)", text)
    assert all(dims.split(",")[0] in ("2", "16") for dims in moved) and (update is pairs or not moved), moved


def test_the_compiler_is_told_what_the_chips_of_a_mesh_need(monkeypatch):
  """When a run calls the update and when `compile` asks for it: an option that nobody knows is refused by both."""
  kind = jax.devices()[0].device_kind
  monkeypatch.setitem(sharding.COMPILER_OPTIONS, kind, {"xla_no_such_option": "1"})
  mesh = mesh_of("data")
  update = train.make_update(small_model.loss_fn, SGD, mesh=mesh, param_axes=small_model.PARAM_AXES)
  state = train.new_state(parameters(), SGD, mesh=mesh, param_axes=small_model.PARAM_AXES)
  batch = sharding.put(small_model.batch(np.random.default_rng(0)), mesh)
  alone = train.make_update(small_model.loss_fn, SGD)
  for use in (
    lambda: update(state, batch),
    lambda: update.lower(state, batch).compile(),
    lambda: alone(train.new_state(parameters(), SGD), small_model.batch(np.random.default_rng(0))),
  ):
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such_option'"):
      use()


def test_micro_batch_divides_over_the_devices():
  with pytest.raises(ValueError, match=r"micro_batch is 12 steps, which do not divide over 8 devices"):
    train.make_preference_update(small_model.log_prob, stage_kernel, SGD, micro_batch=12, mesh=mesh_of("data"))
  mesh = mesh_of("data")
  state = train.new_state(parameters(), SGD, mesh=mesh)
  update = train.make_update(small_model.loss_fn, SGD, mesh=mesh, micro_batches=5)
  with pytest.raises(ValueError, match="5 micro-batches on 8 devices; make it a multiple of 40"):
    update(state, sharding.put(small_model.batch(np.random.default_rng(0)), mesh))


def test_uneven_padding_between_devices():
  """One device's episodes are all padding but for a step: it takes its share of the others', and nothing is lost."""
  batch = small_model.pairs(np.random.default_rng(3), steps=6)
  batch.valid[2:4], batch.valid[2:4, 0] = False, True
  batch.pairs["stage_id"][:] = np.where(batch.valid, batch.pairs["stage_id"], -1)
  steps = train_preference.in_order(batch.tokens, jnp.asarray(batch.valid), 8)
  assert int(steps.trips) == -(-int(batch.valid.sum()) // 8)  # micro-batches are full, wherever the steps lie
  run = lambda mesh, batch: jax.jit(
    lambda p, b: train.preference_gradient(small_model.log_prob, stage_kernel, p, b, micro_batch=8, mesh=mesh)[0]
  )(sharding.replicate(parameters(), mesh), batch)
  mesh = mesh_of("fsdp")
  chex.assert_trees_all_close(
    jax.device_get(run(mesh, sharding.put(batch, mesh))), jax.device_get(run(None, batch)), rtol=2e-4, atol=2e-6
  )


# A real backbone -------------------------------------------------------------------------------------------


STATS = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.arange(7) < 6)
NANO = dict(
  image_size=8, patch_size=4, dino=dict(width=8, head_size=4, mlp=12), siglip=dict(width=8, head_size=4, mlp=16),
  projector=16, llm_width=16, llm_head_size=8, llm_depth=2, llm_mlp=24, value_hidden=(8, 8), unroll=False,
)


@pytest.mark.parametrize("what, name", [
  ("loss", "mixed"), ("gradient", "tensor"),
  *(pytest.param("gradient", name, marks=pytest.mark.slow) for name in ("fsdp", "mixed")),
])  # fmt: skip
def test_openvla_on_a_mesh_is_that_of_one_device(what, name):
  policy = policies.make(name="openvla", size="tiny", stats=STATS, **NANO)
  rng = np.random.default_rng(0)
  obs = policy.encode(rng.integers(0, 256, (8, 8, 8, 3), dtype=np.uint8), ["pull the cube to the goal"] * 8)
  batch = {"obs": obs, "tokens": rng.integers(0, 256, (8, 7), dtype=np.int32)}
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  params = jax.tree.map(lambda s: 0.3 * jnp.sin(37.7 * jnp.arange(s.size).reshape(s.shape)), shapes)

  def loss_fn(params, batch):
    out = policy.apply(params, batch["obs"], batch["tokens"])
    log_prob = jnp.sum(ops.token_log_prob(out.logits, batch["tokens"]), axis=-1)
    return ops.Mean.of(jnp.square(out.value) - log_prob, jnp.ones(log_prob.shape, bool)), {}

  results = []
  for mesh in (None, mesh_of(name)):
    state = train.new_state(params, SGD, mesh=mesh, param_axes=policy.param_axes)
    if what == "loss":
      loss, _ = jax.jit(loss_fn)(state.params, sharding.put(batch, mesh))
      results.append((jax.device_get(state.params), {"loss": float(loss.value()), "grad_norm": 1.0}))
      continue
    update = train.make_update(loss_fn, SGD, mesh=mesh, param_axes=policy.param_axes)
    state, metrics = update(state, sharding.put(batch, mesh))
    results.append((jax.device_get(state.params), train.fetch(metrics, state.params)))
  (params, told), (params_mesh, told_mesh) = results
  assert told == pytest.approx(told_mesh, rel=1e-4)
  chex.assert_trees_all_close(params, params_mesh, rtol=1e-3, atol=1e-4 * told["grad_norm"])


ACTING = {
  **NANO, "llm_width": 32, "dino": dict(width=16, head_size=4, mlp=24), "siglip": dict(width=16, head_size=4, mlp=32),
}  # fmt: skip


def acting(mesh, policy, params, obs):
  """(tokens, log-probs, value) as a run acts on this mesh, and the bytes of all-gathers in the compiled program."""
  own = sharding.acting_mesh(mesh)
  copy = sharding.local_copy(params, policy.param_axes, mesh)
  n = len(obs.image)
  rest = (obs, jax.random.key(0), np.arange(n, dtype="u4"), np.zeros(n, "u4"), np.zeros(n, "u4"), np.float32(0.7))
  out = jax.device_get(rollout.compile_act(policy, own)(copy, *rest))
  if own is None:
    return out, None
  rest = jax.device_put(rest, sharding.replicated(own))
  text = rollout.act_program(policy, own).lower(copy, *rest).compile().as_text()
  computations, entry = roofline_hlo.parse(text)
  found = roofline_hlo.collectives(computations, roofline_hlo.runs(computations, entry, trips=99), own.size)
  return out, sum(c.times * c.size for c in found if c.kind == "all-gather")


@pytest.mark.parametrize("devices, sizes, adapted", [
  (4, {"data": 2, "fsdp": 2}, False), (4, {"fsdp": 4}, True), (6, {"data": 3, "fsdp": 2}, False),
])  # fmt: skip
def test_acting_cuts_heads_and_hidden_units_and_gathers_no_weight(devices, sizes, adapted):
  """From parameters cut for training to actions: those of one device, and only activations travel.

  Over six devices nothing divides: every parameter is whole on each of them.
  """
  policy = policies.make(name="openvla", size="tiny", stats=STATS, **ACTING)
  policy = lora.wrap(policy, lora.make(policy.config, rank=2)) if adapted else policy
  leaves, tree = jax.tree.flatten(jax.eval_shape(policy.init, jax.random.key(0)))
  rng = np.random.default_rng(0)
  params = jax.tree.unflatten(tree, [jnp.asarray(0.2 * rng.normal(size=s.shape), s.dtype) for s in leaves])
  obs = policy.encode(rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8), ["pull the cube to the goal"] * 2)
  expected, _ = acting(None, policy, params, obs)
  assert len(set(np.ravel(expected.tokens).tolist())) > 3
  mesh = sharding.make_mesh(sizes, jax.devices()[:devices])
  cut = jax.device_put(params, sharding.shardings(params, policy.param_axes, mesh))
  out, gathered = acting(mesh, policy, cut, obs)
  np.testing.assert_array_equal(out.tokens, expected.tokens)
  np.testing.assert_allclose(out.log_prob, expected.log_prob, atol=1e-4)
  np.testing.assert_allclose(out.value, expected.value, rtol=1e-4, atol=1e-5)
  if not adapted:  # a layer uses its adapters whole
    size = sum(x.nbytes for x in jax.tree.leaves(params["llm"]["layers"]))
    assert gathered < 0.2 * size  # an action passes seven times through these layers


@pytest.mark.parametrize("faithful", [False, True])
def test_keys_and_values_of_acting_lie_by_their_rule(faithful):
  """Rows over data and fsdp, heads over tensor: the prefix layer by layer, the action tokens in one stack."""
  stats = STATS._replace(mask=np.ones(7, bool))
  policy = policies.make(name="openvla", size="tiny", stats=stats, faithful=faithful, **NANO)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  obs = policy.encode(np.zeros((4, 8, 8, 3), np.uint8), ["pull the cube to the goal"] * 4)
  with sharding.activations(mesh_of("mixed")):
    traced = jax.make_jaxpr(policy.act)(params, obs, jax.random.split(jax.random.key(0), 4), 1.0)
  pinned = [(eqn.outvars[0].aval.shape, tuple(eqn.params["sharding"].spec)) for eqn in inspecting.equations(traced)
            if eqn.primitive.name == "sharding_constraint"]  # fmt: skip
  places = {shape: spec for shape, spec in pinned if shape[-4:-2] == (4, 2) and shape[-1] == NANO["llm_head_size"]}
  prefix = 1 + policy.config.patches + policy.config.prompt_length - 1
  rule = (("data", "fsdp"), "tensor")
  assert {shape: spec[: len(shape) - 2] for shape, spec in places.items()} == {
    (4, 2, prefix, 8): rule, (2, 4, 2, 7 if faithful else 6, 8): (None, *rule),
  }  # fmt: skip


def test_a_copy_in_the_type_of_its_products_acts_the_same():
  """Kernels and tables in half the bytes; norms and the value head, which see float32, as they are."""
  policy = policies.make(name="openvla", size="tiny", stats=STATS, **{**NANO, "compute_dtype": "bfloat16"})
  params = policy.init(jax.random.key(1))
  kinds = lambda path, x: policy.acts_in(sharding.path_name(path), x)
  copy = jax.tree_util.tree_map_with_path(lambda path, x: x.astype(kinds(path, x)), params)
  kept = {sharding.path_name(p).split("/")[-1] for p, x in jax.tree_util.tree_leaves_with_path(copy) if x.dtype == "f4"}
  assert {"scale", "bias"} < kept and copy["value"]["fc1"]["kernel"].dtype == "f4"
  assert copy["llm"]["layers"]["attn"]["qkv"]["kernel"].dtype == copy["llm"]["head"]["table"].dtype == jnp.bfloat16
  rng = np.random.default_rng(0)
  obs = policy.encode(rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), ["pull the cube to the goal"] * 3)
  act = jax.jit(policy.act)
  keys = jax.random.split(jax.random.key(2), 3)
  chex.assert_trees_all_equal(*(act(p, obs, keys, np.float32(1.0)) for p in (copy, params)))


def test_where_a_process_acts():
  """Over its devices where a parameter is cut; as it lies where none is; whole where an axis does not divide."""
  mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
  own = sharding.acting_mesh(mesh)
  assert dict(own.shape) == {"data": 1, "fsdp": 1, "tensor": 4}
  assert sharding.acting_mesh(None) is None and sharding.acting_mesh(mesh_of("data")) is None
  params = {"layers": jnp.ones((3, 8, 16)), "odd": jnp.ones((8, 6)), "bias": jnp.ones(8)}
  rules = ((r"layers|odd", ("embed", "mlp")), (r"bias", (None,)))
  copy = sharding.local_copy(params, rules, mesh)
  assert {name: x.sharding.spec for name, x in copy.items()} == {"layers": P(None, None, "tensor"), "odd": P(),
                                                                 "bias": P()}  # fmt: skip
  chex.assert_trees_all_equal(jax.device_get(copy), jax.device_get(params))
  half = sharding.local_copy(params, rules, mesh, lambda path, x: "bfloat16" if path == "odd" else x.dtype)
  assert {name: x.dtype for name, x in half.items()} == {"layers": "float32", "odd": "bfloat16", "bias": "float32"}
  assert sharding.local_copy(params, rules, mesh_of("data")) is params


def test_openvla_has_a_rule_for_every_weight():
  """Backbones name their weights in these words; the smallest one divides over a mixed mesh."""
  policy = policies.make(name="openvla", size="tiny", stats=STATS)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  places = sharding.shardings(params, policy.param_axes, mesh_of("mixed"))
  cut = lambda x, s: int(np.prod(x.shape)) if s.spec == P() else 0
  whole = sum(jax.tree.leaves(jax.tree.map(cut, params, places)))
  assert whole < 0.1 * sum(x.size for x in jax.tree.leaves(params)), sharding.table(params, places, mesh_of("mixed"))


# Several processes -----------------------------------------------------------------------------------------

PROCESS = """
import sys
import jax
rank, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.config.update("jax_disable_most_optimizations", True)
jax.distributed.initialize(f"localhost:{port}", 2, rank)
import json
import numpy as np
import small_model
from stare_jax import checkpoint, sharding, train
mesh = sharding.make_mesh({"data": 2, "fsdp": 2})
axes, tx = small_model.PARAM_AXES, train.make_optimizer(learning_rate=1e-2)
state = small_model.state(tx, mesh)
update = train.make_update(small_model.loss_fn, tx, mesh=mesh, param_axes=axes, micro_batches=2)
batch = small_model.batch(np.random.default_rng(0))
mine = jax.tree.map(lambda x: np.split(x, 2)[rank] if np.ndim(x) else x, batch)
state, metrics = update(state, sharding.put(mine, mesh))
told = train.fetch(metrics, state.params)
checkpoint.save(folder, 1, {"train": state, "cursor": np.array([1, 2])}, {"rank": "any"})
restored, _ = checkpoint.restore(folder, {"train": state, "cursor": np.zeros(2, int)})
again = train.new_state(restored["train"].params, tx, mesh=mesh, param_axes=axes)
digests = [checkpoint.params_sha256(x.params) for x in (state, restored["train"], again)]
checkpoint.HASHED_BYTES = 1000  # in parts
digests.append(checkpoint.params_sha256(state.params))
print(json.dumps({**told, "digests": digests, "cursor": restored["cursor"].tolist()}))
"""


@pytest.mark.multiprocess
def test_two_processes_are_one_run(tmp_path, root):
  """Each process passes its own rows; loss, gradient and checkpoint are those of one process with all of them."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  env = {
    **os.environ, "PYTHONPATH": f"{root}:{root / 'tests'}", "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  command = [sys.executable, "-c", PROCESS]
  both = [
    subprocess.Popen([*command, str(rank), port, str(tmp_path)], env=env, stdout=subprocess.PIPE, text=True)
    for rank in range(2)
  ]
  try:
    told = [json.loads(process.communicate(timeout=300)[0].splitlines()[-1]) for process in both]
  finally:
    for process in both:
      process.kill()
  assert told[0] == told[1]
  assert len(set(told[0]["digests"])) == 1 and told[0]["cursor"] == [1, 2]
  loss, _ = small_model.loss_fn(parameters(), small_model.batch(np.random.default_rng(0)))
  assert told[0]["loss"] == pytest.approx(float(loss.value()), rel=1e-5)
  abstract = {"train": {"params": parameters()}}  # one process reads what two wrote
  restored, _ = checkpoint.restore(tmp_path, abstract, partial=True)
  assert checkpoint.params_sha256(restored["train"]["params"]) == told[0]["digests"][0]
