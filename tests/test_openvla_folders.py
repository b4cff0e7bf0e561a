"""What a public OpenVLA folder says beside its weights; and a bad folder, which is refused before anything is read."""

from __future__ import annotations

import itertools
import json
import pathlib
import shutil
import struct

import absl.flags
import jax
import ml_collections
import numpy as np
import optax
import public_model as public
import pytest
from ml_collections import config_flags

from stare_jax import checkpoint, convert, pipeline_check, pipeline_policy, pipeline_run, policies, sharding, train
from stare_jax.checkpoint import CheckpointError
from stare_jax.config import LEFT_OPEN, ConfigError
from stare_jax.policies import lora, openvla, openvla_config, openvla_files, openvla_names, tensor_files
from tests import toy_run

FUSED = [public.DINO, public.SIGLIP]
TENSORS = public.draw(public.public_shapes(FUSED))


@pytest.fixture
def folder(tmp_path):
  """A checkpoint in one file, to be broken."""
  return public.write(tmp_path / "broken", FUSED, TENSORS)


def edit(path: pathlib.Path, change) -> None:
  found = json.loads(path.read_text())
  change(found)
  path.write_text(json.dumps(found))


def equal(a, b) -> None:
  same = lambda x, y: x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
  assert jax.tree.structure(a) == jax.tree.structure(b) and all(map(same, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def one_device(monkeypatch):
  one = jax.devices()[:1]
  monkeypatch.setattr(sharding, "make_mesh", lambda sizes=None, make=sharding.make_mesh: make(dict(data=1), one))
  jax.config.update("jax_disable_most_optimizations", True)  # most of the time is compilation
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def test_reading_says_how_far_it_is(folder):
  config, told = openvla_files.folder_config(folder), []
  openvla_files.read_params(folder, config, progress=lambda *of: told.append(of))
  steps = [TENSORS[t.name].nbytes for t in openvla_names.tensors(config) if t.path]
  assert told == [(done, sum(steps)) for done in itertools.accumulate(steps)]


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


def test_prompt_is_the_template_and_ends_with_the_start_token(folder):
  policy = openvla_files.make_policy(folder)
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


def test_an_end_token_of_its_own(folder, tmp_path):
  assert openvla_files.folder_config(folder).eos == 2  # Llama's, which public folders do not name
  edit(folder / "config.json", lambda c: c["text_config"].update(eos_token_id=7))
  config = openvla_files.folder_config(folder)
  assert config.eos == 7 and openvla_config.config_json(config)[0]["text_config"]["eos_token_id"] == 7


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


def headed(text, size):
  """A file with this header and so many bytes behind it."""
  return lambda f: (f / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0" * size)


def entry(dtype='"BF16"', shape="[2]", offsets="[0, 4]"):
  return headed(f'{{"a": {{"dtype": {dtype}, "shape": {shape}, "data_offsets": {offsets}}}}}', 8)


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
  "wrong length": (entry(offsets="[0, 6]"), r"a BF16\[2\] takes 6 bytes, expected 4"),
  "gap": (entry(offsets="[4, 8]"), "overlap or leave gaps"),
  "list for a header": (headed("[]", 0), "its header is a list, expected an object"),
  "null for a header": (headed("null", 0), "its header is a NoneType, expected an object"),
  "list for a tensor": (headed('{"a": [0, 4]}', 4), "header's entry of a is malformed"),
  "offsets in words": (entry(offsets='["0", "4"]'), "header's entry of a is malformed"),
  "offsets that are no whole numbers": (entry(offsets="[0.0, 4.0]"), "header's entry of a is malformed"),
  "shape in words": (entry(shape='"2"'), "header's entry of a is malformed"),
  "list for a type": (entry(dtype='["BF16"]'), "header's entry of a is malformed"),
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
def test_shards_that_do_not_belong_together(tmp_path, kind):
  folder = public.write(tmp_path / "shards", FUSED, TENSORS, files=3)
  breaking, message = INDEXES[kind]
  breaking(folder)
  with pytest.raises(CheckpointError, match=message):
    tensor_files.read_folder(folder)


def test_a_folder_that_is_not_there(tmp_path):
  with pytest.raises(CheckpointError, match="no folder .*nowhere; name the folder of a public checkpoint"):
    tensor_files.read_folder(tmp_path / "nowhere")
  with pytest.raises(ValueError, match="unknown policy 'opnvla'; did you mean 'openvla'"):
    policies.load(tmp_path, name="opnvla")


# What a run leaves, as public files ------------------------------------------------------------------------


def checkpoint_of_run(out: pathlib.Path, folder: pathlib.Path, stats, rank: int = 0) -> pathlib.Path:
  """A checkpoint as a run on `folder` writes it before anything has moved; with adapters, without their base."""
  policy, params = openvla_files.load(folder)
  fields = dict(rank=rank, alpha=4, targets="q_proj,v_proj")
  if rank:
    params = lora.start(lora.make(policy.config, **fields), params, jax.random.key(0))
    del params["base"]
  meta = {"action_stats": {name: np.asarray(x).tolist() for name, x in stats._asdict().items()},
          "base": pipeline_policy.digest(folder) if rank else ""}  # fmt: skip
  checkpoint.save(out, 1, {"params": params}, meta, config={"policy": {"lora": fields}})
  return out


def test_an_untouched_run_gives_the_statistics_of_its_folder_back(folder, tmp_path, one_device):
  """The gripper in [0, 1], which public code expects; and a run on what was written acts as that run did."""
  _, published = openvla_config.read_statistics(folder)
  config = from_flags(pathlib.Path(__file__).parents[1], "openvla_7b", folder, "--config.policy.unnorm_key=bridge_orig")
  ours = pipeline_policy.folder_statistics(config)
  assert (ours.q01[-1], ours.q99[-1], ours.mask[-1]) == (-3, 1, True)
  run = checkpoint_of_run(tmp_path / "run", folder, ours)
  out = convert.to_public(run, tmp_path / "out", source=folder, dataset="bridge_orig")
  _, written = openvla_config.read_statistics(out)
  equal(written, published)
  config.policy.checkpoint = str(out)
  again = pipeline_policy.folder_statistics(config)
  equal(again, ours)
  bins = np.repeat(np.arange(0, 256, 5)[:, None], 7, axis=1)
  first, second = (openvla_files.make_policy(folder, stats=stats).decode(bins) for stats in (ours, again))
  np.testing.assert_array_equal(first, second)
  grip = openvla_files.make_policy(out).decode(bins)[:, -1]  # as public code reads it
  np.testing.assert_array_equal(grip > 0.5, first[:, -1] > 0)


def test_adapters_go_only_with_the_base_that_they_were_trained_on(folder, tmp_path, one_device):
  run = checkpoint_of_run(tmp_path / "run", folder, openvla_config.read_statistics(folder)[1], rank=2)
  adapter = convert.to_peft(run, tmp_path / "adapter", source=folder)
  assert (adapter / "adapter_model.safetensors").exists()
  tensors = public.draw(public.public_shapes(FUSED), seed=1)
  other = public.write(tmp_path / "other", FUSED, tensors)
  for write in (convert.to_peft, convert.to_public):
    with pytest.raises(CheckpointError, match="adapters of a base with digest .*--source .*other has .*: name the pub"):
      write(run, tmp_path / "wrong", source=other)
  assert not (tmp_path / "wrong").exists()


# What a run chooses ----------------------------------------------------------------------------------------

CHOSEN = dict(prompt_length=96, param_dtype="float32", compute_dtype="float16", remat="attention", attention="plain",
              resize="lanczos3", center_crop=True, faithful=True)  # fmt: skip


def from_flags(root: pathlib.Path, preset: str, folder: pathlib.Path, *flags: str) -> ml_collections.ConfigDict:
  """The configuration as the command line makes it."""
  values = absl.flags.FlagValues()
  said = ["main", f"--config={root}/configs/ipi.py:{preset}", f"--config.policy.checkpoint={folder}", *flags]
  config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=said)
  values(said)
  return pipeline_check.resolved(values.config)


@pytest.mark.parametrize("preset", ["openvla_7b", "openvla_7b_lora"])
def test_every_open_field_of_the_policy_is_chosen_on_the_command_line(folder, root, preset):
  assert set(CHOSEN) == set(LEFT_OPEN)
  stats = policies.ActionStats(-np.ones(7, np.float32), np.ones(7, np.float32), np.ones(7, bool))
  flags = [f"--config.policy.options.{name}={value}" for name, value in CHOSEN.items()]
  for flag, (name, value) in zip(flags, CHOSEN.items(), strict=True):
    config = pipeline_policy.make_policy(from_flags(root, preset, folder, flag), stats).config
    assert getattr(config, name) == value, flag
  config = pipeline_policy.make_policy(from_flags(root, preset, folder, *flags), stats).config
  assert {name: getattr(config, name) for name in CHOSEN} == CHOSEN
  # What is not chosen is the folder's or the preset's, and no part of what a run is known by.
  full = {"remat": "block", "param_dtype": "float32", "compute_dtype": "bfloat16"}
  own = full if preset == "openvla_7b" else {"remat": "products"}
  config = from_flags(root, preset, folder)
  assert config.policy.options.to_dict() == own
  made = pipeline_policy.make_policy(config, stats).config
  assert made == openvla_files.make_policy(folder, stats=stats, **own).config and made.llm_width == 32


# A run from a converted folder -----------------------------------------------------------------------------


def run_from(start: pathlib.Path, workdir: pathlib.Path, rank: int = 0, **options) -> pipeline_run.Run:
  """A run whose configuration names a starting point and nothing of the policy but these options."""
  config = toy_run.get_config()
  config.policy.lora.rank = rank
  config.phases, config.init_from = ("preference",), str(start)
  config.policy.size, config.sim.image_size = "7b", 224
  with config.unlocked():
    config.policy.options = ml_collections.ConfigDict(dict(prompt_length=96, **options))
  return pipeline_run.Run(config, workdir)


def test_a_converted_folder_is_all_that_a_run_needs(folder, tmp_path, one_device):
  """Sizes, vocabulary and prompts of the public folder, which may be gone; and what that run saves is as complete."""
  policy, params = openvla_files.load(folder, prompt_length=96)
  params["value"] = jax.tree.map(lambda x: x.astype("bfloat16"), params["value"])
  assert convert.main(["--to-orbax", str(folder), str(tmp_path / "start")]) == 0
  folder.rename(tmp_path / "elsewhere")
  run = run_from(tmp_path / "start", tmp_path / "first")
  started = pipeline_run.starting_params(run, "preference")
  assert run.policy.config == policy.config
  equal(started, params)
  frames = np.full((1, 8, 8, 3), 7, np.uint8)
  for ours, theirs in zip(run.obs(frames), policy.encode(frames, [run.task.instruction]), strict=True):
    np.testing.assert_array_equal(ours, theirs)

  state = train.new_state(started, optax.sgd(0.0), mesh=run.mesh)
  options = dict(total=1, every=1, unit="update", show=())
  pipeline_run.advance_until(run, "preference", state, lambda state, i: (state, {"loss": 0.0}), **options)
  run.close()
  shutil.rmtree(tmp_path / "start")
  saved = tmp_path / "first" / "checkpoints" / "preference"
  again = run_from(saved, tmp_path / "second", remat="none")
  equal(pipeline_run.starting_params(again, "preference"), started)
  assert (again.policy.config.llm_width, again.policy.config.remat) == (policy.config.llm_width, "none")
  np.testing.assert_array_equal(again.obs(frames).prompt, run.obs(frames).prompt)

  with pytest.raises(ConfigError, match="param_dtype = float32, and init_from = .* holds bfloat16: .*--dtype float32"):
    run_from(saved, tmp_path / "third", param_dtype="float32")
  with pytest.raises(ConfigError, match="policy.options.llm_width = 16 and init_from = .*sizes and vocabulary come"):
    run_from(saved, tmp_path / "third", llm_width=16)


def test_adapters_start_on_a_converted_folder(folder, tmp_path, one_device):
  _, params = openvla_files.load(folder)
  convert.to_orbax(folder, tmp_path / "start")
  run = run_from(tmp_path / "start", tmp_path / "run", rank=2)
  started = pipeline_run.starting_params(run, "preference")
  equal(started["base"], {name: x for name, x in params.items() if name != "value"})
  assert started["lora"] and run.policy.trainable("lora/llm/head/a")


def test_checkpoints_without_a_tokenizer_name_the_way(tmp_path, one_device):
  checkpoint.save(tmp_path / "start", 0, {"params": {"w": np.ones(2)}}, {"action_stats": {}})
  with pytest.raises(ConfigError, match=r"needs the tokenizer .*start carries none: .*policy.checkpoint="):
    run_from(tmp_path / "start", tmp_path / "run")
