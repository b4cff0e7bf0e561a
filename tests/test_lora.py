"""LoRA: what is adapted, peft's forward and files, the frozen base, and training of the adapters alone."""

from __future__ import annotations

import functools
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import torch
from safetensors.numpy import load_file, save_file

from stare_jax import policies, sharding, train
from stare_jax.checkpoint import CheckpointError
from stare_jax.losses import imitation, ops, preference
from stare_jax.policies import lora, lora_files, openvla, openvla_names, tensor_files
from stare_jax.policies.sizes import SEVEN_B
from tests import inspecting, torch_openvla

pytestmark = pytest.mark.usefixtures("quick_compile")

ATOL = 1e-4
SMALL = dict(  # no two sizes alike
  image_size=28,
  patch_size=14,
  dino=dict(width=20, depth=3, head_size=10, mlp=44, prefix_tokens=3),
  siglip=dict(width=24, depth=3, head_size=12, mlp=52),
  projector=72,
  llm_width=28,
  llm_head_size=14,
  llm_depth=3,
  llm_mlp=60,
  prompt_length=8,
  value_hidden=(12,),
  unroll=False,
)
STATS = policies.ActionStats(-np.ones(7, np.float32), np.ones(7, np.float32), np.arange(7) < 6)
RAGGED = r".*layers\.[02]\.self_attn\.q_proj|.*\.self_attn\.v_proj"  # modules of one kernel, in different layers
PUBLIC = "proj qkv fc1 fc2 fc3 q kv q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head".split()


@pytest.fixture(autouse=True)
def full_precision():
  torch.set_num_threads(1)
  with jax.default_matmul_precision("highest"):
    yield


@functools.cache
def base():
  """(policy, its torch twin, parameters, observations of two rows, bins)."""
  policy = policies.make(size="tiny", stats=STATS, **SMALL)
  model = torch_openvla.OpenVLA(policy.config)
  torch_openvla.randomise(model, 0)
  params = jax.tree.map(jnp.asarray, openvla_names.to_params(policy.config, model.public_state()))
  rng = np.random.default_rng(0)
  obs = policy.encode(rng.integers(0, 256, (2, 28, 28, 3), dtype=np.uint8), ["put the spoon down"] * 2)
  return policy, model, params, obs, rng.integers(0, 256, (2, 7)).astype(np.int32)


def perturbed(tree, seed=0):
  """Adapters that are not zero anywhere."""
  leaves, structure = jax.tree.flatten(tree)
  rng = np.random.default_rng(seed)
  return jax.tree.unflatten(structure, [jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype) for x in leaves])


@functools.cache
def adapted(targets="all-linear", rank=4):
  """(lora, wrapped policy, parameters with adapters at work)."""
  policy, _, params, _, _ = base()
  spec = lora.make(policy.config, rank=rank, alpha=6, targets=targets)
  whole = lora.start(spec, params, jax.random.key(1))
  return spec, lora.wrap(policy, spec), {**whole, "lora": perturbed(whole["lora"])}


def forward(policy, params):
  _, _, _, obs, bins = base()
  return jax.jit(policy.apply)(params, obs, bins)


def torch_forward(model):
  """The same rows in torch, without padding."""
  policy, _, _, obs, bins = base()
  ids = torch.from_numpy(obs.prompt[0][obs.prompt_mask[0]]).long()[None].repeat(2, 1)
  inner = getattr(model, "base_model", None)
  plain = inner.model if inner is not None else model
  with torch.no_grad():
    logits, value = plain.teacher_forced(plain.pixels(obs.image), ids, torch.from_numpy(bins).long())
  return logits[..., policy.config.first_action : policy.config.action_end].numpy(), value.numpy()


# What is adapted ------------------------------------------------------------------------------------------


