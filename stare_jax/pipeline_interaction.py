"""Interaction: StA-PPO in the simulator (METHOD: Interaction)."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from stare_jax import pipeline_together, pipeline_updates, stages, train, train_critic
from stare_jax.episode import SIGNAL_SIZE, StagedEpisode, unpack_signals
from stare_jax.losses import ops, ppo
from stare_jax.pipeline_rewards import raw, rewards
from stare_jax.pipeline_run import Run, advance_until, starting_params, step
from stare_jax.rollout import Start

FEW = 16  # steps: of fewer, a deviation is wrong by a fifth and more


def interaction(run: Run) -> Any:
  """StA-PPO in the simulator (METHOD: Interaction). Every iteration starts from fresh episodes.

  So an iteration is a function of the state and its number, and a resumed run needs no simulator snapshot.
  """
  c, n = with_success_reward(run.config.interaction, len(run.task.stages)), run.config.sim.num_envs
  params = starting_params(run, "interaction")
  reference = reference_log_prob(run, params, c) if c.hp.kl_weight else None
  tx, update = pipeline_updates.interaction(run.policy, c, run.mesh, run.param_axes)
  trained = dict(mesh=run.mesh, param_axes=run.param_axes, trainable=run.policy.trainable)
  critic = train_critic.init(jax.random.fold_in(run.key, 1), num_features(run)) if c.critic == "state" else None
  state = train.new_state(params, tx, critic=critic, **trained)
  del params  # the state has its own
  seed_of = training_seeds(run.seeds("interaction", 1)[0], c.steps, run.task.starts)

  def advance(state, i):
    began = time.monotonic()
    collector = run.collector(run.actor(state.params, "interaction", c.temperature), stop_on_success=c.stop_on_success)
    rows = pipeline_together.rows(collector, lambda env, j: Start(seed_of(i * n + env, j)), c.steps)
    del collector  # with its actor's copy of the parameters, which an update has no room for
    rows = [stages.annotate(run.task, row, offset=c.offset) for row in rows]
    collected = time.monotonic()
    if c.critic == "state":
      features = [[state_features(item) for item in row] for row in rows]
      if i == 0:
        state = dataclasses.replace(state, critic=train_critic.calibrate(state.critic, stacked(features)))
      rows = with_values(rows, features, state.critic)
    data = advantages(rows, c)
    data["obs"] = run.obs(np.concatenate([item.episode.images for row in rows for item in row]))
    if reference is not None:
      data["ref_log_prob"] = reference(data["obs"], data["tokens"])
    state, metrics = learn(run, update, state, data, i)
    if c.critic == "state":
      rng = np.random.default_rng([run.config.seed, i, *b"critic"])
      critic = train_critic.fit(state.critic, stacked(features), data["returns"], batch=c.batch, rng=rng, **c.critic_hp)
      state = dataclasses.replace(state, critic=critic)
    metrics |= rollout_metrics(run, rows, c)
    now = time.monotonic()
    return state, metrics | {
      "env_steps": n * c.steps, "rollout_seconds": collected - began, "update_seconds": now - collected,
      "steps_per_second": n * c.steps / (now - began),
    }  # fmt: skip

  state = advance_until(run, "interaction", state, advance, total=c.iterations, every=c.checkpoint_every,
                        unit="iteration", show=("success", "return_shaped", "kl"))  # fmt: skip
  return state.params


def training_seeds(first: int, steps: int, starts: int | None) -> Callable[[int, int], int]:
  """(row, j) -> the seed of the j-th episode of a row of `steps` steps; no two are alike.

  With published starts, a seed's remainder by their number says which one it is. Nearly all episodes are the first of
  their row, so rows are a number of seeds apart that shares no factor with theirs: else few of the starts would be met.
  """
  apart = next(n for n in itertools.count(steps) if math.gcd(n, starts or 1) == 1)
  return lambda row, j: first + row * apart + j


def reference_log_prob(run: Run, params: Any, c: Any) -> Callable[[Any, np.ndarray], np.ndarray]:
  """(obs, tokens int32[N, A]) -> float32[N, A] under the policy that the phase started from, a batch at a time.

  A frozen base is the same arrays as the trained policy's: of adapters there are two copies, of the base there is one.
  """

  def log_prob(params, obs, tokens):
    return ops.token_log_prob(run.policy.apply(params, obs, tokens).logits, tokens, c.temperature)

  log_prob = pipeline_together.compiled(run, log_prob)

  def every(obs: Any, tokens: np.ndarray) -> np.ndarray:
    parts = [slice(at, at + c.batch) for at in range(0, len(tokens), c.batch)]
    one = lambda p: np.asarray(log_prob(params, jax.tree.map(lambda x: x[p], obs), tokens[p]))
    return np.concatenate([one(p) for p in parts])

  return every


# A critic of the simulator's state (train_critic): what it sees, and the values that it gives.


def num_features(run: Run) -> int:
  return SIGNAL_SIZE + 8 + len(run.task.stages) + 2


def state_features(item: StagedEpisode) -> np.ndarray:
  """float32[T+1, F]: every signal, tool-object and object-goal displacements with their lengths, stage, potential."""
  signals = unpack_signals(item.episode.signals)
  gaps = [signals[a][:, :3] - signals[b][:, :3] for a, b in (("tcp_pose", "object_pose"), ("object_pose", "goal_pose"))]
  sizes = [np.linalg.norm(gap, axis=-1, keepdims=True) for gap in gaps]
  stage = np.append(item.stage_id, item.completed.sum())
  one_hot = stage[:, None] == np.arange(len(item.completed) + 1)
  parts = [item.episode.signals, *gaps, *sizes, one_hot, item.potential[:, None]]
  return np.concatenate(parts, axis=-1).astype(np.float32)


def stacked(features: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
  """float32[N * T, F]: the states in which a decision was made, row by row."""
  return np.concatenate([x[:-1] for row in features for x in row])


def with_values(rows: Sequence[Sequence[StagedEpisode]], features: Any, critic: train_critic.Critic) -> list[list]:
  """The same episodes with the critic's values in place of the policy's."""
  x = np.concatenate([x for row in features for x in row])
  room = 2 * sum(len(item.episode) for row in rows for item in row)  # one shape: an episode has at least one step
  value = iter(np.asarray(train_critic.values(critic, np.pad(x, ((0, room - len(x)), (0, 0)))))[: len(x)])

  def valued(item: StagedEpisode) -> StagedEpisode:
    *v, last = itertools.islice(value, len(item.episode) + 1)
    last = 0.0 if item.episode.terminated else float(last)
    return dataclasses.replace(item, episode=dataclasses.replace(item.episode, value=np.array(v), last_value=last))

  return [[valued(item) for item in row] for row in rows]


def with_success_reward(c: Any, num_stages: int) -> Any:
  """The configuration with `success_reward` filled in where it is 0 (automatic): K * max(offset, 0.5) + 0.5.

  That is more than any potential, (K - 1) * offset + sigmoid(1) at offset 0.5. A success ends the potential it has
  (Phi of a terminal state is 0), and a critic that is still at zero would otherwise call it a loss. With shaped
  milestones it is K + 0.5 for the same reason: each part is for a stage that gives back up to sigmoid(1) = 0.73.
  """
  if c.success_reward:
    return c
  c = c.copy_and_resolve_references()
  with c.unlocked():
    c.success_reward = num_stages * (1.0 if c.reward == "shaped_milestones" else max(c.offset, 0.5)) + 0.5
  return c


def advantages(rows: Sequence[Sequence[StagedEpisode]], c: Any) -> dict[str, np.ndarray]:
  """GAE over rows of episodes -> flat arrays of N * T steps; the advantage is standardised (`c.standardise`)."""
  grid = {"reward": [], "value": [], "next_value": [], "terminated": [], "truncated": []}
  for row in rows:
    parts = {name: [] for name in grid}
    for item in row:
      episode, steps = item.episode, len(item.episode)
      last = np.arange(steps) == steps - 1
      parts["reward"].append(rewards(item, c))
      parts["value"].append(episode.value)
      parts["next_value"].append(np.append(episode.value[1:], np.float32(episode.last_value)))
      ends = episode.terminated or not c.bootstrap
      parts["terminated"].append(last & ends)
      parts["truncated"].append(last & (not ends))
    for name in grid:
      grid[name].append(np.concatenate(parts[name]))
  arrays = {name: np.stack(rows_) for name, rows_ in grid.items()}
  valid = np.ones(arrays["reward"].shape, bool)
  advantage, returns = ppo.gae(**arrays, valid=valid, discount=c.hp.discount, lam=c.hp.lam)
  stage = np.stack([np.concatenate([item.stage_id for item in row]) for row in rows])
  advantage = ops.standardize(advantage, valid) if c.standardise == "all" else by_stage(np.asarray(advantage), stage)
  episodes = [item.episode for row in rows for item in row]
  flat = {name: np.asarray(x).reshape(-1) for name, x in (("advantage", advantage), ("returns", returns))}
  flat |= {name: np.concatenate([getattr(e, name) for e in episodes]) for name in ("tokens", "log_prob", "value")}
  return flat | {"valid": valid.reshape(-1)}


def by_stage(advantage: np.ndarray, stage: np.ndarray) -> np.ndarray:
  """Each stage's advantages standardised by themselves: a step in a stage that few reach weighs as any other.

    advantage: float32. stage: integers of the same shape.
  Returns: float32 of the same shape. A stage of fewer than `FEW` steps, whose own mean and deviation say little, is
  standardised with all.
  """
  out = np.array(ops.standardize(advantage, np.ones(advantage.shape, bool)))
  for k in np.unique(stage):
    here = stage == k
    if here.sum() >= FEW:
      out[here] = np.asarray(ops.standardize(advantage, here))[here]
  return out


def learn(run: Run, update: train.Update, state: Any, data: dict[str, Any], i: int) -> tuple[Any, dict[str, float]]:
  """The epochs of one iteration: critic alone at first, early stop and step size by the KL to the rollout's policy."""
  c, total = run.config.interaction, len(data["tokens"])
  state = train.set_learning_rate_scale(state, policy_scale=0.0 if i < c.critic_warmup else 1.0)
  if i == c.critic_warmup > 0:
    state = train.restart_moments(state)
  logged: list[dict[str, float]] = []
  for epoch in range(c.epochs):
    order = np.random.default_rng([run.config.seed, i, epoch]).permutation(total)
    here = []
    for rows in map(run.mine, order.reshape(-1, c.batch)):
      state, metrics = step(run, update, state, jax.tree.map(lambda x: x[rows], data))  # noqa: B023 - called at once
      here.append(metrics)
    logged += here
    kl = float(np.mean([m["kl"] for m in here]))
    if c.target_kl and kl > c.target_kl:
      break
  if c.target_kl and i >= c.critic_warmup:
    scale = train.learning_rate_scale(state)
    scale *= 1 / 1.5 if kl > 1.5 * c.target_kl else 1.5 if kl < c.target_kl / 1.5 else 1.0
    state = train.set_learning_rate_scale(state, float(np.clip(scale, 0.1, 10.0)))
  metrics = {name: float(np.mean([m[name] for m in logged])) for name in logged[0]}
  metrics["explained_variance"] = float(ppo.explained_variance(metrics))
  drop = ("return", "return_square", "residual", "residual_square", "value")
  metrics = {name: value for name, value in metrics.items() if name not in drop}
  return state, metrics | {"kl": kl, "epochs": len(logged) * c.batch / total}


