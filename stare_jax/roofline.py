"""What a program should cost on a machine that is not here: chips, floating-point operations, memory and step time.

The formulas are in docs/scaling.md; `roofline_hlo` reads what the compiler made.

Peak rates are those of the vendors' data sheets: bfloat16 matrix products without sparsity, one direction of the links
of one chip. An interconnect is taken at half of its links, as a ring that runs one way around each axis of the torus.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

from stare_jax import sharding

GIB, GB = 2**30, 1e9
# What a compiled update takes beside the activations that it keeps, in units of those that remat "block" would keep;
# and how many more trees of gradients where they are summed over micro-batches: the loop's, and on a TPU its next one.
# With these the plan meets the programs of docs/scaling.md within 5 %. Layers apart take none of the first.
AT_WORK, SUMS = {"tpu": 1.2, "gpu": 0.2}, {"tpu": 2, "gpu": 1}


class Chip(NamedTuple):
  """flops: bfloat16 per second. hbm: bytes. bandwidth: bytes/s of HBM. links: bytes/s out of the chip, all links."""

  flops: float
  hbm: float
  bandwidth: float
  links: float


CHIPS: dict[str, Chip] = {
  # Google Cloud's documentation of each TPU version.
  "v4": Chip(275e12, 32 * GIB, 1228 * GB, 300 * GB),
  "v5e": Chip(197e12, 16 * GIB, 819 * GB, 200 * GB),
  "v5p": Chip(459e12, 95 * GIB, 2765 * GB, 600 * GB),
  "v6e": Chip(918e12, 32 * GIB, 1640 * GB, 448 * GB),
  # NVIDIA's data sheets of the SXM modules; NVLink in one direction.
  "A100": Chip(312e12, 80 * GB, 2039 * GB, 300 * GB),
  "H100": Chip(989e12, 80 * GB, 3350 * GB, 450 * GB),
  "H200": Chip(989e12, 141 * GB, 4800 * GB, 450 * GB),
}


# Floating-point operations ----------------------------------------------------------------------------------


def forward_flops(params: Any, config: Any, count: int = 7) -> dict[str, float]:
  """FLOPs of one row's forward pass by part of the network: 2 for each weight and position, and attention.

      products   2 * in * out * positions, for every kernel
      attention  4 * positions^2 * width for every layer: scores and weighted values; the causal mask saves nothing

    params: the parameter tree, or its shapes.
    config: the policy's `sizes.Config`.
    count: action tokens with a choice; the last one never enters the network.
  """
  sequence = config.patches + config.prompt_length + count - 1
  out = {"vision": 0.0, "projector": 0.0, "llm": 0.0, "value": 0.0}
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    name = sharding.path_name(path)
    if name.endswith("/kernel"):
      out[name.split("/")[0]] += 2.0 * math.prod(x.shape) * _positions(name, config, count)
  out["head"] = 2.0 * count * config.bins * config.llm_width
  attention = 4.0 * config.llm_depth * sequence**2 * config.llm_width
  visions = [getattr(config, name) for name in params["vision"]]
  attention += sum(4.0 * (v.depth - 1) * (config.patches + v.prefix_tokens) ** 2 * v.width for v in visions)
  return out | {"attention": attention}


def _positions(name: str, config: Any, count: int) -> int:
  """At how many positions of a row the product with a parameter of this name is taken."""
  part, *rest = name.split("/")
  if part == "vision":
    return config.patches + (0 if "patch" in rest else getattr(config, rest[0]).prefix_tokens)
  if part == "llm":
    return count if rest[0] == "head" else config.patches + config.prompt_length + count - 1
  return {"projector": config.patches, "value": 1}[part]


def model_flops(params: Any, config: Any, rows: int, *, backward: bool, count: int = 7) -> float:
  """FLOPs that a program is credited with: forward once, and backward twice of it; nothing for what is computed again.

  So neither rematerialisation nor the first of two passes of a preference gradient counts. With adapters, {"base",
  "lora", "value"} of `lora.start`, backward is once the forward of what is frozen: its weights get no gradient.
  """
  adapters = 0.0
  if frozen := "lora" in params:
    for path, x in jax.tree_util.tree_leaves_with_path(params["lora"]):
      adapters += 2.0 * math.prod(x.shape) * _positions(sharding.path_name(path), config, count)
    params = {**params["base"], "value": params["value"]}
  forward = sum(forward_flops(params, config, count).values())
  return rows * (forward * (3 - frozen) + adapters * 3 if backward else forward + adapters)


def traced_flops(jaxpr: Jaxpr | ClosedJaxpr, trips: int = 1) -> float:
  """FLOPs of all matrix products of a trace, scans times their length, what is computed again included.

  trips: of every loop whose length is known only on the device.
  """
  total = 0.0
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    if eqn.primitive.name == "dot_general":
      (contract, _), _ = eqn.params["dimension_numbers"]
      left = eqn.invars[0].aval.shape
      total += 2.0 * math.prod(eqn.outvars[0].aval.shape) * math.prod(left[i] for i in contract)
      continue
    times = {"scan": eqn.params.get("length", 1), "while": trips}.get(eqn.primitive.name, 1)
    inner = [traced_flops(sub, trips) for sub in jaxprs_in_params(eqn.params)]
    total += times * (max(inner, default=0.0) if eqn.primitive.name == "cond" else sum(inner))
  return total


# Step time --------------------------------------------------------------------------------------------------


class StepTime(NamedTuple):
  """Seconds of one step on each chip.

    compute: all matrix products at peak.
    products, others: HBM traffic of the instructions with matrix products, and of the others.
    links: all collectives.
  """

  compute: float
  products: float
  others: float
  links: float

  @property
  def chip(self) -> float:
    """Without the interconnect: products are as slow as their operations or operands, the others as their operands."""
    return max(self.compute, self.products) + self.others

  @property
  def overlapped(self) -> float:
    """Every collective hidden behind the chip's own work."""
    return max(self.chip, self.links)

  @property
  def serial(self) -> float:
    """No collective hidden."""
    return self.chip + self.links