def test_seven_b_has_the_public_modules_and_count():
  """The figures of the public fine-tuning script at rank 32; nothing is allocated."""
  spec, dead = lora.make(SEVEN_B, rank=32), lora.unused(SEVEN_B)
  assert (len(spec.modules), len(spec.modules) + len(dead)) == (426, 439)
  assert spec.alpha == 16 and spec.scale == 0.5
  assert spec.size == 109_126_400
  assert spec.size + 32 * sum(map(sum, dead.values())) == 110_828_288
  shapes = jax.eval_shape(functools.partial(lora.init, spec), jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == spec.size
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
  assert set(lora.select(SEVEN_B, PUBLIC)) == set(spec.modules)  # what "all-linear" expands to


@pytest.mark.parametrize("targets, count", [
  ("q_proj,v_proj", 64), (("q_proj", "v_proj"), 64), (r".*\.(q|v)_proj", 64), ("lm_head", 1), (("qkv",), 23 + 26),
  (r".*layers\.(3|5)\.self_attn\.k_proj", 2), ("language_model.model.layers.0.mlp.up_proj", 1), ("patch_embed.proj", 2),
  (RAGGED, 2 + 32),
])  # fmt: skip
def test_targets_by_name_and_by_pattern(targets, count):
  spec = lora.make(SEVEN_B, rank=2, targets=targets)
  assert len(spec.modules) == count
  assert spec.size == sum(2 * (m.outputs + np.prod(m.inputs)) for m in spec.modules)  # no module more is trained


@pytest.mark.parametrize("targets, words", [
  ("q_prj", ("'q_prj'", "q_proj")), (("q_proj", "vproj"), ("'vproj'", "v_proj")), ("(", ("regular expression",)),
  (("kv",), ("no output depends on",)),
])  # fmt: skip
def test_wrong_targets_are_named(targets, words):
  with pytest.raises(ValueError) as caught:
    lora.make(SEVEN_B, rank=2, targets=targets)
  assert all(word in str(caught.value) for word in words), caught.value


def test_fresh_adapters_are_gaussian_and_change_nothing():
  policy, _, params, obs, bins = base()
  spec, wrapped, _ = adapted()
  fresh = lora.start(spec, params, jax.random.key(1))
  a = np.concatenate([np.ravel(x) for path, x in jax.tree_util.tree_leaves_with_path(fresh["lora"])
                      if path[-1].key == "a"])  # fmt: skip
  assert abs(a.std() * spec.rank - 1) < 0.05 and abs(a.mean()) < 0.01
  assert all(not x.any() for path, x in jax.tree_util.tree_leaves_with_path(fresh["lora"]) if path[-1].key == "b")
  assert all(x is y for x, y in zip(jax.tree.leaves(fresh["base"]), jax.tree.leaves({**params, "value": {}})))
  np.testing.assert_array_equal(forward(wrapped, fresh).logits, forward(policy, params).logits)


# Against peft ---------------------------------------------------------------------------------------------


def peft_model(targets, **options):
  """The torch twin with peft's adapters, none of them zero."""
  policy, plain, _, _, _ = base()
  model = torch_openvla.OpenVLA(policy.config)
  model.load_state_dict(plain.state_dict())
  config = peft.LoraConfig(target_modules=targets, exclude_modules=r"value_head\..*", r=4, lora_alpha=6, **options)
  model = peft.get_peft_model(model, config)
  generator = torch.Generator().manual_seed(3)
  for name, p in model.named_parameters():
    if "lora_" in name:
      p.data = 0.2 * torch.randn(p.shape, generator=generator)
  return model


@pytest.mark.parametrize("targets, options", [
  (PUBLIC, {}), (["q_proj", "v_proj"], {"use_rslora": True}),
  (r".*layers\.[02]\.mlp\.up_proj|.*\.2\.self_attn\.._proj", {}), (RAGGED, {}),
], ids=["all-linear", "two names", "some layers", "layers that differ"])  # fmt: skip
def test_adapters_of_peft_give_the_same_forward(tmp_path, targets, options):
  policy, plain, params, _, _ = base()
  model = peft_model(targets, **options)
  model.save_pretrained(tmp_path)
  loaded = lora_files.load(tmp_path, policy.config)
  assert loaded.lora.scale == (6 / 2 if options else 6 / 4) and loaded.value is None
  stored = [name for name in load_file(tmp_path / lora_files.WEIGHTS) if ".lora_" not in name]
  assert len(stored) == len(loaded.bases) == (targets is PUBLIC)  # where lm_head is adapted, its frozen weights too
  names = [name.split(".lora_")[0].removeprefix(lora_files.PREFIX)
           for name in load_file(tmp_path / lora_files.WEIGHTS) if name not in stored]  # fmt: skip
  assert {m.name for m in loaded.lora.modules} == set(names) - set(lora.unused(policy.config))
  out = forward(lora.wrap(policy, loaded.lora), lora_files.params_of(loaded, params))
  logits, value = torch_forward(model)
  np.testing.assert_allclose(out.logits, logits, atol=ATOL)
  np.testing.assert_allclose(out.value, value, atol=ATOL)
  assert np.abs(logits - torch_forward(plain)[0]).max() > 0.1  # the adapters are at work
  # And back: the same files, those of modules that nothing depends on included.
  again = lora_files.save(tmp_path / "again", policy.config, loaded.lora, lora_files.params_of(loaded, params),
                          base="openvla/openvla-7b", kept=loaded.kept)  # fmt: skip
  ours, theirs = load_file(again / lora_files.WEIGHTS), load_file(tmp_path / lora_files.WEIGHTS)
  assert set(ours) == set(theirs) and all(np.array_equal(ours[name], theirs[name]) for name in ours)
  assert bool(loaded.kept) is (targets is PUBLIC)
  if loaded.bases:
    other = {**params, "llm": {**params["llm"], "head": jax.tree.map(lambda x: x + 1, params["llm"]["head"])}}
    with pytest.raises(CheckpointError, match="llm/head/table of the model that it was trained on"):
      lora_files.params_of(loaded, other)


def test_peft_takes_what_is_saved_here(tmp_path):
  policy, plain, _, _, _ = base()
  spec, wrapped, params = adapted()
  folder = lora_files.save(tmp_path / "adapter", policy.config, spec, params)
  fresh = torch_openvla.OpenVLA(policy.config)
  fresh.load_state_dict(plain.state_dict())
  with warnings.catch_warnings():
    warnings.filterwarnings("error", message=".*missing adapter keys.*")
    model = peft.PeftModel.from_pretrained(fresh, folder)
  out = forward(wrapped, params)
  logits, value = torch_forward(model)
  np.testing.assert_allclose(out.logits, logits, atol=ATOL)
  np.testing.assert_allclose(out.value, value, atol=ATOL)
  loaded = lora_files.load(folder, policy.config)
  assert loaded.lora == spec and not loaded.kept
  jax.tree.map(np.testing.assert_array_equal, loaded.adapters, dict(params["lora"]))
  jax.tree.map(np.testing.assert_array_equal, loaded.value, dict(params["value"]))
  # peft's merge is ours.
  merged = openvla_names.to_params(policy.config, {**model.merge_and_unload().public_state()})
  ours = jax.jit(functools.partial(lora.merge, spec))(params)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), ours, merged)
  with pytest.raises(CheckpointError, match="exists already"):
    lora_files.save(folder, policy.config, spec, params)