def whole_episodes(rows: Sequence[Sequence[StagedEpisode]], horizon: int) -> list[StagedEpisode]:
  """The episodes that had a whole horizon before them when they started, or where none had, the first of each row.

  Those that the end of the rollout cuts would count only where they succeed in time, and success would look higher.
  """
  kept = []
  for row in rows:
    left = sum(len(item.episode) for item in row)
    for first, item in zip(itertools.chain([True], itertools.repeat(False)), row):
      if first or left >= horizon:
        kept.append(item)
      left -= len(item.episode)
  return kept


def rollout_metrics(run: Run, rows: Sequence[Sequence[StagedEpisode]], c: Any) -> dict[str, float]:
  """Success, conditional stage completion and returns, per episode of `whole_episodes`."""
  ended = whole_episodes(rows, run.config.sim.horizon)
  completed = np.stack([item.completed for item in ended])
  before = np.concatenate([np.ones_like(completed[:, :1]), completed[:, :-1]], axis=1)
  there = before.sum(0)
  rates = np.where(there > 0, (completed & before).sum(0) / np.maximum(there, 1), np.nan)  # none there: not known
  discounted = lambda reward: float(reward @ c.hp.discount ** np.arange(len(reward)))
  shaped = [discounted(rewards(item, c)) for item in ended]
  return {
    "episodes": float(len(ended)), "success": float(completed[:, -1].mean()),
    "return_raw": float(np.mean([discounted(raw(item, c)) for item in ended])),
    "return_shaped": float(np.mean(shaped)), "length": float(np.mean([len(x.episode) for x in ended])),
    **{f"stage_{k + 1}": float(rate) for k, rate in enumerate(rates)},
  }  # fmt: skip
