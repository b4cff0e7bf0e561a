"""The hall: Imitation -> Preference -> Interaction, one function per phase, and the loop that they share.

A phase is a pure function of (its starting parameters, the configuration, the seed): the i-th advance of its loop
depends on the state and on i alone. So a run that was killed anywhere repeats from its last checkpoint and ends with
the same parameters as one that was not. What is on disk is complete or absent, never half.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stare_jax import batching, checkpoint, dataset, evaluate, losses, policies, report, sharding, sims, stages, tasks, train
from stare_jax.config import PHASES, ConfigError, validate
from stare_jax.episode import Episode, StagedEpisode
from stare_jax.losses import ops, ppo
from stare_jax.rollout import Collector, ExpertActor, PolicyActor, Start, Stop, compile_act

log = logging.getLogger("stare_jax")
IDENTITY_SKIPS = ("phases", "preset", "evaluation.", "report.", "checkpoint.", "sim.timeout", "interaction.iterations")
USER_ERRORS = (ConfigError, checkpoint.CheckpointError, dataset.DatasetError, sims.SimulatorError, train.NonFiniteError,
               FileExistsError, OSError)  # fmt: skip
CHUNK = 64  # episodes per file of a growing data set: what a kill during collection can cost


class Run:
  """What the phases of one run share: configuration, folders, policy, simulator, metrics.

  The simulator starts when it is first needed and the policy exists once its action statistics do.
  """

  def __init__(self, config: Any, workdir: str | os.PathLike, *, stop: Callable[[], bool] = lambda: False):
    self.config, self.stop = config, stop
    self.workdir = pathlib.Path(workdir)
    self.task = tasks.get(config.task)
    self.mesh = sharding.make_mesh(dict(config.mesh))
    self.key = jax.random.key(config.seed)
    self.policy: policies.Policy | None = None
    self.logger: report.MetricsLogger | None = None
    self._sim: Any = None
    self.results: dict[str, dict] = {}
    self.events: list[str] = []
    self.env_steps: dict[str, int] = {}
    self.seconds: dict[str, float] = {}

  @property
  def sim(self) -> Any:
    if self._sim is None:
      c = self.config.sim
      self._sim = sims.make(
        c.name, task=self.task, num_envs=c.num_envs, num_workers=c.num_workers, image_size=c.image_size, timeout=c.timeout
      )  # fmt: skip
    return self._sim

  def close(self) -> None:
    if self._sim is not None:
      self.events += self._sim.events
      self._sim.close()
      self._sim = None
    if self.logger is not None:
      self.logger.close()

  def check(self) -> None:
    """Called in every loop; leaves it when the process was asked to end."""
    if self.stop():
      raise Stop

  def use_statistics(self, stats: policies.ActionStats) -> None:
    c = self.config.policy
    self.stats = stats
    self.policy = policies.make(c.name, size=c.size, stats=stats, image_size=self.config.sim.image_size, **c.options)
    self.act = compile_act(self.policy)
    self.param_axes = self.policy.param_axes if self.mesh.size > 1 else None

  def obs(self, images: np.ndarray) -> policies.Obs:
    """What the policy sees of images uint8[N, H, W, 3] under the task's instruction."""
    return self.policy.encode(images, [self.task.instruction] * len(images))

  def identity(self, phase: str) -> dict[str, Any]:
    """The flat fields that decide a phase's parameters: a checkpoint of other ones is refused.

    Not among them: how a run shows itself, evaluation, later phases, and how long Interaction goes on, so that a
    finished run may be evaluated otherwise, changed from a later phase on, or trained for longer.
    """
    later = PHASES[PHASES.index(phase) + 1 :]
    skipped = (*IDENTITY_SKIPS, *(f"{name}." for name in later))
    return {k: v for k, v in checkpoint.flatten_config(self.config).items() if not k.startswith(skipped)}

  def seeds(self, purpose: str, count: int) -> range:
    """`count` environment seeds for a purpose; never those of the evaluation, which lie below 2^24."""
    state = np.random.SeedSequence([self.config.seed, *purpose.encode()]).generate_state(1)[0]
    first = 2**24 + int(state) % 2**30
    return range(first, first + count)

  def collector(self, actor: Any, *, progress: report.Progress | None = None, **options: Any) -> Collector:
    def show(steps: int, episode: Episode | None) -> None:
      if progress is not None and episode is not None:
        successes.append(bool(episode.success[1:].any()))
        progress.update(1, success=float(np.mean(successes)))

    successes: list[bool] = []
    c = self.config.sim
    return Collector(
      self.sim, self.task, actor, horizon=c.horizon, groups=c.groups, check=self.check, progress=show, **options
    )  # fmt: skip

  def actor(self, params: Any, purpose: str, temperature: float) -> PolicyActor:
    key = jax.random.fold_in(self.key, int.from_bytes(purpose.encode()[:4], "little"))
    return PolicyActor(self.act, self.policy, params, key, temperature, self.task.instruction)


