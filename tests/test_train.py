"""The update: exact under every cut of the batch, refused whole when it is not finite, traced once."""

from __future__ import annotations

import dataclasses
import functools

import chex
import inspecting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small_model

from stare_jax import policies, sharding, train
from stare_jax.losses.ops import Mean

pytestmark = pytest.mark.usefixtures("quick_compile")

SGD = optax.sgd(1.0)
ADAM = functools.partial(train.make_optimizer, learning_rate=1e-2)


@functools.cache
def parameters(seed=0):
  return jax.device_get(jax.jit(small_model.init)(jax.random.key(seed)))


def fresh(tx):
  """A state at step 0; one compilation per structure is spared by starting from numpy."""
  params = jax.device_put(jax.tree.map(np.copy, parameters()))
  return train.TrainState(step=jax.device_put(np.int32(0)), params=params, opt=tx.init(params))


@functools.cache
def sgd_update(loss_fn, micro_batches):
  return train.make_update(loss_fn, SGD, micro_batches=micro_batches)


@functools.cache
def adam_update():
  """Several tests share one compiled update, and all of them hold that it was traced once."""
  return ADAM(), train.make_update(small_model.loss_fn, ADAM(), micro_batches=2)


def sgd_gradient(loss_fn, batch, micro_batches):
  """The gradient as the update applies it, and the metrics."""
  before = jax.device_get(fresh(SGD).params)
  after, metrics = sgd_update(loss_fn, micro_batches)(fresh(SGD), sharding.put(batch))
  return jax.tree.map(np.subtract, before, jax.device_get(after.params)), train.fetch(metrics, after.params)


# Micro-batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batches", [3, 4, 48])
def test_micro_batches_do_not_change_the_update(rng, micro_batches):
  batch = small_model.batch(rng)
  batch["valid"][:12] = False  # micro-batches of very different weight, some of none
  whole, told = sgd_gradient(small_model.loss_fn, batch, 1)
  cut, told_cut = sgd_gradient(small_model.loss_fn, batch, micro_batches)
  chex.assert_trees_all_close(whole, cut, rtol=1e-4, atol=1e-6)
  assert told.keys() == told_cut.keys()
  for name in told:
    assert told[name] == pytest.approx(told_cut[name], rel=1e-4), name


def test_gradient_is_that_of_the_mean(rng):
  batch = small_model.batch(rng)
  ours, told = sgd_gradient(small_model.loss_fn, batch, 4)
  mean = lambda params: small_model.loss_fn(params, batch)[0].value()
  loss, expected = jax.jit(jax.value_and_grad(mean))(parameters())
  chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-6)
  assert told["loss"] == pytest.approx(float(loss), rel=1e-5)
  assert told["grad_norm"] == pytest.approx(float(optax.tree.norm(expected)), rel=1e-4)
  assert told["update_norm"] == pytest.approx(told["grad_norm"], rel=1e-6)


def test_no_valid_row_gives_no_gradient(rng):
  batch = small_model.batch(rng) | {"valid": np.zeros(48, bool)}
  gradient, told = sgd_gradient(small_model.loss_fn, batch, 4)
  assert told["loss"] == told["grad_norm"] == 0.0
  assert not any(np.any(g) for g in jax.tree.leaves(gradient))


def test_rows_that_do_not_divide_are_named(rng):
  with pytest.raises(ValueError, match=r"obs/.* has 48 rows, which do not divide into 5 micro-batches.*multiple of 5"):
    sgd_gradient(small_model.loss_fn, small_model.batch(rng), 5)
  with pytest.raises(ValueError, match="micro_batches is 0"):
    train.make_update(small_model.loss_fn, ADAM(), micro_batches=0)


def test_kernels_may_return_their_value(rng):
  """(float32[], {"loss": Mean}) as the kernels of losses/ do; anything without a Mean is refused by name."""
  batch = small_model.batch(rng)

  def as_kernel(params, batch):
    loss, metrics = small_model.loss_fn(params, batch)
    return loss.value(), metrics | {"loss": loss}

  chex.assert_trees_all_close(
    sgd_gradient(as_kernel, batch, 3)[0], sgd_gradient(small_model.loss_fn, batch, 3)[0], rtol=1e-6, atol=1e-7
  )
  with pytest.raises(TypeError, match="returned no Mean"):
    sgd_gradient(lambda p, b: (jnp.float32(0), {}), batch, 1)
  with pytest.raises(TypeError, match=r"metrics \['odd'\]: expected a Mean"):
    sgd_gradient(lambda p, b: (small_model.loss_fn(p, b)[0], {"odd": jnp.float32(0)}), batch, 1)


# Refusal ---------------------------------------------------------------------------------------------------