def test_saving_adapters_again_after_a_kill_or_a_full_disk(tmp_path, monkeypatch):
  policy = base()[0]
  spec, _, params = adapted()
  left = tmp_path / ".adapter.partial"
  left.mkdir()
  (left / lora_files.WEIGHTS).write_bytes(b"half")

  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(tensor_files, "write", fail)
    with pytest.raises(CheckpointError, match="adapter could not be written .No space left.*; nothing was left behind"):
      lora_files.save(tmp_path / "adapter", policy.config, spec, params)
  assert list(tmp_path.iterdir()) == []
  left.mkdir()
  (left / "of_a_killed_process").touch()
  folder = lora_files.save(tmp_path / "adapter", policy.config, spec, params)
  assert lora_files.load(folder, policy.config).lora == spec
  assert sorted(p.name for p in folder.iterdir()) == sorted([lora_files.CONFIG, lora_files.WEIGHTS, lora_files.VALUE])
  assert list(tmp_path.iterdir()) == [folder]


def test_a_wrong_adapter_folder_is_named(tmp_path):
  policy = base()[0]
  spec, _, params = adapted(("q_proj", "v_proj"))
  good = lora_files.save(tmp_path / "good", policy.config, spec, params)
  arrays = load_file(good / lora_files.WEIGHTS)
  first = sorted(arrays)[0]

  def edited(config=None, change=lambda arrays: arrays):
    folder = tmp_path / "bad"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    settings = json.loads((folder / lora_files.CONFIG).read_text())
    (folder / lora_files.CONFIG).write_text(json.dumps(settings | (config or {})))
    save_file(change(dict(arrays)), folder / lora_files.WEIGHTS)
    return folder

  def refused(words, *changes, **more):
    folder = edited(*changes, **more)
    with pytest.raises(CheckpointError) as caught:
      lora_files.load(folder, policy.config)
    assert all(word in str(caught.value) for word in words), caught.value

  refused(("use_dora",), {"use_dora": True})
  refused(("rank_pattern",), {"rank_pattern": {"q_proj": 8}})
  refused(("modules_to_save",), {"modules_to_save": ["lm_head"]})
  for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"):  # which change the base's weights, too
    refused(("init_lora_weights", init, "merge_and_unload"), {"init_lora_weights": init})
  for plain in ({"init_lora_weights": "Gaussian"}, {"init_lora_weights": True, "corda_config": {"verbose": True}}):
    lora_files.load(edited(plain), policy.config)
  refused(("alora_invocation_tokens",), {"alora_invocation_tokens": [5, 6]})
  refused(("kasa_config",), {"kasa_config": {"beta": 1e-4}})
  refused(("of_next_year",), {"of_next_year": True})
  refused(("r is 0", "at least 1"), {"r": 0})
  refused(("lora_alpha 0",), {"lora_alpha": 0})
  refused(("r is '4'",), {"r": "4"})
  refused(("at rank 8", first.split(".lora_")[0].removeprefix(lora_files.PREFIX)), {"r": 8})
  refused(("peft_type",), {"peft_type": "IA3"})
  refused(("lacks", "lora_A"), change=lambda x: {k: v for k, v in x.items() if k != first})
  renamed = lambda old, new: lambda x: {k.replace(old, new): v for k, v in x.items()}
  refused(("q_prj", "nearest: language_model"), change=renamed("q_proj", "q_prj"))
  refused(("expected base_model",), change=renamed("base_model.", ""))


