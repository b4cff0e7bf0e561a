"""What runs otherwise on an NVIDIA GPU: attention in one kernel, layers taken apart, what the compiler is told."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from stare_jax import pipeline_policy, policies, sharding
from stare_jax.policies import layers as nn
from stare_jax.policies import lora, openvla
from tests import inspecting
from tests.test_policy import jit, nano, some_obs, some_tokens

# Length, head size, whether there is a mask: the decoder's, one of odd length, both vision transformers'.
SHAPES = [(20, 128, True), (13, 128, True), (21, 64, False), (16, 72, False)]


def case(length, size, masked, dtype=jnp.float32):
  """Queries, keys, values, what comes back [2, 3, length, size], and the mask: causal, with padding in every row."""
  arrays = [jnp.asarray(x, dtype) for x in np.random.default_rng(0).normal(size=(4, 2, 3, length, size))]
  seen = np.tril(np.ones((length, length), bool)) & (np.arange(length) != np.array([[3], [5]]))[:, None, None]
  return *arrays, jnp.asarray(seen) if masked else None


def with_gradients(function, q, k, v, back):
  out, pull_back = jax.vjp(function, q, k, v)
  return out, *pull_back(back.transpose(0, 2, 1, 3).astype(out.dtype))


@pytest.mark.parametrize("length, size, masked", SHAPES)
def test_fused_attention_is_attention(length, size, masked):
  """Around the kernel: axes, the scale, the position that makes a length even. The kernel here is not cuDNN's."""
  *arrays, seen = case(length, size, masked)
  plain = with_gradients(lambda q, k, v: nn.plain_attention(q, [(k, v)], seen), *arrays)
  fused = with_gradients(lambda q, k, v: nn.fused_attention(q, k, v, seen, causal=masked, kernel="xla"), *arrays)
  assert fused[0].shape == (2, length, 3, size)
  for ours, reference in zip(fused, plain, strict=True):
    np.testing.assert_allclose(ours, reference, atol=2e-5)


def test_the_policy_by_the_fused_kernel_is_the_policy(monkeypatch):
  """Which is told where it may take the decoder's attention for causal. The kernel here is not cuDNN's."""
  policy, params, *_ = nano(unroll=True)
  obs, tokens, keys = some_obs(policy), some_tokens(), jax.random.split(jax.random.key(3), 3)

  def everything():
    loss = lambda p: jnp.sum(policy.apply(p, obs, tokens).logits[..., 3])
    return jit(jax.grad(loss))(params), jax.jit(lambda: policy.act(params, obs, keys, jnp.float32(1.0)))()

  plain, told, kernel = everything(), [], nn.fused_attention
  monkeypatch.setattr(nn, "fuses", lambda *_: True)
  fake = lambda q, k, v, seen, causal: told.append(causal) or kernel(q, k, v, seen, causal, "xla")
  monkeypatch.setattr(nn, "fused_attention", fake)
  fused = everything()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), fused, plain)
  assert set(told) == {True, False}  # not in the decoder's last layer, whose queries are the last ones alone


def test_rotation_is_one_on_every_device(monkeypatch):
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 5, 8)), jnp.bfloat16)
  rope = nn.rotation(jnp.asarray(np.random.default_rng(1).integers(0, 9, (2, 5))), 9, 8, 10000.0)
  both = lambda: jax.vjp(lambda y: nn.rotate(y, rope), x)
  (out, pull_back), cotangent = both(), x[::-1]
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  turned, pull_turned = both()
  np.testing.assert_array_equal(turned, out)
  np.testing.assert_array_equal(*pull_back(cotangent), *pull_turned(cotangent))


def test_last_queries_may_be_odd_in_number():
  q, k, v, _, seen = case(20, 64, True)
  fused = nn.fused_attention(q[:, :, -7:], k, v, seen[:, :, -7:], kernel="xla")
  np.testing.assert_allclose(fused, nn.plain_attention(q, [(k, v)], seen)[:, -7:], atol=2e-5)


def with_adapters(policy, params, targets="all-linear"):
  adapters = lora.make(policy.config, rank=2, targets=targets)
  factors = lora.init(adapters, jax.random.key(5))
  factors = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), factors)
  base = {name: x for name, x in params.items() if name != "value"}
  return lora.wrap(policy, adapters), {"base": base, "lora": factors, "value": params["value"]}