def poisoned(value):
  """A loss whose value term is `value` where the batch says so."""

  def loss_fn(params, batch):
    loss, metrics = small_model.loss_fn(params, batch)
    bad = jnp.where(jnp.any(batch["poison"] > 0), value, 0.0)
    term = Mean(total=metrics["value"].total + bad, weight=metrics["value"].weight)
    return Mean(total=loss.total + bad, weight=loss.weight), metrics | {"value": term}

  return loss_fn


def test_weights_decay_where_they_multiply_and_nowhere_else():
  """OpenVLA's parameters under a gradient of zero: kernels and the table of the output shrink, nothing else moves."""
  policy = policies.make(size="tiny", stats=policies.ActionStats(-np.ones(7), np.ones(7), np.ones(7, bool)))
  params = jax.tree.map(jnp.ones_like, policy.init(jax.random.key(0)))
  tx = train.make_optimizer(learning_rate=0.1, weight_decay=0.5)
  updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
  moved = {sharding.path_name(path): bool(np.any(x)) for path, x in jax.tree_util.tree_leaves_with_path(updates)}
  assert moved == {path: path.endswith("/kernel") or path == "llm/head/table" for path in moved}


@pytest.mark.parametrize("value, micro_batches", [(np.nan, 1), (np.inf, 4)])
def test_non_finite_loss_changes_nothing(rng, value, micro_batches):
  tx = ADAM(weight_decay=0.1)
  update = train.make_update(poisoned(value), tx, micro_batches=micro_batches)
  batch = small_model.batch(rng) | {"poison": np.zeros(48, np.float32)}
  state, metrics = update(fresh(tx), sharding.put(batch))
  train.fetch(metrics, state.params)
  before = jax.device_get(state)
  batch["poison"][7] = 1
  state, metrics = update(state, sharding.put(batch))
  chex.assert_trees_all_equal(before, jax.device_get(state))
  with pytest.raises(train.NonFiniteError, match=r"loss terms not finite: value = (nan|inf), loss = (nan|inf)"):
    train.fetch(metrics, state.params)
  batch["poison"][7] = 0
  state, metrics = update(state, sharding.put(batch))  # and it goes on from there
  assert int(state.step) == 2 and np.isfinite(train.fetch(metrics, state.params)["loss"])
  assert update.traces == 1


def test_non_finite_gradient_names_the_parameter(rng):
  def loss_fn(params, batch):
    loss, metrics = small_model.loss_fn(params, batch)
    # The square root of zero: a finite loss with an infinite slope, in one parameter.
    corner = jnp.sqrt(jnp.sum(jnp.square(params["layers"]["mlp"]["up"]["bias"])))
    return dataclasses.replace(loss, total=loss.total + corner), metrics

  tx = ADAM()
  state = fresh(tx)
  before = jax.device_get(state)
  state, metrics = train.make_update(loss_fn, tx)(state, sharding.put(small_model.batch(rng)))
  chex.assert_trees_all_equal(before, jax.device_get(state))
  with pytest.raises(train.NonFiniteError, match=r"gradient not finite in 1 of 6 parameters, first layers/mlp/up/bias"):
    train.fetch(metrics, state.params)


def test_overflowing_step_is_refused(rng):
  tx = train.make_optimizer(learning_rate=1e38, clip_norm=None)
  update = train.make_update(small_model.loss_fn, tx)
  state = train.set_learning_rate_scale(fresh(tx), 1e3)
  before = jax.device_get(state)
  state, metrics = update(state, sharding.put(small_model.batch(rng)))
  chex.assert_trees_all_equal(before.params, jax.device_get(state.params))
  with pytest.raises(train.NonFiniteError, match="step not finite|learning_rate = inf"):
    train.fetch(metrics, state.params)


# The optimiser ---------------------------------------------------------------------------------------------


def reference_adamw(params, grads, *, rates, clip, decay, value_scale, betas=(0.9, 0.999), eps=1e-8):
  """numpy AdamW over a dict of arrays: one dict of gradients per step."""
  moments = {k: (np.zeros_like(p), np.zeros_like(p)) for k, p in params.items()}
  for t, (g, rate) in enumerate(zip(grads, rates, strict=True), 1):
    norm = np.sqrt(sum(np.sum(x**2) for x in g.values()))
    for k, p in params.items():
      x = g[k] * min(1.0, clip / norm)
      m, v = moments[k]
      m, v = betas[0] * m + (1 - betas[0]) * x, betas[1] * v + (1 - betas[1]) * x**2
      moments[k] = m, v
      step = m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + eps)
      step = step + decay * p * (p.ndim > 1)
      params[k] = p - rate * (value_scale if k.startswith("value") else 1.0) * step
  return params


