"""What runs otherwise on an NVIDIA GPU: attention in one kernel, and layers that `act` takes apart."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax import policies
from stare_jax.policies import layers as nn
from stare_jax.policies import lora
from tests.test_policy import nano, some_obs

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
  fused = with_gradients(lambda q, k, v: nn.fused_attention(q, k, v, seen, kernel="xla"), *arrays)
  assert fused[0].shape == (2, length, 3, size)
  for ours, reference in zip(fused, plain, strict=True):
    np.testing.assert_allclose(ours, reference, atol=2e-5)


def test_last_queries_may_be_odd_in_number():
  q, k, v, _, seen = case(20, 64, True)
  fused = nn.fused_attention(q[:, :, -7:], k, v, seen[:, :, -7:], kernel="xla")
  np.testing.assert_allclose(fused, nn.plain_attention(q, [(k, v)], seen)[:, -7:], atol=2e-5)


@pytest.mark.parametrize("adapted", [False, True])
def test_act_with_layers_apart_is_act(adapted, monkeypatch):
  policy, params, *_ = nano()
  if adapted:
    adapters = lora.make(policy.config, rank=2)
    factors = lora.init(adapters, jax.random.key(5))
    factors = jax.tree.map(lambda x: x + 0.1 * jnp.sin(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), factors)
    base = {name: x for name, x in params.items() if name != "value"}
    policy, params = lora.wrap(policy, adapters), {"base": base, "lora": factors, "value": params["value"]}
  inputs = (params, some_obs(policy), jax.random.split(jax.random.key(3), 3), jnp.float32(1.0))
  depth, width = policy.config.llm_depth, policy.config.llm_width
  by_index = f"(tensor<{depth}x{width}x3x{width}xf32>, tensor<i32>"  # a layer cut out of its stack, which is a copy
  program = jax.jit(policy.act)
  scanned = program(*inputs)
  assert by_index in program.lower(*inputs).as_text()
  monkeypatch.setattr(nn, "on_nvidia", lambda: True)
  program = jax.jit(lambda *inputs: policy.act(*inputs))
  apart = program(*inputs)
  assert by_index not in program.lower(*inputs).as_text()
  np.testing.assert_array_equal(apart.tokens, scanned.tokens)
  np.testing.assert_allclose(apart.log_prob, scanned.log_prob, atol=1e-5)
  np.testing.assert_allclose(apart.value, scanned.value, atol=1e-5)


def test_attention_is_fused_only_where_it_can_be(monkeypatch):
  assert not nn.fuses("auto", jnp.bfloat16)  # these tests run on a CPU
  monkeypatch.setattr(nn, "on_nvidia", lambda: True)
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
  fused = jax.jit(lambda *x: with_gradients(lambda q, k, v: nn.fused_attention(q, k, v, seen), *x))
  exact = plain(*(x.astype(jnp.float32) for x in arrays))
  error = lambda found: [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in zip(found, exact, strict=True)]
  assert np.all(np.array(error(fused(*arrays))) < 1.5 * np.array(error(plain(*arrays))) + 1e-4)
