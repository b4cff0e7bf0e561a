"""Public OpenVLA folders: every tensor in its place on any mesh, back bit for bit, and nothing read from a bad one."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import public_model as public
import pytest

from stare_jax import checkpoint, convert, pipeline_run, policies, sharding
from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import openvla, openvla_config, openvla_files, openvla_names, sizes, tensor_files
from tests import toy_run

FUSED = [public.DINO, public.SIGLIP]
VARIANTS = {"fused": FUSED, "siglip": [public.SIGLIP], "dino": [public.DINO]}


@pytest.fixture(autouse=True, scope="module")
def quick_compile():
  """Most of the time of these tests is compilation."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, pathlib.Path]:
  """One folder for each variant, never to be changed: copy it."""
  root = tmp_path_factory.mktemp("public")
  made = {}
  for name, towers in VARIANTS.items():
    tensors = public.draw(public.public_shapes(towers))
    made[name] = public.write(root / name, towers, tensors, files=3 if name == "fused" else 1)
  return made


@pytest.fixture(scope="module")
def fused(folders):
  """(policy, params, tensors by public name) on one device."""
  return *openvla_files.load(folders["fused"]), public.read(folders["fused"])


@pytest.fixture
def folder(folders, tmp_path):
  """A copy of the fused checkpoint in one file, to be broken."""
  return public.write(tmp_path / "broken", FUSED, public.read(folders["fused"]))


def bits(x) -> bytes:
  x = np.ascontiguousarray(np.asarray(x))
  return f"{x.dtype}{x.shape}".encode() + x.tobytes()


def edit(path: pathlib.Path, change) -> None:
  found = json.loads(path.read_text())
  change(found)
  path.write_text(json.dumps(found))


# The table -------------------------------------------------------------------------------------------------


def test_names_and_shapes_at_full_size():
  table = {t.name: t for t in openvla_names.tensors(sizes.SEVEN_B)}
  assert len(table) == 982 and sum(t.size for t in table.values()) == 7_541_237_184
  dino = dict(family="dino", width=1024, depth=24, mlp=4096, patch_size=14, prefix_tokens=5, layer_scale=1.0)
  siglip = dict(family="siglip", width=1152, depth=27, mlp=4304, patch_size=14, prefix_tokens=0, layer_scale=None)
  llm = dict(width=4096, depth=32, mlp=11008, vocabulary=32064)
  assert {name: t.shape for name, t in table.items()} == public.public_shapes([dino, siglip], 224, llm)
  dead = {name for name, t in table.items() if not t.path}
  assert len(dead) == 14 + 2 + 12 + 2 + 13  # the last blocks, the final norms, the pooling
  assert all(".blocks.23." in n or ".blocks.26." in n or "r.norm." in n or ".attn_pool." in n for n in dead)


@pytest.mark.parametrize("towers", VARIANTS)
def test_every_parameter_is_filled_exactly_once(folders, towers):
  config = openvla_files.folder_config(folders[towers])
  full = openvla_names.shapes(config)
  filled = {path: np.zeros(shape, np.int8) for path, shape in full.items()}
  for t in openvla_names.tensors(config) + openvla_names.value_tensors(config):
    if t.path:
      assert math.prod(t.block) == t.size and len(t.block) == len(full[t.path])
      filled[t.path][tuple(slice(a, a + n) for a, n in zip(t.start, t.block))] += 1
  assert all((x == 1).all() for x in filled.values())


def test_sizes_come_from_the_files(fused):
  policy, params, _ = fused
  c = policy.config
  assert (c.image_size, c.patch_size, c.vocabulary, c.action_end, c.bins, c.pad) == (8, 4, 384, 320, 256, 320)
  assert (c.llm_width, c.llm_depth, c.llm_head_size, c.llm_mlp, c.projector) == (32, 2, 16, 48, 160)
  assert (c.rms_eps, c.rope_theta, c.bos, c.start, c.param_dtype) == (1e-6, 1e4, 1, 3, "bfloat16")
  assert c.dino.mean == (0.484375, 0.455078125, 0.40625) and c.siglip.std == (0.5, 0.5, 0.5)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(policy.init, jax.random.key(0)))
  seven = openvla_config.config_json(sizes.SEVEN_B)[0]
  assert seven["timm_model_ids"] == ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_224"]