@pytest.mark.parametrize("adapted", [False, True])
def test_act_with_layers_apart_is_act(adapted, monkeypatch):
  policy, params, *_ = nano()
  if adapted:
    policy, params = with_adapters(policy, params)
  inputs = (params, some_obs(policy), jax.random.split(jax.random.key(3), 3), jnp.float32(1.0))
  depth, width = policy.config.llm_depth, policy.config.llm_width
  by_index = f"(tensor<{depth}x{width}x3x{width}xf32>, tensor<i32>"  # a layer cut out of its stack, which is a copy
  program = jax.jit(policy.act)
  scanned = program(*inputs)
  assert by_index in program.lower(*inputs).as_text()
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  program = jax.jit(lambda *inputs: policy.act(*inputs))
  apart = program(*inputs)
  assert by_index not in program.lower(*inputs).as_text()
  np.testing.assert_array_equal(apart.tokens, scanned.tokens)
  np.testing.assert_allclose(apart.log_prob, scanned.log_prob, atol=1e-5)
  np.testing.assert_allclose(apart.value, scanned.value, atol=1e-5)


def test_frozen_layers_that_lie_apart_act_and_learn_as_their_stack(monkeypatch):
  """As a run on one GPU keeps them; adapters stay stacked, and so do their gradients."""
  policy, params = with_adapters(*nano()[:2], "q_proj,down_proj")
  params = jax.tree.map(jnp.copy, params)  # others have theirs from the same cache
  obs, tokens, keys = some_obs(policy), some_tokens(), jax.random.split(jax.random.key(3), 3)
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  acted = jax.jit(lambda p: policy.act(p, obs, keys, jnp.float32(1.0)))
  loss = lambda own, base: jnp.sum(policy.apply({"base": base, **own}, obs, tokens).logits[..., 3])
  learnt = jit(jax.grad(loss))
  own = {name: params[name] for name in ("lora", "value")}
  expected = acted(params), policy.value(params, obs), learnt(own, params["base"])
  stacks = jax.tree.leaves(params["base"]["llm"]["layers"])
  base = openvla.layers_apart(params["base"], nn.unstack_and_delete)
  assert all(x.is_deleted() for x in stacks)
  assert len(base["llm"]["layers"]) == policy.config.llm_depth
  assert all(isinstance(view["layers"], list) for view in base["vision"].values())
  assert openvla.layers_apart(base)["llm"]["layers"] is base["llm"]["layers"]
  apart = {**params, "base": base}
  found = acted(apart), policy.value(apart, obs), learnt(own, base)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected)
  assert jax.tree.structure(found[2]) == jax.tree.structure(own)


@pytest.mark.parametrize("adapted", [False, True])
def test_an_evaluation_alone_takes_the_layers_apart_once(adapted, monkeypatch):
  policy, params, *_ = nano()
  policy, params = with_adapters(policy, params) if adapted else (policy, params)
  params = jax.tree.map(jnp.copy, params)
  mesh = sharding.make_mesh({}, jax.devices()[:1])
  assert pipeline_policy.for_acting_alone(policy, params, mesh) is params
  inputs = some_obs(policy), jax.random.split(jax.random.key(3), 3), jnp.float32(1.0)
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  faithful = policy._replace(config=dataclasses.replace(policy.config, faithful=True))
  assert pipeline_policy.for_acting_alone(faithful, params, mesh) is params
  expected = jax.jit(policy.act)(params, *inputs)
  stacks = jax.tree.leaves(params.get("base", params)["llm"]["layers"])
  program = jax.jit(policy.act).lower(apart := pipeline_policy.for_acting_alone(policy, params, mesh), *inputs)
  assert all(x.is_deleted() for x in stacks)
  found = program.compile()(apart, *inputs)
  np.testing.assert_array_equal(found.tokens, expected.tokens)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def gradient_program(**options):
  policy, params, *_ = nano(**options)
  obs, tokens = some_obs(policy), some_tokens()
  return jit(jax.grad(lambda p: policy.apply(p, obs, tokens).logits[..., 3].sum())).lower(params)


@pytest.mark.parametrize("targets", ["q_proj,v_proj,up_proj", pytest.param("all-linear", marks=pytest.mark.slow)])
def test_the_gradient_on_one_gpu_is_that_of_a_scan(targets, monkeypatch):
  policy, params, *_ = nano(remat="products")
  policy, params = with_adapters(policy, params, targets)
  obs, tokens = some_obs(policy), some_tokens()
  own = {name: params[name] for name in ("lora", "value")}

  def loss(own):
    out = policy.apply({**params, **own}, obs, tokens)
    return jnp.sum(jax.nn.log_softmax(out.logits)[..., 3]) + jnp.sum(out.value)

  traced = lambda: inspecting.primitives(jax.value_and_grad(loss), own)
  compiled = lambda: jit(jax.value_and_grad(loss))(own)
  assert "scan" in traced()
  scanned = compiled()
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  assert "scan" not in traced()
  with sharding.activations(sharding.make_mesh({"data": -1}, jax.devices()[:2])):  # of several GPUs
    assert "scan" in traced()
  apart = compiled()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), apart, scanned)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(apart))


