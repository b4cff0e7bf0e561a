"""Throughput of the policy: act, and apply with gradient, by size. JSON lines on standard output.

  python benchmarks/policy.py                                 # tiny: act at N = 8 and 16, gradient at N = 64
  python benchmarks/policy.py --options '{"llm_width": 128}'  # any field of the policy's configuration
  python benchmarks/policy.py --free 4                        # only 3 of the motions and the gripper vary
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from stare_jax import policies


def measure(function, args, repeats: int) -> dict[str, float]:
  """Milliseconds per call, wall and processor (all threads), and seconds to compile. Medians."""
  start = time.perf_counter()
  compiled = jax.jit(function).lower(*args).compile()
  seconds = time.perf_counter() - start
  jax.block_until_ready(compiled(*args))
  wall, cpu = [], []
  for _ in range(repeats):
    begin = time.perf_counter(), time.process_time()
    jax.block_until_ready(compiled(*args))
    wall.append(time.perf_counter() - begin[0])
    cpu.append(time.process_time() - begin[1])
  return {
    "wall_ms": round(1e3 * float(np.median(wall)), 2),
    "wall_min_ms": round(1e3 * min(wall), 2),
    "cpu_ms": round(1e3 * float(np.median(cpu)), 2),
    "compile_s": round(seconds, 2),
  }


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="tiny")
  parser.add_argument("--options", default="{}", type=json.loads, help="JSON of configuration fields")
  parser.add_argument("--free", default=7, type=int, help="action dimensions that vary, the gripper among them")
  parser.add_argument("--act", default=[8, 16], type=int, nargs="*", help="rows")
  parser.add_argument("--grad", default=[64], type=int, nargs="*", help="rows")
  parser.add_argument("--repeats", default=10, type=int)
  args = parser.parse_args()

  free = np.array([True] * (args.free - 1) + [False] * (7 - args.free) + [True])
  stats = policies.ActionStats(-np.ones(7), np.where(free, 1.0, -1.0), np.arange(7) < 6)
  ids = lambda text: [5] * len(text.split())  # a stand-in where the vocabulary's files are not here
  policy = policies.make(size=args.size, stats=stats, tokenizer=ids if args.size != "tiny" else None, **args.options)
  params = jax.jit(policy.init)(jax.random.key(0))
  rng = np.random.default_rng(0)

  def obs(n: int) -> policies.Obs:
    images = rng.integers(0, 256, (n, policy.config.image_size, policy.config.image_size, 3), dtype=np.uint8)
    return jax.device_put(policy.encode(images, ["pull the cube to the goal"] * n))

  def loss(params, obs, tokens):
    out = policy.apply(params, obs, tokens)
    logp = jnp.take_along_axis(jax.nn.log_softmax(out.logits), tokens[..., None], axis=-1)
    return jnp.mean(out.value**2) - jnp.mean(logp, where=free[:, None])

  def report(what: str, n: int, function, *inputs) -> None:
    figures = measure(function, inputs, args.repeats)
    row = {"benchmark": f"policy/{what}", "size": args.size, "rows": n, "free": args.free, **figures}
    row |= {"rows_per_s": round(1e3 * n / figures["wall_ms"], 1), "options": args.options}
    row |= {"parameters": sum(x.size for x in jax.tree.leaves(params)), "device": jax.devices()[0].device_kind}
    print(json.dumps(row), flush=True)

  for n in args.act:
    report("act", n, policy.act, params, obs(n), jax.random.split(jax.random.key(1), n), jnp.float32(1.0))
  for n in args.grad:
    tokens = jnp.asarray(rng.integers(0, 256, (n, 7)), jnp.int32)
    report("gradient", n, jax.grad(loss), params, obs(n), tokens)


if __name__ == "__main__":
  main()
