"""Lowers and compiles the programs of a configuration for chips that are not here, and reads what came out."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from stare_jax import pipeline_policy, pipeline_updates, policies, rollout, roofline, roofline_hlo, sharding, train
from stare_jax.compile_topology import host, topology
from stare_jax.config import ConfigError
from stare_jax.pipeline_check import check_batches, check_fields, resolved
from stare_jax.policies import lora, openvla_files

PROGRAMS = ("imitation", "preference", "interaction", "act")
SMALLER = "use smaller micro-batches, more devices or LoRA"
PARTS = {"imitation": "SFT", "preference": "StA-TPO", "interaction": "StA-PPO", "act": "act"}


def make_policy(config: Any) -> policies.Policy:
  """The policy of a configuration, without adapters, from shapes: tokenizer and statistics change none."""
  c, options = config.policy, resolved(config).policy.options.to_dict()
  unit = np.ones(7, np.float32)
  stats = policies.ActionStats(-unit, unit, unit > 0)
  if c.checkpoint:
    sizes = openvla_files.folder_config(c.checkpoint, options)
    return policies.make(c.name, size=sizes, stats=stats, tokenizer=lambda text: [1])
  tokenizer = {} if c.size == "tiny" else {"tokenizer": lambda text: [1]}
  return policies.make(c.name, size=c.size, stats=stats, image_size=config.sim.image_size, **options, **tokenizer)


# Arguments without values -----------------------------------------------------------------------------------


def _rows(mesh: Mesh, *shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.batch_sharding(mesh))


def _obs(policy: policies.Policy, mesh: Mesh, *lead: int) -> policies.Obs:
  size, length = policy.config.image_size, policy.config.prompt_length
  return policies.Obs(
    image=_rows(mesh, *lead, size, size, 3, dtype=jnp.uint8),
    prompt=_rows(mesh, *lead, length, dtype=jnp.int32),
    prompt_mask=_rows(mesh, *lead, length, dtype=bool),
  )


def batch(policy: policies.Policy, config: Any, program: str, mesh: Mesh, stages: int = 3) -> Any:
  """Shapes, dtypes and places of a phase's batch, as the pipeline puts it on the mesh."""
  actions = policy.config.action_size
  if program == "imitation":
    n = config.imitation.batch
    return {"obs": _obs(policy, mesh, n), "tokens": _rows(mesh, n, actions, dtype=jnp.int32)}
  if program == "interaction":
    n = config.interaction.batch
    names = ("advantage", "returns", "value")
    flat = {name: _rows(mesh, n) for name in names} | {"valid": _rows(mesh, n, dtype=bool)}
    flat |= {"log_prob": _rows(mesh, n, actions), "tokens": _rows(mesh, n, actions, dtype=jnp.int32)}
    if config.interaction.hp.kl_weight:
      flat["ref_log_prob"] = _rows(mesh, n, actions)
    return flat | {"obs": _obs(policy, mesh, n)}
  b, t = config.preference.batch, max(resolved(config).preference.buckets)
  pairs = {
    "stage_id": _rows(mesh, 2 * b, t, dtype=jnp.int32), "cost": _rows(mesh, 2 * b, stages),
    "sign": _rows(mesh, b, stages, dtype=jnp.int8), "overall": _rows(mesh, b, dtype=jnp.int8),
  }  # fmt: skip
  return train.PreferenceBatch(
    obs=_obs(policy, mesh, 2 * b, t), tokens=_rows(mesh, 2 * b, t, actions, dtype=jnp.int32),
    valid=_rows(mesh, 2 * b, t, dtype=bool), ref_log_prob=_rows(mesh, 2 * b, t), pairs=pairs,
  )  # fmt: skip


def abstract_params(policy: policies.Policy, mesh: Mesh) -> Any:
  shapes = jax.eval_shape(policy.init, jax.random.key(0))
  places = sharding.shardings(shapes, policy.param_axes, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, places)


@dataclasses.dataclass(frozen=True)
class Job:
  """A program to compile. rows: forward passes in one step; trips: of loops whose length only the device knows."""

  traced: Any
  rows: int
  trips: int
  backward: bool
  mesh: Mesh


def job(policy: policies.Policy, config: Any, program: str, devices: Sequence[jax.Device]) -> Job:
  """The program as the pipeline builds it, with abstract arguments."""
  if program not in PROGRAMS:
    raise ValueError(f"program {program!r}: expected one of {PROGRAMS}")
  if program == "act":
    return _act_job(policy, config, devices)
  mesh = sharding.make_mesh(dict(config.mesh), devices)
  section = config[program]
  tx, update = getattr(pipeline_updates, program)(policy, section, mesh, policy.param_axes)
  params = abstract_params(policy, mesh)
  state = train.abstract_state(params, tx, mesh=mesh, param_axes=policy.param_axes, trainable=policy.trainable)
  traced = update.trace(state, batch(policy, config, program, mesh))
  if program != "preference":
    return Job(traced, section.batch, 1, True, mesh)
  shape = (2 * section.batch, max(resolved(config).preference.buckets))
  return Job(traced, math.prod(shape), train.most_trips(shape, section.micro_batch), True, mesh)