def test_layers_apart_keep_what_they_are_told_and_no_more():
  """A compiler that sees that two products are one would keep what was to be computed again, and run out of memory."""
  products, width = {}, nano()[0].config.llm_width
  kernel = f"tensor<{width}x3x{width}xf32>"
  for remat in ("none", "products", "block"):
    program = gradient_program(unroll=True, remat=remat)
    products[remat] = len(re.findall(r" (?:dot|custom-call)\(", program.compile().as_text()))
    hidden = [line for line in program.as_text().splitlines() if "optimization_barrier" in line]
    assert bool(hidden) is (remat != "none")
    assert kernel in program.as_text() and not any(kernel in line for line in hidden)  # or it would be copied
  assert products["none"] < products["products"] < products["block"]


@pytest.mark.parametrize("causal", [False, True])
def test_the_kernel_is_told_what_it_need_not_look_at(causal, monkeypatch):
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: None)
  q, k, v, _, seen = case(20, 64, True, jnp.bfloat16)
  program = jax.make_jaxpr(lambda *x: nn.fused_attention(*x, seen, causal))(q, k, v)
  told = [eqn.params["mask_type"] for eqn in inspecting.equations(program.jaxpr) if "mask_type" in eqn.params]
  assert told and set(told) == {cudnn.MaskType.CAUSAL if causal else cudnn.MaskType.NO_MASK}


@pytest.mark.parametrize("remat, times", [("none", 1), ("products", 1), ("attention", 1), ("block", 2)])
def test_the_fused_kernel_runs_again_only_where_nothing_is_kept(remat, times, monkeypatch):
  monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
  monkeypatch.setattr(cudnn, "check_compute_capability", lambda *_: None)
  monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda *_: False)

  def block(x, weight):
    q = nn.split_heads(jnp.stack([x @ weight] * 3, axis=2), 64)
    return nn.attention(q[0], [(q[1], q[2])], None, fused=True), None

  loss = lambda x, weight: nn.rematerialised(block, remat, False)(x, weight)[0].astype(jnp.float32).sum()
  program = jax.make_jaxpr(jax.grad(loss))(jnp.ones((2, 8, 64), jnp.bfloat16), jnp.ones((64, 64), jnp.bfloat16))
  assert [eqn.primitive.name for eqn in inspecting.equations(program.jaxpr)].count(nn.FUSED) == times


def test_the_compiler_is_told_about_gpus_alone(monkeypatch):
  mesh = sharding.make_mesh({"data": -1})
  assert sharding.compiler_options(None) is sharding.compiler_options(mesh) is None
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  assert sharding.compiler_options(None) == sharding.compiler_options(sharding.make_mesh({}, jax.devices()[:1]))
  for flag in ("xla_gpu_enable_triton_gemm", "xla_gpu_enable_latency_hiding_scheduler"):
    assert sharding.compiler_options(None)[flag] is False
  assert jax.jit(lambda x: x + 1, compiler_options=sharding.ONE_GPU)(1.0) == 2.0  # this JAX knows all of them
  assert mesh.size > 1
  for found in (sharding.compiler_options(mesh), *(sharding.compiler_options(m, acting=True) for m in (None, mesh))):
    assert found == sharding.NVIDIA


def test_attention_is_fused_only_where_it_can_be(monkeypatch):
  assert not nn.fuses("auto", jnp.bfloat16)  # these tests run on a CPU
  monkeypatch.setattr(sharding, "on_nvidia", lambda *_: True)
  assert not nn.fuses("auto", jnp.bfloat16)  # a card too old for the kernel
  monkeypatch.setattr(nn, "_capability", lambda: 9.0)
  assert nn.fuses("auto", jnp.bfloat16)
  assert not nn.fuses("plain", jnp.bfloat16) and not nn.fuses("auto", jnp.float32)
  with pytest.raises(ValueError, match='attention is "flash": expected "auto" or "plain"'):
    policies.make(stats=None, attention="flash")


@pytest.mark.gpu
@pytest.mark.parametrize(
  "length, size, masked", [(310, 128, True), (303, 128, True), (261, 64, False), (256, 72, False)]
)
def test_cudnn_attention_is_as_exact_as_the_plain_form(length, size, masked):
  """In bfloat16, against float32."""
  if not nn.fuses("auto", jnp.bfloat16):
    pytest.skip("cuDNN's attention needs an NVIDIA GPU")
  *arrays, seen = case(length, size, masked, jnp.bfloat16)
  plain = jax.jit(lambda *x: with_gradients(lambda q, k, v: nn.plain_attention(q, [(k, v)], seen), *x))
  fused = jax.jit(lambda *x: with_gradients(lambda q, k, v: nn.fused_attention(q, k, v, seen, causal=masked), *x))
  exact = plain(*(x.astype(jnp.float32) for x in arrays))
  error = lambda found: [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in zip(found, exact, strict=True)]
  assert np.all(np.array(error(fused(*arrays))) < 1.5 * np.array(error(plain(*arrays))) + 1e-4)
