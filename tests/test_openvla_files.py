"""Public OpenVLA folders: every tensor in its place on any mesh, back bit for bit, and nothing read from a bad one."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import public_model as public
import pytest

from benchmarks import random_folder
from stare_jax import policies, sharding
from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import openvla, openvla_config, openvla_files, openvla_names, sizes, tensor_files

pytestmark = pytest.mark.usefixtures("quick_compile")

FUSED = [public.DINO, public.SIGLIP]
VARIANTS = {"fused": FUSED, "siglip": [public.SIGLIP], "dino": [public.DINO]}


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
  config = openvla_files.folder_config(folders[towers], {"compute_dtype": "float32"})
  tensors = {name: x.astype(np.float32) for name, x in public.read(folders[towers]).items()}
  params = openvla_files.to_params(config, tensors)
  other = {"siglip": "dino", "dino": "siglip"}[towers]
  assert set(params["vision"]) == {towers} and getattr(config, other) is None
  image = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
  features = openvla.encode_vision(
    params["vision"][towers], openvla.patchify(jnp.float32(image) / 255, 4), getattr(config, towers), config
  )
  w = lambda name: (tensors[f"projector.{name}.weight"].T, tensors[f"projector.{name}.bias"])
  (w1, b1), (w2, b2) = w("fc1"), w("fc2")
  hidden = np.asarray(features) @ w1 + b1
  expected = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / np.sqrt(2))) @ w2 + b2
  np.testing.assert_allclose(openvla.encode_image(params, image, config), expected, rtol=1e-4, atol=1e-5)


MESHES = {
  "fsdp": dict(data=1, fsdp=8), "mixed": dict(data=2, fsdp=2, tensor=2),
}  # fmt: skip


@pytest.fixture
def on_device(monkeypatch):
  """Every parameter is put together on the device, as large ones are."""
  monkeypatch.setattr(openvla_files, "STAGED_BYTES", 0)


@pytest.mark.parametrize("sizes_", MESHES.values(), ids=MESHES)
def test_loading_onto_a_mesh_equals_loading_onto_one_device(folders, fused, on_device, sizes_):
  mesh = sharding.make_mesh(sizes_)
  policy, params = policies.load(folders["fused"], mesh=mesh)
  places = sharding.shardings(params, policy.param_axes, mesh)
  assert jax.tree.all(jax.tree.map(lambda x, place: x.sharding == place, params, places))
  assert jax.tree.map(public.bits, params) == jax.tree.map(public.bits, fused[1])


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


def test_every_number_survives_the_device(tmp_path):
  """Infinities, signed zeros and subnormal numbers to the bit. A NaN stays one; XLA's CPU programs choose its bits."""
  every = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(256, 256)
  public.library.save_file({"v.weight": every}, tmp_path / "x.safetensors")
  entry = tensor_files.read_header(tmp_path / "x.safetensors")["v.weight"]
  t, full = openvla_names._fused("v", "qkv", 256, 256, 2, 1), (2, 256, 3, 256)
  leaf = None
  for layer in (0, 1):
    leaf = openvla_files._fill(leaf, t._replace(start=(layer, 0, 2, 0)), entry, full, every.dtype, None)
  number = ~np.isnan(every.astype(np.float32))
  assert number.sum() == 2**16 - 2 * 127
  for back in (np.asarray(leaf)[0, :, 2].T, openvla_files._take(leaf, t, every.dtype)):
    assert public.bits(back[number]) == public.bits(every[number]) and np.isnan(back[~number].astype(np.float32)).all()


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
  assert jax.tree.map(public.bits, again) == jax.tree.map(public.bits, params)


def test_a_state_dict_needs_no_files(fused):
  policy, params, tensors = fused
  loaded = openvla_files.to_params(policy.config, tensors)
  assert jax.tree.map(public.bits, loaded) == jax.tree.map(public.bits, params)
  live = dict(openvla_files.to_public(policy.config, loaded))
  assert {name: public.bits(x) for name, x in live.items()} == {name: public.bits(tensors[name]) for name in live}
  dead = {t.name for t in openvla_names.tensors(policy.config) if not t.path}
  assert set(tensors) - set(live) == dead
  with pytest.raises(CheckpointError, match="1 tensors are missing"):
    openvla_files.to_params(policy.config, {k: x for k, x in tensors.items() if k != "projector.fc3.bias"})


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
  assert {name: public.bits(x) for name, x in again.items()} == {name: public.bits(x) for name, x in tensors.items()}
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
  assert jax.tree.map(public.bits, openvla_files.load(out)[1]) == jax.tree.map(public.bits, params)  # value head too