# Reading ---------------------------------------------------------------------------------------------------


def test_linear_layers_compute_what_torch_computes(fused, rng):
  """x W^T + b on the public layout, for each kind of layer."""
  _, params, tensors = fused
  f32 = {name: x.astype(np.float32) for name, x in tensors.items()}
  llm, dino = params["llm"]["layers"], params["vision"]["dino"]["layers"]
  x, y = rng.standard_normal(32).astype(np.float32), rng.standard_normal(16).astype(np.float32)
  ours = lambda kernel, x: np.tensordot(x, np.asarray(kernel, np.float32), 1)
  for j, part in enumerate("qkv"):
    theirs = f32[f"language_model.model.layers.1.self_attn.{part}_proj.weight"] @ x
    np.testing.assert_allclose(ours(llm["attn"]["qkv"]["kernel"][1], x)[j], theirs, rtol=1e-5, atol=1e-6)
  for j, part in enumerate(("gate", "up")):
    theirs = f32[f"language_model.model.layers.0.mlp.{part}_proj.weight"] @ x
    np.testing.assert_allclose(ours(llm["mlp"]["gate_up"]["kernel"][0], x)[j], theirs, rtol=1e-5, atol=1e-6)
  block = "vision_backbone.featurizer.blocks.1"
  qkv = (f32[f"{block}.attn.qkv.weight"] @ y + f32[f"{block}.attn.qkv.bias"]).reshape(3, 16)
  bias = np.asarray(dino["attn"]["qkv"]["bias"][1], np.float32)
  np.testing.assert_allclose(ours(dino["attn"]["qkv"]["kernel"][1], y) + bias, qkv, rtol=1e-5, atol=1e-6)
  down = f32[f"{block}.mlp.fc2.weight"] @ np.repeat(y, 2)
  np.testing.assert_allclose(ours(dino["mlp"]["down"]["kernel"][1], np.repeat(y, 2)), down, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(dino["scale2"][1], tensors[f"{block}.ls2.scale_factor"])
  np.testing.assert_array_equal(params["llm"]["head"]["table"], tensors["language_model.lm_head.weight"])
  prefix = np.concatenate([tensors[f"vision_backbone.featurizer.{k}_token"][0] for k in ("cls", "reg")])
  np.testing.assert_array_equal(params["vision"]["dino"]["prefix"], prefix)


def test_patch_embedding_is_the_convolution(fused, rng):
  _, params, tensors = fused
  image = rng.random((1, 8, 8, 3)).astype(np.float32)
  ours = openvla.nn.dense(params["vision"]["siglip"]["patch"], openvla.patchify(jnp.asarray(image), 4))
  kernel, bias = (tensors[f"vision_backbone.fused_featurizer.patch_embed.proj.{k}"].astype(np.float32)
                  for k in ("weight", "bias"))  # fmt: skip
  for n, (row, column) in enumerate(np.ndindex(2, 2)):
    window = image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
    np.testing.assert_allclose(ours[0, n], np.einsum("oihw,hwi->o", kernel, window) + bias, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("towers", ["siglip", "dino"])
def test_one_vision_transformer_and_two_projector_layers(folders, towers, rng):
  policy, params = policies.load(folders[towers], compute_dtype="float32", param_dtype="float32")
  other = {"siglip": "dino", "dino": "siglip"}[towers]
  assert set(params["vision"]) == {towers} and getattr(policy.config, other) is None
  image = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  features = openvla.encode_vision(
    params["vision"][towers], jnp.float32(image) / 255, getattr(policy.config, towers), policy.config
  )
  tensors = {name: x.astype(np.float32) for name, x in public.read(folders[towers]).items()}
  w = lambda name: (tensors[f"projector.{name}.weight"].T, tensors[f"projector.{name}.bias"])
  (w1, b1), (w2, b2) = w("fc1"), w("fc2")
  hidden = np.asarray(features) @ w1 + b1
  expected = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) @ w2 + b2
  np.testing.assert_allclose(openvla.encode_image(params, image, policy.config), expected, rtol=1e-4, atol=1e-5)


MESHES = {
  "fsdp": dict(data=1, fsdp=8), "tensor": dict(data=4, tensor=2), "mixed": dict(data=2, fsdp=2, tensor=2),
}  # fmt: skip


@pytest.mark.parametrize("sizes_", MESHES.values(), ids=MESHES)
def test_loading_onto_a_mesh_equals_loading_onto_one_device(folders, fused, sizes_):
  mesh = sharding.make_mesh(sizes_)
  policy, params = openvla_files.load(folders["fused"], mesh=mesh)
  places = sharding.shardings(params, policy.param_axes, mesh)
  assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, params, places))
  assert jax.tree.map(bits, params) == jax.tree.map(bits, fused[1])


