"""losses/__init__.py, losses/ops.py and losses/imitation.py against numpy, their invariances and their traces."""

from __future__ import annotations

import functools

import chex
import inspecting
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from stare_jax import losses
from stare_jax.losses import imitation, ops
from stare_jax.losses.ops import Mean

SEEDS = (0, 1, 2)
N, A, V = 6, 3, 9
seeds = pytest.mark.parametrize("seed", SEEDS)
eager_and_jit = pytest.mark.parametrize("jit", [lambda f: f, jax.jit], ids=["eager", "jit"])


def draw(seed: int):
  """Logits [N, A, V], tokens [N, A] and a mask [N, A] that is true somewhere and false somewhere."""
  rng = np.random.default_rng(seed)
  logits = rng.normal(size=(N, A, V)).astype(np.float32) * 2
  tokens = rng.integers(0, V, (N, A)).astype(np.int32)
  valid = rng.random((N, A)) < 0.7
  valid[0, 0], valid[0, 1] = True, False
  return logits, tokens, valid


def log_softmax(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.float64)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


# The registry --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", losses.names())
def test_every_registered_kernel_loads(name):
  assert callable(losses.get(name))


def test_an_unknown_kernel_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match="did you mean 'stage_tpo'.*cross_entropy"):
    losses.get("stage_dpo")


# Mean and check ------------------------------------------------------------------------------------------------


@seeds
def test_means_of_shards_add_to_the_mean_of_the_whole(seed):
  x, _, valid = draw(seed)
  x = x[..., 0]
  parts = [Mean.of(x[i : i + 2], valid[i : i + 2]) for i in range(0, N, 2)]
  pooled = functools.reduce(lambda a, b: a + b, parts)
  np.testing.assert_allclose(pooled.value(), x[valid].mean(), rtol=1e-6)
  chex.assert_trees_all_close(pooled, Mean.of(x, valid), rtol=1e-6)


def test_a_mean_of_nothing_is_zero_with_zero_gradient():
  value, grad = jax.value_and_grad(lambda x: Mean.of(x, jnp.zeros(3, bool)).value())(jnp.full(3, jnp.nan))
  assert value == 0 and not np.any(grad)


def test_check_names_the_array_and_what_was_expected():
  f32 = jnp.float32
  assert ops.check(x=(jnp.ones((2, 3)), "NT", f32), y=(jnp.ones(3), "T", f32)) == {"N": 2, "T": 3}
  with pytest.raises(AssertionError, match=r"has shape \(2, 4\).*value: expected float32\[N, T\] with N=2, T=3"):
    ops.check(reward=(jnp.ones((2, 3)), "NT", f32), value=(jnp.ones((2, 4)), "NT", f32))
  with pytest.raises(AssertionError, match=r"reward: expected float32\[N, T\]"):
    ops.check(reward=(jnp.ones(3), "NT", f32))
  for wrong in (jnp.int32, jnp.bfloat16, jnp.float16):
    with pytest.raises(AssertionError, match="reward: expected float32"):
      ops.check(reward=(jnp.ones((2, 3), wrong), "NT", f32))


# Token log-probabilities and entropy ---------------------------------------------------------------------------


@eager_and_jit
@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.6])
def test_token_log_prob_is_the_softmax_at_that_temperature(temperature, jit):
  logits, tokens, _ = draw(0)
  got = jit(ops.token_log_prob)(logits, tokens, temperature)
  want = log_softmax(logits / temperature)
  for n, a in np.ndindex(N, A):
    np.testing.assert_allclose(got[n, a], want[n, a, tokens[n, a]], rtol=1e-5)


@eager_and_jit
@seeds
def test_entropy(seed, jit):
  logits, _, _ = draw(seed)
  want = log_softmax(logits / 0.7)
  np.testing.assert_allclose(jit(ops.entropy)(logits, 0.7), -(np.exp(want) * want).sum(-1), rtol=1e-5)
  np.testing.assert_allclose(ops.entropy(jnp.zeros((A, V))), np.log(V), rtol=1e-6)


