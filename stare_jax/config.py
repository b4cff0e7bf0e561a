"""Presets by string argument, and the checks that cross fields: before any device or simulator is touched.

A config file's `get_config(arg)` receives what follows the colon of `--config=configs/ipi.py:smoke,task=pick_cube`.
"""

from __future__ import annotations

import difflib
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PHASES = ("imitation", "preference", "interaction")
AT_LEAST_1 = (
  "sim.horizon", "sim.num_envs", "sim.image_size", "imitation.demonstrations", "imitation.updates", "imitation.batch",
  "imitation.checkpoint_every", "preference.starts", "preference.samples", "preference.updates", "preference.batch",
  "preference.micro_batch", "preference.pairs_per_start", "preference.checkpoint_every", "interaction.iterations",
  "interaction.steps", "interaction.epochs", "interaction.batch", "interaction.checkpoint_every", "evaluation.episodes",
  "checkpoint.keep",
)  # fmt: skip
AT_LEAST_0 = (
  "seed", "imitation.expert_noise", "imitation.hp.smoothing_sigma", "preference.margin", "interaction.target_kl",
  "interaction.critic_warmup", "interaction.offset", "report.videos", "interaction.success_reward",
  "interaction.hp.policy_weight", "interaction.hp.value_weight", "interaction.hp.kl_weight",
  "interaction.hp.entropy_weight", "preference.hp.cost_weight", "preference.hp.chosen_weight",
  *(f"{phase}.optimiser.{name}" for phase in PHASES for name in ("weight_decay", "warmup_steps")),
  "interaction.optimiser.value_lr_scale",
)  # fmt: skip
ABOVE_0 = ("preference.hp.beta", "interaction.hp.clip", "sim.timeout",
           *(f"{phase}.optimiser.learning_rate" for phase in PHASES))
OPEN_OR_ABOVE_0 = ("interaction.hp.clip_high", "interaction.hp.value_clip", "interaction.hp.huber_delta",
                   *(f"{phase}.optimiser.clip_norm" for phase in PHASES))
AT_MOST_1 = ("interaction.hp.discount", "interaction.hp.lam")  # and at least 0
CHOICES = {
  "preference.pairs": ("stage", "trajectory"), "interaction.critic": ("state", "policy"),
  "interaction.terminal": ("zero", "keep"),
  "interaction.reward": ("potential", "stages", "success", "milestones", "shaped_milestones", "levels"),
  "interaction.standardise": ("all", "stage"), "interaction.hp.ratio": ("action", "token"),
  "imitation.optimiser.schedule": ("constant", "cosine"), "preference.optimiser.schedule": ("constant", "cosine"),
}  # fmt: skip
STOPPED = 75  # exit status (EX_TEMPFAIL): what starts runs may start this one again, which 0 would call finished
OF_A_CHECKPOINT = (  # fields of the policy's configuration that a public checkpoint decides
  "image_size", "patch_size", "dino", "siglip", "projector", "llm_width", "llm_depth", "llm_head_size", "llm_mlp",
  "vocabulary", "action_end", "bins", "action_size", "bos", "eos", "start", "pad", "template", "word_tokenizer",
)  # fmt: skip

LEFT_OPEN = {  # fields of the policy's configuration that a run may choose; None: as its checkpoint or size has them
  "prompt_length": int, "param_dtype": str, "compute_dtype": str, "remat": str, "attention": str, "resize": str,
  "center_crop": bool, "faithful": bool,
}  # fmt: skip


class ConfigError(ValueError):
  """A configuration that cannot run; the message says what came, what was expected and what to write instead."""


def suggest(word: str, known: Sequence[str]) -> str:
  """'did you mean "x"? Known: a, b, c.' for an unknown word."""
  near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
  hint = f'did you mean "{near[0]}"? ' if near else ""
  return f"{hint}Known: {', '.join(known)}."