# --- the shared loop --------------------------------------------------------------------------------------------


def checkpoint_dir(run: Run, phase: str) -> pathlib.Path:
  return run.workdir / "checkpoints" / phase


def advance_until(
  run: Run,
  phase: str,
  state: train.TrainState,
  advance: Callable[[train.TrainState, int], tuple[train.TrainState, dict[str, float]]],
  *,
  total: int,
  every: int,
  unit: str,
  show: Sequence[str],
) -> train.TrainState:
  """Run `advance(state, i)` for i up to `total` from the last checkpoint, saving every `every` and at the end.

  `advance` returns metrics of floats; "env_steps", if there, is how many simulator steps it took.
  """
  folder, fields = checkpoint_dir(run, phase), run.identity(phase)
  start, meta = 0, {}
  if checkpoint.latest(folder) is not None:
    state, meta = checkpoint.restore(folder, state, config=fields)
    start = meta["iteration"]
    log.info("%s: resuming after %d of %d %ss", phase, start, total, unit)
  env_steps, spent = meta.get("env_steps", 0), meta.get("seconds", 0.0)
  run.logger = report.MetricsLogger(run.workdir, resume=(phase, start))
  began = time.monotonic()

  def save(i: int) -> None:
    run.logger.flush()
    seconds = spent + time.monotonic() - began
    meta = dict(phase=phase, iteration=i, env_steps=env_steps, seconds=seconds, action_stats={k: np.asarray(v).tolist() for k, v in run.stats._asdict().items()})
    checkpoint.save(folder, i, state, meta, config=fields, keep=run.config.checkpoint.keep)

  saved = start
  with report.Progress(phase, total, initial=start, unit=unit) as bar:
    for i in range(start, total):
      try:
        run.check()
        state, metrics = advance(state, i)
      except Stop:
        if i > saved:
          save(i)
        raise
      env_steps += int(metrics.pop("env_steps", 0))
      run.logger.log(phase, i + 1, metrics, env_steps=env_steps)
      bar.update(1, **{name: metrics[name] for name in show if name in metrics})
      if (i + 1) % every == 0 or i + 1 == total:
        save(i + 1)
        saved = i + 1
  run.env_steps[phase], run.seconds[phase] = env_steps, spent + time.monotonic() - began
  run.logger.close()
  return state


# --- episodes ---------------------------------------------------------------------------------------------------


def gather(run: Run, name: str, starts: Sequence[Start], make_actor: Callable[[], Any], fields: Mapping[str, Any]) -> list[Episode]:
  """The episodes of `starts`, from data/<name>/ where they are there already; written chunk by chunk as they come."""
  folder, episodes = run.workdir / "data" / name, []
  chunks = [starts[i : i + CHUNK] for i in range(0, len(starts), CHUNK)]
  expect = {"digest": checkpoint.config_digest(fields)}
  began = time.monotonic()
  with report.Progress(f"{name} rollouts", len(starts), unit="episode") as bar:
    collector = None
    for i, chunk in enumerate(chunks):
      path = folder / f"{i:05d}.episodes"
      if path.exists():
        found, _ = dataset.open(path, expect=expect)
        bar.update(len(found))
      else:
        collector = collector or run.collector(make_actor(), progress=bar)
        found = collector.episodes(chunk)
        dataset.write(path, found, expect)
      episodes += found
  run.seconds[f"{name} rollouts"] = time.monotonic() - began
  return episodes


def demonstrations(run: Run) -> list[Episode]:
  """Successful episodes of the task's scripted expert."""
  c = run.config.imitation
  starts = [Start(seed) for seed in run.seeds("demonstrations", c.demonstrations)]
  fields = {k: v for k, v in run.identity("imitation").items() if k.startswith(("task", "seed", "sim."))}
  fields |= {"demonstrations": c.demonstrations, "noise": c.expert_noise}
  actor = lambda: ExpertActor(run.task, c.expert_noise, run.config.seed)
  found = gather(run, "demonstrations", starts, actor, fields)
  kept = [episode for episode in found if episode.terminated]
  if not kept:
    raise ConfigError(f"none of {len(found)} demonstrations of {run.task.name} succeeded; lower imitation.expert_noise "
                      f"(now {c.expert_noise}) or raise sim.horizon (now {run.config.sim.horizon})")
  log.info("demonstrations: kept the %d of %d that succeeded", len(kept), len(found))
  return kept


