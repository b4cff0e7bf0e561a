"""What a program would cost elsewhere: counted FLOPs, the reader of compiled programs, the memory plan, the command."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax import checkpoint, compile_programs, policies, roofline, roofline_hlo, sharding, train
from stare_jax.policies import lora
from tests import inspecting, nano_pod

STATS = policies.ActionStats(-np.ones(7, np.float32), np.ones(7, np.float32), np.arange(7) < 6)


def nano(**options):
  return policies.make("openvla", size="tiny", stats=STATS, **{**nano_pod.NANO, "image_size": 16, **options})


def shapes_of(policy, rows):
  params = jax.eval_shape(policy.init, jax.random.key(0))
  c, of = policy.config, jax.ShapeDtypeStruct
  obs = policies.Obs(of((rows, c.image_size, c.image_size, 3), jnp.uint8), of((rows, c.prompt_length), jnp.int32),
                     of((rows, c.prompt_length), bool))  # fmt: skip
  return params, obs, of((rows, c.action_size), jnp.int32)


# FLOPs -----------------------------------------------------------------------------------------------------


def test_counted_flops_are_those_of_the_compiler():
  """Unrolled, so that XLA counts every layer. Its count has elementwise operations too, and a cheaper last layer."""
  policy = nano(unroll=True, remat="none", compute_dtype="float32", llm_width=128, llm_mlp=344, llm_head_size=32)
  arguments = shapes_of(policy, rows=2)
  forward = lambda p, obs, tokens: policy.apply(p, obs, tokens).logits
  compiler = jax.jit(forward).lower(*arguments).compile().cost_analysis()["flops"]
  model = roofline.model_flops(arguments[0], policy.config, 2, backward=False)
  traced = roofline.traced_flops(jax.make_jaxpr(forward)(*arguments))
  assert compiler == pytest.approx(model, rel=0.15)
  assert traced == pytest.approx(compiler, rel=0.15) and traced < compiler


@pytest.mark.parametrize("remat, times", [("none", 3), ("block", 4)])
def test_traced_flops_know_of_scans_and_of_what_is_computed_again(remat, times):
  policy = nano(remat=remat)
  arguments = shapes_of(policy, rows=2)
  forward = lambda p, obs, tokens: jnp.sum(policy.apply(p, obs, tokens).logits)
  once = roofline.traced_flops(jax.make_jaxpr(forward)(*arguments))
  assert once == pytest.approx(roofline.model_flops(arguments[0], policy.config, 2, backward=False), rel=0.02)
  both = roofline.traced_flops(jax.make_jaxpr(jax.grad(forward))(*arguments))
  assert both == pytest.approx(times * once, rel=0.1)  # nothing is differentiated by pixels, or computed again outside


def test_traced_flops_of_loops_of_unknown_length():
  loop = lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: x @ x, x)
  jaxpr = jax.make_jaxpr(loop)(jnp.ones((8, 8)), 3)
  assert roofline.traced_flops(jaxpr, trips=5) == 5 * 2 * 8**3


# Step time -------------------------------------------------------------------------------------------------


def test_step_time_is_the_slowest_of_what_overlaps():
  step = roofline.StepTime(compute=3.0, products=2.0, others=1.0, links=5.0)
  assert (step.chip, step.overlapped, step.serial) == (4.0, 5.0, 9.0)
  assert roofline.StepTime(1.0, 2.0, 0.5, 0.1).overlapped == 2.5


def test_collectives_cost_what_a_ring_moves():
  chip = roofline.CHIPS["v5e"]
  second = chip.links / 2
  assert roofline.collective_seconds("all-gather", second, 4, chip) == pytest.approx(0.75)
  assert roofline.collective_seconds("all-reduce", second, 4, chip) == pytest.approx(1.5)
  assert roofline.collective_seconds("reduce-scatter", second, 1, chip) == 0.0


# Reading compiled programs ---------------------------------------------------------------------------------


def test_collectives_in_a_scan_count_as_often_as_it_runs():
  """Five layers whose weights are cut: five gathers, of the bytes of one layer each; the compiler's text has one."""
  mesh = sharding.make_mesh({"fsdp": 4, "data": 2})
  rows, cut = sharding.batch_sharding(mesh), jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp"))
  layers = jax.ShapeDtypeStruct((5, 64, 32), jnp.float32, sharding=cut)
  x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=rows)

  def forward(x, layers):
    def body(x, w):
      x = sharding.constrain(jnp.tanh(x @ w) @ w.T, "batch", None)
      return x, None

    with sharding.activations(mesh):
      return jax.lax.scan(body, x, layers)[0]

  text = jax.jit(forward, out_shardings=rows).lower(x, layers).compile().as_text()
  computations, entry = roofline_hlo.parse(text)
  found = roofline_hlo.collectives(computations, roofline_hlo.runs(computations, entry, trips=99), mesh.size)
  gathers = [c for c in found if c.kind == "all-gather"]
  assert {(c.times, c.size, c.group) for c in gathers} == {(5, 64 * 32 * 4.0, 4)}
  assert text.count(" all-gather(") == len(gathers)