def test_optimiser_against_numpy(rng):
  start = {
    "fc/kernel": rng.normal(size=(4, 3)).astype(np.float32),
    "fc/bias": rng.normal(size=3).astype(np.float32),
    "value/kernel": rng.normal(size=(4, 1)).astype(np.float32),
  }
  grads = [{k: 3 * rng.normal(size=p.shape).astype(np.float32) for k, p in start.items()} for _ in range(6)]
  total, warm, peak = 8, 2, 0.05
  cosine = lambda t: 0.5 * (1 + np.cos(np.pi * max(t - warm, 0) / (total - warm)))
  rates = [peak * min(1, (t + 1) / warm) * cosine(t) for t in range(6)]
  tx = train.make_optimizer(
    learning_rate=peak, warmup_steps=warm, total_steps=total, schedule="cosine", weight_decay=0.1, clip_norm=1.0,
    value_lr_scale=3.0,
  )
  nest = lambda d: {"fc": {"kernel": d["fc/kernel"], "bias": d["fc/bias"]}, "value": {"kernel": d["value/kernel"]}}
  params, opt = nest(start), tx.init(nest(start))
  for g in grads:
    updates, opt = jax.jit(tx.update)(nest(g), opt, params)
    params = optax.apply_updates(params, updates)
  expected = reference_adamw(dict(start), grads, rates=rates, clip=1.0, decay=0.1, value_scale=3.0)
  chex.assert_trees_all_close(params, nest(expected), rtol=2e-4, atol=1e-6)


def test_schedule_moves_at_once_and_ends():
  tx = ADAM(warmup_steps=4, total_steps=10, schedule="cosine")
  one = {"kernel": np.ones((1, 1), np.float32)}
  opt, update, rates = tx.init(one), jax.jit(tx.update), []
  for _ in range(12):
    step, opt = update(one, opt, one)
    rates.append(-float(step["kernel"][0, 0]))  # the gradient is constant, so Adam's own step is one
  np.testing.assert_allclose(rates[:5], [0.0025, 0.005, 0.0075, 0.01, 0.01], rtol=1e-4)
  np.testing.assert_allclose(rates[10:], [0, 0], atol=1e-9)


@pytest.mark.parametrize("wrong, message", [
  (dict(schedule="linear"), "not one of 'cosine', 'constant'"),
  (dict(schedule="cosine"), "total_steps is None"),
  (dict(schedule="cosine", total_steps=5, warmup_steps=5), "must exceed warmup_steps = 5"),
])
def test_schedules_that_cannot_be(wrong, message):
  with pytest.raises(ValueError, match=message):
    ADAM(**wrong)


def test_value_scale_without_a_value_head_is_an_error():
  tx = ADAM(value_lr_scale=2.0)
  params = {"fc": {"value": {"kernel": jnp.ones((2, 2))}}}  # attention's own "value" is not the head
  with pytest.raises(ValueError, match="no parameter matches"):
    tx.update(params, tx.init(params), params)


def test_host_scales_the_rate_without_a_retrace(rng):
  (tx, update), batch = adam_update(), sharding.put(small_model.batch(rng))
  plain, _ = update(fresh(tx), batch)
  half, metrics = update(train.set_learning_rate_scale(fresh(tx), 0.5), batch)
  assert train.fetch(metrics, half.params)["learning_rate"] == pytest.approx(0.005)
  assert train.learning_rate_scale(half) == 0.5  # it stays
  start = parameters()
  chex.assert_trees_all_close(
    jax.tree.map(lambda a, b: 2 * (np.asarray(a) - b), half.params, start),
    jax.tree.map(lambda a, b: np.asarray(a) - b, plain.params, start),
    atol=1e-6,
  )
  critic, _ = update(train.set_learning_rate_scale(fresh(tx), policy_scale=0.0), batch)
  chex.assert_trees_all_equal(critic.params["embed"], start["embed"])
  chex.assert_trees_all_equal(critic.params["value"], plain.params["value"])
  for _ in range(30):
    critic, _ = update(critic, batch)
  critic = train.restart_moments(train.set_learning_rate_scale(critic, policy_scale=1.0))
  thawed, _ = update(critic, batch)
  first, later = (np.asarray(x.params["embed"]["table"]) - start["embed"]["table"] for x in (plain, thawed))
  np.testing.assert_allclose(np.abs(later), np.abs(first), rtol=2e-2, atol=1e-6)  # a first step: as large as the rate
  assert update.traces == 1
  with pytest.raises(ValueError, match="not made by make_optimizer"):
    train.set_learning_rate_scale(fresh(SGD), 0.5)