# The forward pass -----------------------------------------------------------------------------------------


def test_merged_equals_attached_and_the_reference_is_the_base():
  policy, _, params, obs, _ = base()
  spec, wrapped, whole = adapted()
  attached, plain = forward(wrapped, whole), forward(policy, params)
  merged = jax.jit(functools.partial(lora.merge, spec))(whole)
  np.testing.assert_allclose(forward(policy, merged).logits, attached.logits, atol=ATOL)
  given = jax.tree.map(jnp.copy, whole)  # a 7B host does not hold the weights twice
  jax.tree.map(np.testing.assert_array_equal, lora.merge(spec, given, donate=True), lora.merge(spec, whole))
  assert given["base"]["llm"]["head"]["table"].is_deleted()
  np.testing.assert_array_equal(merged["llm"]["embed"]["table"], params["llm"]["embed"]["table"])
  alone = wrapped.reference(whole)
  assert all(x is y for x, y in zip(jax.tree.leaves(alone["base"]), jax.tree.leaves(whole["base"])))
  np.testing.assert_array_equal(forward(wrapped, alone).logits, plain.logits)
  assert np.abs(attached.logits - plain.logits).max() > 0.1
  # Acting is the same policy: greedy actions are the likeliest of the teacher-forced logits on them.
  keys = jax.random.split(jax.random.key(0), 2)
  taken = jax.jit(wrapped.act)(whole, obs, keys, jnp.float32(0.0))
  logits = jax.jit(wrapped.apply)(whole, obs, taken.tokens).logits
  np.testing.assert_array_equal(np.argmax(logits, -1), taken.tokens)
  np.testing.assert_allclose(taken.value, attached.value, atol=ATOL)
  np.testing.assert_allclose(jax.jit(wrapped.value)(whole, obs), attached.value, atol=ATOL)


def loss_of(policy):
  def loss_fn(params, batch):
    logits = policy.apply(params, batch["obs"], batch["tokens"]).logits
    _, metrics = imitation.cross_entropy(logits, batch["tokens"], jnp.ones(batch["tokens"].shape, bool))
    return metrics["loss"], metrics

  return loss_fn