def _act_job(policy: policies.Policy, config: Any, devices: Sequence[jax.Device]) -> Job:
  """`act` on the chips of one host: every process acts for its own simulators."""
  mesh = sharding.make_mesh(dict(config.mesh), devices)
  local, hosts = host(devices), len({device.process_index for device in devices})
  own = sharding.acting_mesh(mesh, devices[0].process_index)
  own = sharding.make_mesh({"data": 1}, local[:1]) if own is None else sharding.make_mesh(dict(own.shape), local)
  n = max(config.sim.num_envs // config.sim.groups // hosts, 1)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  places = sharding.acting_shardings(params, policy.param_axes, own)
  kind = lambda path, x: policy.acts_in(sharding.path_name(path), x) if policy.acts_in else x.dtype
  params = jax.tree_util.tree_map_with_path(
    lambda path, x, s: jax.ShapeDtypeStruct(x.shape, kind(path, x), sharding=s), params, places
  )
  whole = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(own))
  obs = jax.tree.map(lambda x: whole(x.dtype, *x.shape), _obs(policy, own, n))
  key = whole(jax.random.key(0).dtype)
  traced = rollout.act_program(policy, own).trace(params, obs, key, *[whole(jnp.uint32, n)] * 3, whole(jnp.float32))
  return Job(traced, n, 1, False, own)


# What came out ----------------------------------------------------------------------------------------------


def measure(policy: policies.Policy, name: str, program: str, this: Job, chip: roofline.Chip) -> dict[str, Any]:
  """Compiles one program: memory, collectives, FLOPs and modelled step time, as one flat record.

  Raises: RuntimeError where the compiler refuses the program, as those of TPUs do with one that does not fit.
  """
  try:
    compiled = this.traced.lower().compile()
  except jax.errors.JaxRuntimeError as error:
    raise RuntimeError(f"{program} on {name} does not compile: {str(error).splitlines()[0]}") from error
  memory = compiled.memory_analysis()
  used = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
  used += memory.generated_code_size_in_bytes - memory.alias_size_in_bytes
  computations, entry = roofline_hlo.parse(compiled.as_text())
  times = roofline_hlo.runs(computations, entry, this.trips)
  moved = roofline_hlo.collectives(computations, times, this.mesh.size)
  products, others = roofline_hlo.traffic(computations, times)
  config, count = policy.config, int(np.flatnonzero(policy.free)[-1]) + 1
  params = jax.eval_shape(policy.init, jax.random.key(0))
  model = roofline.model_flops(params, config, this.rows, backward=this.backward, count=count)
  hardware = roofline.traced_flops(this.traced.jaxpr, this.trips)
  links = sum(c.times * roofline.collective_seconds(c.kind, c.size, c.group, chip) for c in moved)
  step = roofline.StepTime(
    compute=hardware / this.mesh.size / chip.flops, products=products / chip.bandwidth, others=others / chip.bandwidth,
    links=links,
  )  # fmt: skip
  by_kind: dict[str, list[float]] = collections.defaultdict(lambda: [0, 0.0])
  for c in moved:
    by_kind[c.kind][0] += c.times
    by_kind[c.kind][1] += c.times * c.size
  ideal = model / this.mesh.size / chip.flops
  return {
    "topology": name, "program": program, "mesh": dict(this.mesh.shape), "rows": this.rows, "chips": this.mesh.size,
    "arguments": memory.argument_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "used": used, "hbm": chip.hbm,
    "collectives": {kind: {"count": int(n), "bytes": size} for kind, (n, size) in sorted(by_kind.items())},
    "model_flops": model, "hardware_flops": hardware, "compute_seconds": step.compute,
    "product_seconds": step.products, "other_seconds": step.others, "link_seconds": step.links,
    "serial_seconds": step.serial, "overlapped_seconds": step.overlapped, "mfu_serial": ideal / step.serial,
    "mfu_overlapped": ideal / step.overlapped,
  }  # fmt: skip


def describe(record: dict[str, Any]) -> str:
  """A record in words."""
  gib = lambda size: f"{size / 2**30:.2f} GiB"
  mesh = " x ".join(f"{name} {size}" for name, size in record["mesh"].items())
  lines = [
    f"{PARTS[record['program']]} on {record['topology']}: {record['rows']} rows on {mesh}",
    f"  memory       {gib(record['used'])} of {gib(record['hbm'])} per chip: arguments {gib(record['arguments'])}, "
    f"temporaries {gib(record['temporaries'])}",
  ]
  lines += [
    f"  {kind:<12} {c['count']} times, {gib(c['bytes'])} per chip" for kind, c in record["collectives"].items()
  ]
  lines += [
    f"  FLOPs        model {record['model_flops']:.3e}, hardware {record['hardware_flops']:.3e}",
    f"  seconds      compute {record['compute_seconds']:.3f}, HBM {record['product_seconds']:.3f} with products and "
    f"{record['other_seconds']:.3f} without, links {record['link_seconds']:.3f}",
    f"  step         {record['serial_seconds']:.3f} s with no collective hidden, {record['overlapped_seconds']:.3f} s "
    f"with all of them",
    f"  MFU          {100 * record['mfu_serial']:.1f} % to {100 * record['mfu_overlapped']:.1f} %",
  ]
  return "\n".join(lines)