def collective_seconds(kind: str, size: float, group: int, chip: Chip) -> float:
  """Seconds of one collective on a ring that uses half of a chip's links.

    size: bytes of the whole array on one device: what an all-gather leaves, what a reduce-scatter starts from.
    group: devices that take part.
  """
  share = (group - 1) / group if group > 1 else 0.0
  factor = {"all-gather": share, "reduce-scatter": share, "all-reduce": 2 * share, "all-to-all": share / 2,
            "collective-permute": 1.0}[kind]  # fmt: skip
  return factor * size / (chip.links / 2)


# Memory plan ------------------------------------------------------------------------------------------------


def kept_per_row(config: Any, remat: str, count: int = 7, apart: bool = False) -> float:
  """Bytes of what the layers of one row keep for the backward pass (`layers.REMAT`), with one layer at work.

  Scores that are kept are so in float32 three times over, and in the type of products.

    apart: the last layer of the decoder computes the action's positions alone; attention keeps no scores (`nn.fuses`),
      and everything is what the gradient reads: no q and k before their rotation, no factors of silu.
  """
  item = 2 if config.compute_dtype == "bfloat16" else 4
  fused = apart and item == 2 and config.attention == "auto"
  sequence = config.patches + config.prompt_length + count - 1
  visions = list(config.views.values())
  stacks = [(config.llm_depth - apart, sequence, config.llm_width, 2 * config.llm_mlp, config.llm_mlp,
             config.llm_head_size)]  # fmt: skip
  stacks += [(v.depth - 1, config.patches + v.prefix_tokens, v.width, v.mlp, v.mlp, v.head_size) for v in visions]

  # mlp: what its first products make; middle: what its last one takes, half of that where there is a gate.
  def layer(length: int, width: int, mlp: int, middle: int, head: int, remat: str, score: int) -> float:
    kept = width  # the block's input
    everything = 7 * width + mlp + middle if apart else 10 * width + 2 * mlp
    kept += {"block": 0, "attention": 4 * width, "products": 5 * width + mlp, "none": everything}[remat]
    scores = score * (width // head) * length * length if remat == "none" and not fused else 0
    return kept * length * item + scores

  total = sum(depth * layer(*sizes, remat, score=12 + item) for depth, *sizes in stacks)
  return total + max(layer(*sizes, "none", score=4 + item) for _, *sizes in stacks)  # what is being computed again


def memory_plan(
  params: Any, config: Any, *, devices: int, rows: int, remat: str, trainable: int | None = None, summed: bool = False,
  apart: bool = False, chip: str = "tpu",
) -> dict[str, float]:  # fmt: skip
  """Bytes on each device for an update of `rows` rows per device, and for `act` with as many.

    devices: in how many pieces the parameters are cut (fsdp x tensor).
    trainable: how many parameters are; None is all of them. Gradients and both moments are float32.
    summed: over several micro-batches.
    apart: layers are copied out of their stack, as on one NVIDIA GPU (`layers.stack`); frozen ones count as lying apart
      from the start, as those of `policy.checkpoint` do.
    chip: a key of `AT_WORK`.
  """
  leaves = ((jax.tree_util.keystr(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params))
  copied = [x for path, x in leaves if "layers" in path and trainable is None]
  count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
  size = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(params))
  trained = count if trainable is None else trainable
  item = 2 if config.compute_dtype == "bfloat16" else 4
  extra = trained * 4 if trainable is not None else 0  # the factors themselves, beside the frozen parameters
  layer = size / max(config.llm_depth, 1) if devices > 1 else 0.0  # gathered while it is used
  return {
    "parameters": (size + extra) / devices,
    "gradients": 4.0 * trained / devices,
    "summed gradients": 4.0 * SUMS[chip] * trained / devices if summed else 0.0,
    "moments": 8.0 * trained / devices,
    "one layer, gathered": layer,
    "copied layers": float(sum(math.prod(x.shape) * x.dtype.itemsize for x in copied)) if apart else 0.0,
    "activations": rows * kept_per_row(config, remat, apart=apart),
    "at work": 0.0 if apart else AT_WORK[chip] * rows * kept_per_row(config, "block"),
    "KV cache of act": cache_bytes(config, rows, item),
  }


def cache_bytes(config: Any, rows: int, item: int = 2, count: int = 7) -> float:
  """Bytes of the keys and values of `rows` rows: prefix and action tokens."""
  length = config.patches + config.prompt_length + count - 1
  return 2.0 * config.llm_depth * rows * length * config.llm_width * item


def training_bytes(plan: Mapping[str, float]) -> float:
  """What an update needs at once: everything but the cache."""
  return sum(size for name, size in plan.items() if name != "KV cache of act")