def test_a_process_reads_only_what_its_devices_hold(folders, monkeypatch):
  """Every device's piece of a kernel is read from the file alone, and once however many devices hold it."""
  read = []

  class Counted(np.ndarray):
    def __getitem__(self, index):
      read.append(super().__getitem__(index).size)
      return super().__getitem__(index)

  monkeypatch.setattr(tensor_files, "view", lambda entry, view=tensor_files.view: view(entry).view(Counted))
  mesh = sharding.make_mesh(dict(data=2, fsdp=2, tensor=2))
  config = openvla_files.folder_config(folders["fused"])
  entries = tensor_files.read_folder(folders["fused"])
  t = next(t for t in openvla_names.tensors(config) if t.name.endswith("1.mlp.up_proj.weight"))
  where = openvla_files._place(t.path, openvla_names.shapes(config)[t.path], mesh)
  piece = openvla_files._piece(t, entries[t.name], where)
  assert read == [t.size // 4] * 4
  assert {shard.data.shape for shard in piece.addressable_shards} == {(24, 16)}


def test_dtype_is_the_files_unless_asked(tmp_path, folders):
  half = {name: x.astype(np.float16) for name, x in public.read(folders["siglip"]).items()}
  folder = public.write(tmp_path / "half", [public.SIGLIP], half)
  assert {str(x.dtype) for x in jax.tree.leaves(openvla_files.load(folder)[1])} == {"float16"}
  policy, params = openvla_files.load(folder, param_dtype="float32")
  assert {str(x.dtype) for x in jax.tree.leaves(params)} == {"float32"} and policy.config.param_dtype == "float32"
  head = half["language_model.lm_head.weight"].astype(np.float32)
  np.testing.assert_array_equal(params["llm"]["head"]["table"], head)
  half["language_model.lm_head.weight"] = head
  mixed = public.write(tmp_path / "mixed", [public.SIGLIP], half)
  with pytest.raises(CheckpointError, match="mixes float16, float32: choose with param_dtype="):
    openvla_files.load(mixed)
  _, again = openvla_files.load(mixed, param_dtype="float32")
  assert jax.tree.map(bits, again) == jax.tree.map(bits, params)


def test_a_state_dict_needs_no_files(fused):
  policy, params, tensors = fused
  loaded = openvla_files.to_params(policy.config, tensors)
  assert jax.tree.map(bits, loaded) == jax.tree.map(bits, params)
  live = dict(openvla_files.to_public(policy.config, loaded))
  assert {name: bits(x) for name, x in live.items()} == {name: bits(tensors[name]) for name in live}
  dead = {t.name for t in openvla_names.tensors(policy.config) if not t.path}
  assert set(tensors) - set(live) == dead
  with pytest.raises(CheckpointError, match="1 tensors are missing"):
    openvla_files.to_params(policy.config, {k: x for k, x in tensors.items() if k != "projector.fc3.bias"})


# Statistics and tokenizer ----------------------------------------------------------------------------------


def test_statistics_of_one_of_several_data_sets(folder):
  other = {"action": {"q01": [0.0] * 7, "q99": [2.0] * 7}}
  edit(folder / "config.json", lambda c: c["norm_stats"].update(libero_goal_no_noops=other))
  with pytest.raises(CheckpointError, match="2 data sets; choose one with unnorm_key=: bridge_orig, libero_goal"):
    openvla_config.read_statistics(folder)
  with pytest.raises(CheckpointError, match="no action statistics of 'bridge'; did you mean 'bridge_orig'"):
    openvla_config.read_statistics(folder, "bridge")
  name, stats = openvla_config.read_statistics(folder, "libero_goal")
  assert name == "libero_goal_no_noops" and stats.mask.all()  # no mask: everything is normalised
  name, stats = openvla_config.read_statistics(folder, "bridge_orig")
  np.testing.assert_array_equal(stats.q99, np.float32(public.BRIDGE["q99"]))
  assert stats.mask.tolist() == public.BRIDGE["mask"]


def test_statistics_beside_the_weights_replace_those_of_the_configuration(folder):
  (folder / "dataset_statistics.json").write_text(json.dumps({"mine": {"action": {"q01": [-1, 0], "q99": [1, 1]}}}))
  name, stats = openvla_config.read_statistics(folder)
  assert name == "mine" and len(stats.q01) == 2
  with pytest.raises(CheckpointError, match="did you mean 'mine'"):
    openvla_config.read_statistics(folder, "bridge_orig")
  assert openvla_files.make_policy(folder).config.action_size == 2


def test_prompt_is_the_template_and_ends_with_the_start_token(fused):
  policy = fused[0]
  obs = policy.encode(np.zeros((1, 8, 8, 3), np.uint8), ["Put the SPOON to bed"])
  ids = obs.prompt[0][obs.prompt_mask[0]].tolist()
  tokenizer = public.tokenizer()
  text = tokenizer.encode("In: What action should the robot take to put the spoon to bed?\nOut:").ids
  assert ids == [1, *text, 3] and tokenizer.id_to_token(3) == "▁"
  assert tokenizer.id_to_token(ids[1]) == "▁In" and "▁spoon" in [tokenizer.id_to_token(i) for i in ids]
  # A prompt that ends with a blank has the start token already, and gets no second one.
  config = policy.config
  blank = openvla_config.Tokenizer(tokenizer, 3)(config.template.format(instruction="go") + " ")
  assert blank[-1] == 3
  ids, mask = openvla.encode_prompt(config, lambda text: blank, "go")
  assert ids[mask].tolist() == [1, *blank]


def test_vicuna_prompt_of_v01(folder):
  edit(folder / "config.json", lambda c: c.update(llm_backbone_id="vicuna-v15-7b"))
  template = openvla_files.folder_config(folder).template
  assert template.startswith("A chat between a curious user and an artificial intelligence assistant.")
  assert template.endswith(" USER: What action should the robot take to {instruction}? ASSISTANT:")


def test_a_tokenizer_that_does_not_fit(folder):
  tokenizer = public.tokenizer()
  tokenizer.add_tokens([f"<{i}>" for i in range(400)])
  tokenizer.save(str(folder / "tokenizer.json"))
  with pytest.raises(CheckpointError, match="is another model's: 4.. tokens with <s> 1 and ▁ 3, expected at most 384"):
    openvla_files.make_policy(folder)
  (folder / "tokenizer.json").write_text("{}")
  with pytest.raises(CheckpointError, match=r"tokenizer.json is no tokenizer \("):
    openvla_files.make_policy(folder)
  (folder / "tokenizer.json").unlink()
  with pytest.raises(CheckpointError, match="has no tokenizer.json; save it there"):
    openvla_files.make_policy(folder)
  assert openvla_files.make_policy(folder, tokenizer=lambda text: [5], start=7).config.start == 7


# Writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("towers", VARIANTS)
@pytest.mark.parametrize("files", ["one file", "shards"])
def test_round_trip_bit_for_bit(tmp_path, folders, towers, files):
  source = folders[towers]
  (policy, params), tensors = openvla_files.load(source), public.read(source)
  out = openvla_files.save(
    tmp_path / "out", policy, params, source, shard_bytes=10**9 if files == "one file" else 40_000
  )
  again = public.read(out)  # by the library, which checks the format
  assert {name: bits(x) for name, x in again.items()} == {name: bits(x) for name, x in tensors.items()}
  models = sorted(p.name for p in out.glob("model*.safetensors"))
  if files == "shards":
    assert len(models) > 2 and max((out / name).stat().st_size for name in models) < 50_000
    index = json.loads((out / tensor_files.INDEX).read_text())
    assert set(index["weight_map"]) == set(tensors) and set(index["weight_map"].values()) == set(models)
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
  else:
    assert models == ["model.safetensors"] and not (out / tensor_files.INDEX).exists()
  for name in ("config.json", "preprocessor_config.json", "tokenizer.json", "README.md"):
    assert (out / name).read_bytes() == (source / name).read_bytes()
  assert [p.name for p in tmp_path.iterdir()] == ["out"]
  assert jax.tree.map(bits, openvla_files.load(out)[1]) == jax.tree.map(bits, params)  # the value head too


def test_from_a_mesh_only_what_was_trained_changes(tmp_path, folders):
  source = folders["fused"]
  policy, params = openvla_files.load(source, mesh=sharding.make_mesh(MESHES["mixed"]))
  qkv, fc1 = params["llm"]["layers"]["attn"]["qkv"], params["value"]["fc1"]
  qkv["kernel"] = qkv["kernel"].at[1, :, 2].multiply(2)  # the second layer's v
  fc1["bias"] = fc1["bias"].astype(jnp.float32) + 1 / 3
  stats = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.ones(7, bool))
  out = openvla_files.save(tmp_path / "out", policy, params, source, stats=stats, dataset="pull_cube")
  before, after = public.read(source), public.read(out)
  v = "language_model.model.layers.1.self_attn.v_proj.weight"
  assert {name for name in before if bits(before[name]) != bits(after[name])} == {v}
  np.testing.assert_array_equal(after[v].astype(np.float32), 2 * before[v].astype(np.float32))
  again = openvla_files.load(out, unnorm_key="pull_cube")
  assert jax.tree.map(bits, again[1]) == jax.tree.map(bits, params)
  assert again[1]["value"]["fc1"]["bias"].dtype == jnp.float32  # in the dtype that it was trained in
  np.testing.assert_array_equal(again[0].decode(np.full((1, 7), 127)), policies_decode(stats, 127))