def test_an_impossible_bin_adds_nothing_and_breaks_no_gradient():
  """A dimension that never varies is forced into one bin by logits of -inf."""
  logits = jnp.full((1, V), -jnp.inf).at[0, 2].set(1.0)
  tokens = jnp.array([2], jnp.int32)
  for fn in (ops.entropy, lambda x: ops.token_log_prob(x, tokens)):
    value, grad = jax.value_and_grad(lambda x, fn=fn: fn(x).sum())(logits)
    assert value == 0 and not np.any(grad)


# Reductions over stages ----------------------------------------------------------------------------------------


@eager_and_jit
@seeds
def test_stage_mean_is_a_loop_over_steps(seed, jit):
  rng = np.random.default_rng(seed)
  x, stage_id = rng.normal(size=(4, 11)).astype(np.float32), rng.integers(-1, 4, (4, 11)).astype(np.int32)
  x[stage_id < 0] = np.nan
  mean, steps = jit(functools.partial(ops.stage_mean, num_stages=5))(x, stage_id)
  for e, k in np.ndindex(4, 5):
    of_stage = [x[e, t] for t in range(11) if stage_id[e, t] == k]
    assert steps[e, k] == len(of_stage)
    np.testing.assert_allclose(mean[e, k], np.mean(of_stage) if of_stage else 0.0, rtol=1e-5, atol=1e-6)


def test_stage_sums_add_to_the_sum_of_the_episode():
  x, stage_id = np.ones((2, 7), np.float32), np.array([[0, 0, 1, 1, 2, -1, -1], [0] * 7], np.int32)
  np.testing.assert_array_equal(ops.stage_sum(x, stage_id, 3), [[2, 2, 1], [7, 0, 0]])


# Standardised advantages ---------------------------------------------------------------------------------------


@eager_and_jit
@seeds
def test_standardize_over_valid_entries_only(seed, jit):
  x, _, valid = draw(seed)
  x = np.where(valid, x[..., 0] * 3 + 100, np.nan)
  got = np.asarray(jit(ops.standardize)(x, valid))
  np.testing.assert_allclose(got[valid], (x[valid] - x[valid].mean()) / x[valid].std(), rtol=1e-3, atol=1e-4)
  assert not np.any(got[~valid])
  assert not np.any(ops.standardize(jnp.full((4,), 7.0), jnp.ones(4, bool)))  # constant: zeros, not NaN


def test_standardize_over_shards_is_that_of_the_whole():
  x, _, valid = draw(0)
  x, whole = x[..., 0], ops.standardize(x[..., 0], valid)
  mesh = inspecting.data_mesh(2)
  chex.assert_trees_all_close(jax.jit(ops.standardize)(*inspecting.shard(mesh, (x, valid))), whole, atol=1e-6)


# Imitation -----------------------------------------------------------------------------------------------------


def cross_entropy_loop(logits, tokens, valid, sigma):
  """Eq. SFT with targets w_v, one token at a time."""
  log_prob, terms = log_softmax(logits), []
  for n, a in np.ndindex(N, A):
    if valid[n, a]:
      weight = np.arange(V) == tokens[n, a]
      if sigma:
        weight = np.exp(-0.5 * ((np.arange(V) - tokens[n, a]) / sigma) ** 2)
      terms.append(-(weight / weight.sum() * log_prob[n, a]).sum())
  return np.mean(terms)


@eager_and_jit
@pytest.mark.parametrize("sigma", [0.0, 0.5, 2.0])
@seeds
def test_cross_entropy_is_a_loop_over_tokens(seed, sigma, jit):
  logits, tokens, valid = draw(seed)
  loss, metrics = jit(functools.partial(imitation.cross_entropy, smoothing_sigma=sigma))(logits, tokens, valid)
  np.testing.assert_allclose(loss, cross_entropy_loop(logits, tokens, valid, sigma), rtol=1e-5)
  assert loss == metrics["loss"].value()
  np.testing.assert_allclose(metrics["nll"].value(), cross_entropy_loop(logits, tokens, valid, 0.0), rtol=1e-5)
  error = np.abs(logits.argmax(-1) - tokens)[valid]
  np.testing.assert_allclose(metrics["accuracy"].value(), (error == 0).mean(), rtol=1e-6)
  np.testing.assert_allclose(metrics["l1"].value(), error.mean(), rtol=1e-6)


