"""The preference gradient: that of the whole batch at once, in one pass or in two, whatever the micro-batches are."""

from __future__ import annotations

import functools

import chex
import inspecting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model
from meshes import quick_compile  # noqa: F401 - a fixture of every test here

from stare_jax import roofline, sharding, train, train_preference
from stare_jax.losses import preference

SGD = optax.sgd(1.0)
HEAD = lambda path: path.startswith(("head/", "value/"))


@functools.cache
def parameters(seed=0):
  return jax.device_get(jax.jit(small_model.init)(jax.random.key(seed)))


def stage_kernel(log_ratio, batch):
  p = batch.pairs
  return preference.stage_tpo(
    log_ratio, p["stage_id"], p["cost"], p["sign"], beta=0.7, cost_weight=0.3, chosen_weight=0.1
  )


KERNELS = {
  "stage_tpo": stage_kernel,
  "tpo": lambda log_ratio, batch: preference.tpo(log_ratio, batch.valid, batch.pairs["overall"], beta=0.7),
  "window_tpo": lambda log_ratio, batch: preference.window_tpo(
    log_ratio, batch.valid, batch.pairs["overall"], beta=0.7, window=3
  ),
}


def ragged(rng, pairs=7, steps=10):
  """Pairs of very different length, one of padding alone, one of sign 0, one of which an episode is a single step."""
  batch = small_model.pairs(rng, pairs=pairs, steps=steps)
  batch.valid[[1, pairs + 1]] = False
  batch.valid[3, 1:] = batch.valid[[5, pairs + 5], 2:] = False
  batch.pairs["stage_id"][~batch.valid] = -1
  batch.pairs["sign"][[1, 4]], batch.pairs["sign"][[0, 2, 3, 5]] = 0, [[1, 0, -1], [-1, 1, 1], [1, 1, 0], [1, -1, 0]]
  has_steps = (batch.pairs["stage_id"][..., None] == np.arange(3)).any(1)
  batch.pairs["cost"][~has_steps] = np.nan
  batch.pairs["overall"] = np.array([1, 0, -1, 1, 0, 1, -1], np.int8)
  return batch._replace(obs=batch.obs | {"image": batch.obs["image"].astype(np.float32)})


def spoil(batch, where):
  """NaN observations, tokens out of range and NaN references in these steps, bool[2B, T]."""
  dirty = jax.tree.map(np.copy, batch)
  dirty.obs["image"][where] = np.nan
  dirty.tokens[where] = 10**6
  dirty.ref_log_prob[where] = np.nan
  return dirty


@functools.partial(jax.jit, static_argnums=2)
def one_shot(params, batch, kernel=stage_kernel):
  """The preference loss and its gradient as they are written in the method: ((loss, metrics), gradient)."""

  def loss(params):
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch.obs, batch.tokens))
    log_prob = jnp.sum(small_model.log_prob(params, *flat), axis=-1).reshape(batch.valid.shape)
    return kernel(jnp.where(batch.valid, log_prob - batch.ref_log_prob, 0.0), batch)

  return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def gradient(params, batch, micro_batch, kernel=stage_kernel, log_prob=small_model.log_prob):
  return train.preference_gradient(log_prob, kernel, params, batch, micro_batch=micro_batch)


def values(metrics):
  return {name: float(m.value()) for name, m in metrics.items()}