def test_no_merged_weight_and_no_row_of_logits_is_ever_made():
  """In the trace of a gradient: no sum as large as a weight, no logits beyond the action ids, float32 gradients."""
  policy, _, params, obs, bins = base()
  spec, wrapped, whole = adapted()
  half = {**whole, "base": jax.tree.map(lambda x: x.astype(jnp.bfloat16), whole["base"])}
  trained, frozen = train.split(half, wrapped.trainable)
  loss = lambda p: loss_of(wrapped)(train.join(p, frozen), {"obs": obs, "tokens": bins})[0].total
  grads = jax.eval_shape(jax.grad(loss), trained)
  assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
  shapes = {spec.shape[-3:] for spec in jax.tree.leaves(
    openvla.specs(policy.config), is_leaf=lambda x: isinstance(x, openvla.Spec)) if len(spec.shape) == 4}  # fmt: skip
  for module in spec.modules:
    shapes |= {(int(np.prod(module.inputs)), module.outputs), (module.outputs, int(np.prod(module.inputs)))}
  vocabulary, rows = policy.config.vocabulary, {spec.rank, policy.config.llm_width}
  for eqn in inspecting.equations(jax.make_jaxpr(jax.grad(loss))(trained)):
    for out in eqn.outvars:
      shape = out.aval.shape
      if eqn.primitive.name in ("add", "add_any"):
        assert shape[-2:] not in shapes and shape[-3:] not in shapes, (eqn.primitive, shape)
      if shape[-1:] == (vocabulary,):
        assert set(shape[:-1]) <= rows, (eqn.primitive, shape)  # adapters of lm_head, not activations


def test_every_parameter_has_a_rule_and_adapters_are_cut_like_their_kernel():
  policy = base()[0]
  wrapped = lora.wrap(policy, lora.make(policy.config, rank=4))
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2, "data": 2})
  shapes = jax.eval_shape(wrapped.init, jax.random.key(0))
  places = sharding.shardings(shapes, wrapped.param_axes, mesh)
  spec = lambda *path: tuple(openvla_names.leaf(places, "/".join(path)).spec)
  assert spec("base/llm/layers/attn/qkv/kernel") == (None, "fsdp", None, "tensor")
  assert spec("lora/llm/layers/attn/qkv/a") == (None, "fsdp")
  assert spec("lora/llm/layers/attn/qkv/b") == (None, None, None, "tensor")
  assert spec("lora/vision/dino/layers/attn/qkv/b") == (None, None, None, "tensor")
  assert spec("lora/llm/head/a") == ("fsdp",) and spec("lora/llm/head/b") == (None, "tensor")
  assert spec("base/projector/fc1/kernel") == ("fsdp", "tensor") and spec("value/fc1/kernel") == ("fsdp",)


# Training -------------------------------------------------------------------------------------------------


def batch(rows=8):
  policy = base()[0]
  rng = np.random.default_rng(4)
  images = rng.integers(0, 256, (rows, 28, 28, 3), dtype=np.uint8)
  obs = policy.encode(images, ["put it down", "lift the red ball"] * (rows // 2))
  return {"obs": obs, "tokens": rng.integers(0, 256, (rows, 7)).astype(np.int32)}


def test_an_update_moves_the_adapters_alone_whatever_the_micro_batch():
  _, wrapped, params = adapted()
  # A large eps: Adam would otherwise blow the rounding of gradients near 0 up to whole steps.
  tx = train.make_optimizer(learning_rate=1e-2, weight_decay=0.1, value_lr_scale=2.0, eps=0.1)
  results = []
  for micro_batches in (1, 4):
    update = train.make_update(loss_of(wrapped), tx, micro_batches=micro_batches, trainable=wrapped.trainable)
    state = train.new_state(params, tx, trainable=wrapped.trainable)
    state, metrics = update(state, batch())
    state, metrics = update(state, batch())
    assert update.traces == 1 and train.fetch(metrics, state.params, wrapped.trainable)["grad_norm"] > 0
    assert all(x is y for x, y in zip(jax.tree.leaves(state.params["base"]), jax.tree.leaves(params["base"])))
    changed = jax.tree.map(lambda x, y: bool(np.any(np.asarray(x) != np.asarray(y))), state.params, params)
    assert all(jax.tree.leaves(changed["lora"]))
    results.append(state.params["lora"])
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), *results)
  moments = [x for x in jax.tree.leaves(state.opt) if x.ndim]
  trained = jax.tree.leaves({"lora": params["lora"], "value": params["value"]})
  assert sorted(x.size for x in moments) == sorted(2 * [x.size for x in trained])


