"""The comparison with PyTorch says of each case what was measured, and says at once where it cannot measure."""

from __future__ import annotations

import argparse
import fcntl
import json
import types

import jax
import numpy as np
import pytest

from benchmarks import torch_comparison
from stare_jax import policies, sharding

torch = pytest.importorskip("torch")


def small_policy():
  stats = policies.ActionStats(-np.ones(7), np.ones(7), np.arange(7) < 6)
  vision = dict(width=64, depth=2, head_size=64, mlp=64)
  small = torch_comparison.SMALL | dict(image_size=28, dino=vision, siglip=vision, projector=32, llm_depth=1,
                                        llm_width=64, llm_mlp=64)  # fmt: skip
  return policies.make(size="7b", stats=stats, tokenizer=lambda text: [5], **small)


def small_config():
  return small_policy().config


class Side:
  """PyTorch's side on a device that holds 16 rows with gradient checkpointing and 8 without."""

  optimizer = object()

  def __init__(self):
    self.on, self.seen = False, []

  def checkpoint(self, on):
    self.on = on

  def put(self, batch):
    return batch

  def sft(self, batch):
    self.seen.append((len(batch["tokens"]), self.on))
    if len(batch["tokens"]) > 8 and not self.on:
      raise RuntimeError("CUDA out of memory")

  def measure_peak(self, function):
    function()

  def synchronise(self):
    pass


def test_each_case_says_whether_it_was_recomputed(capsys):
  comparison = object.__new__(torch_comparison.Comparison)
  comparison.args = argparse.Namespace(size="small", rank=0, repeats=1, micro=0)
  comparison.cores, comparison.config, comparison.jax, comparison.torch = 1, small_config(), None, Side()
  comparison.turn = torch_comparison.Turn("")
  comparison.device = types.SimpleNamespace(platform="cpu", device_kind="cpu")
  for rows in (8, 16, 8):
    comparison.update("sft", rows)
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["torch_recomputes"] for line in lines] == [False, True, False]
  assert {seen for seen in comparison.torch.seen if seen[0] == 8} == {(8, False)}


def test_nothing_else_compiles_or_is_timed_in_a_turn(tmp_path):
  path = str(tmp_path / "lock")
  turn, other = torch_comparison.Turn(path), open(path)
  fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)  # compiles beside it
  fcntl.flock(other, fcntl.LOCK_UN)
  with turn, pytest.raises(BlockingIOError):
    fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
  fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
  with torch_comparison.Turn(""), torch_comparison.Turn(""):  # without a file nobody waits for anybody
    pass


@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_compiled_for_is_what_is_drawn(rank, monkeypatch):
  """On one GPU, where frozen layers lie apart."""
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  comparison = object.__new__(torch_comparison.Comparison)
  comparison.args, comparison.torch = argparse.Namespace(size="7b", rank=rank, micro=0), None
  comparison.policy, comparison.config = small_policy(), small_policy().config
  side = comparison.our_side()
  parts = [side.shapes["llm"], *side.shapes["vision"].values()]
  assert {isinstance(part["layers"], list) for part in parts} == {rank > 0}
  kinds = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert kinds(side.shapes) == kinds(side.params)
  assert kinds(jax.eval_shape(side.start, side.shapes)) == kinds(side.start(side.params))


def test_an_update_in_micro_batches_is_the_update():
  comparison = object.__new__(torch_comparison.Comparison)
  comparison.policy, comparison.config, comparison.torch = small_policy(), small_config(), None
  batch = torch_comparison.batch_of(comparison.config, 4)

  def once(micro):
    comparison.args = argparse.Namespace(size="7b", rank=2, micro=micro)
    side = comparison.our_side()
    return side.update("ppo", side.put(batch))[0]()

  whole, cut = once(0), once(2)
  assert set(cut) == set(whole)
  for name, value in whole.items():
    assert cut[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
  with pytest.raises(SystemExit, match="--micro 3 does not divide --update 4"):
    once(3)


def test_checkpointing_can_be_undone():
  from benchmarks.torch_side import Torch
  side = Torch(small_config(), device="cpu")
  llm = side.model.language_model
  for on in (True, False):
    side.checkpoint(on)
    assert (llm.is_gradient_checkpointing, llm.training) == (on, on)


def test_a_torch_without_cuda_is_told_before_anything_is_built(monkeypatch):
  monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
  with pytest.raises(SystemExit, match="JAX runs on a gpu, and torch .* finds no CUDA device.*--sides jax"):
    torch_comparison.check_torch("gpu")
  torch_comparison.check_torch("cpu")