def parse_arg(arg: str, presets: Mapping[str, Any], **defaults: Any) -> tuple[str, dict[str, Any]]:
  """`"smoke,task=pick_cube,seed=3"` -> ("smoke", {"task": "pick_cube", "seed": 3}).

  The preset comes first and may be left out ("default"). Values take the type of their default.

  Raises:
    ConfigError: unknown preset or key (with the nearest known one), or a value of the wrong type.
  """
  preset, values = "default", dict(defaults)
  parts = [part for part in (arg or "").split(",") if part]
  for position, item in enumerate(parts):
    key, separator, text = item.partition("=")
    if not separator:
      if key not in presets:
        raise ConfigError(f'unknown preset "{key}": {suggest(key, tuple(presets))}')
      if preset != "default":
        raise ConfigError(f'two presets, "{preset}" and "{key}": name one')
      if position > 0:
        first = ",".join([key, *(part for part in parts if part not in presets)])
        raise ConfigError(f'the preset "{key}" has to come first: write "{first}"')
      preset = key
    elif key not in defaults:
      raise ConfigError(f'unknown key "{key}" after the preset: {suggest(key, tuple(defaults))} '
                        f"Any other field is set with --config.{key}=...")
    else:
      try:
        values[key] = type(defaults[key])(text)
      except ValueError as error:
        raise ConfigError(f'{key}="{text}": expected {type(defaults[key]).__name__}') from error
  return preset, values


def _at(c: Any, field: str, *default: Any) -> Any:
  return functools.reduce(lambda x, name: getattr(x, name, *default), field.split("."), c)


def _validate_ranges(c: Any) -> None:
  wanted: list[tuple[Sequence[str], Callable[[float], bool], str]] = [
    (AT_LEAST_1, lambda x: x >= 1, "at least 1"), (AT_LEAST_0, lambda x: x >= 0, "at least 0"),
    (ABOVE_0, lambda x: x > 0, "more than 0"), (AT_MOST_1, lambda x: 0 <= x <= 1, "0 to 1"),
    (OPEN_OR_ABOVE_0, lambda x: x is None or x > 0, "more than 0, or None"),
  ]  # fmt: skip
  numbers = {"": c}
  while numbers:  # nan would pass every comparison that is written the wrong way round
    name, x = numbers.popitem()
    if hasattr(x, "items"):
      numbers |= {f"{name}.{key}".lstrip("."): value for key, value in x.items()}
    elif isinstance(x, float) and not math.isfinite(x) and not name.endswith(".clip_norm"):
      raise ConfigError(f"{name} = {x}: expected a finite number")
  for fields, good, words in wanted:
    for field in fields:
      value = _at(c, field, None)  # a configuration of one's own need not have what may be left open
      if (value is None and fields is not OPEN_OR_ABOVE_0) or not good(value):
        raise ConfigError(f"{field} = {value}: expected {words}")


def _validate_batches(c: Any) -> None:
  _divides(c, "imitation.batch", c.imitation.batch, "imitation.micro_batches", c.imitation.micro_batches)
  _divides(c, "interaction.batch", c.interaction.batch, "interaction.micro_batches", c.interaction.micro_batches)
  rollout = c.sim.num_envs * c.interaction.steps
  if rollout % c.interaction.batch:
    raise ConfigError(f"interaction.batch = {c.interaction.batch} does not divide a rollout of sim.num_envs x "
                      f"interaction.steps = {c.sim.num_envs} x {c.interaction.steps} = {rollout} steps")
  one_update = c.interaction.epochs == 1 and c.interaction.batch == rollout
  if "interaction" in c.phases and c.interaction.target_kl and one_update:
    raise ConfigError(f"interaction.target_kl = {c.interaction.target_kl} follows the KL that an iteration's later "
                      f"updates see, and interaction.batch = {rollout}, all steps of a rollout, with one epoch is a "
                      f"single update: choose a smaller batch, more epochs, or target_kl = 0")


def _divides(c: Any, field: str, value: int, by_field: str, by: int) -> None:
  if by < 1:
    raise ConfigError(f"{by_field} = {by}: expected at least 1")
  if value < 1 or value % by:
    raise ConfigError(f"{field} = {value} does not divide by {by_field} = {by}: choose a multiple of {by}, "
                      f"for example --config.{field}={by * max(1, round(value / by))}")


