"""What the phases compute on the host: minibatches, advantages and the rates of a rollout, against plain loops."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import math
import mmap
import pathlib
from types import SimpleNamespace

import jax
import ml_collections
import numpy as np
import pytest

from stare_jax import dataset, losses, pipeline, pipeline_pairs, pipeline_run, pipeline_updates, suites, tasks, train
from stare_jax.checkpoint import config_digest, save
from stare_jax.config import ConfigError
from stare_jax.episode import SIGNAL_SIZE, Episode, StagedEpisode
from stare_jax.pipeline import evaluation_fields
from stare_jax.pipeline_interaction import advantages, rollout_metrics, training_seeds, whole_episodes
from stare_jax.pipeline_policy import Base
from stare_jax.pipeline_run import minibatch
from stare_jax.policies import ActionStats
from stare_jax.rollout import Start
from tests import toy_run

HORIZON = 6


def test_minibatches_cover_every_item_each_epoch():
  n, size = 23, 5  # 4 batches an epoch, 3 items left out, others each time
  batches = [minibatch(n, size, i, seed=1) for i in range(40)]
  assert all(len(batch) == size for batch in batches)
  for epoch in range(10):
    seen = np.concatenate(batches[4 * epoch : 4 * epoch + 4])
    assert len(set(seen.tolist())) == 20 and seen.min() >= 0 and seen.max() < n
  assert set(np.concatenate(batches).tolist()) == set(range(n))


def test_fewer_steps_than_a_batch_are_told_before_anything_is_compiled():
  c = ml_collections.ConfigDict(dict(batch=4096, micro_batches=4, demonstrations=8))
  pipeline.check_demonstrations(4096, c, shards=2)
  pipeline.check_demonstrations(248, c, shards=2)
  with pytest.raises(ConfigError, match="250 steps were demonstrated.* choose a batch of 248, or more"):
    pipeline.check_demonstrations(250, c, shards=2)
  with pytest.raises(ConfigError, match="7 steps .* into 8 parts: choose more imitation.demonstrations"):
    pipeline.check_demonstrations(7, c, shards=2)


def test_a_minibatch_depends_on_its_number_alone():
  """What a resumed run asks for first is what the uninterrupted one had there."""
  forward = [minibatch(40, 8, i, seed=2) for i in range(25)]
  for i in reversed(range(25)):
    np.testing.assert_array_equal(minibatch(40, 8, i, seed=2), forward[i])
  assert any((minibatch(40, 8, i, seed=3) != forward[i]).any() for i in range(3))


def test_a_batch_larger_than_the_data_takes_all_of_it():
  assert sorted(minibatch(3, 8, 0, seed=0).tolist()) == [0, 1, 2]


def demonstration(seed: int, length: int) -> Episode:
  rng = np.random.default_rng(seed)
  return Episode(
    task="pull_cube", seed=seed, instruction="pull", images=rng.integers(0, 256, (length, 8, 8, 3), dtype=np.uint8),
    signals=np.zeros((length + 1, SIGNAL_SIZE), np.float32), actions=rng.random((length, 7), np.float32),
    tokens=np.zeros((length, 7), np.int32), log_prob=np.zeros((length, 7), np.float32),
    value=np.zeros(length, np.float32), last_value=0.0, terminated=True,
  )  # fmt: skip


def is_mapped(array: np.ndarray) -> bool:
  """Whether its bytes are those of a file."""
  while isinstance(array, np.ndarray):
    array = array.base
  return isinstance(array, mmap.mmap)


def test_collected_episodes_leave_the_memory_for_their_file(tmp_path):
  collected = []

  class Collector:
    def episodes(self, starts):
      collected.extend(demonstration(start.seed, 3) for start in starts)
      return collected[-len(starts) :]

  run = SimpleNamespace(workdir=tmp_path, seconds={}, env_steps={}, never_run=(), check_here=lambda: None,
                        collector=lambda actor, **_: Collector())  # fmt: skip
  starts = [Start(seed) for seed in range(70)]
  gather = functools.partial(pipeline_run.gather, run, "demonstrations", starts, object, {"a": 1})
  first, second = gather(), gather()
  assert len(collected) == 70 and all(is_mapped(e.images) for e in [*first, *second])
  for a, b, c in zip(collected, first, second, strict=True):
    np.testing.assert_array_equal(a.images, b.images)
    np.testing.assert_array_equal(a.images, c.images)


def test_fields_of_phases_that_never_ran_do_not_bind_what_was_collected():
  now = {"preference.starts": 4, "task": "toy"}
  saved = {**now, "imitation.batch": 64}  # as versions before wrote it
  meta = {"digest": config_digest(saved), "fields": saved}
  path = pathlib.Path("00000.episodes")
  pipeline_run.check_collected(path, meta, now, ("imitation.",))
  with pytest.raises(dataset.DatasetError, match="imitation.batch: 64 there, absent now"):
    pipeline_run.check_collected(path, meta, now)
  with pytest.raises(dataset.DatasetError, match="preference.starts: 4 there, 5 now"):
    pipeline_run.check_collected(path, meta, now | {"preference.starts": 5}, ("imitation.",))


@pytest.mark.parametrize("trainable", [None, lambda path: path.startswith(("lora/", "value/"))])
def test_resuming_holds_one_state_at_a_time(tmp_path, trainable):
  """The fresh state would live, beside the one that is read, as long as the phase; frozen parameters are shared."""
  params = {name: jax.numpy.full(4, i, jax.numpy.float32) for i, name in enumerate(("base", "lora", "value"))}
  params = {name: {"kernel": x} for name, x in params.items()}
  tx = train.make_optimizer(learning_rate=1e-3)
  state = train.new_state(params, tx, trainable=trainable)
  save(tmp_path, 1, state, {}, config={})
  config = ml_collections.ConfigDict(dict(policy=dict(checkpoint="", lora=dict(rank=0))))
  fresh = train.new_state(jax.tree.map(jax.numpy.zeros_like, params), tx, trainable=trainable)
  read, _ = Base(config).restore(SimpleNamespace(trainable=trainable), tmp_path, fresh)
  jax.tree.map(np.testing.assert_array_equal, read, state)
  own, frozen = train.split_state(fresh, trainable)
  assert all(x.is_deleted() for x in jax.tree.leaves(own))
  assert not any(x.is_deleted() for x in jax.tree.leaves(frozen)) and bool(jax.tree.leaves(frozen)) == bool(trainable)


def test_imitation_takes_the_batches_of_its_episodes_put_together(monkeypatch, tmp_path):
  """In the same order, and without putting all images together: 16,384 demonstrations of 7B would be 120 GB."""
  made = [demonstration(seed, 3 + seed % 5) for seed in range(20)]
  dataset.write(tmp_path / "demonstrations", made)
  episodes, _ = dataset.open(tmp_path / "demonstrations")
  config, batches, put_together = toy_run.get_config(), [], []
  policy = SimpleNamespace(tokenize=lambda actions: actions, trainable=None)
  run = SimpleNamespace(config=config, folder_statistics=1, use_statistics=lambda _: None, policy=policy, mesh=None,
                        param_axes=None, mine=lambda x: x, obs=lambda x: x)  # fmt: skip

  def advance_until(run, phase, state, advance, **_):
    for i in range(30):
      advance(state, i)
    return state

  concatenate = np.concatenate
  replaced = {
    (pipeline, "demonstrations"): lambda run: episodes, (pipeline, "starting_params"): lambda *_: None,
    (pipeline, "advance_until"): advance_until,
    (pipeline, "step"): lambda run, update, state, batch: batches.append(batch),
    (pipeline_updates, "imitation"): lambda *_: (None, None),
    (train, "new_state"): lambda *_, **__: SimpleNamespace(params=None),
    (np, "concatenate"): lambda arrays, **k: put_together.append([x.shape for x in arrays]) or concatenate(arrays, **k),
  }  # fmt: skip
  for (where, name), value in replaced.items():
    monkeypatch.setattr(where, name, value)
  pipeline.imitation(run)
  monkeypatch.undo()
  assert not any(len(shape) == 4 for shapes in put_together for shape in shapes)
  images, actions = (np.concatenate([getattr(e, name) for e in made]) for name in ("images", "actions"))
  for i, batch in enumerate(batches):
    rows = minibatch(len(images), config.imitation.batch, i, config.seed)
    np.testing.assert_array_equal(batch["obs"], images[rows])
    np.testing.assert_array_equal(batch["tokens"], actions[rows])
  assert len(batches) == 30


def staged(rng: np.random.Generator, length: int, terminated: bool, stages: int = 2) -> StagedEpisode:
  value = rng.standard_normal(length).astype(np.float32)
  reached = stages if terminated else int(rng.integers(0, stages))
  episode = Episode(
    task="pull_cube", seed=0, instruction="pull", images=np.zeros((length, 4, 4, 3), np.uint8),
    signals=np.zeros((length + 1, SIGNAL_SIZE), np.float32), actions=np.zeros((length, 7), np.float32),
    tokens=rng.integers(0, 256, (length, 7)).astype(np.int32),
    log_prob=rng.standard_normal((length, 7)).astype(np.float32), value=value,
    last_value=0.0 if terminated else float(rng.standard_normal()), terminated=terminated,
  )  # fmt: skip
  completed_at = np.where(np.arange(stages) < reached, length, -1).astype(np.int32)
  potential = rng.random(length + 1).astype(np.float32) + reached
  zeros = np.zeros(length, np.float32)
  return StagedEpisode(episode, zeros.astype(np.int32), completed_at, np.zeros(stages, np.float32), potential, zeros)


def test_a_sample_off_the_common_path_is_left_out():
  rng = np.random.default_rng(5)
  whole = [staged(rng, length, False) for length in (9, 9, 9, 4, 9)]
  whole[1].episode.signals[4] = 1.0  # not where the first sample is when they part
  starts = [Start(7, 0, 4), Start(7, 1, 4), Start(7, 2, 4), Start(7, 3, 4), Start(8, 0, 0)]
  kept = pipeline_pairs.parted(whole, starts)
  assert [len(item.episode) for item in kept] == [5, 5, 9]  # without the stray one, and the one that ended before
  np.testing.assert_array_equal(kept[1].episode.tokens, whole[2].episode.tokens[4:])
  assert kept[2] is whole[4]


def rollout(rng: np.random.Generator) -> list[list[StagedEpisode]]:
  """Two rows of ten steps: ended by success, by the horizon, and by the end of the rollout."""
  return [
    [staged(rng, 4, True), staged(rng, HORIZON, False)],
    [staged(rng, HORIZON, False), staged(rng, 1, True), staged(rng, 3, False)],
  ]


def settings(**changes) -> ml_collections.ConfigDict:
  c = dict(reward="potential", offset=0.5, terminal="zero", bootstrap=True, success_reward=3.0, standardise="all")
  return ml_collections.ConfigDict(c | dict(hp=dict(discount=0.9, lam=0.8)) | changes)


def by_loop(rows, c) -> tuple[np.ndarray, np.ndarray]:
  """Eq. Shape and GAE, one step at a time, in double precision."""
  advantage, returns = [], []
  for row in rows:
    for item in row:
      e, phi, n = item.episode, item.potential.astype(float), len(item.episode)
      later, out = 0.0, np.zeros(n)
      for t in reversed(range(n)):
        end = e.terminated and t == n - 1
        reward = c.success_reward if end else 0.0
        if c.reward == "potential":
          after = 0.0 if end and c.terminal == "zero" else phi[t + 1]
          reward += c.hp.discount * after - phi[t]
        following = 0.0 if end else (e.value[t + 1] if t + 1 < n else e.last_value)
        later = reward + c.hp.discount * following - e.value[t] + c.hp.discount * c.hp.lam * later
        out[t] = later
      advantage.append(out)
      returns.append(out + e.value)
  advantage = np.concatenate(advantage)
  return (advantage - advantage.mean()) / advantage.std(), np.concatenate(returns)


@pytest.mark.parametrize("reward, terminal", [("potential", "zero"), ("potential", "keep"), ("success", "zero")])
def test_advantages_equal_a_loop_over_episodes(rng, reward, terminal):
  rows, c = rollout(rng), settings(reward=reward, terminal=terminal)
  data = advantages(rows, c)
  advantage, returns = by_loop(rows, c)
  np.testing.assert_allclose(data["advantage"], advantage, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(data["returns"], returns, rtol=1e-4, atol=1e-5)
  assert data["valid"].all()
  for name in ("tokens", "log_prob", "value"):  # in the order of the advantages
    np.testing.assert_array_equal(data[name], np.concatenate([getattr(i.episode, name) for r in rows for i in r]))


def test_an_episode_does_not_reach_into_the_one_before(rng):
  """Returns, not advantages: those are standardised over all steps."""
  rows, c = rollout(rng), settings()
  before = advantages(rows, c)["returns"]
  rows[0][1] = staged(rng, HORIZON, False)
  after = advantages(rows, c)["returns"]
  np.testing.assert_array_equal(before[:4], after[:4])
  assert (before[4:10] != after[4:10]).all()
  np.testing.assert_array_equal(before[10:], after[10:])


def test_rates_count_only_episodes_that_had_the_time(rng):
  """A success in the last steps counts only if a failure there would have, or the rate is too high."""
  rows = rollout(rng)
  whole = whole_episodes(rows, HORIZON)
  assert [id(x) for x in whole] == [id(rows[0][0]), id(rows[0][1]), id(rows[1][0])]
  assert [id(x) for x in whole_episodes(rows, 50)] == [id(rows[0][0]), id(rows[1][0])]


def test_rollout_metrics_equal_a_loop(rng):
  rows, c = rollout(rng), settings()
  found = rollout_metrics(SimpleNamespace(config=SimpleNamespace(sim=SimpleNamespace(horizon=HORIZON))), rows, c)
  items = [rows[0][0], rows[0][1], rows[1][0]]
  reached = list(items)
  for k in range(2):
    done = [item for item in reached if item.completed[k]]
    assert found[f"stage_{k + 1}"] == pytest.approx(len(done) / len(reached) if reached else math.nan, nan_ok=True)
    reached = done
  assert found["episodes"] == 3 and found["success"] == pytest.approx(1 / 3)
  assert found["length"] == pytest.approx((4 + HORIZON + HORIZON) / 3)
  raw, shaped = [], []
  for item in items:
    n, end, total = len(item.episode), item.episode.terminated, 0.0
    raw.append(3.0 * 0.9 ** (n - 1) * end)
    for t in range(n):
      last = t == n - 1
      after = 0.0 if last and end else item.potential[t + 1]
      total += 0.9**t * ((3.0 if last and end else 0.0) + 0.9 * after - item.potential[t])
    shaped.append(total)
  assert found["return_raw"] == pytest.approx(np.mean(raw))
  assert found["return_shaped"] == pytest.approx(np.mean(shaped), rel=1e-5)


def test_of_a_stage_that_nobody_came_to_nothing_is_known(rng):
  rows, c = rollout(rng), settings()
  run = SimpleNamespace(config=SimpleNamespace(sim=SimpleNamespace(horizon=HORIZON)))
  none = lambda item: dataclasses.replace(item, completed_at=np.full_like(item.completed_at, -1))
  found = rollout_metrics(run, [[none(item) for item in row] for row in rows], c)
  assert found["stage_1"] == 0 and math.isnan(found["stage_2"])


@pytest.mark.parametrize("steps", [30, 40, 60, 80, 120])
def test_first_episodes_of_rows_meet_all_published_starts(steps):
  for starts in (24, 64):
    seed_of = training_seeds(5, steps, starts)
    met = collections.Counter(seed_of(row, 0) % starts for row in range(10 * starts))
    assert set(met.values()) == {10} and len(met) == starts
    every = [seed_of(row, j) for row in range(20) for j in range(steps)]  # an episode has a step, so j stays below
    assert len(set(every)) == len(every)
  assert training_seeds(5, steps, None)(3, 2) == 5 + 3 * steps + 2


def test_every_preference_loss_has_its_adapter():
  assert set(pipeline_updates.PREFERENCE_LOSSES) == set(losses.names("preference"))


@pytest.mark.slow
def test_trajectory_preferences_and_the_policys_own_critic(tmp_path, toy_environment, uninterrupted):
  """The other choice of both, through the front door, from another run's imitation."""
  workdir = tmp_path / "run"
  done = toy_run.launch(
    workdir, toy_environment, f"--config.init_from={uninterrupted}/checkpoints/imitation",
    "--config.phases=('preference','interaction')", "--config.preference.loss=tpo",
    "--config.interaction.critic=policy", "--config.interaction.iterations=2",
  )  # fmt: skip
  assert done.returncode == 0 and "compiled again" not in done.stderr, done.stdout + done.stderr
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  preference, first, second = ([r for r in rows if r["phase"] == "preference"], *rows[-2:])
  assert "pairs_1" in preference[0] and "pairs_2" not in preference[0]  # the whole episode is its only stage
  # The head is trained in the update, and the second rollout is judged by what it learned from the first.
  assert first["explained_variance"] == pytest.approx(0, abs=1e-3) and abs(second["explained_variance"]) > 1e-3