# --- the phases -------------------------------------------------------------------------------------------------


def starting_params(run: Run, phase: str) -> Any:
  """Parameters that a phase starts from: the last checkpoint of the phase before, or of `init_from`."""
  earlier = [p for p in PHASES[: PHASES.index(phase)] if checkpoint.latest(checkpoint_dir(run, p)) is not None]
  if phase == "imitation" and not run.config.init_from:
    return run.policy.init(jax.random.fold_in(run.key, 0))
  if earlier:
    folder = checkpoint_dir(run, earlier[-1])
  elif run.config.init_from:
    folder = pathlib.Path(run.config.init_from)
  else:
    raise ConfigError(f"{phase} has nothing to start from: {run.workdir} holds no checkpoint of an earlier phase. Run "
                      f'imitation first, or name a checkpoint folder with --config.init_from=RUN/checkpoints/imitation')
  meta = checkpoint.read_meta(folder)
  run.use_statistics(policies.ActionStats(**{k: np.array(v) for k, v in meta["action_stats"].items()}))
  abstract = {"params": jax.eval_shape(run.policy.init, run.key)}
  return checkpoint.restore(folder, abstract, partial=True)[0]["params"]


def optimizer(c: Any, total: int) -> optax.GradientTransformation:
  return train.make_optimizer(total_steps=total, **c.optimiser)


def step(run: Run, update: train.Update, state: train.TrainState, batch: Any) -> tuple[train.TrainState, dict[str, float]]:
  """One update from a host batch: down through the one door, and the metrics up through the other."""
  state, metrics = update(state, sharding.put(batch, run.mesh))
  return state, train.fetch(metrics, state.params)


@functools.lru_cache(maxsize=2)
def _epoch(n: int, size: int, seed: int, epoch: int) -> list[np.ndarray]:
  return batching.epoch_batches(n, size, seed=seed, epoch=epoch)


