"""Ahead-of-time compilation by the compilers of chips that are not here."""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from stare_jax import compile_programs, compile_topology


def tpu_compiler() -> str:
  """The TPU compiler's library, or nothing."""
  beside = pathlib.Path(sys.prefix, "tpu-compiler", "libtpu", "libtpu.so")
  return os.environ.get("TPU_LIBRARY_PATH", "") or (str(beside) if beside.exists() else "")


def compiled(tmp_path, environment, *flags):
  if not tpu_compiler():
    pytest.skip("the TPU compiler is not installed: make tpu-compiler")
  out = tmp_path / "programs.jsonl"
  command = [sys.executable, "-m", "stare_jax.compile", "--config=tests/nano_pod.py", "--topology=v5e:2x2"]
  environment = {**environment, "TPU_LIBRARY_PATH": tpu_compiler()}
  root = pathlib.Path(__file__).resolve().parent.parent
  done = subprocess.run([*command, f"--json={out}", *flags], cwd=root, env=environment, capture_output=True, text=True,
                        check=False)  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  return done.stdout, [json.loads(line) for line in out.read_text().splitlines()]


def check(record, gathers=True, act=0.98):
  assert record["chips"] in (1, 4) and 0 < record["used"] < record["hbm"]
  # Acting has a cache: its prefix does not look at later tokens, which the model counts. With layers apart its last
  # layer computes one position, which is much of a model with four layers.
  assert record["model_flops"] > 0
  assert record["hardware_flops"] >= (act if record["program"] == "act" else 1.0) * record["model_flops"]
  assert 0 < record["mfu_serial"] <= record["mfu_overlapped"] < 1
  if gathers:  # the weights of a layer are gathered where it runs, and their gradients return to their pieces
    assert record["collectives"]["all-gather"]["count"] >= 2 * 4 * 4
    assert record["collectives"]["all-gather"]["bytes"] > 0


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 4])
def test_tpu_compiler_takes_the_sft_update(tmp_path, user_environment, rank):
  text, (record,) = compiled(tmp_path, user_environment, "--program=imitation", f"--config.policy.lora.rank={rank}")
  check(record)
  assert ("lora/llm/head/b" in text) == bool(rank)
  assert "SFT on v5e:2x2: 64 rows on data 2 x fsdp 2 x tensor 1" in text and "4 TPU v5 lite" not in text


def test_a_mesh_may_cut_an_axis_of_the_torus(user_environment):
  """fsdp=8 on 4 x 4 chips is neither axis nor both."""
  if not tpu_compiler():
    pytest.skip("the TPU compiler is not installed: make tpu-compiler")
  code = """
import os
from stare_jax import compile
os.environ.update(compile.compiler_environment())
from stare_jax import compile_topology, sharding
mesh = sharding.make_mesh({"data": -1, "fsdp": 8}, compile_topology.topology("v6e:4x4")[1])
print(dict(mesh.shape), len({device.id for device in mesh.devices.flat}))
"""
  root = pathlib.Path(__file__).resolve().parent.parent
  environment = {**user_environment, "TPU_LIBRARY_PATH": tpu_compiler()}
  done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True,
                        check=False)  # fmt: skip
  assert done.stdout.split("\n")[0] == "{'data': 2, 'fsdp': 8, 'tensor': 1} 16", done.stderr[-2000:]


@pytest.mark.slow
def test_gpu_compiler_takes_every_program(tmp_path, user_environment):
  if not pathlib.Path(sys.prefix, "gpu-compiler").exists():
    pytest.skip("the GPU compiler is not installed: make gpu-compiler")
  out = tmp_path / "programs.jsonl"
  command = [sys.executable, "-m", "stare_jax.compile", "--config=tests/nano_pod.py", "--topology=h100:1x4"]
  root = pathlib.Path(__file__).resolve().parent.parent
  done = subprocess.run([*command, f"--json={out}"], cwd=root, env=user_environment, capture_output=True, text=True,
                        check=False)  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr[-3000:]
  records = [json.loads(line) for line in out.read_text().splitlines()]
  assert [record["program"] for record in records] == list(compile_programs.PROGRAMS)
  for record in records:
    check(record, gathers=False, act=0.85)
    assert record["product_seconds"] > 0 and (record["collectives"]["reduce-scatter"]["count"] >= 5) is (
      record["program"] != "act")  # fmt: skip


@pytest.mark.parametrize("name, words", [
  ("v5e", "expected a TPU version"), ("b100:1x8", "h100:2x8"), ("h100:8", "machines x GPUs of each, such as h100:2x8"),
  ("h100:0x8", "machines x GPUs"), ("h200:1x1", "--devices=1xH200"),
])  # fmt: skip
def test_a_topology_that_is_none_says_what_one_is(name, words):
  with pytest.raises(ValueError, match=re.escape(words)):
    compile_topology.topology(name)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_tpu_compiler_takes_every_program(tmp_path, user_environment, rank):
  _, records = compiled(tmp_path, user_environment, f"--config.policy.lora.rank={rank}")
  assert [record["program"] for record in records] == list(compile_programs.PROGRAMS)
  for record in records:
    check(record, gathers=record["program"] != "act")