@pytest.mark.parametrize("where", ["on the device", "on the host"])
def test_from_a_mesh_only_what_was_trained_changes(tmp_path, folders, monkeypatch, where):
  if where == "on the device":
    monkeypatch.setattr(openvla_files, "STAGED_BYTES", 0)
  source = folders["fused"]
  policy, params = openvla_files.load(source, mesh=sharding.make_mesh(MESHES["mixed"]))
  qkv, fc1 = params["llm"]["layers"]["attn"]["qkv"], params["value"]["fc1"]
  qkv["kernel"] = qkv["kernel"].at[1, :, 2].multiply(2)  # the second layer's v
  fc1["bias"] = fc1["bias"].astype(jnp.float32) + 1 / 3
  stats = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.ones(7, bool))
  out = openvla_files.save(tmp_path / "out", policy, params, source, stats=stats, dataset="pull_cube")
  before, after = public.read(source), public.read(out)
  v = "language_model.model.layers.1.self_attn.v_proj.weight"
  assert {name for name in before if public.bits(before[name]) != public.bits(after[name])} == {v}
  np.testing.assert_array_equal(after[v].astype(np.float32), 2 * before[v].astype(np.float32))
  monkeypatch.undo()
  again = openvla_files.load(out, unnorm_key="pull_cube")
  assert jax.tree.map(public.bits, again[1]) == jax.tree.map(public.bits, params)
  assert again[1]["value"]["fc1"]["bias"].dtype == jnp.float32  # in the dtype that it was trained in
  np.testing.assert_array_equal(again[0].decode(np.full((1, 7), 127)), policies_decode(stats, 127))


def policies_decode(stats, token):
  """The public formula: centres of 255 intervals over [-1, 1], then the range."""
  edges = np.linspace(-1, 1, 256)
  centre = ((edges[1:] + edges[:-1]) / 2)[256 - token - 1]
  return np.float32(0.5 * (centre + 1) * (stats.q99 - stats.q01) + stats.q01)[None]


def test_what_was_trained_in_float32_loads_again_in_float32(tmp_path, folders):
  """Tensors that do not exist here stay in bfloat16 unless all are cast, and say nothing of the dtype."""
  source = folders["fused"]
  policy, params = openvla_files.load(source, param_dtype="float32")
  for name, dtype, found in (("as it is", None, {"bfloat16", "float32"}), ("asked for", "float32", {"float32"})):
    out = openvla_files.save(tmp_path / name, policy, params, source, dtype=dtype)
    assert {str(x.dtype) for x in public.read(out).values()} == found
    again, loaded = openvla_files.load(out)
    assert again.config == policy.config and jax.tree.map(public.bits, loaded) == jax.tree.map(public.bits, params)


def test_a_random_folder_is_a_public_one(tmp_path, fused):
  """What `benchmarks.random_folder` writes at 7B, at a small size: every public tensor, and it loads."""
  policy, _, tensors = fused
  out = random_folder.write(tmp_path / "random", policy.config, shard_bytes=100_000)
  form = lambda tensors: {name: (x.shape, x.dtype) for name, x in tensors.items()}
  assert form(public.read(out)) == form(tensors)
  assert len(list(out.glob("*.safetensors"))) > 1
  assert openvla_files.load(out, tokenizer=lambda text: [5], start=3)[0].config == policy.config


def test_a_cast_folder_says_so(tmp_path, folders, fused):
  """All of its tensors are cast, those that this network does without among them, and config.json names the type."""
  policy, params, before = fused
  out = openvla_files.save(tmp_path / "out", policy, params, folders["fused"], dtype="float32")
  after, (was, now) = public.read(out), (json.loads((f / "config.json").read_text()) for f in (folders["fused"], out))
  assert before.keys() == after.keys() and {x.dtype for x in after.values()} == {np.dtype("float32")}
  assert all(public.bits(x.astype(np.float32)) == public.bits(after[name]) for name, x in before.items())
  assert was["torch_dtype"] == "bfloat16" and now == was | {
    "torch_dtype": "float32", "text_config": was["text_config"] | {"torch_dtype": "float32"}}  # fmt: skip
  same = openvla_files.save(tmp_path / "same", policy, params, folders["fused"])
  assert (same / "config.json").read_bytes() == (folders["fused"] / "config.json").read_bytes()