@pytest.mark.slow
def test_rl4vlas_ppo_acts_on_episodes_of_a_fixed_length(tmp_path, toy_environment, uninterrupted):
  workdir = tmp_path / "run"
  done = toy_run.launch(
    workdir, toy_environment, f"--config.init_from={uninterrupted}/checkpoints/imitation",
    "--config.phases=('interaction',)", "--config.interaction.steps=12", "--config.interaction.batch=24",
    "--config.interaction.iterations=3", config="tests/toy_run.py:default,method=rl4vla_faithful,task=pick_cube",
  )  # fmt: skip
  assert done.returncode == 0 and "compiled again" not in done.stderr, done.stdout + done.stderr
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  assert len(rows) == 3 and all(row["episodes"] == 4 and row["length"] == 12 for row in rows)
  assert all(row["return_raw"] == row["return_shaped"] for row in rows)  # nothing is shaped


def test_tasks_of_the_presets_have_stages():
  for name in tasks.names():
    assert tasks.get(name).stages


def test_whatever_decides_an_evaluation_is_in_its_digest():
  config = toy_run.get_config()
  run = SimpleNamespace(config=config, task=tasks.get("pull_cube"), stats=ActionStats(*np.zeros((3, 7))))
  digest = lambda suite=None, block=0, show=0: config_digest(evaluation_fields(run, "abc", suite, block, show))
  seen = [digest(), digest(suites.get("lighting")), digest(block=1), digest(show=3)]
  config.policy.checkpoint = "elsewhere"  # a path: its parameters are in the digest
  assert digest() == seen[0]
  config.seed += 1  # of the actor's samples
  seen.append(digest())
  config.policy.unnorm_key = "bridge_orig"
  seen.append(digest())
  config.policy.options.patch_size = 16
  seen.append(digest())
  run.stats = ActionStats(*np.ones((3, 7)))  # decodes the same tokens to other actions
  assert len({*seen, digest()}) == 8