TPU_TEXT = """\
HloModule sample
%all-reduce-scatter.1 (input: bf16[512,64]) -> bf16[128,64] {
  %input = bf16[512,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.1 = bf16[512,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3}}
  ROOT %piece = bf16[128,64]{1,0} slice(%all-reduce.1), slice={[0:128], [0:64]}
}
%link.1 (param_0: bf16[16,64]) -> bf16[64,64] {
  %param_0 = bf16[16,64]{1,0} parameter(0)
  ROOT %all-gather.7 = bf16[64,64]{1,0:S(1)} all-gather(%param_0), channel_id=9, replica_groups=mesh['a'=2,'b'=4] {'b'}
}
%link.2 (param_0.2: bf16[16,64]) -> bf16[64,64] {
  %param_0.2 = bf16[16,64]{1,0} parameter(0)
  ROOT %all-gather.8 = bf16[64,64]{1,0} all-gather(%param_0.2), channel_id=9, replica_groups=mesh['a'=2,'b'=4] {'b'}
}
%slice_fused (stack: f32[32,100], at: s32[]) -> f32[1,100] {
  %stack = f32[32,100]{1,0} parameter(0)
  %at = s32[] parameter(1)
  ROOT %one = f32[1,100]{1,0} dynamic-slice(%stack, %at, %at), dynamic_slice_sizes={1,100}
}
%outer (stack.2: f32[32,100], at.2: s32[]) -> f32[1,100] {
  %stack.2 = f32[32,100]{1,0} parameter(0)
  %at.2 = s32[] parameter(1)
  ROOT %inner = f32[1,100]{1,0} fusion(%stack.2, %at.2), kind=kLoop, calls=%slice_fused
}
%condition (state: (s32[], bf16[16,64])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %state = (s32[], bf16[16,64]) parameter(0)
  %count = s32[] get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%count, %limit), direction=LT
}
%body (state.1: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %state.1 = (s32[], bf16[16,64]) parameter(0)
  %x = bf16[16,64]{1,0} get-tuple-element(%state.1), index=1
  %first = bf16[64,64]{1,0:S(1)} fusion(%x), kind=kCustom, calls=%link.1
  %second = bf16[64,64]{1,0} fusion(%x), kind=kCustom, calls=%link.2
  %layers = f32[32,100]{1,0} constant({...})
  %i = s32[] get-tuple-element(%state.1), index=0
  %layer = f32[1,100]{1,0} fusion(%layers, %i), kind=kLoop, calls=%outer
  ROOT %next = (s32[], bf16[16,64]) tuple(%i, %x)
}
ENTRY %main (p: bf16[16,64], g: bf16[512,64]) -> bf16[128,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  %g = bf16[512,64]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[16,64]) tuple(%zero, %p)
  %loop = (s32[], bf16[16,64]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[128,64]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_how_a_tpu_writes_its_programs():
  """Loops without a written length, collectives in the links of a chain, fused reduce-scatters, memory spaces, slices
  in fusions inside fusions."""
  computations, entry = roofline_hlo.parse(TPU_TEXT)
  times = roofline_hlo.runs(computations, entry, trips=99)
  assert times["body"] == 7 and times["link.1"] == 7 and times["main"] == 1
  found = sorted(roofline_hlo.collectives(computations, times, 8))
  assert found == [("all-gather", 7, 64 * 64 * 2.0, 4), ("reduce-scatter", 1, 512 * 64 * 2.0, 4)]
  products, others = roofline_hlo.traffic(computations, times)
  links = (16 * 64 * 2) + (16 * 64 * 2 + 64 * 64 * 2)  # what is gathered into S(1) is not in HBM
  layer = 2 * 100 * 4 + 4  # one of the 32 rows, read and written, and where it lies
  counter = 4 + 4 + 1  # two numbers compared
  assert products == 0 and others == 7 * (links + layer + counter) + (512 + 128) * 64 * 2


def test_an_all_to_all_counts_the_whole_array():
  """As the other kinds do; its type is the piece of one device."""
  text = "ENTRY %main {\n  %p = f32[8,64] parameter(0)\n" \
         "  ROOT %out = f32[8,64] all-to-all(%p), channel_id=1, replica_groups=[1,4]<=[4]\n}\n"
  computations, entry = roofline_hlo.parse(text)
  (found,) = roofline_hlo.collectives(computations, roofline_hlo.runs(computations, entry, 1), 4)
  assert found == ("all-to-all", 1, 4 * 8 * 64 * 4.0, 4)


def test_text_that_is_no_program():
  with pytest.raises(ValueError, match="no ENTRY computation: expected a compiled module's as_text"):
    roofline_hlo.parse("nothing")


def test_a_product_of_cublas_is_one_and_its_workspace_no_traffic():
  text = """HloModule m