def test_bfloat16_parameters_keep_float32_moments(rng):
  tx = ADAM(weight_decay=0.1)
  state = train.new_state(jax.tree.map(lambda p: p.astype(jnp.bfloat16), parameters()), tx)
  update = train.make_update(small_model.loss_fn, tx, micro_batches=2)
  before = jax.tree.map(lambda x: x.dtype, state)
  for _ in range(2):
    state, metrics = update(state, sharding.put(small_model.batch(rng)))
  train.fetch(metrics, state.params)
  assert jax.tree.map(lambda x: x.dtype, state) == before
  assert update.traces == 1
  assert {str(x.dtype) for x in jax.tree.leaves(state.opt)} <= {"float32", "int32"}


# The compiled update ---------------------------------------------------------------------------------------


def test_state_is_donated_and_nothing_calls_the_host(rng):
  (tx, update), batch = adam_update(), sharding.put(small_model.batch(rng))
  state = fresh(tx)
  traces = update.traces
  text = update.lower(state, batch).compile().as_text()
  aliased = text.split("input_output_alias=")[1].split("entry_computation_layout")[0].count("may-alias")
  assert update.traces <= traces + 1
  assert aliased == len(jax.tree.leaves(state)), "every leaf of the state is updated in place"
  inspecting.assert_pure(lambda p, b: train._gradients(small_model.loss_fn, p, b, 2, None)[0], state.params, batch)
  new, _ = update(state, batch)
  assert all(x.is_deleted() for x in jax.tree.leaves(state.params)) and not new.step.is_deleted()


def test_new_state_copies(rng):
  """A phase starts from the parameters of the one before, which may live on as the reference."""
  tx, update = adam_update()
  reference = jax.device_put(parameters(1))
  state = train.new_state(reference, tx)
  update(state, sharding.put(small_model.batch(rng)))
  assert not any(x.is_deleted() for x in jax.tree.leaves(reference))
  chex.assert_trees_all_equal(reference, parameters(1))


HEAD = lambda path: path.startswith(("head/", "value/"))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_frozen_parameters_have_no_gradient_no_moments_and_no_copy(rng, micro_batches):
  batch = sharding.put(small_model.batch(rng))
  update = train.make_update(small_model.loss_fn, SGD, micro_batches=micro_batches, trainable=HEAD)
  reference = jax.device_put(parameters())
  start = train.new_state(reference, ADAM(), trainable=HEAD)
  assert len([x for x in jax.tree.leaves(start.opt) if x.ndim]) == 4  # two moments of two kernels
  state = train.new_state(reference, SGD, trainable=HEAD)
  text = update.lower(state, batch).compile().as_text()
  aliased = text.split("input_output_alias=")[1].split("entry_computation_layout")[0].count("may-alias")
  assert aliased == 3, "what is trained and the step are updated in place, and nothing else comes out"
  after, metrics = update(state, batch)
  assert after.params["layers"]["mlp"]["up"]["kernel"] is reference["layers"]["mlp"]["up"]["kernel"]
  assert after.params["embed"]["table"] is reference["embed"]["table"]
  assert state.params["head"]["kernel"].is_deleted() and not reference["head"]["kernel"].is_deleted()
  gradient, all_metrics = sgd_gradient(small_model.loss_fn, batch, micro_batches)
  moved = jax.tree.map(np.subtract, parameters(), jax.device_get(after.params))
  for name in ("head", "value"):
    chex.assert_trees_all_close(moved[name], gradient[name], rtol=1e-5, atol=1e-7)
  norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves((moved["head"], moved["value"]))))
  told = train.fetch(metrics, after.params, HEAD)
  assert told["loss"] == pytest.approx(all_metrics["loss"]) and told["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_non_finite_gradient_is_named_among_what_is_trained(rng):
  def loss_fn(params, batch):
    loss, metrics = small_model.loss_fn(params, batch)
    return dataclasses.replace(loss, total=loss.total + jnp.sqrt(0.0 * jnp.sum(params["value"]["kernel"]))), metrics

  state = train.new_state(jax.device_put(parameters()), SGD, trainable=HEAD)
  state, metrics = train.make_update(loss_fn, SGD, trainable=HEAD)(state, sharding.put(small_model.batch(rng)))
  with pytest.raises(train.NonFiniteError, match=r"gradient not finite in 1 of 2 parameters, first value/kernel"):
    train.fetch(metrics, state.params, HEAD)
  with pytest.raises(ValueError, match="nothing to train"):
    train.new_state(parameters(), SGD, trainable=lambda path: False)


def test_loop_makes_no_stray_transfer(rng):
  tx, update = adam_update()
  state = fresh(tx)
  batches = [small_model.batch(rng) for _ in range(3)]
  with jax.transfer_guard("disallow"):
    for batch in batches:
      state, metrics = update(state, sharding.put(batch))
      train.fetch(metrics, state.params)
      state = train.set_learning_rate_scale(state, 0.9)
  assert update.traces == 1 and int(state.step) == 3