def minibatch(n: int, size: int, i: int, seed: int) -> np.ndarray:
  """The rows of the i-th batch of an endless shuffled stream over n items: a function of its arguments alone."""
  size = min(size, n)
  epoch, index = divmod(i, n // size)
  return _epoch(n, size, seed, epoch)[index]


def imitation(run: Run) -> Any:
  """SFT on demonstrations (METHOD: Imitation)."""
  c = run.config.imitation
  episodes = demonstrations(run)
  actions = np.concatenate([episode.actions for episode in episodes])
  run.use_statistics(policies.ActionStats.from_actions(actions))
  images = np.concatenate([episode.images for episode in episodes])
  tokens = run.policy.tokenize(actions)
  free = np.array(run.policy.free)
  kernel = losses.get(c.loss)

  def loss_fn(params, batch):
    logits = run.policy.apply(params, batch["obs"], batch["tokens"]).logits
    _, metrics = kernel(logits, batch["tokens"], jnp.broadcast_to(free, batch["tokens"].shape), **c.hp)
    return metrics["loss"], metrics

  tx = optimizer(c, c.updates)
  update = train.make_update(loss_fn, tx, mesh=run.mesh, param_axes=run.param_axes, micro_batches=c.micro_batches)
  init = functools.partial(starting_params, run, "imitation")
  state = train.new_state(init(), tx, mesh=run.mesh, param_axes=run.param_axes)

  def advance(state, i):
    rows = minibatch(len(images), c.batch, i, run.config.seed)
    return step(run, update, state, {"obs": run.obs(images[rows]), "tokens": tokens[rows]})

  state = advance_until(run, "imitation", state, advance, total=c.updates, every=c.checkpoint_every,
                        unit="update", show=("loss", "accuracy"))  # fmt: skip
  return state.params


def preference(run: Run) -> Any:
  """StA-TPO on same-start pairs of the starting policy's own rollouts (METHOD: Preference).

  The starting policy is the reference, and what it recorded while it acted are the reference log-probabilities.
  """
  c = run.config.preference
  params = starting_params(run, "preference")
  starts = [Start(seed, sample) for seed in run.seeds("preference", c.starts) for sample in range(c.samples)]
  fields = {k: v for k, v in run.identity("preference").items() if not k.startswith("preference.")}
  fields |= {name: c[name] for name in ("starts", "samples", "temperature")}
  actor = lambda: run.actor(params, "preference", c.temperature)
  staged = stages.annotate(run.task, gather(run, "preference", starts, actor, fields))
  rng = np.random.default_rng([run.config.seed, *b"pairs"])
  pairs = batching.pair(staged, margin=c.margin, cap=c.pairs_per_start, rng=rng)
  report.write_json(run.workdir / "data" / "preference" / "pairs.json", batching.pair_statistics(staged, pairs))
  if not pairs:
    raise ConfigError(f"no two of the {len(staged)} rollouts differ in any stage, so there is nothing to prefer: raise "
                      f"preference.starts ({c.starts}), preference.samples ({c.samples}) or preference.temperature")
  reference = [item.episode.log_prob for item in staged]

  def log_prob(params, obs, tokens):
    return ops.token_log_prob(run.policy.apply(params, obs, tokens).logits, tokens, c.temperature)

  def kernel(log_ratio, batch):
    p = batch.pairs
    if c.loss == "tpo":
      return losses.get(c.loss)(log_ratio, batch.valid, p["overall"], beta=c.hp.beta)
    return losses.get(c.loss)(log_ratio, p["stage_id"], p["cost"], p["sign"], **c.hp)

  tx = optimizer(c, c.updates)
  update = train.make_preference_update(
    log_prob, kernel, tx, micro_batch=c.micro_batch, mesh=run.mesh, param_axes=run.param_axes
  )
  state = train.new_state(params, tx, mesh=run.mesh, param_axes=run.param_axes)

  def advance(state, i):
    rows = minibatch(len(pairs), c.batch, i, run.config.seed)
    b = batching.pad_pairs(staged, [pairs[r] for r in rows], reference, buckets=c.buckets, batch_size=c.batch)
    flat = run.obs(b.images.reshape(-1, *b.images.shape[2:]))
    obs = jax.tree.map(lambda x: x.reshape(*b.images.shape[:2], *x.shape[1:]), flat)
    data = {"stage_id": b.stage_id, "cost": b.cost, "sign": b.sign, "overall": b.overall}
    return step(run, update, state, train.PreferenceBatch(obs, b.tokens, b.stage_id >= 0, b.ref_log_prob, data))

  state = advance_until(run, "preference", state, advance, total=c.updates, every=c.checkpoint_every,
                        unit="update", show=("loss", "accuracy"))  # fmt: skip
  return state.params


def interaction(run: Run) -> Any:
  """StA-PPO in the simulator (METHOD: Interaction). Every iteration starts from fresh episodes.

  So an iteration is a function of the state and its number, and a resumed run needs no simulator snapshot.
  """
  c, n = run.config.interaction, run.config.sim.num_envs
  params = starting_params(run, "interaction")
  reference = params if c.hp.kl_weight else None
  tx = optimizer(c, c.iterations)
  loss_fn = ppo_loss(run.policy, c.temperature, **c.hp)
  update = train.make_update(loss_fn, tx, mesh=run.mesh, param_axes=run.param_axes, micro_batches=c.micro_batches)
  state = train.new_state(params, tx, mesh=run.mesh, param_axes=run.param_axes)
  first = run.seeds("interaction", 1)[0]

  def advance(state, i):
    began = time.monotonic()
    collector = run.collector(run.actor(state.params, "interaction", c.temperature))
    start_of = lambda env, j: Start(first + (i * n + env) * c.steps + j)
    rows = [stages.annotate(run.task, row, offset=c.offset) for row in collector.rows(start_of, c.steps)]
    collected = time.monotonic()
    data = advantages(rows, c)
    data["obs"] = run.obs(np.concatenate([item.episode.images for row in rows for item in row]))
    if reference is not None:
      data["ref_log_prob"] = run.log_prob(reference, data["obs"], data["tokens"], c.temperature)
    state, metrics = learn(run, update, state, data, i)
    metrics |= rollout_metrics(run, rows, c)
    now = time.monotonic()
    return state, metrics | {
      "env_steps": n * c.steps, "rollout_seconds": collected - began, "update_seconds": now - collected,
      "steps_per_second": n * c.steps / (now - began),
    }  # fmt: skip

  state = advance_until(run, "interaction", state, advance, total=c.iterations, every=c.checkpoint_every,
                        unit="iteration", show=("success", "return_shaped", "kl"))  # fmt: skip
  return state.params


def ppo_loss(policy: policies.Policy, temperature: float, **hp: Any) -> Callable:
  """The PPO objective on the policy's forward pass."""
  hp = {name: value for name, value in hp.items() if name not in ("discount", "lam")}

  def loss_fn(params, batch):
    out = policy.apply(params, batch["obs"], batch["tokens"])
    log_prob = ops.token_log_prob(out.logits, batch["tokens"], temperature)
    entropy = ops.entropy(out.logits, temperature).sum(-1)
    _, metrics = ppo.objective(
      log_prob, batch["log_prob"], batch["advantage"], out.value, batch["value"], batch["returns"], entropy,
      batch["valid"], batch.get("ref_log_prob"), **hp,
    )  # fmt: skip
    return metrics["loss"], metrics

  return loss_fn


def advantages(rows: Sequence[Sequence[StagedEpisode]], c: Any) -> dict[str, np.ndarray]:
  """GAE over rows of episodes -> flat arrays of N * T steps: tokens, log_prob, value, advantage (standardised), returns."""
  grid = {"reward": [], "value": [], "next_value": [], "terminated": [], "truncated": []}
  for row in rows:
    parts = {name: [] for name in grid}
    for item in row:
      episode, steps = item.episode, len(item.episode)
      last = np.arange(steps) == steps - 1
      reward = np.where(last & episode.terminated, c.success_reward, 0.0).astype(np.float32)
      if c.shaping:
        done = np.array(episode.terminated)
        reward = stages.shaped_reward(reward, item.potential, done, discount=c.hp.discount, terminal=c.terminal)
      parts["reward"].append(reward)
      parts["value"].append(episode.value)
      parts["next_value"].append(np.append(episode.value[1:], np.float32(episode.last_value)))
      parts["terminated"].append(last & episode.terminated)
      parts["truncated"].append(last & (not episode.terminated))
    for name in grid:
      grid[name].append(np.concatenate(parts[name]))
  arrays = {name: np.stack(rows_) for name, rows_ in grid.items()}
  valid = np.ones(arrays["reward"].shape, bool)
  advantage, returns = ppo.gae(**arrays, valid=valid, discount=c.hp.discount, lam=c.hp.lam)
  advantage = ops.standardize(advantage, valid)
  episodes = [item.episode for row in rows for item in row]
  flat = {name: np.asarray(x).reshape(-1) for name, x in (("advantage", advantage), ("returns", returns))}
  flat |= {name: np.concatenate([getattr(e, name) for e in episodes]) for name in ("tokens", "log_prob", "value")}
  return flat | {"valid": valid.reshape(-1)}


def learn(run: Run, update: train.Update, state: Any, data: dict[str, Any], i: int) -> tuple[Any, dict[str, float]]:
  """The epochs of one iteration: critic alone at first, early stop and step size by the KL to the rollout's policy."""
  c, total = run.config.interaction, len(data["tokens"])
  state = train.set_learning_rate_scale(state, policy_scale=0.0 if i < c.critic_warmup else 1.0)
  logged: list[dict[str, float]] = []
  for epoch in range(c.epochs):
    order = np.random.default_rng([run.config.seed, i, epoch]).permutation(total)
    here = []
    for rows in order.reshape(-1, c.batch):
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


def rollout_metrics(run: Run, rows: Sequence[Sequence[StagedEpisode]], c: Any) -> dict[str, float]:
  """Success and stage completion of the episodes that ended by themselves, and returns per episode."""
  items = [item for row in rows for item in row]
  ended = [item for item in items if item.episode.terminated or len(item.episode) == run.config.sim.horizon]
  if not ended:
    return {"episodes": 0.0}
  completed = np.stack([item.completed for item in ended])
  before = np.concatenate([np.ones_like(completed[:, :1]), completed[:, :-1]], axis=1)
  rates = (completed & before).sum(0) / np.maximum(before.sum(0), 1)
  gain = [c.hp.discount ** len(item.episode) * item.potential[-1] * (not item.episode.terminated) - item.potential[0]
          for item in ended]  # fmt: skip
  raw = [c.success_reward * c.hp.discount ** (len(item.episode) - 1) * item.episode.terminated for item in ended]
  return {
    "episodes": float(len(ended)), "success": float(completed[:, -1].mean()), "return_raw": float(np.mean(raw)),
    "return_shaped": float(np.mean(np.add(raw, gain))), "length": float(np.mean([len(x.episode) for x in ended])),
    **{f"stage_{k + 1}": float(rate) for k, rate in enumerate(rates)},
  }  # fmt: skip


# --- evaluation and the run -------------------------------------------------------------------------------------


def evaluation(run: Run, label: str, params: Any) -> dict:
  """Roll the policy out on the evaluation seeds, unless evaluations/<label>.json has it for this very configuration."""
  c = run.config.evaluation
  fields = run.identity(label) | {f"evaluation.{k}": v for k, v in c.items()}
  if label == "interaction":
    fields["interaction.iterations"] = run.config.interaction.iterations
  path = run.workdir / "evaluations" / f"{label}.json"
  if path.exists():
    found = json.loads(path.read_text())
    if found.get("digest") == checkpoint.config_digest(fields):
      return found
  began = time.monotonic()
  with report.Progress(f"{label} evaluation", c.episodes, unit="episode") as bar:
    collector = run.collector(run.actor(params, "evaluation", c.temperature), progress=bar, stop_on_success=False)
    episodes = collector.episodes([Start(c.seed + i) for i in range(c.episodes)])
  staged = stages.annotate(run.task, episodes, offset=run.config.interaction.offset)
  names = [stage.name for stage in run.task.stages]
  result = evaluate.summarise(
    staged, label=label, stage_names=names, temperature=c.temperature, seconds=time.monotonic() - began
  )
  half = run.config.report.videos // 2
  for index, i in enumerate(evaluate.pick_samples(staged, successes=run.config.report.videos - half, failures=half)):
    item = staged[i]
    report.write_sample(
      run.workdir, label=label, index=index, frames=item.episode.images, fps=10.0, task=run.task.name,
      seed=item.episode.seed, success=bool(item.episode.success[1:].any()), stages=names, stage_id=item.stage_id,
      completed_at=item.completed_at, potential=item.potential, instruction=run.task.instruction,
    )  # fmt: skip
  result["digest"] = checkpoint.config_digest(fields)
  report.write_evaluation(run.workdir, result)
  return result


PHASE_FUNCTIONS = {"imitation": imitation, "preference": preference, "interaction": interaction}


def run(config: Any, workdir: str | os.PathLike, *, command: str = "", stop: Callable[[], bool] = lambda: False) -> dict:
  """Run the phases of `config` in `workdir`, resuming whatever is there; returns the summary.

  Raises:
    ConfigError, CheckpointError, DatasetError, SimulatorError: bad input; nothing was overwritten.
    NonFiniteError: an update was refused; the last checkpoint is intact.
    Stop: `stop()` became true; a checkpoint was written, and the same command continues from it.
  """
  validate(config, tasks.names)
  this = Run(config, workdir, stop=stop)
  began = time.monotonic()
  try:
    for phase in config.phases:
      params = PHASE_FUNCTIONS[phase](this)
      this.results[phase] = evaluation(this, phase, params)
      success = this.results[phase]["success_once"]
      log.info("%s: success %.1f %% [%.1f, %.1f] over %d episodes", phase, 100 * success["rate"],
                   100 * success["low"], 100 * success["high"], success["n"])  # fmt: skip
      summary = summarise(this, params, command, time.monotonic() - began)
      report.write_summary(this.workdir, summary)
      report.build_report(this.workdir)
  finally:
    this.close()
  return summary


def summarise(run: Run, params: Any, command: str, seconds: float) -> dict:
  """What summary.json holds."""
  versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "orbax-checkpoint", "numpy",
                                                                  "mani_skill", "sapien", "torch")}  # fmt: skip
  return {
    "task": run.task.name, "preset": run.config.preset, "seed": run.config.seed, "phases": run.results,
    "params_sha256": checkpoint.params_sha256(params), "parameters": sum(x.size for x in jax.tree.leaves(params)),
    "config": json.loads(run.config.to_json_best_effort()), "versions": versions | {"python": platform.python_version()},
    "wall_seconds": run.seconds | {"this launch": seconds}, "env_steps": run.env_steps, "command": command,
    "hardware": {"platform": jax.default_backend(), "devices": jax.device_count(), "cores": os.cpu_count(),
                 "machine": platform.machine(), "device_kind": jax.devices()[0].device_kind},
    "simulator_events": list(run.events),
  }  # fmt: skip
