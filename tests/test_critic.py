"""The critic of the simulator's state: that it starts as nothing, learns, and puts its values where they belong."""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from stare_jax import pipeline_interaction, tasks, train_critic
from stare_jax.episode import SIGNAL_SIZE
from stare_jax.train import NonFiniteError
from tests.test_pipeline import rollout, settings

FEATURES = 6


def by_numpy(critic: train_critic.Critic, x: np.ndarray) -> np.ndarray:
  x = np.clip((x - np.asarray(critic.mean)) / np.asarray(critic.scale), -5, 5).astype(float)
  *hidden, (weight, bias) = [(np.asarray(w, float), np.asarray(b, float)) for w, b in critic.params]
  for w, b in hidden:
    x = np.tanh(x @ w + b)
  return (x @ weight + bias)[:, 0]


def fitted(rng: np.random.Generator, epochs: int = 60) -> tuple[train_critic.Critic, np.ndarray, np.ndarray]:
  """A critic that was fitted to a curved function of two features on very different scales."""
  x = (rng.standard_normal((480, FEATURES)) * [1, 100, 1, 1, 0.01, 1] + 3).astype(np.float32)
  target = lambda x: (np.sin(x[:, 0] - 3) + (x[:, 1] - 3) / 100).astype(np.float32)
  critic = train_critic.calibrate(train_critic.init(jax.random.key(0), FEATURES), x)
  critic = train_critic.fit(critic, x, target(x), epochs=epochs, batch=60, learning_rate=3e-3, rng=rng)
  fresh = (rng.standard_normal((200, FEATURES)) * [1, 100, 1, 1, 0.01, 1] + 3).astype(np.float32)
  return critic, fresh, target(fresh)


def test_it_starts_at_zero(rng):
  """So that the potential alone is the baseline at first."""
  critic = train_critic.init(jax.random.key(0), FEATURES)
  np.testing.assert_array_equal(train_critic.values(critic, rng.standard_normal((5, FEATURES)).astype(np.float32)), 0)


def test_it_learns_and_its_forward_pass_is_the_written_one(rng):
  critic, x, y = fitted(rng)
  found = np.asarray(train_critic.values(critic, x))
  np.testing.assert_allclose(found, by_numpy(critic, x), rtol=1e-4, atol=1e-5)
  assert 1 - np.var(y - found) / np.var(y) > 0.9


def test_calibrating_moves_no_leaf(rng):
  """A leaf in another place than before would compile the next update again."""
  critic = jax.device_put(train_critic.init(jax.random.key(0), FEATURES), jax.devices()[1])
  after = train_critic.calibrate(critic, rng.standard_normal((9, FEATURES)).astype(np.float32))
  assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, critic)
  assert {x.dtype for x in (after.mean, after.scale)} == {np.dtype("float32")}


def test_a_feature_far_out_saturates(rng):
  """A contact force that no rollout has shown yet must not throw the baseline."""
  critic, x, _ = fitted(rng, epochs=2)
  far, further = x.copy(), x.copy()
  far[:, 1], further[:, 1] = 1e4, 1e9
  np.testing.assert_array_equal(train_critic.values(critic, far), train_critic.values(critic, further))


def test_a_loss_that_is_not_finite_is_refused_with_its_source(rng):
  x, y = rng.standard_normal((20, FEATURES)).astype(np.float32), np.ones(20, np.float32)
  critic = lambda: train_critic.init(jax.random.key(0), FEATURES)
  fit = functools.partial(train_critic.fit, epochs=2, batch=10, rng=rng)
  y[3] = np.nan
  with pytest.raises(NonFiniteError, match="look at returns"):
    fit(critic(), x, y, learning_rate=1e-3)
  y[3] = 1e30
  with pytest.raises(NonFiniteError, match="learning rate 0.001"):
    fit(critic(), x, y, learning_rate=1e-3)


def test_the_same_seed_fits_the_same_critic():
  one, two = (fitted(np.random.default_rng(3), epochs=2)[0] for _ in range(2))
  jax.tree.map(np.testing.assert_array_equal, one.params, two.params)


def test_values_lie_at_their_states_and_end_with_the_bootstrap(rng):
  """Against a loop over episodes: V(s_t) for every step, V(s_T) where an episode was cut, 0 where it terminated."""
  rows = rollout(rng)
  for row in rows:  # signals that differ
    row[:] = [
      dataclasses.replace(item, episode=dataclasses.replace(
        item.episode, signals=rng.standard_normal((len(item.episode) + 1, SIGNAL_SIZE)).astype(np.float32)))
      for item in row
    ]  # fmt: skip
  features = [[pipeline_interaction.state_features(item) for item in row] for row in rows]
  size = pipeline_interaction.num_features(SimpleNamespace(task=tasks.get("pull_cube")))
  assert {x.shape[1] for row in features for x in row} == {size}
  x = pipeline_interaction.stacked(features)
  assert len(x) == sum(len(item.episode) for row in rows for item in row)
  critic = train_critic.calibrate(train_critic.init(jax.random.key(1), size), x)
  critic = train_critic.fit(critic, x, x[:, 0], epochs=4, batch=10, learning_rate=1e-2, rng=rng)
  for row, kept, own in zip(rows, pipeline_interaction.with_values(rows, features, critic), features, strict=True):
    for item, valued, seen in zip(row, kept, own, strict=True):
      want = by_numpy(critic, seen)
      np.testing.assert_allclose(valued.episode.value, want[:-1], rtol=1e-4, atol=1e-5)
      assert valued.episode.last_value == pytest.approx(0 if item.episode.terminated else want[-1], rel=1e-4, abs=1e-5)
      np.testing.assert_array_equal(valued.episode.tokens, item.episode.tokens)
  data = pipeline_interaction.advantages(pipeline_interaction.with_values(rows, features, critic), settings())
  np.testing.assert_allclose(data["value"], by_numpy(critic, x), rtol=1e-4, atol=1e-5)
