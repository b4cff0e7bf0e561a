"""Chips that are not here, as devices to compile for: TPU slices and machines with NVIDIA GPUs."""

from __future__ import annotations

import re

import jax
import numpy as np

from stare_jax import roofline

TPU_KINDS = {"TPU v4": "v4", "TPU v5": "v5p", "TPU v5 lite": "v5e", "TPU v6 lite": "v6e"}
# What XLA wants to know of a GPU, from NVIDIA's data sheets and CUDA's table of compute capabilities: multiprocessors,
# their CUDA cores, shared memory and the largest part of it for one block (bytes), L2 (bytes), clock (GHz).
GPUS = {
  "A100": ("8", 108, 64, 167936, 166912, 41943040, 1.41),
  "H100": ("9", 132, 128, 233472, 232448, 52428800, 1.98),
  "H200": ("9", 132, 128, 233472, 232448, 52428800, 1.98),
}


def topology(name: str) -> tuple[roofline.Chip, list[jax.Device]]:
  """The chip and the devices of "v5e:16x16", one device per chip, or of "h100:2x8", two machines with eight GPUs each.

  Raises: ValueError for another name, and where the compiler is not installed.
  """
  version, _, shape = name.partition(":")
  if version.upper() in GPUS:
    return roofline.CHIPS[version.upper()], _gpus(name, version.upper(), shape)
  if version not in roofline.CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
    known = [chip for chip in roofline.CHIPS if chip.startswith("v")]
    raise ValueError(f"topology {name!r}: expected a TPU version of {known} and its shape, such as v5e:16x16 or "
                     f"v4:2x2x4, or a GPU of {[gpu.lower() for gpu in GPUS]} with machines x GPUs, such as h100:2x8")
  options = {"chip_config_name": "megacore"} if version == "v4" else {}  # both cores of a chip as one device
  return roofline.CHIPS[version], _devices(name, "tpu", "make tpu-compiler", topology_name=name, **options)


def _gpus(name: str, kind: str, shape: str) -> list[jax.Device]:
  if not re.fullmatch(r"\d+x\d+", shape) or (count := int(shape.split("x")[0]) * int(shape.split("x")[1])) < 1:
    raise ValueError(f"topology {name!r}: expected machines x GPUs of each, such as {kind.lower()}:2x8")
  if count == 1:
    raise ValueError(f"topology {name!r}: on one GPU attention is cuDNN's, which compiles where that GPU is; "
                     f"--devices=1x{kind} has its memory plan, by formula")
  options = dict(topology_name=name, topology=f"1x{shape}", target_config=_target(kind))
  return _devices(name, "cuda", "make gpu-compiler", **options)


def _target(kind: str) -> str:
  """A GpuTargetConfigProto in words."""
  capability, cores, lanes, shared, of_block, cache, clock = GPUS[kind]
  chip = roofline.CHIPS[kind]
  return f"""
    platform_name: "CUDA" device_description_str: "NVIDIA {kind}" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
    gpu_device_info {{
      cuda_compute_capability {{ major: {capability} }} core_count: {cores} fpus_per_core: {lanes}
      clock_rate_ghz: {clock} device_memory_size: {int(chip.hbm)} memory_bandwidth: {int(chip.bandwidth)}
      l2_cache_size: {cache}
      shared_memory_per_core: {shared} shared_memory_per_block_optin: {of_block} shared_memory_per_block: 49152
      threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    }}"""


def _devices(name: str, platform: str, how: str, **options: str) -> list[jax.Device]:
  from jax.experimental import topologies

  try:
    return list(topologies.get_topology_desc(platform=platform, **options).devices)
  except Exception as error:  # what a missing or unfit compiler raises is not one type
    raise ValueError(f"topology {name!r}: the compiler did not give it ({str(error).splitlines()[0]}). Is it installed "
                     f"({how}), and do these chips come in that shape?") from error


def host(devices: list[jax.Device]) -> list[jax.Device]:
  """The devices of the first process. TPU chips come as a topology of their own: some compile for all of one only."""
  first = [d for d in devices if d.process_index == devices[0].process_index]
  if first[0].platform != "tpu" or len(first) == len(devices):
    return first
  at = np.array([d.coords for d in first])
  shape = np.ptp(at, axis=0) + 1
  version = TPU_KINDS[first[0].device_kind]
  return topology(f"{version}:{'x'.join(str(n) for n in (shape if version in ('v4', 'v5p') else shape[:2]))}")[1]