def policies_decode(stats, token):
  """The public formula: centres of 255 intervals over [-1, 1], then the range."""
  edges = np.linspace(-1, 1, 256)
  centre = ((edges[1:] + edges[:-1]) / 2)[256 - token - 1]
  return np.float32(0.5 * (centre + 1) * (stats.q99 - stats.q01) + stats.q01)[None]


def test_without_a_source_the_configuration_is_written_anew(tmp_path, fused):
  policy, params, tensors = fused
  stats = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.ones(7, bool))
  out = openvla_files.save(tmp_path / "out", policy, params, stats=stats, dtype="float32")
  tokenizer = openvla_config.Tokenizer(public.tokenizer(), 3)
  again, loaded = openvla_files.load(out, tokenizer=tokenizer, start=3, param_dtype="bfloat16")
  assert again.config == policy.config
  assert jax.tree.map(bits, loaded) == jax.tree.map(bits, params)
  written = public.read(out)
  assert {str(x.dtype) for x in written.values()} == {"float32"}
  assert set(tensors) - set(written) == {t.name for t in openvla_names.tensors(policy.config) if not t.path}
  for config in (sizes.SEVEN_B, policy.config):
    c, processor = openvla_config.config_json(config)
    assert openvla_config._fields(c, processor)["dino"].width == config.dino.width
  with pytest.raises(CheckpointError, match="projector 99: the public format has 160"):
    openvla_config.config_json(sizes.override(policy.config, {"projector": 99}))


