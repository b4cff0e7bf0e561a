"""Runs that train adapters: what their checkpoints hold; a killed one ends as one that was not, bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import safetensors.numpy

from stare_jax import checkpoint, convert, pipeline_policy
from stare_jax.config import ConfigError
from stare_jax.policies import openvla_files
from tests import public_model, toy_lora_run, toy_run

pytestmark = pytest.mark.multiprocess
TOWERS = [public_model.DINO, public_model.SIGLIP]


def config_of(folder=None):
  return "tests/toy_lora_run.py" + (f":{folder}" if folder else "")


def public_folder(path, seed=0):
  return public_model.write(path, TOWERS, public_model.draw(public_model.public_shapes(TOWERS), seed))


def finish(workdir, env, folder, *flags):
  done = toy_run.launch(workdir, env, *flags, config=config_of(folder))
  assert done.returncode == 0, done.stdout + done.stderr
  assert "compiled again" not in done.stderr
  return done.stderr


def kill_in(phase, workdir, env, folder, *flags):
  """Kills the run after three updates of a phase, of which two are in a checkpoint."""
  with (workdir.with_name("killed.log")).open("ab") as log:
    command = toy_run.command(workdir, *flags, config=config_of(folder))
    process = subprocess.Popen(command, cwd=toy_run.ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
  done = lambda: (path := workdir / "metrics.jsonl").exists() and sum(
    json.loads(line)["phase"] == phase for line in path.read_text().split("\n")[:-1]
  )
  while done() < 3:
    assert process.poll() is None, (workdir.with_name("killed.log")).read_text()
    time.sleep(0.002)
  process.send_signal(signal.SIGKILL)
  assert process.wait() == -signal.SIGKILL


def test_a_run_on_a_public_folder_saves_what_it_trains_and_resumes(tmp_path, toy_environment):
  folder, phases = public_folder(tmp_path / "public"), "--config.phases=('imitation',)"
  said = finish(tmp_path / "whole", toy_environment, folder, phases)
  assert "the rest is frozen" in said
  saved = tmp_path / "whole/checkpoints/imitation"
  leaves = checkpoint.read_leaves(saved)
  assert {path.split("/")[1] for path in leaves if path.startswith("params/")} == {"lora", "value"}
  assert not any("base" in path for path in leaves)  # nor moments of it
  assert {x.dtype for x in leaves.values() if x.ndim} == {np.dtype("float32")}
  trained = {path: x for path, x in leaves.items() if path.startswith("params/lora/") and path.endswith("/b")}
  after = checkpoint.restore(saved, {path: jax.ShapeDtypeStruct(x.shape, x.dtype) for path, x in trained.items()},
                             partial=True)[0]  # fmt: skip
  assert sum(np.any(np.asarray(x)) for x in after.values()) == len(trained)  # every adapter has moved from 0
  assert len(checkpoint.read_meta(saved)["base"]) == 64

  # The same adapters scaled otherwise, or in other layers, would be a policy that nobody trained.
  policy = SimpleNamespace(config=openvla_files.folder_config(folder))
  for changed, word in ({"alpha": 8}, "alpha = 4"), ({"targets": r".*layers\.1\..*q_proj"}, "targets = 'all-linear'"):
    config = toy_lora_run.get_config(str(folder))
    pipeline_policy.check_adapters(saved, config, policy)
    config.policy.lora.update(changed)
    with pytest.raises(ConfigError, match=f"were trained with policy.lora.{word}"):
      pipeline_policy.check_adapters(saved, config, policy)

  # The adapters for peft, and merged: the folder differs from its source in the adapted weights alone.
  adapter = convert.to_peft(saved, tmp_path / "adapter", source=folder)
  arrays = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
  name = "language_model.model.layers.1.self_attn.k_proj"
  a, b = (arrays[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
  merged = public_model.read(convert.to_public(saved, tmp_path / "merged", source=folder, dtype="float32"))
  before = public_model.read(folder)
  np.testing.assert_allclose(merged[f"{name}.weight"], before[f"{name}.weight"].astype(np.float32) + b @ a, atol=2e-3)
  assert np.array_equal(merged["language_model.model.embed_tokens.weight"].astype(before[name + ".weight"].dtype),
                        before["language_model.model.embed_tokens.weight"])  # fmt: skip

  kill_in("imitation", tmp_path / "run", toy_environment, folder, phases)
  finish(tmp_path / "run", toy_environment, folder, phases)
  assert toy_run.results(tmp_path / "run") == toy_run.results(tmp_path / "whole")

  shutil.rmtree(folder)
  public_folder(folder, seed=1)  # other weights under the same name
  done = toy_run.launch(tmp_path / "run", toy_environment, phases, "--config.imitation.updates=6",
                        config=config_of(folder))  # fmt: skip
  assert done.returncode == 2 and "CheckpointError" in done.stderr and "adapters of a base" in done.stderr, done.stderr
  assert "Traceback" not in done.stderr


ONE_GPU = """
import runpy
from stare_jax import sharding
from stare_jax.policies import layers
sharding.on_nvidia = lambda *_: True
taken = layers.unstack_and_delete
layers.unstack_and_delete = lambda x: print("APART", x.shape) or taken(x)
runpy.run_module("stare_jax.main", run_name="__main__", alter_sys=True)
"""


def test_a_run_goes_on_where_the_frozen_layers_lie_apart(tmp_path, toy_environment):
  """As on one GPU, though this is a CPU: the same checkpoints, and the same losses up to rounding."""
  folder, phases = public_folder(tmp_path / "public"), "--config.phases=('imitation','preference')"
  finish(tmp_path / "whole", toy_environment, folder, phases)
  shutil.copytree(tmp_path / "whole", tmp_path / "run")
  shutil.rmtree(tmp_path / "run/checkpoints/imitation/00000006")
  shutil.rmtree(tmp_path / "run/checkpoints/preference")
  command = toy_run.command(tmp_path / "run", phases, config=config_of(folder))[3:]
  done = subprocess.run([sys.executable, "-c", ONE_GPU, *command], cwd=toy_run.ROOT, env=toy_environment,
                        capture_output=True, text=True)  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  # Once for each array of two layers, in both phases together: the decoder's, DINO's with its LayerScale, SigLIP's.
  assert done.stdout.count("APART (2, ") == 6 + 14 + 12
  assert "imitation: resuming after 4 of 6 updates" in done.stderr and "compiled again" not in done.stderr
  ours, whole = (toy_run.results(tmp_path / name)["metrics"] for name in ("run", "whole"))
  losses = lambda rows: [(row["phase"], row["step"], row["loss"]) for row in rows]
  for a, b in zip(losses(ours), losses(whole), strict=True):
    assert a[:2] == b[:2] and a[2] == pytest.approx(b[2], rel=1e-4)
  leaves = [checkpoint.read_leaves(tmp_path / name / "checkpoints/preference") for name in ("run", "whole")]
  assert leaves[0] == leaves[1]


@pytest.mark.slow
@pytest.mark.parametrize("public", [True, False])
def test_killed_in_every_phase(tmp_path, toy_environment, public):
  """With interaction.hp.kl_weight above 0, so that the reference is there too; the base is of a folder or the seed."""
  folder = public_folder(tmp_path / "public") if public else None
  finish(tmp_path / "whole", toy_environment, folder)
  for phase in ("imitation", "preference", "interaction"):
    kill_in(phase, tmp_path / "run", toy_environment, folder)
  finish(tmp_path / "run", toy_environment, folder)
  assert toy_run.results(tmp_path / "run") == toy_run.results(tmp_path / "whole")
  leaves = checkpoint.read_leaves(tmp_path / "run/checkpoints/interaction")
  assert any(path.startswith("params/base/") for path in leaves) is not public


@pytest.mark.slow
def test_adapters_start_on_a_run_without_and_on_a_public_policy_as_it_is(tmp_path, toy_environment):
  phases = "--config.phases=('imitation',)"
  assert toy_run.launch(tmp_path / "plain", toy_environment, phases).returncode == 0
  source = tmp_path / "plain/checkpoints/imitation"
  finish(tmp_path / "run", toy_environment, None, "--config.phases=('preference',)", f"--config.init_from={source}")
  leaves = checkpoint.read_leaves(tmp_path / "run/checkpoints/preference")
  same = {path: path.replace("params/", "params/base/") for path in checkpoint.read_leaves(source)
          if path.startswith("params/") and not path.startswith("params/value/")}  # fmt: skip
  read = lambda at, paths, leaves: checkpoint.restore(at, {p: leaves[p] for p in paths}, partial=True)[0]
  before = read(source, same.keys(), checkpoint.read_leaves(source))
  after = read(tmp_path / "run/checkpoints/preference", same.values(), leaves)
  assert all(np.array_equal(before[old], after[new]) for old, new in same.items())

  folder = public_folder(tmp_path / "public")
  flags = ("--config.phases=('preference','interaction')", "--config.policy.unnorm_key=bridge_orig")
  finish(tmp_path / "direct", toy_environment, folder, *flags)
  meta = checkpoint.read_meta(tmp_path / "direct/checkpoints/interaction")
  np.testing.assert_allclose(meta["action_stats"]["q99"], public_model.BRIDGE["q99"], rtol=1e-6)


@pytest.mark.slow
def test_a_run_from_a_converted_folder_is_the_run_on_that_folder(tmp_path, toy_environment):
  """The same losses, though the folder is gone; and the next phase goes on from what that run left."""
  folder, imitation = public_folder(tmp_path / "public"), "--config.phases=('imitation',)"
  finish(tmp_path / "direct", toy_environment, folder, imitation)
  convert.to_orbax(folder, tmp_path / "start")
  shutil.rmtree(folder)
  alone = "--config.policy.checkpoint="
  finish(tmp_path / "run", toy_environment, folder, imitation, alone, f"--config.init_from={tmp_path / 'start'}")
  direct, ours = (toy_run.results(tmp_path / name)["metrics"] for name in ("direct", "run"))
  losses = lambda rows: [(row["step"], row["loss"], row["accuracy"]) for row in rows]
  assert len(ours) == 6 and losses(ours) == losses(direct)  # the value head, which is drawn anew, has no part in them
  shutil.rmtree(tmp_path / "start")
  saved = tmp_path / "run/checkpoints/imitation"
  finish(tmp_path / "next", toy_environment, folder, "--config.phases=('preference',)", alone,
         f"--config.init_from={saved}")  # fmt: skip
  assert (tmp_path / "next/checkpoints/preference/tokenizer.json").exists()