def _validate_policy(c: Any) -> None:
  options, lora, patch = c.policy.options, c.policy.lora, c.policy.options.get("patch_size", 1)
  if c.policy.checkpoint:  # frames are resized to what it was trained with
    if known := [name for name in OF_A_CHECKPOINT if name in options]:
      raise ConfigError(f"policy.options.{known[0]} = {options[known[0]]} and policy.checkpoint = "
                        f'"{c.policy.checkpoint}": sizes and vocabulary come from the checkpoint; choose a preset '
                        f"without policy.options.{', '.join(known)}")
  elif c.policy.unnorm_key:
    raise ConfigError(f'policy.unnorm_key = "{c.policy.unnorm_key}" names statistics of a public checkpoint, and '
                      f"policy.checkpoint is empty: name its folder, or leave unnorm_key empty")
  elif patch is not None and (patch < 1 or c.sim.image_size % patch):
    raise ConfigError(f"sim.image_size = {c.sim.image_size} is not a multiple of policy.options.patch_size = {patch}")
  training = () if "suites" in c else [p for p in c.phases if p != "imitation"]
  if options.get("faithful") and training:
    raise ConfigError(f"policy.options.faithful = True and the phase {training[0]}: what it draws is not what its "
                      f"log-probabilities are of, so nothing can be learnt from it; evaluate with it "
                      f"(configs/eval.py), or leave it out")
  if lora.rank < 0 or (lora.rank and not lora.alpha > 0):
    raise ConfigError(f"policy.lora = {lora.to_dict()}: expected a rank of at least 0 (0: no adapters, everything is "
                      f"trained) and an alpha of more than 0, such as rank=32, alpha=16")


def _validate_preference(c: Any) -> None:
  p = c.preference
  if p.samples < 2:
    raise ConfigError(f"preference.samples = {p.samples}: a pair needs at least 2 rollouts of one start")
  if p.samples_max and p.samples_max < p.samples:
    raise ConfigError(f"preference.samples_max = {p.samples_max} is less than preference.samples = {p.samples}, with "
                      f"which every start begins: choose {p.samples} or more, or 0 for no more than those")  # fmt: skip
  for field in ("parts_before", "tail"):
    if not 0 <= p[field] <= c.sim.horizon:
      raise ConfigError(f"preference.{field} = {p[field]}: expected 0 to sim.horizon = {c.sim.horizon}")
  name, longest = ("preference.tail", p.tail) if p.tail else ("sim.horizon", c.sim.horizon)
  if min(p.buckets) < 1:
    raise ConfigError(f"preference.buckets = {tuple(p.buckets)}: expected lengths in steps, each at least 1")
  if max(p.buckets) < longest:
    raise ConfigError(f"preference.buckets = {tuple(p.buckets)} hold no episode of {name} = {longest} "
                      f"steps: add a bucket of {longest}")
  if p.loss == "window_tpo" and min(p.buckets) < 8:
    raise ConfigError(f'preference.loss = "window_tpo" compares windows of 8 steps, and preference.buckets = '
                      f"{tuple(p.buckets)} hold fewer: raise preference.tail (now {p.tail}), or leave it 0")
  if p.loss == "stage_tpo" and p.pairs == "trajectory":
    raise ConfigError('preference.loss = "stage_tpo" and preference.pairs = "trajectory": a success against a failure '
                      'says nothing of their stages; choose pairs = "stage", or the loss "tpo" or "window_tpo"')
  if p.loss != "stage_tpo" and not p.hp.gating:
    raise ConfigError(f'preference.hp.gating = False and preference.loss = "{p.loss}": only "stage_tpo" compares '
                      f"stages, so that there is something to gate")
  if p.loss != "stage_tpo" and p.hp.chosen_weight:
    raise ConfigError(f'preference.hp.chosen_weight = {p.hp.chosen_weight} and preference.loss = "{p.loss}": only '
                      f'"stage_tpo" has that term; set it to 0, or choose that loss')