def test_without_a_source_the_configuration_is_written_anew(tmp_path, fused):
  policy, params, tensors = fused
  stats = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.ones(7, bool))
  out = openvla_files.save(tmp_path / "out", policy, params, stats=stats, dtype="float32")
  tokenizer = openvla_config.Tokenizer(public.tokenizer(), 3)
  again, loaded = openvla_files.load(out, tokenizer=tokenizer, start=3, param_dtype="bfloat16")
  assert again.config == policy.config
  assert jax.tree.map(public.bits, loaded) == jax.tree.map(public.bits, params)
  written = public.read(out)
  assert {str(x.dtype) for x in written.values()} == {"float32"}
  assert set(tensors) - set(written) == {t.name for t in openvla_names.tensors(policy.config) if not t.path}
  for config in (sizes.SEVEN_B, policy.config):
    c, processor = openvla_config.config_json(config)
    assert openvla_config._fields(c, processor)["dino"].width == config.dino.width
  with pytest.raises(CheckpointError, match="projector 99: the public format has 160"):
    openvla_config.config_json(sizes.override(policy.config, {"projector": 99}))
  with pytest.raises(CheckpointError, match='resize "lanczos3": the public format has words for bicubic, letterbox'):
    openvla_config.config_json(sizes.override(policy.config, {"resize": "lanczos3"}))


@pytest.mark.parametrize("resize, public_name", [("bicubic", "resize-naive"), ("letterbox", "letterbox"),
                                                 ("resize-crop", "resize-crop")])  # fmt: skip
def test_how_frames_are_resized_is_saved_without_a_source(tmp_path, fused, resize, public_name):
  config = sizes.override(fused[0].config, {"resize": resize})
  for name, found in zip(("config.json", "preprocessor_config.json"), openvla_config.config_json(config), strict=True):
    assert found["image_resize_strategy"] == public_name
    (tmp_path / name).write_text(json.dumps(found))
  assert openvla_config.read_config(tmp_path).resize == resize


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


# Several processes, and memory -----------------------------------------------------------------------------

PROCESS = """
import sys, jax, numpy as np
rank, port, folder, out = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from stare_jax import sharding
from stare_jax.policies import openvla_files, tensor_files
openvla_files.STAGED_BYTES = 1000  # some parameters on the host, some on the devices
policy, params = openvla_files.load(folder, mesh=sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 2}))
head = params["llm"]["head"]["table"]
assert not head.is_fully_addressable
entry = tensor_files.read_folder(folder)["language_model.lm_head.weight"]
for shard in head.addressable_shards:
  np.testing.assert_array_equal(np.asarray(shard.data), tensor_files.view(entry)[shard.index])
openvla_files.save(out, policy, params, folder)
"""


@pytest.mark.multiprocess
@pytest.mark.slow
def test_two_processes_load_and_save_together(tmp_path, folders, user_environment):
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = str(free.getsockname()[1])
  env = user_environment | {
    "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }  # fmt: skip
  command = [sys.executable, "-c", PROCESS]
  paths = [str(folders["fused"]), str(tmp_path / "out")]
  both = [subprocess.Popen([*command, str(rank), port, *paths], env=env, stderr=subprocess.PIPE, text=True)
          for rank in range(2)]  # fmt: skip
  try:
    told = [process.communicate(timeout=500)[1] for process in both]
  finally:
    for process in both:
      process.kill()
  assert [process.returncode for process in both] == [0, 0], "\n".join(told)
  before, after = public.read(folders["fused"]), public.read(tmp_path / "out")
  assert {name: public.bits(x) for name, x in before.items()} == {name: public.bits(x) for name, x in after.items()}



MEMORY = """
import sys, jax, jax.numpy as jnp
from stare_jax.policies import openvla_files
folder, out = sys.argv[1:]
# Not getrusage's ru_maxrss, which a process inherits from the one that started it.
peak = lambda: 1024 * int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1])
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
  """On CPU the parameters are host memory themselves; what comes on top is far less than one stacked parameter."""
  llm = dict(width=1024, depth=24, heads=8, mlp=2816, vocabulary=8192 + 64, padding=64)
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
  stacked = 2 * 24 * 1024 * 2 * 2816  # gate and up of all layers
  room = 4 * largest + (130 << 20)  # compiled programs, and what the allocator keeps (188 to 198 MB in all were seen)
  assert total > 600 << 20 and room < 0.75 * stacked
  assert loading > total  # the measure sees the parameters
  assert loading - total < room
  assert saving - total < room
