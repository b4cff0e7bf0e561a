"""python -m stare_jax.convert: a public folder to a checkpoint of a run, and back; what it refuses."""

from __future__ import annotations

import pathlib

import jax
import numpy as np
import public_model as public
import pytest

from stare_jax import checkpoint, convert, pipeline_run, policies, sharding
from stare_jax.policies import openvla_config, openvla_files, openvla_names, sizes
from tests import toy_run

pytestmark = pytest.mark.usefixtures("quick_compile")


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> pathlib.Path:
  """A public folder with both vision transformers, in shards."""
  towers = [public.DINO, public.SIGLIP]
  folder = tmp_path_factory.mktemp("public") / "fused"
  return public.write(folder, towers, public.draw(public.public_shapes(towers)), files=3)


def test_convert_there_and_back(tmp_path, source, capsys):
  out = tmp_path / "orbax"
  assert convert.main(["--to-orbax", str(source), str(out)]) == 0
  assert f"--config.init_from={out}" in capsys.readouterr().out
  _, stats = openvla_config.read_statistics(source)
  assert jax.tree.map(public.bits, pipeline_run.read_statistics(out)) == jax.tree.map(public.bits, stats)
  back = tmp_path / "public"
  assert convert.main(["--to-public", str(out), str(back), "--source", str(source), "--dataset", "mine"]) == 0
  before, after = public.read(source), public.read(back)
  assert {name: public.bits(x) for name, x in before.items()} == {name: public.bits(x) for name, x in after.items()}
  name, again = openvla_config.read_statistics(back)
  assert name == "mine" and jax.tree.map(public.bits, again) == jax.tree.map(public.bits, stats)
  first, second = (openvla_files.load(f)[1]["value"] for f in (source, back))
  assert jax.tree.map(public.bits, first) == jax.tree.map(public.bits, second)


def test_convert_says_what_is_wrong(tmp_path, source, capsys):
  out = tmp_path / "orbax"
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


@pytest.mark.parametrize("flags, words", [
  (("--to-orbax", "a", "b", "--source", "c"), "--source does nothing with --to-orbax; it belongs to --to-public and"),
  (("--to-orbax", "a", "b", "--step", "0"), "--step does nothing with --to-orbax"),
  (("--to-public", "a", "b", "--source", "c", "--unnorm-key", "d"), "--unnorm-key does nothing with --to-public"),
  (("--to-peft", "a", "b", "--source", "c", "--dtype", "float32"), "it belongs to --to-orbax and --to-public"),
  (("--to-peft", "a", "b", "--source", "c", "--dataset", "d"), "--dataset does nothing with --to-peft"),
])  # fmt: skip
def test_a_flag_of_another_command_is_not_taken_silently(flags, words, capsys):
  with pytest.raises(SystemExit):
    convert.main(flags)
  assert words in capsys.readouterr().err


def test_a_run_starts_from_a_converted_folder(tmp_path, monkeypatch, rng):
  """As --config.init_from, through what the pipeline checks."""
  one = jax.devices()[:1]
  monkeypatch.setattr(sharding, "make_mesh", lambda sizes=None, make=sharding.make_mesh: make(dict(data=1), one))
  config = toy_run.get_config()
  with config.unlocked():
    config.policy.options.projector = 128  # 4 x features, as public ones have it
  options = {**config.policy.options.to_dict(), "image_size": config.sim.image_size}
  network = sizes.configure("tiny", options)
  params = openvla_names.nest({
    path: rng.standard_normal(shape).astype(np.float32) for path, shape in openvla_names.shapes(network).items()
  })  # fmt: skip
  stats = policies.ActionStats(q01=-np.ones(7, np.float32), q99=np.ones(7, np.float32), mask=np.arange(7) < 6)
  folder = openvla_files.save(tmp_path / "public", network, params, stats=stats)
  convert.to_orbax(folder, tmp_path / "orbax")
  config.init_from, config.phases = str(tmp_path / "orbax"), ("preference",)
  run = pipeline_run.Run(config, tmp_path / "run")
  started = pipeline_run.starting_params(run, "preference")
  assert jax.tree.map(public.bits, started) == jax.tree.map(public.bits, params)
  assert jax.tree.map(public.bits, run.stats) == jax.tree.map(public.bits, stats)