def _validate_rewards(c: Any) -> None:
  i = c.interaction
  if not i.stop_on_success and i.reward != "levels":
    raise ConfigError(f'interaction.stop_on_success = False and interaction.reward = "{i.reward}", which is paid where '
                      f'an episode ends by success: choose the reward "levels", or stop_on_success = True')
  if not i.bootstrap and (i.stop_on_success or i.steps % c.sim.horizon):
    raise ConfigError(f"interaction.bootstrap = False wants episodes that all end at the time limit: set "
                      f"stop_on_success = False (now {i.stop_on_success}) and interaction.steps = 0 or a multiple of "
                      f"sim.horizon = {c.sim.horizon} (now {i.steps})")


def _validate_training(c: Any) -> None:
  _validate_batches(c)
  if c.interaction.optimiser.schedule != "constant":
    raise ConfigError(f'interaction.optimiser.schedule = "{c.interaction.optimiser.schedule}": expected "constant"; '
                      f"its learning rate follows target_kl, and a run may be extended")
  for phase in c.phases:
    betas = tuple(c[phase].optimiser.get("betas", (0.9, 0.999)))
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
      raise ConfigError(f"{phase}.optimiser.betas = {betas}: expected two numbers from 0 to less than 1, such as "
                        f"(0.9, 0.999)")
  for phase in [p for p in c.phases if p != "interaction"]:
    total, optimiser = c[phase].updates, c[phase].optimiser
    if optimiser.schedule == "cosine" and optimiser.warmup_steps >= total:
      raise ConfigError(f"{phase}.optimiser.warmup_steps = {optimiser.warmup_steps} leaves nothing of the {total} "
                        f"updates to a cosine schedule: choose fewer than {total}")
  if "preference" in c.phases:
    _validate_preference(c)
  if "interaction" in c.phases:
    _validate_rewards(c)


def validate(c: Any, task_names: Callable[[], Sequence[str]]) -> None:
  """Cross-field checks. Raises ConfigError."""
  if c.task not in task_names():
    raise ConfigError(f'unknown task "{c.task}": {suggest(c.task, tuple(task_names()))}')
  for phase in c.phases:
    if phase not in PHASES:
      raise ConfigError(f'unknown phase "{phase}" in phases: {suggest(str(phase), PHASES)}')
  if list(c.phases) != [p for p in PHASES if p in c.phases]:
    raise ConfigError(f"phases = {tuple(c.phases)}: expected an ordered selection of {PHASES}")
  if not c.phases:
    raise ConfigError(f"phases is empty: name at least one of {PHASES}")
  _validate_ranges(c)
  _divides(c, "sim.num_envs", c.sim.num_envs, "sim.groups", c.sim.groups)
  if not 1 <= c.sim.num_workers <= c.sim.num_envs:
    raise ConfigError(f"sim.num_workers = {c.sim.num_workers}: expected 1 to sim.num_envs = {c.sim.num_envs}")
  if "suites" not in c:  # where nothing is trained
    _validate_training(c)
  _validate_policy(c)
  for phase in ("preference", "interaction"):  # what acts at 0 has no log-probabilities to learn from
    if not c[phase].temperature > 0:
      raise ConfigError(f"{phase}.temperature = {c[phase].temperature}: expected more than 0, such as 1.0")
  if c.evaluation.temperature < 0:
    raise ConfigError(f"evaluation.temperature = {c.evaluation.temperature}: expected 0 (argmax) or more, such as 1.0")
  critic = c.interaction.critic_hp
  if critic.epochs < 1 or not critic.learning_rate > 0:
    raise ConfigError(f"interaction.critic_hp = {critic.to_dict()}: expected epochs of at least 1 and a learning_rate "
                      f"of more than 0, such as 16 and 1e-3")
  for field, known in CHOICES.items():
    if (value := _at(c, field)) not in known:
      raise ConfigError(f'{field} = "{value}": {suggest(str(value), known)}')