def test_saving_refuses_and_leaves_nothing(tmp_path, folders, fused, monkeypatch):
  policy, params, _ = fused
  source = folders["fused"]
  with pytest.raises(CheckpointError, match="exists already"):
    openvla_files.save(source, policy, params, source)
  with pytest.raises(CheckpointError, match=r"parameters: value/fc1/bias is absent, expected \(512,\)"):
    openvla_files.save(tmp_path / "out", policy, {**params, "value": {"fc1": {}}}, source)
  with pytest.raises(CheckpointError, match="source .*siglip: .* tensors are missing"):
    openvla_files.save(tmp_path / "out", policy, params, folders["siglip"])

  def fail(*args, **kwargs):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr(tensor_files, "write", fail)
  with pytest.raises(CheckpointError, match="could not be written .No space left.*; nothing was left behind"):
    openvla_files.save(tmp_path / "out", policy, params, source)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 1000))
  with pytest.raises(CheckpointError, match="disk full: .*out needs"):
    openvla_files.save(tmp_path / "out", policy, params, source)
  assert list(tmp_path.iterdir()) == []


# What is refused -------------------------------------------------------------------------------------------


def rewrite(folder, change):
  """The checkpoint with other tensors."""
  tensors = public.read(folder)
  change(tensors)
  public.library.save_file(tensors, folder / "model.safetensors")