# One gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, micro_batch", [
  ("stage_tpo", 1), ("stage_tpo", 7), ("stage_tpo", 20), ("stage_tpo", 33), ("stage_tpo", 1000),
  ("tpo", 7), ("tpo", 23), ("window_tpo", 7), ("window_tpo", 23),
])  # fmt: skip
def test_the_gradient_is_that_of_the_whole_batch_at_once(rng, name, micro_batch):
  """Two passes below 2 T = 20, one from there on; with NaN where nothing is."""
  batch, params, kernel = ragged(rng), parameters(2), KERNELS[name]
  (loss, told), expected = one_shot(params, batch, kernel)
  assert any(np.any(g) for g in jax.tree.leaves(expected))
  for data in (batch, spoil(batch, ~batch.valid)):
    grads, value, metrics = gradient(params, data, micro_batch, kernel)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-5)
    assert float(value) == pytest.approx(float(loss), rel=1e-5)
    assert values(metrics) == pytest.approx(values(told), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("micro_batch", [7, 23, 1000])
def test_what_is_not_compared_is_never_evaluated(rng, micro_batch):
  """Stages without a pair, pairs of sign 0: whatever is there, the same loss and gradient to the last bit."""
  batch, params = ragged(rng), parameters(2)
  compared = np.asarray(train_preference.compared_steps(stage_kernel, batch))
  assert compared.any() and (batch.valid & ~compared).sum() > 10
  results = [gradient(params, data, micro_batch) for data in (batch, spoil(batch, ~compared))]
  chex.assert_trees_all_equal(*results)


@pytest.mark.parametrize("name", KERNELS)
def test_compared_steps_are_those_of_existing_pairs(rng, name):
  """Against the definition, as a loop; also where the costs leave nothing of the sigmoid's slope."""
  batch = ragged(rng)
  batch.pairs["cost"][:] *= 1e4
  sides, expected = len(batch.valid) // 2, np.zeros(batch.valid.shape, bool)
  for b in range(sides):
    rows = [b, sides + b]
    valid, stage_id = batch.valid[rows], batch.pairs["stage_id"][rows]
    if name == "stage_tpo":
      for k in np.flatnonzero(batch.pairs["sign"][b]):
        if (stage_id == k).any(1).all():
          expected[rows] |= stage_id == k
    elif batch.pairs["overall"][b] and valid.any(1).all():
      shorter = valid.sum(1).min()
      expected[rows] = valid if name == "tpo" else valid & (np.arange(10) < shorter if shorter >= 3 else False)
  np.testing.assert_array_equal(train_preference.compared_steps(KERNELS[name], batch), expected)


def test_nothing_to_prefer_is_no_gradient(rng):
  batch = small_model.pairs(rng)
  batch.pairs["sign"][:] = 0
  for micro_batch in (7, 20, 1000):
    grads, loss, metrics = gradient(parameters(), batch, micro_batch)
    assert float(loss) == float(metrics["margin"].value()) == 0.0
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_frozen_parameters_get_no_gradient(rng):
  pairs = sharding.put(small_model.pairs(rng))
  for micro_batch in (5, 20):
    update = train.make_preference_update(
      small_model.log_prob, stage_kernel, SGD, micro_batch=micro_batch, trainable=HEAD
    )
    state, _ = update(train.new_state(jax.device_put(parameters()), SGD, trainable=HEAD), pairs)
    _, expected = one_shot(parameters(), pairs)
    moved = jax.tree.map(np.subtract, parameters(), jax.device_get(state.params))
    chex.assert_trees_all_close(moved["head"], jax.device_get(expected)["head"], rtol=1e-4, atol=1e-6)
    assert not any(np.any(x) for x in jax.tree.leaves((moved["embed"], moved["layers"])))


# Micro-batches ---------------------------------------------------------------------------------------------


def first_fit_decreasing(lengths, size):
  """How many micro-batches, as a loop."""
  loads = []
  for n in sorted(lengths, reverse=True):
    at = next((i for i, load in enumerate(loads) if load + n <= size), len(loads))
    loads[at : at + 1] = [n + (loads[at] if at < len(loads) else 0)]
  return len(loads)


@pytest.mark.parametrize("size", [40, 51, 64, 200])
@pytest.mark.parametrize("make", [train_preference.whole_pairs, train_preference.in_order])
def test_every_wanted_step_is_in_one_micro_batch_and_no_pair_is_cut(rng, make, size):
  pairs, steps = 16, 20
  whole = make is train_preference.whole_pairs

  @jax.jit
  def cut(wanted):
    found = make({"row": jnp.arange(wanted.size).reshape(wanted.shape)}, wanted, size)
    rows = lambda number: train_preference._micro_batch(found, number, size, None)
    return found.trips, jax.vmap(rows)(jnp.arange(len(found.start) - 1))

  for trial in range(20):
    longest = rng.integers(0, steps + 1) if trial else 0  # none at all to begin with
    wanted = np.arange(steps) < rng.integers(0, longest + 1, (2 * pairs, 1))
    wanted &= rng.random(wanted.shape) < rng.choice([0.5, 1.0])  # stages without a pair leave holes
    trips, (rows, index, real) = jax.device_get(cut(wanted))
    assert (rows["row"] == index).all() and not real[trips:].any()
    assert sorted(index[real]) == list(np.flatnonzero(wanted))
    assert not trips or wanted.ravel()[index].all(), "what fills a micro-batch up is a wanted step"
    homes = [{n for n in range(trips) if np.isin(index[n][real[n]] // steps % pairs, b).any()} for b in range(pairs)]
    lengths = (wanted[:pairs].sum(1) + wanted[pairs:].sum(1)).tolist()
    if whole:
      assert all(len(home) == bool(n) for home, n in zip(homes, lengths))
    assert trips == (first_fit_decreasing([n for n in lengths if n], size) if whole else -(-sum(lengths) // size))


def test_full_pairs_take_as_many_micro_batches_as_we_say():
  wanted = jnp.ones((2 * 16, 5), bool)
  for size in (1, 7, 10, 15, 40, 47, 80, 1000):
    make = train_preference.whole_pairs if train_preference.one_pass(wanted.shape, size) else train_preference.in_order
    assert int(make({}, wanted, size).trips) == train.most_trips(wanted.shape, size), size


def test_a_pair_that_fits_is_evaluated_once(rng):
  """One pass calls the policy once, and its matrix products are those of a gradient of as many rows; two passes call it
  twice."""
  batch, calls = small_model.pairs(rng), []
  log_prob = lambda *args: calls.append(args) or small_model.log_prob(*args)
  params = parameters()
  rows = lambda n: jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], (batch.obs, batch.tokens))
  plain = jax.grad(lambda p, n: jnp.sum(small_model.log_prob(p, *rows(n))))
  for size, count in ((batch.valid.size, 1), (batch.valid.size - 1, 1), (20, 1), (19, 2)):
    traced = jax.make_jaxpr(functools.partial(gradient, micro_batch=size, log_prob=log_prob))(params, batch)
    assert len(calls) == count
    if count == 1:
      expected = roofline.traced_flops(jax.make_jaxpr(functools.partial(plain, n=size))(params))
      assert roofline.traced_flops(traced) == expected
    assert ("while" in {e.primitive.name for e in inspecting.equations(traced)}) == (size < batch.valid.size)
    calls.clear()


def test_no_more_rows_than_there_are(rng):
  seen = []
  log_prob = lambda p, obs, tokens: seen.append(len(tokens)) or small_model.log_prob(p, obs, tokens)
  gradient(parameters(), small_model.pairs(rng), 1000, stage_kernel, log_prob)
  assert seen == [80]


def test_micro_batch_must_be_positive():
  with pytest.raises(ValueError, match="micro_batch is 0 steps"):
    train.make_preference_update(small_model.log_prob, stage_kernel, SGD, micro_batch=0)


# The update ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [16, 24])
def test_preference_update_learns_refuses_and_traces_once(rng, micro_batch):
  tx = train.make_optimizer(learning_rate=1e-2)
  update = train.make_preference_update(small_model.log_prob, stage_kernel, tx, micro_batch=micro_batch)
  batch = small_model.pairs(rng, pairs=6)
  batch.pairs["sign"][batch.pairs["sign"] == 0] = 1
  state, losses = train.new_state(jax.device_put(parameters()), tx), []
  for _ in range(15):
    state, metrics = update(state, sharding.put(batch))
    losses.append(train.fetch(metrics, state.params)["loss"])
  assert losses[-1] < 0.7 * losses[0]
  state, metrics = update(state, sharding.put(small_model.pairs(rng, pairs=6)))  # other lengths
  train.fetch(metrics, state.params)
  batch.ref_log_prob[0, 0] = np.nan
  before = jax.device_get(state)
  state, metrics = update(state, sharding.put(batch))
  chex.assert_trees_all_equal(before, jax.device_get(state))
  with pytest.raises(train.NonFiniteError, match="loss terms not finite: .*loss = nan"):
    train.fetch(metrics, state.params)
  assert update.traces == 1


@pytest.mark.parametrize("micro_batch, small, large", [
  (8, dict(pairs=2, steps=8), dict(pairs=2, steps=128)), (16, dict(pairs=2, steps=8), dict(pairs=32, steps=8)),
])  # fmt: skip
def test_preference_memory_is_that_of_a_micro_batch(micro_batch, small, large):
  """Temporary memory of the compiled update hardly grows with trajectories 16 times longer, or 16 times as many.

  By less than a hundredth of what one pass takes: numbers of each step do grow.
  """

  def wide(params, obs, tokens):  # 64 KiB of activations per step, which one pass over all steps would keep
    x = jnp.tanh(small_model.hidden(params, obs)[:, None, :] * jnp.linspace(0.5, 2, 1024)[:, None])
    return small_model.log_prob(params, obs, tokens) + 1e-3 * jnp.sum(jnp.sin(x * x), axis=(1, 2))[:, None]

  update = train.make_preference_update(wide, stage_kernel, SGD, micro_batch=micro_batch)
  state, temporary = train.new_state(jax.device_put(parameters()), SGD), []
  for sizes in (small, large):
    batch = sharding.put(small_model.pairs(np.random.default_rng(0), **sizes))
    temporary.append(update.lower(state, batch).compile().memory_analysis().temp_size_in_bytes)
  whole = jax.jit(lambda p, b: train.preference_gradient(wide, stage_kernel, p, b, micro_batch=512)[0])
  at_once = whole.lower(state.params, batch).compile().memory_analysis().temp_size_in_bytes
  assert temporary[1] - temporary[0] < at_once / 100, (at_once, temporary)
  assert at_once > 10 * temporary[1], (at_once, temporary)


def test_a_policy_that_is_its_own_reference_has_ratios_of_one(rng):
  batch, params = small_model.pairs(rng), parameters()
  flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (batch.obs, batch.tokens))
  own = jnp.sum(small_model.log_prob(params, *flat), axis=-1).reshape(batch.valid.shape)
  _, _, metrics = gradient(params, batch._replace(ref_log_prob=np.asarray(own)), 7)
  assert float(metrics["chosen"].value()) == pytest.approx(0, abs=1e-6)
