"""What the programs of a configuration need on a machine that is not here.

  python -m stare_jax.compile --config=configs/ipi.py:openvla_7b --topology=v5e:16x16     compiled for these TPU chips
  python -m stare_jax.compile --config=configs/ipi.py:openvla_7b --topology=h100:2x8      for 2 machines of 8 GPUs
  python -m stare_jax.compile --config=configs/ipi.py:openvla_7b_lora --devices=1xH100    a memory plan, by formula

With --topology the updates of the three phases and `act` are compiled by the chip's own compiler (`make tpu-compiler`,
`make gpu-compiler`), which needs no such chip; nothing is allocated or run. --program names one of them. --json adds
one line for each program to a file.
Status 0; 2: a mistake in the input, or a program that does not fit, which is told when all of them are there.
"""

from __future__ import annotations

import os
import pathlib
import sys

from absl import app, flags
from ml_collections import config_flags

from stare_jax.config_command import fail, parse

CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/ipi.py:openvla_7b.")
TOPOLOGY = flags.DEFINE_string("topology", "", "Chips, such as v5e:16x16, v5p:2x4x4, v6e:8x8, v4:2x2x4, h100:2x8.")
DEVICES = flags.DEFINE_string("devices", "", "GPUs, such as 8xH100, 1xH200, 8xA100.")
PROGRAM = flags.DEFINE_string("program", "", "One of imitation, preference, interaction, act; by default all.")
JSON = flags.DEFINE_string("json", "", "A file to which each program adds one line.")


def compiler_environment() -> dict[str, str]:
  """What lets the TPU's compiler load without a TPU, without asking a cloud about one, and beside other processes.

  The compilers lie beside the packages, not among them: JAX looks for a TPU wherever it can import libtpu, and for a
  GPU wherever it finds that plugin, and no other command should.
  """
  found = {
    "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-1", "TPU_WORKER_ID": "0",
    "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_MIN_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
  }  # fmt: skip
  library = pathlib.Path(sys.prefix) / "tpu-compiler" / "libtpu" / "libtpu.so"
  return found | ({"TPU_LIBRARY_PATH": str(library)} if library.exists() else {})


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    fail(f"unexpected arguments {argv[1:]}; settings are flags, such as --topology=v5e:16x16")
  if CONFIG.value is None or bool(TOPOLOGY.value) == bool(DEVICES.value):
    fail("give --config=FILE and one of --topology=v5e:16x16 and --devices=8xH100")
  if DEVICES.value and (PROGRAM.value or JSON.value):
    fail("--program and --json go with --topology: a plan by formula is of all phases, and is only printed")
  for name, value in compiler_environment().items():
    os.environ.setdefault(name, value)

  beside = pathlib.Path(sys.prefix) / "gpu-compiler"
  if TOPOLOGY.value and not TOPOLOGY.value.startswith("v") and beside.exists():
    sys.path.insert(0, str(beside))

  from stare_jax import compile_programs  # loads JAX, which reads the environment

  try:
    if DEVICES.value:
      text, fits = compile_programs.plan(CONFIG.value, DEVICES.value)
      print(text)
      sys.exit(0 if fits else 2)
    else:
      chosen = (PROGRAM.value,) if PROGRAM.value else compile_programs.PROGRAMS
      compile_programs.report(CONFIG.value, TOPOLOGY.value, chosen, JSON.value)
  except (ValueError, RuntimeError, OSError) as error:
    fail(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
