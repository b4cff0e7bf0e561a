"""A public OpenVLA-7B folder with random weights: loading, converting and launching, tried without the real one.

  python -m benchmarks.random_folder openvla-7b-random      # 15 GB, minutes; 982 tensors as openvla/openvla-7b has them
  /usr/bin/time -v python -m stare_jax.convert --to-orbax openvla-7b-random converted

Every tensor that the public file has, in bfloat16, those that this network does without among them: normals of standard
deviation 0.02, ones where a norm has its scale. Action statistics are [-1, 1] under the name "random". There is no
tokenizer.json: copy Llama 2's into it to run a policy.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil

import ml_dtypes
import numpy as np

from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import ActionStats, openvla_config, openvla_names, tensor_files
from stare_jax.policies.openvla_files import SHARD_BYTES
from stare_jax.policies.sizes import SEVEN_B, Config

DTYPE = np.dtype(ml_dtypes.bfloat16)


def write(folder: pathlib.Path, config: Config, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> pathlib.Path:
  """The folder of any size, a tensor at a time. Raises CheckpointError where it exists or the disk has no room."""
  if folder.exists():
    raise CheckpointError(f"{folder} exists already; name a new folder, or remove that one")
  files = tensor_files.shards([tensor_files.Plan(t.name, DTYPE, t.shape) for t in openvla_names.tensors(config)],
                              shard_bytes)  # fmt: skip
  described, processor = openvla_config.config_json(config)
  stats = ActionStats(*(np.full(config.action_size, x, np.float32) for x in (-1, 1)), np.ones(config.action_size, bool))
  texts = {"config.json": described, "preprocessor_config.json": processor,
           "dataset_statistics.json": openvla_config.statistics_json("random", stats)}  # fmt: skip
  texts |= {tensor_files.INDEX: tensor_files.index_of(files)} if len(files) > 1 else {}
  rng = np.random.default_rng(seed)
  size = sum(row.nbytes for rows in files.values() for row in rows)
  with tensor_files.appearing(folder) as partial:
    if (free := shutil.disk_usage(partial).free) < 1.01 * size:
      raise CheckpointError(f"disk full: {folder} needs {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
                            f"choose a folder on another disk. Nothing was written")
    for name, content in texts.items():
      (partial / name).write_text(json.dumps(content, indent=2) + "\n")
    for name, rows in files.items():
      tensor_files.write(partial / name, rows, (drawn(row, rng) for row in rows))
  return folder


def drawn(row: tensor_files.Plan, rng: np.random.Generator) -> np.ndarray:
  if "norm" in row.name and row.name.endswith(".weight"):
    return np.ones(row.shape, row.dtype)
  return (0.02 * rng.standard_normal(row.shape, np.float32)).astype(row.dtype)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--seed", type=int, default=0)
  arguments = parser.parse_args()
  print(f"written: {write(arguments.folder.absolute(), SEVEN_B, arguments.seed)}")


if __name__ == "__main__":
  main()