def test_a_checkpoint_under_suites_resumed(tmp_path, toy_environment, uninterrupted):
  """In-distribution is the run's own evaluation; what is there is not run again, what is gone comes back the same."""
  workdir, config = tmp_path / "suites", f"configs/eval.py:run={uninterrupted}"
  flags = ("--config.suites.seeds=2", "--config.suites.pictures=2")
  done = toy_run.launch(workdir, toy_environment, *flags, config=config)
  assert done.returncode == 0, done.stdout + done.stderr
  of_run = json.loads((uninterrupted / "evaluations" / "interaction.json").read_text())
  found = {path.stem: json.loads(path.read_text()) for path in sorted((workdir / "evaluations").glob("*.json"))}
  run = ("image_noise", "in_distribution", "instruction")  # what the toy can change
  assert list(found) == [f"{name}-{seed}" for name in run for seed in (0, 1)]
  assert json.loads((workdir / "suites.json").read_text())["after"] == of_run["after"] > 0
  skipped = {"label", "digest", "seconds", "told", "after"}
  compared = {name: value for name, value in of_run.items() if name not in skipped}
  assert {name: found["in_distribution-0"][name] for name in compared} == compared
  assert found["in_distribution-1"]["seeds"][0] == of_run["seeds"][1] + 1
  table = json.loads((workdir / "suites.json").read_text())
  assert [row["suite"] for row in table["rows"]] == list(suites.names())
  assert table["params_sha256"] == json.loads((uninterrupted / "summary.json").read_text())["params_sha256"]
  assert "cannot change: camera" in table["rows"][1]["not_run"]
  assert (workdir / "pictures" / "image_noise-0.jpg").stat().st_size > 0

  files = {path: path.stat().st_mtime_ns for path in (workdir / "evaluations").iterdir()}
  gone = workdir / "evaluations" / "image_noise-1.json"
  gone.unlink()
  done = toy_run.launch(workdir, toy_environment, *flags, config=config)
  assert done.returncode == 0 and "image_noise-1 evaluation" in done.stderr and "noise-0 evaluation" not in done.stderr
  del files[gone]
  assert {path: path.stat().st_mtime_ns for path in files} == files
  same = lambda result: {name: value for name, value in result.items() if name != "seconds"}
  assert same(json.loads(gone.read_text())) == same(found[gone.stem])
  again = json.loads((workdir / "suites.json").read_text())
  assert again["rows"] == table["rows"]


@pytest.mark.parametrize(("phase", "q01", "mask"), [("imitation", 0.3, False), ("public", -3.0, True)])
def test_a_gripper_between_0_and_1_is_a_data_sets_only_where_it_comes_from_one(tmp_path, phase, q01, mask):
  """Demonstrations that never close it have such statistics, too, and theirs are in the simulator's terms."""
  stats = {"q01": [-1.0] * 6 + [0.3], "q99": [1.0] * 7, "mask": [True] * 6 + [False]}
  save(tmp_path / "start", 0, {"params": np.zeros(2)}, {"phase": phase, "action_stats": stats})
  took = []
  config = SimpleNamespace(phases=("preference",), init_from=str(tmp_path / "start"))
  run = SimpleNamespace(
    config=config, workdir=tmp_path, folder_statistics=None, key=jax.random.key(0), policy=None, mesh=None,
    base=SimpleNamespace(from_checkpoint=lambda *_: "parameters"), use_statistics=took.append,
  )  # fmt: skip
  assert pipeline_run.starting_params(run, "preference") == "parameters"
  (found,) = took
  assert found.q01[-1] == np.float32(q01) and found.mask[-1] == mask and found.q99[-1] == 1
