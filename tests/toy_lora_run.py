"""The main job on the toy simulator with adapters at rank 4: on a base from the seed, or from a public folder (no tests
here).

  python -m stare_jax.main --config=tests/toy_lora_run.py[:FOLDER] --workdir=DIR
"""

from __future__ import annotations

import pathlib
import sys

import ml_collections


def get_config(folder: str = "") -> ml_collections.ConfigDict:
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # a config file is loaded by its path
  from tests import toy_run

  config = toy_run.get_config()
  config.policy.lora.rank, config.policy.lora.alpha = 4, 4
  config.policy.checkpoint = folder
  if folder:
    with config.unlocked():
      config.policy.options = ml_collections.ConfigDict(dict(prompt_length=96, compute_dtype="float32"))
  return config