def report(config: Any, name: str, programs: Sequence[str], path: str = "") -> list[dict[str, Any]]:
  """Compiles the programs one by one and prints each as soon as it is known; `path` collects JSON lines.

  Raises: ConfigError for what a run would refuse; RuntimeError where a program does not fit into a chip's memory.
  """
  check_fields(config)
  if "suites" in config and tuple(programs) != ("act",):
    raise ConfigError("an evaluation trains nothing: add --program=act")
  policy = make_policy(config)
  if config.policy.lora.rank:
    policy = lora.wrap(policy, pipeline_policy.adapters(config, policy))
  chip, devices = topology(name)
  check_batches(config, sharding.batch_shards(sharding.make_mesh(dict(config.mesh), devices)))
  records = []
  for program in programs:
    this = job(policy, config, program, devices)
    if program == programs[0]:
      params = jax.eval_shape(policy.init, jax.random.key(0))
      print(sharding.table(params, sharding.shardings(params, policy.param_axes, this.mesh), this.mesh, rows=3))
    records.append(measure(policy, name, program, this, chip))
    print(describe(records[-1]), flush=True)
    if path:
      with pathlib.Path(path).open("a") as file:
        file.write(json.dumps(records[-1]) + "\n")
  if large := [PARTS[r["program"]] for r in records if r["used"] > r["hbm"]]:
    raise RuntimeError(f"{', '.join(large)}: more than the {chip.hbm / 2**30:.1f} GiB of a chip; {SMALLER}")
  return records


# GPUs: by formula -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Absent:
  """A GPU that is not here, in the place of a `jax.Device`: enough to make a mesh of."""

  id: int
  device_kind: str
  platform: str = "gpu"
  process_index: int = 0


def plan(config: Any, text: str) -> tuple[str, bool]:
  """The memory plan of "8xH100" in words, of the phases that run, and whether all of them fit.

  Raises: ValueError for what is not "NxGPU", and for a mesh or a batch with which a run would not start there either.
  """
  found = re.fullmatch(r"(\d+)x(\w+)", text)
  gpus = [name for name in roofline.CHIPS if not name.startswith("v")]
  if found is None or found[2] not in gpus or int(found[1]) < 1:
    raise ValueError(f"devices {text!r}: expected a number and one of {gpus}, such as 8xH100")
  check_fields(config)
  if "suites" in config:
    raise ConfigError("an evaluation trains nothing, and a plan is of updates: see --topology and --program=act")
  devices, chip = int(found[1]), roofline.CHIPS[found[2]]
  policy = make_policy(config)
  mesh = sharding.make_mesh(dict(config.mesh), [Absent(i, found[2]) for i in range(devices)])
  shards = sharding.batch_shards(mesh)
  check_batches(config, shards)
  params = abstract_params(policy, mesh)
  lines = [f"memory plan of {config.preset} on {devices} x {found[2]}, {chip.hbm / 2**30:.1f} GiB each; in GiB per GPU"]
  trainable, all_fit = lora_parameters(config, policy, params), True
  for program in config.phases:
    rows, summed = micro_batch(config, program)
    here = rows // shards
    sizes = roofline.memory_plan(
      params, policy.config, devices=mesh.shape["fsdp"] * mesh.shape["tensor"], rows=here, remat=policy.config.remat,
      trainable=trainable, summed=summed, apart=devices == 1, chip="gpu",
    )  # fmt: skip
    total = roofline.training_bytes(sizes)
    fits = total < 0.9 * chip.hbm
    all_fit &= fits
    verdict = "fits" if fits else f"DOES NOT FIT: {SMALLER}"
    lines.append(f"{PARTS[program]:<8} {here} rows per GPU: {total / 2**30:.1f}, {verdict}")
    lines += [f"  {size / 2**30:8.2f}  {name}" for name, size in sizes.items()]
  return "\n".join(lines), all_fit


def micro_batch(config: Any, program: str) -> tuple[int, bool]:
  """(rows of one micro-batch on all devices, whether the gradients of several are summed) of a phase's update."""
  section = config[program]
  if program == "preference":
    steps = 2 * section.batch * max(resolved(config).preference.buckets)
    return min(section.micro_batch, steps), steps > section.micro_batch
  return section.batch // section.micro_batches, section.micro_batches > 1


def lora_parameters(config: Any, policy: policies.Policy, params: Any) -> int | None:
  """Trainable parameters under `policy.lora`, with the value head; None without adapters."""
  if not config.policy.lora.rank:
    return None
  value = sum(math.prod(x.shape) for x in jax.tree.leaves(params["value"]))
  return pipeline_policy.adapters(config, policy).size + value