def cut(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-10])


def lengthen(folder):
  path = folder / "model.safetensors"
  path.write_bytes(path.read_bytes() + b"junk")


def headless(folder):
  (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")


def garbled(folder):
  text = b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 6]}}'
  (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 6)


def gap(folder):
  text = b'{"a": {"dtype": "BF16", "shape": [2], "data_offsets": [4, 8]}}'
  (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)


def pickled(folder):
  (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def adapters(folder):
  (folder / "model.safetensors").unlink()
  (folder / "adapter_config.json").write_text("{}")


LM_HEAD = "language_model.lm_head.weight"
BROKEN = {
  "missing": (lambda f: rewrite(f, lambda t: t.pop(LM_HEAD)), r"1 tensors are missing \['language_model.lm_head"),
  "extra": (lambda f: rewrite(f, lambda t: t.update(more=t[LM_HEAD])), r"1 are unknown \['more'\]"),
  "renamed": (lambda f: rewrite(f, lambda t: t.update({"model." + LM_HEAD: t.pop(LM_HEAD)})), "meant to be"),
  "gamma": (
    lambda f: rewrite(f, lambda t: t.update({"vision_backbone.featurizer.blocks.0.ls1.gamma": t[LM_HEAD]})),
    'called "scale_factor"',
  ),
  "shape": (lambda f: rewrite(f, lambda t: t.update({LM_HEAD: t[LM_HEAD].T})), r"is \[32, 384\], expected \[384, 32\]"),
  "dead shape": (
    lambda f: rewrite(f, lambda t: t.update({"vision_backbone.featurizer.norm.bias": t[LM_HEAD]})), "norm.bias is"
  ),
  "integers": (lambda f: rewrite(f, lambda t: t.update({LM_HEAD: np.zeros((384, 32), np.int8)})), "is I8, expected"),
  "double": (lambda f: rewrite(f, lambda t: t.update({LM_HEAD: np.zeros((384, 32))})), "is F64, expected one of BF16"),
  "truncated": (cut, "is truncated: .* bytes, its header says"),
  "too long": (lengthen, "is too long"),
  "no header": (headless, "no safetensors file with a header of"),
  "wrong length": (garbled, r"a BF16\[2\] takes 6 bytes, expected 4"),
  "gap": (gap, "overlap or leave gaps"),
  "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "0 bytes are no safetensors"),
  "pickle": (pickled, "pytorch_model.bin is a pickle, which can run code and is never opened"),
  "adapters": (adapters, "holds adapters, not a model"),
  "no weights": (lambda f: (f / "model.safetensors").unlink(), "neither model.safetensors nor"),
  "no config": (lambda f: (f / "config.json").unlink(), "has no config.json; name the folder"),
  "no processor": (lambda f: (f / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
  "bad json": (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json cannot be read as JSON"),
  "no object": (lambda f: (f / "config.json").write_text("[]"), "holds a list, expected an object"),
  "field": (lambda f: edit(f / "config.json", lambda c: c.pop("pad_to_multiple_of")), "KeyError: 'pad_to_multiple"),
  "model": (lambda f: edit(f / "config.json", lambda c: c.update(model_type="llava")), '"llava", expected "openvla"'),
  "heads": (
    lambda f: edit(f / "config.json", lambda c: c["text_config"].update(num_key_value_heads=1)),
    "asks for {'num_key_value_heads': 1}, which this network does not have",
  ),
  "rope": (
    lambda f: edit(f / "config.json", lambda c: c["text_config"].update(rope_scaling={"type": "x"})), "rope_scaling"
  ),
  "activation": (
    lambda f: edit(f / "config.json", lambda c: c.update(timm_override_act_layers=["quick_gelu", None])), "quick_gelu"
  ),
  "unknown tower": (lambda f: edit(f / "config.json", lambda c: c.pop("vision_sizes")), '"vit_test_dino" is unknown'),
  "fused or not": (
    lambda f: edit(f / "config.json", lambda c: c.update(use_fused_vision_backbone=False)), "expected 1, as"
  ),
  "resize": (
    lambda f: edit(f / "config.json", lambda c: c.update(image_resize_strategy="squash")), '"squash" is unknown'
  ),
  "depth": (
    lambda f: edit(f / "config.json", lambda c: c["text_config"].update(num_hidden_layers=3)), "9 tensors are missing"
  ),
  "no statistics": (lambda f: edit(f / "config.json", lambda c: c.pop("norm_stats")), "carries no action statistics"),
  "statistics": (
    lambda f: edit(f / "config.json", lambda c: c["norm_stats"]["bridge_orig"]["action"].pop("q99")), "malformed"
  ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_refused_before_anything_is_read(folder, monkeypatch, kind):
  breaking, message = BROKEN[kind]
  breaking(folder)
  monkeypatch.setattr(tensor_files, "view", lambda entry: pytest.fail(f"{entry} was read"))
  with pytest.raises(CheckpointError, match=message):
    openvla_files.load(folder)


INDEXES = {
  "file missing": (lambda f: (f / "model-00002-of-00003.safetensors").unlink(), "00002-of-00003.safetensors is miss"),
  "shards mixed up": (
    lambda f: shutil.copy(f / "model-00001-of-00003.safetensors", f / "model-00002-of-00003.safetensors"),
    "files are of different checkpoints",
  ),
  "index lacks a tensor": (
    lambda f: edit(f / tensor_files.INDEX, lambda i: i["weight_map"].pop(LM_HEAD)), "index puts into None"
  ),
  "index has one more": (
    lambda f: edit(f / tensor_files.INDEX, lambda i: i["weight_map"].update(x="model-00001-of-00003.safetensors")),
    "lacks x",
  ),
  "another folder": (
    lambda f: edit(f / tensor_files.INDEX, lambda i: i["weight_map"].update(x="../x.safetensors")),
    "expected files of its own folder",
  ),
  "pickles": (
    lambda f: edit(f / tensor_files.INDEX, lambda i: i["weight_map"].update(x="pytorch_model-1.bin")), "is a pickle"
  ),
  "no map": (lambda f: edit(f / tensor_files.INDEX, lambda i: i.pop("weight_map")), 'has no "weight_map"'),
}  # fmt: skip


@pytest.mark.parametrize("kind", INDEXES)
def test_shards_that_do_not_belong_together(tmp_path, folders, kind):
  folder = shutil.copytree(folders["fused"], tmp_path / "copy")
  breaking, message = INDEXES[kind]
  breaking(folder)
  with pytest.raises(CheckpointError, match=message):
    tensor_files.read_folder(folder)


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(CheckpointError, match="no folder .*nowhere; name the folder of a public checkpoint"):
    tensor_files.read_folder(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="unknown policy 'opnvla'; did you mean 'openvla'"):
    policies.load(tmp_path, name="opnvla")


# Folder to checkpoint of a run, and back -------------------------------------------------------------------


def test_convert_there_and_back(tmp_path, folders, capsys):
  source, out = folders["fused"], tmp_path / "orbax"
  assert convert.main(["--to-orbax", str(source), str(out)]) == 0
  assert f"--config.init_from={out}" in capsys.readouterr().out
  _, stats = openvla_config.read_statistics(source)
  assert jax.tree.map(bits, pipeline_run.read_statistics(out)) == jax.tree.map(bits, stats)
  back = tmp_path / "public"
  assert convert.main(["--to-public", str(out), str(back), "--source", str(source), "--dataset", "mine"]) == 0
  before, after = public.read(source), public.read(back)
  assert {name: bits(x) for name, x in before.items()} == {name: bits(x) for name, x in after.items()}
  name, again = openvla_config.read_statistics(back)
  assert name == "mine" and jax.tree.map(bits, again) == jax.tree.map(bits, stats)
  first, second = (openvla_files.load(f)[1]["value"] for f in (source, back))
  assert jax.tree.map(bits, first) == jax.tree.map(bits, second)


def test_convert_says_what_is_wrong(tmp_path, folders, capsys):
  source, out = folders["fused"], tmp_path / "orbax"
  assert convert.main(["--to-orbax", str(source), str(out), "--unnorm-key", "brige_orig"]) == 2
  assert "did you mean 'bridge_orig'" in capsys.readouterr().err and not out.exists()
  assert convert.main(["--to-public", str(out), str(tmp_path / "x"), "--source", str(source)]) == 2
  assert "no checkpoint in" in capsys.readouterr().err
  checkpoint.save(out, 3, {"params": {"llm": np.zeros(3)}}, {})
  assert convert.main(["--to-public", str(out), str(tmp_path / "x"), "--source", str(source)]) == 2
  assert "carries no action statistics" in capsys.readouterr().err
  assert convert.main(["--to-orbax", str(source), str(out)]) == 2
  assert "holds checkpoints already" in capsys.readouterr().err
  with pytest.raises(SystemExit):
    convert.main(["--to-public", str(out), str(tmp_path / "x")])
  assert "--to-public needs --source" in capsys.readouterr().err


def test_a_run_starts_from_a_converted_folder(tmp_path, monkeypatch):
  """As --config.init_from, through what the pipeline checks."""
  one = jax.devices()[:1]
  monkeypatch.setattr(sharding, "make_mesh", lambda sizes=None, make=sharding.make_mesh: make(dict(data=1), one))
  config = toy_run.get_config()
  with config.unlocked():
    config.policy.options.projector = 128  # 4 x features, as public ones have it
  options = {**config.policy.options.to_dict(), "image_size": config.sim.image_size}
  network = sizes.configure("tiny", options)
  params = openvla.init(network, jax.random.key(5))
  stats = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.arange(7) < 6)
  folder = openvla_files.save(tmp_path / "public", network, params, stats=stats)
  convert.to_orbax(folder, tmp_path / "orbax")
  config.init_from, config.phases = str(tmp_path / "orbax"), ("preference",)
  run = pipeline_run.Run(config, tmp_path / "run")
  started = pipeline_run.starting_params(run, "preference")
  assert jax.tree.map(bits, started) == jax.tree.map(bits, params)
  assert jax.tree.map(bits, run.stats) == jax.tree.map(bits, stats)


# Memory ----------------------------------------------------------------------------------------------------

MEMORY = """
import resource, sys, jax, jax.numpy as jnp
from stare_jax.policies import openvla_files
folder, out = sys.argv[1:]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.zeros(8)))
policy = openvla_files.make_policy(folder)
before = peak()
params = openvla_files.read_params(folder, policy.config)
loaded = peak()
openvla_files.save(out, policy, params, folder)
print("PEAK", sum(x.nbytes for x in jax.tree.leaves(params)), loaded - before, peak() - before)
"""


@pytest.mark.slow
def test_the_host_holds_one_tensor_at_a_time(tmp_path, user_environment):
  """On CPU the parameters themselves are host memory; what comes on top of them is bounded by the largest tensor."""
  llm = dict(width=1024, depth=12, heads=8, mlp=2816, vocabulary=8192 + 64, padding=64)
  shapes = public.public_shapes(FUSED, llm=llm)
  tensors = {name: np.full(shape, 0.01, ml_dtypes.bfloat16) for name, shape in shapes.items()}
  folder = public.write(tmp_path / "public", FUSED, tensors, files=2)
  (folder / "config.json").write_text(json.dumps(public.config_json(FUSED, llm=llm)))
  largest = max(x.nbytes for x in tensors.values())
  done = subprocess.run(
    [sys.executable, "-c", MEMORY, str(folder), str(tmp_path / "out")], env=user_environment | {"JAX_PLATFORMS": "cpu"},
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  total, loading, saving = map(int, done.stdout.split()[-3:])
  print(f"parameters {total}, largest tensor {largest}, peak while loading {loading}, and while saving {saving}")
  assert total > 300 << 20
  assert loading - total < 4 * largest + (96 << 20)
  assert saving - total < 4 * largest + (96 << 20)