def test_soft_targets_sum_to_one_at_the_edges_and_narrow_to_one_hot():
  tokens = jnp.array([0, 4, V - 1], jnp.int32)
  wide = imitation.soft_targets(tokens, V, 2.0)
  np.testing.assert_allclose(wide.sum(-1), 1.0, rtol=1e-6)
  np.testing.assert_array_equal(wide.argmax(-1), tokens)
  np.testing.assert_allclose(wide[1], wide[1, ::-1], rtol=1e-6)  # symmetric about the middle bin
  chex.assert_trees_all_close(
    imitation.soft_targets(tokens, V, 0.05), imitation.soft_targets(tokens, V, 0.0), atol=1e-6
  )
  with pytest.raises(ValueError, match="smoothing_sigma is -1"):
    imitation.soft_targets(tokens, V, -1)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_gradient_is_softmax_less_target(sigma):
  logits, tokens, valid = draw(0)
  loss = lambda x: imitation.cross_entropy(x, tokens, valid, smoothing_sigma=sigma)[0]
  want = (jax.nn.softmax(logits) - imitation.soft_targets(tokens, V, sigma)) / valid.sum()
  np.testing.assert_allclose(jax.grad(loss)(logits), np.where(valid[..., None], want, 0), atol=1e-6)
  check_grads(jax.jit(loss), (logits,), order=1, modes=["rev"], eps=1e-2, atol=2e-3, rtol=2e-2)


@pytest.mark.parametrize("sigma", [0.0, 1.0])
def test_masked_tokens_are_inert(sigma):
  """NaN and nonsense tokens under the mask: the same loss, and a gradient of exactly zero there."""
  logits, tokens, valid = draw(0)
  loss = lambda x, t: imitation.cross_entropy(x, t, valid, smoothing_sigma=sigma)
  dirty = np.where(valid[..., None], logits, np.nan), np.where(valid, tokens, -99).astype(np.int32)
  chex.assert_trees_all_equal(loss(logits, tokens), loss(*dirty))
  grad = np.asarray(jax.grad(lambda x: loss(x, dirty[1])[0])(dirty[0]))
  assert np.isfinite(grad).all() and not grad[~valid].any() and grad[valid].any()


def test_micro_batches_add_to_the_whole():
  batch = draw(0)
  whole = imitation.cross_entropy(*batch)[1]
  parts = [imitation.cross_entropy(*(x[i : i + 2] for x in batch))[1] for i in range(0, N, 2)]
  pooled = {name: functools.reduce(lambda a, b: a + b, (p[name] for p in parts)) for name in whole}
  chex.assert_trees_all_close(pooled, whole, rtol=1e-6)


def test_cross_entropy_refuses_wrong_dtypes_and_shapes():
  logits, tokens, valid = draw(0)
  for wrong in (
    (logits.astype(jnp.bfloat16), tokens, valid),
    (logits, tokens.astype(np.float32), valid),
    (logits, tokens, valid.astype(np.float32)),
    (logits, tokens[:, :-1], valid),
    (logits[0], tokens, valid),
  ):
    with pytest.raises(AssertionError, match="expected"):
      imitation.cross_entropy(*wrong)


def test_cross_entropy_traces_once_and_stays_on_its_devices():
  kernel = jax.value_and_grad(functools.partial(imitation.cross_entropy, smoothing_sigma=1.0), has_aux=True)
  inspecting.assert_pure(kernel, *draw(0))
  traced = inspecting.Traced(kernel)
  for seed in SEEDS:
    traced(*draw(seed))
  assert traced.count == 1
  moved = inspecting.collectives(inspecting.hlo(kernel, *inspecting.shard(inspecting.data_mesh(2), draw(0))))
  assert set(moved) <= {"all-reduce"} and max(moved.values()) == 1  # the sums, nothing else