def test_modules_of_one_kernel_that_are_not_adapted_stay_zeros():
  """q_proj in two of three layers, v_proj in all: what stands for the third q_proj is not trained, however long."""
  spec, wrapped, _ = adapted(RAGGED)
  params = lora.start(spec, base()[2], jax.random.key(1))
  tx = train.make_optimizer(learning_rate=1e-2, weight_decay=0.1)
  update = train.make_update(loss_of(wrapped), tx, trainable=wrapped.trainable)
  state = train.new_state(params, tx, trainable=wrapped.trainable)
  for _ in range(3):
    state, _ = update(state, batch())
  pair = state.params["lora"]["llm"]["layers"]["attn"]["qkv"]
  a, b = np.asarray(pair["a"]), np.asarray(pair["b"])
  assert a.shape[0] == b.shape[0] == 3 and a.shape[2] == b.shape[1] == 2
  assert not a[1, :, 0].any() and not b[1, 0].any()
  moved = [(a[i, :, g], b[i, g]) for i, g in ((0, 0), (2, 0), (0, 1), (1, 1), (2, 1))]
  assert all(x.any() and y.any() for x, y in moved)


@pytest.mark.slow
def test_a_mesh_gives_the_update_of_one_device():
  """Base, adapters and moments in pieces, over fsdp and tensor: the same step, and everything stays where it lies."""
  _, wrapped, params = adapted()
  mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
  tx, rows = optax.sgd(1.0, momentum=0.9), batch()
  moved = []
  for where in ({}, dict(mesh=mesh, param_axes=wrapped.param_axes)):
    update = train.make_update(loss_of(wrapped), tx, trainable=wrapped.trainable, **where)
    state = train.new_state(params, tx, trainable=wrapped.trainable, **where)
    before = state.params["base"]["llm"]["layers"]["attn"]["qkv"]["kernel"]
    state, metrics = update(state, sharding.put(rows, where.get("mesh")))
    assert state.params["base"]["llm"]["layers"]["attn"]["qkv"]["kernel"] is before
    trained, _ = train.split(state.params, wrapped.trainable)
    moved.append((jax.device_get(trained), train.fetch(metrics, state.params, wrapped.trainable)))
  places = train.state_shardings(state, mesh, wrapped.param_axes)
  assert jax.tree.map(lambda x: x.sharding, state) == places
  cut = {str(x.sharding.spec) for x in jax.tree.leaves(state.opt)}
  assert any("fsdp" in spec for spec in cut) and any("tensor" in spec for spec in cut)
  (alone, told), (spread, told_spread) = moved
  assert told_spread == pytest.approx(told, rel=1e-4)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=5e-5), alone, spread)


def test_two_passes_equal_the_gradient_in_one_piece():
  """StA-TPO through adapters, against the base as reference: no second set of weights, the same gradient."""
  policy = base()[0]
  _, wrapped, params = adapted()
  flat = batch(12)
  lanes = lambda x: x.reshape(4, 3, *x.shape[1:])
  valid = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
  log_prob = lambda p, obs, tokens: ops.token_log_prob(wrapped.apply(p, obs, tokens).logits, tokens)
  total = jax.jit(lambda p: log_prob(p, flat["obs"], flat["tokens"]).sum(-1).reshape(4, 3))
  reference = np.asarray(total(wrapped.reference(params)))
  stage_id = np.where(valid, 0, -1).astype(np.int32)
  pairs = train.PreferenceBatch(
    jax.tree.map(lanes, flat["obs"]), lanes(flat["tokens"]), valid, reference,
    {"stage_id": stage_id, "cost": np.zeros((4, 1), np.float32), "sign": np.ones((2, 1), np.int8)},
  )  # fmt: skip
  kernel = lambda ratio, b: preference.stage_tpo(
    ratio, b.pairs["stage_id"], b.pairs["cost"], b.pairs["sign"], beta=0.5, cost_weight=0.0
  )
  pairs = jax.tree.map(jnp.asarray, pairs)
  trained, frozen = train.split(params, wrapped.trainable)
  whole = lambda p, obs, tokens: log_prob(train.join(p, frozen), obs, tokens)
  two_pass = jax.jit(lambda p: train.preference_gradient(whole, kernel, p, pairs, micro_batch=4)[:2])

  def one_shot(p):
    score = whole(p, flat["obs"], flat["tokens"]).sum(-1).reshape(4, 3)
    return kernel(jnp.where(valid, score - reference, 0.0), pairs)[1]["loss"].value()

  grads, loss = two_pass(trained)
  expected_loss, expected = jax.jit(jax.value_and_grad(one_shot))(trained)
  np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
  scale = float(optax.tree.norm(expected))
  close = lambda x, y: np.testing.assert_allclose(x / scale, y / scale, atol=1e-5)
  jax.tree.map(close, grads["lora"], expected["lora"])
  assert policy.trainable is None and scale > 0
