"""A configuration that compiles fast, on four chips: for tests of ahead-of-time compilation (no tests here).

  python -m stare_jax.compile --config=tests/nano_pod.py --topology=v5e:2x2 [--config.policy.lora.rank=4]
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from configs import ipi

NANO = dict(
  patch_size=8, dino=dict(width=32, head_size=16, mlp=64), siglip=dict(width=32, head_size=16, mlp=64), projector=64,
  llm_width=64, llm_head_size=16, llm_depth=4, llm_mlp=96, value_hidden=(16, 8), unroll=False, prompt_length=12,
  remat="block", compute_dtype="bfloat16",
)  # fmt: skip


def get_config(arg=""):
  c = ipi.get_config(arg or "smoke")
  with c.unlocked():
    c.sim.image_size = 16
    c.policy.options = NANO
    c.mesh.data, c.mesh.fsdp = 2, 2
    c.preference.micro_batch = 40
  return c