ENTRY %main (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  %gemm = (bf16[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"
  ROOT %out = bf16[64,16]{1,0} get-tuple-element(%gemm), index=0
}
"""
  computations, entry = roofline_hlo.parse(text)
  times = roofline_hlo.runs(computations, entry, 1)
  assert roofline_hlo.traffic(computations, times) == (2 * (64 * 32 + 32 * 16 + 64 * 16), 0)


# The memory plan -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["block", pytest.param("none", marks=pytest.mark.slow)])
def test_memory_plan_against_the_compiler(remat):
  """State to the byte; activations, of which the compiler fuses some and pads others, to a factor of two."""
  policy = nano(remat=remat, llm_width=128, llm_mlp=344, llm_head_size=32, compute_dtype="float32")
  rows = 16
  params, obs, tokens = shapes_of(policy, rows)
  tx = train.make_optimizer(learning_rate=1e-3)
  loss = lambda p, batch: (lambda x: (train_mean(x), {}))(policy.apply(p, *batch).logits)
  update = train.make_update(loss, tx)
  state = train.abstract_state(params, tx)
  memory = update.lower(state, (obs, tokens)).compile().memory_analysis()
  plan = roofline.memory_plan(params, policy.config, devices=1, rows=rows, remat=remat)
  assert plan["parameters"] + plan["moments"] == pytest.approx(memory.alias_size_in_bytes, rel=0.01)
  work = plan["activations"] + plan["gradients"]
  assert work / 2 < memory.temp_size_in_bytes < 2 * work


def train_mean(x):
  from stare_jax.losses.ops import Mean
  return Mean.of(jnp.square(x), jnp.ones(x.shape, bool))


def test_cache_is_what_act_carries():
  policy = nano()
  _, obs, _ = shapes_of(policy, 3)
  c = policy.config
  expected = 2 * c.llm_depth * 3 * (c.patches + c.prompt_length + 6) * c.llm_width * 2
  assert roofline.cache_bytes(c, 3) == expected


def test_plan_of_a_gpu_names_what_does_not_fit():
  from configs import ipi
  lora, fits = compile_programs.plan(ipi.get_config("openvla_7b_lora"), "1xH100")
  assert fits and lora.count("fits") == 3 and "DOES NOT FIT" not in lora
  alone = ipi.get_config("openvla_7b")
  alone.mesh.fsdp = 1
  text, fits = compile_programs.plan(alone, "1xH100")
  assert "DOES NOT FIT" in text and not fits
  with pytest.raises(ValueError, match="devices '8xB9': expected a number and one of .*'H100'.* such as 8xH100"):
    compile_programs.plan(ipi.get_config("openvla_7b"), "8xB9")


@pytest.mark.parametrize("changes, gpus, message", [
  ({}, "8xH100", "mesh: .*'fsdp': 16.* needs a multiple of 16 devices, this machine shows 8; change config.mesh"),
  ({"mesh.fsdp": -1}, "8xH100", r"mesh: only one axis may be -1, got \['data', 'fsdp'\]"),
  ({"task": "pul_cube"}, "16xH100", 'unknown task "pul_cube"'),
  ({"sim.num_envs": -8}, "16xH100", "sim.num_envs = -8: expected at least 1"),
  ({"imitation.micro_batches": 0}, "16xH100", "imitation.micro_batches = 0: expected at least 1"),
  ({"phases": ("imitaton",)}, "16xH100", 'unknown phase "imitaton"'),
  ({"policy.checkpoint": "/nowhere"}, "16xH100", "/nowhere"),
  ({"mesh.fsdp": 24}, "24xH100", "an axis of .* does not divide over 24 fsdp devices"),
  ({"mesh.fsdp": 8, "interaction.micro_batches": 256}, "8xH100", "interaction.batch = 1024 does not divide over 8"),
])  # fmt: skip
def test_a_plan_refuses_what_a_run_would_refuse(changes, gpus, message):
  from configs import ipi
  config = ipi.get_config("openvla_7b")
  config.update_from_flattened_dict({"imitation.batch": 768 if gpus == "24xH100" else 1024} | changes)
  if gpus == "24xH100":
    config.phases = ("imitation",)
  with pytest.raises((ValueError, checkpoint.CheckpointError), match=message):
    compile_programs.plan(config, gpus)


def test_a_plan_takes_the_rest_of_the_devices_as_a_run_does():
  """fsdp=-1 cuts the parameters over all of them; it counted as 1."""
  from configs import ipi
  config = ipi.get_config("openvla_7b")
  config.mesh.update(data=1, fsdp=-1)
  text, fits = compile_programs.plan(config, "16xH100")
  assert fits and "SFT      64 rows per GPU" in text and "    1.75  parameters" in text and "DOES NOT FIT" not in text


# What a slice of chips needs beside the preset as it is written; docs/scaling.md has the same as a table.
MICRO = ("imitation.micro_batches", "interaction.micro_batches", "preference.micro_batch")
AS_WRITTEN = [("v5e", 128), ("v5e", 256), ("v5p", 16), ("v5p", 32), ("v6e", 32), ("v6e", 64), ("v6e", 256), ("v4", 32),
              ("v4", 64), ("A100", 16), ("H100", 16)]  # fmt: skip
WITH_FLAGS = [
  ("v5e", 64, {"preference.micro_batch": 512}),
  ("v5e", 32, dict(zip(MICRO, (4, 4, 256)))),
  ("v5e", 16, dict(zip(MICRO, (8, 8, 64)))),
  ("v6e", 16, dict(zip(MICRO, (2, 2, 512)))),
  ("v4", 16, dict(zip(MICRO, (2, 2, 512)))),
]


def needed(config, chips: int, chip: str = "tpu") -> float:
  """Bytes on a device for the largest update; raises where the mesh, a rule or a batch does not divide."""
  from stare_jax import config as config_checks
  from stare_jax import pipeline_check, tasks
  config = pipeline_check.resolved(config)
  config_checks.validate(config, tasks.names)
  policy = compile_programs.make_policy(config)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == 7_500_320_160
  pieces = config.mesh.fsdp * config.mesh.tensor
  axes = jax.sharding.AbstractMesh((chips // pieces, config.mesh.fsdp, config.mesh.tensor), sharding.MESH)
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    sharding.param_spec(sharding.path_name(path), x.shape, policy.param_axes, axes)
  pipeline_check.check_batches(config, chips // config.mesh.tensor)
  trainable, most = compile_programs.lora_parameters(config, policy, params), 0.0
  for program in config.phases:
    rows, summed = compile_programs.micro_batch(config, program)
    plan = roofline.memory_plan(params, policy.config, devices=pieces, rows=rows // chips, remat=policy.config.remat,
                                trainable=trainable, summed=summed, apart=chips == 1, chip=chip)  # fmt: skip
    most = max(most, roofline.training_bytes(plan))
  return most


@pytest.mark.parametrize("rows, summed, gib", [
  (16, False, 14.2), (32, False, 20.0), (32, False, 19.3), (32, True, 22.8), (8, True, 14.7), (16, True, 17.7),
  (32, True, 23.5), (50, True, 28.9), (32, True, 23.1),
])  # fmt: skip
def test_memory_plan_against_the_programs_compiled_for_tpus(rows, summed, gib):
  """SFT and StA-TPO of docs/scaling.md, fsdp=16."""
  from configs import ipi
  policy = compile_programs.make_policy(ipi.get_config("openvla_7b"))
  params = jax.eval_shape(policy.init, jax.random.key(0))
  plan = roofline.memory_plan(params, policy.config, devices=16, rows=rows, remat="block", summed=summed)
  assert roofline.training_bytes(plan) / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize("pieces, rows, remat, summed, gib", [
  (16, 16, "block", False, 10.98), (16, 32, "block", False, 14.19), (16, 64, "block", False, 20.70),
  (16, 128, "block", False, 33.75), (16, 32, "attention", False, 27.15), (16, 32, "products", False, 46.17),
  (16, 16, "none", False, 76.85), (16, 32, "block", True, 16.01), (16, 64, "block", True, 22.71),
  (8, 32, "block", False, 21.72), (8, 128, "block", False, 41.28), (8, 128, "block", True, 45.19),
  (32, 32, "block", False, 10.47),
])  # fmt: skip
def test_memory_plan_against_the_programs_compiled_for_gpus(pieces, rows, remat, summed, gib):
  """openvla_7b on fsdp = `pieces`, as `stare_jax.compile --topology=h100:...` has them."""
  from configs import ipi
  policy = compile_programs.make_policy(ipi.get_config("openvla_7b"))
  params = jax.eval_shape(policy.init, jax.random.key(0))
  plan = roofline.memory_plan(params, policy.config, devices=pieces, rows=rows, remat=remat, summed=summed, chip="gpu")
  assert roofline.training_bytes(plan) / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize("apart, rows, remat, summed, gib", [
  (True, 32, "products", False, 51.51), (True, 32, "products", True, 51.94), (True, 32, "block", False, 20.75),
  (True, 8, "block", False, 16.82), (True, 32, "none", False, 67.85), (False, 32, "products", False, 54.31),
  (False, 4, "products", False, 20.45), (False, 32, "block", False, 22.63),
])  # fmt: skip
def test_memory_plan_of_adapters_against_the_programs_compiled_for_gpus(apart, rows, remat, summed, gib):
  """openvla_7b_lora on one GPU, and with mesh.data = 8."""
  from configs import ipi
  config = ipi.get_config("openvla_7b_lora")
  policy = compile_programs.make_policy(config)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  trainable = compile_programs.lora_parameters(config, policy, params)
  plan = roofline.memory_plan(params, policy.config, devices=1, rows=rows, remat=remat, summed=summed, apart=apart,
                              trainable=trainable, chip="gpu")  # fmt: skip
  assert roofline.training_bytes(plan) / 2**30 == pytest.approx(gib, rel=0.05)


@pytest.mark.parametrize("chip, chips", AS_WRITTEN)
def test_slices_that_run_the_7b_preset_as_written(chip, chips):
  from configs import ipi
  kind = "tpu" if chip.startswith("v") else "gpu"
  assert needed(ipi.get_config("openvla_7b"), chips, kind) < 0.95 * roofline.CHIPS[chip].hbm


@pytest.mark.parametrize("chip, chips, flags", WITH_FLAGS)
def test_slices_that_need_smaller_micro_batches(chip, chips, flags, root):
  from configs import ipi
  config = ipi.get_config("openvla_7b")
  assert needed(config, chips) > 0.95 * roofline.CHIPS[chip].hbm
  config.update_from_flattened_dict(flags)
  assert needed(config, chips) < 0.95 * roofline.CHIPS[chip].hbm
  text = " ".join(f"--config.{name}={value}" for name, value in flags.items())
  assert f"| `{text}` |" in (root / "docs" / "scaling.md").read_text()


def test_gpus_of_80_gb_that_run_the_presets(root):
  from configs import ipi
  room = 0.95 * roofline.CHIPS["A100"].hbm
  assert needed(ipi.get_config("openvla_7b_lora"), 1, "gpu") < room
  eight, text = ipi.get_config("openvla_7b"), (root / "docs" / "scaling.md").read_text()
  eight.mesh.fsdp = 8
  assert needed(eight, 8, "gpu") < room and "| 8 A100 or H100 of 80 GB | `--config.mesh.fsdp=8` |" in text


def test_lora_parameters_are_those_of_the_public_recipe():
  """110,828,288 on the public model, dead blocks included; they are not here, so their adapters are not either."""
  from configs import ipi
  config = ipi.get_config("openvla_7b_lora")
  policy = compile_programs.make_policy(config)
  params = jax.eval_shape(policy.init, jax.random.key(0))
  count = compile_programs.lora_parameters(config, policy, params)
  value = sum(x.size for x in jax.tree.leaves(params["value"]))
  r = 32
  dino = r * ((1024 + 3072) + (1024 + 1024) + 2 * (1024 + 4096))
  siglip = r * ((1152 + 3456) + 2 * 1152 + 2 * (1152 + 4304))
  pool = r * (2 * 1152 + (1152 + 2304) + 2 * 1152 + 2 * (1152 + 4304))
  assert count - value == 110_828_288 - dino - siglip - pool


def test_adapters_cost_what_their_products_cost():
  """Acting, traced: forward alone, so the ratio to the base is that of the credited FLOPs, part by part of the tree."""
  config = nano_pod.get_config()
  base = compile_programs.make_policy(config)
  adapted = lora.wrap(base, lora.make(base.config, rank=4))
  traced, credited = [], []
  for policy in (base, adapted):
    this = compile_programs.job(policy, config, "act", jax.devices()[:4])
    params = jax.eval_shape(policy.init, jax.random.key(0))
    traced.append(roofline.traced_flops(this.traced.jaxpr, this.trips))
    credited.append(roofline.model_flops(params, base.config, this.rows, backward=False))
  assert traced[1] - traced[0] == pytest.approx(credited[1] - credited[0], rel=0.02)
  trained = roofline.model_flops(params, base.config, this.rows, backward=True)
  assert trained == pytest.approx(2 * credited[0] + 3 * (credited[1] - credited[0]))


# The programs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", compile_programs.PROGRAMS)
def test_logits_exist_only_where_actions_are(program):
  """No array of a program has the vocabulary beside rows or positions, and action logits have no sequence."""
  config = nano_pod.get_config()
  policy = compile_programs.make_policy(config)
  c = policy.config
  sizes = {c.vocabulary, c.bins, c.patches + c.prompt_length, c.patches + c.prompt_length + 6}
  assert len(sizes) == 4, "sizes that cannot be told apart"
  this = compile_programs.job(policy, config, program, jax.devices()[:4])
  shapes = {tuple(v.aval.shape) for eqn in inspecting.equations(this.traced.jaxpr) for v in eqn.outvars}
  words = {shape for shape in shapes if c.vocabulary in shape}
  assert words <= {(c.vocabulary, c.llm_width)}, words
  logits = [shape for shape in shapes if shape and shape[-1] == c.bins]
  assert logits and all(not set(shape) & {c.patches + c.prompt_length, c.patches + c.prompt_length + 6}
                        for shape in logits)  # fmt: skip
