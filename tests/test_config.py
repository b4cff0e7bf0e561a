"""The configuration: presets by argument, and the checks that cross fields."""

from __future__ import annotations

import contextlib

import ml_collections
import pytest

from configs import eval as evaluation
from configs import ipi
from stare_jax import tasks
from stare_jax.config import ConfigError, parse_arg, suggest, validate
from stare_jax.pipeline_check import check, check_batches, resolved
from stare_jax.policies.tokenizer import WordTokenizer
from tests import toy_run


def checked(**changes):
  config = toy_run.get_config()
  config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
  validate(config, tasks.names)
  return config


def test_preset_and_keys_in_any_number():
  presets = {"default": {}, "smoke": {}}
  assert parse_arg("", presets, task="a", seed=0) == ("default", {"task": "a", "seed": 0})
  assert parse_arg("smoke,task=b,seed=3", presets, task="a", seed=0) == ("smoke", {"task": "b", "seed": 3})
  assert parse_arg("seed=3", presets, task="a", seed=0) == ("default", {"task": "a", "seed": 3})


@pytest.mark.parametrize("arg, words", [
  ("smok", ('"smok"', 'did you mean "smoke"', "default")),
  ("smoke,sed=3", ('"sed"', 'did you mean "seed"', "--config.sed")),
  ("smoke,seed=x", ('seed="x"', "expected int")),
  ("seed=3,smoke", ('"smoke"', 'write "smoke,seed=3"')),
])  # fmt: skip
def test_a_wrong_argument_names_the_nearest(arg, words):
  with pytest.raises(ConfigError) as caught:
    parse_arg(arg, {"default": {}, "smoke": {}}, task="a", seed=0)
  assert all(word in str(caught.value) for word in words), caught.value


def test_suggest_lists_what_is_known():
  assert suggest("pul_cube", ("push_cube", "pull_cube")) == 'did you mean "pull_cube"? Known: push_cube, pull_cube.'
  assert suggest("zzz", ("push_cube",)) == "Known: push_cube."


@pytest.mark.parametrize("preset", ipi.PRESETS)
@pytest.mark.parametrize("task", tasks.names())
def test_every_preset_is_valid_for_every_task(preset, task):
  config = resolved(ipi.get_config(f"{preset},task={task}"))
  validate(config, tasks.names)
  longest = config.preference.tail or config.sim.horizon
  assert config.sim.horizon == tasks.get(task).horizon and config.preference.buckets == (longest,)
  assert config.is_locked


def test_the_default_policy_reads_every_instruction():
  """A word outside its vocabulary takes a token per letter, and begin and start take one each."""
  room = ipi.get_config().policy.options.prompt_length
  long = {name: n for name in tasks.names() if (n := len(WordTokenizer()(tasks.get(name).instruction)) + 2) > room}
  assert not long, f"longer than {room} tokens: {long}; use words that the tokenizer has"


@pytest.mark.parametrize("method", ipi.METHODS)
@pytest.mark.parametrize("preset", [preset for preset in ipi.PRESETS if preset != "smoke"])
def test_every_method_is_valid_with_every_preset(preset, method, tmp_path):
  config = ipi.get_config(f"{preset},task=pick_cube,method={method}")
  check(config, tmp_path)
  assert config.method == method and config.preset == preset and config.phases[0] == "imitation"
  whole = ipi.get_config(f"{preset},task=pick_cube")
  same = [config[name].to_dict() == whole[name].to_dict() for name in ("sim", "policy", "imitation", "evaluation")]
  assert all(same)  # the start that methods share is the same, and so is how they are judged


def test_methods_differ_from_each_other():
  flat = {method: ipi.get_config(f"default,method={method}").to_json() for method in ipi.METHODS}
  assert len({text.replace(f'"method": "{method}"', "") for method, text in flat.items()}) == len(flat)


def test_an_ablation_changes_one_thing():
  ablations = {
    "sta_tpo": ("no_cost", "no_gating", "tpo_same_pairs"),
    "sta_ppo": ("no_potential", "offset_0", "offset_1", "by_stage", "sta_ppo_pixels"),
    "sta_ppo_pixels": ("by_stage_pixels",),
    "ppo_clean": ("ppo_pixels",),
    "milestone_ppo": ("milestone_pixels",),
    "milestone_sta_ppo": ("milestone_sta_pixels",),
  }
  for of, names in ablations.items():
    for name in names:
      assert len(set(ipi.METHODS[name].items()) - set(ipi.METHODS[of].items())) == 1


def test_an_unknown_method_names_the_nearest():
  with pytest.raises(ConfigError, match='unknown method "sta_pp".*"sta_ppo"'):
    ipi.get_config("smoke,method=sta_pp")


def test_rl4vla_wants_a_task_with_a_grasp(tmp_path):
  with pytest.raises(ConfigError, match="rl4vla_faithful.*pull_cube goes Reach -> Pull"):
    check(ipi.get_config("method=rl4vla_faithful"), tmp_path)


def test_what_the_user_says_about_the_horizon_stands():
  config = ipi.get_config("task=put_eggplant_in_basket")
  config.sim.horizon, config.preference.tail = 70, 0
  assert resolved(config).sim.horizon == 70 and resolved(config).preference.buckets == (70,)
  config.preference.buckets = (40, 80)
  assert resolved(config).preference.buckets == (40, 80) and config.sim.horizon == 70


@pytest.mark.parametrize("task", tasks.names())
def test_rollouts_as_long_as_an_episode_go_with_one_batch(task):
  """What docs/baselines.md tells users whose task takes longer than the preset's rollouts."""
  c = ipi.get_config(f"default,task={task}")
  c.interaction.steps, c.interaction.batch = 0, 160
  validate(resolved(c), tasks.names)


def test_a_config_is_locked():
  with pytest.raises((AttributeError, KeyError), match="demonstrations"):
    ipi.get_config("smoke").imitation.demonstration = 3


def test_frames_of_any_size_suit_a_checkpoint():
  config = toy_run.get_config()
  config.policy.checkpoint, config.sim.image_size = "openvla-7b", 20
  with config.unlocked():
    config.policy.options = {}
  validate(config, tasks.names)


@pytest.mark.parametrize("changes, words", [
  (dict(task="pul_cube"), ("pul_cube", '"pull_cube"', "stack_cube")),
  (dict(phases=("imitation", "preferences")), ("preferences", '"preference"')),
  (dict(phases=("preference", "imitation")), ("ordered",)),
  (dict(phases=()), ("phases", "imitation")),
  (dict(sim__num_envs=5), ("sim.num_envs = 5", "sim.groups = 2", "--config.sim.num_envs=")),
  (dict(sim__num_workers=9), ("sim.num_workers = 9", "4")),
  (dict(imitation__micro_batches=3), ("imitation.batch = 8", "imitation.micro_batches = 3")),
  (dict(interaction__batch=16), ("interaction.batch = 16", "40 steps")),
  (dict(interaction__batch=40), ("interaction.batch = 40", "single update", "target_kl = 0")),
  (dict(imitation__optimiser__warmup_steps=6), ("imitation.optimiser.warmup_steps = 6", "6")),
  (dict(sim__image_size=20), ("sim.image_size = 20", "patch_size = 8")),
  (dict(policy__checkpoint="openvla-7b"), ("policy.options.patch_size", "openvla-7b", "come from the checkpoint")),
  (dict(policy__unnorm_key="bridge_orig"), ("policy.unnorm_key", "policy.checkpoint is empty")),
  (dict(policy__lora__rank=-1), ("policy.lora", "rank of at least 0")),
  (dict(policy__lora__rank=4, policy__lora__alpha=0), ("policy.lora", "alpha of more than 0")),
  (dict(imitation__demonstrations=0), ("imitation.demonstrations = 0",)),
  (dict(preference__samples=1), ("preference.samples = 1", "at least 2")),
  (dict(preference__buckets=(7,)), ("preference.buckets", "preference.tail = 8")),
  (dict(preference__buckets=(8,), preference__tail=0), ("preference.buckets", "sim.horizon = 12")),
  (dict(preference__tail=13), ("preference.tail = 13", "0 to sim.horizon = 12")),
  (dict(preference__parts_before=-1), ("preference.parts_before = -1",)),
  (dict(preference__temperature=0.0), ("preference.temperature = 0.0",)),
  (dict(preference__samples_max=1), ("preference.samples_max = 1", "preference.samples = 2")),
  (dict(preference__pairs="trajectory"), ("stage_tpo", "trajectory", "window_tpo")),
  (dict(preference__loss="window_tpo", preference__buckets=(6, 12)), ("window_tpo", "(6, 12)", "preference.tail")),
  (dict(preference__loss="tpo", preference__hp__gating=False), ("preference.hp.gating = False", '"tpo"')),
  (dict(preference__loss="tpo", preference__hp__chosen_weight=0.5), ("chosen_weight = 0.5", '"tpo"', "stage_tpo")),
  (dict(policy__options__faithful=True), ("policy.options.faithful", "preference", "configs/eval.py")),
  (dict(evaluation__temperature=-1.0), ("evaluation.temperature = -1", "argmax")),
  (dict(interaction__reward="level"), ("interaction.reward", '"levels"')),
  (dict(interaction__stop_on_success=False), ("interaction.stop_on_success = False", '"levels"')),
  (dict(interaction__bootstrap=False), ("interaction.bootstrap = False", "sim.horizon = 12")),
  (dict(interaction__hp__discount=1.5), ("interaction.hp.discount = 1.5", "0 to 1")),
  (dict(interaction__hp__lam=-0.1), ("interaction.hp.lam = -0.1", "0 to 1")),
  (dict(imitation__optimiser__clip_norm=0.0), ("imitation.optimiser.clip_norm = 0.0", "more than 0")),
  (dict(imitation__optimiser__learning_rate=-1e-3), ("imitation.optimiser.learning_rate = -0.001", "more than 0")),
  (dict(imitation__optimiser__learning_rate=float("nan")), ("imitation.optimiser.learning_rate = nan", "finite")),
  (dict(imitation__optimiser__betas=(0.9, 1.9)), ("imitation.optimiser.betas = (0.9, 1.9)", "(0.9, 0.999)")),
  (dict(interaction__success_reward=-1.0), ("interaction.success_reward = -1.0", "at least 0")),
  (dict(interaction__hp__huber_delta=0.0), ("interaction.hp.huber_delta = 0.0", "more than 0, or None")),
  (dict(evaluation__temperature=float("inf")), ("evaluation.temperature = inf", "finite")),
  (dict(policy__options={"patch_size": 0}), ("sim.image_size", "patch_size = 0")),
  (dict(interaction__hp__clip=-0.2), ("interaction.hp.clip = -0.2", "more than 0")),
  (dict(interaction__hp__clip_high=0.0), ("interaction.hp.clip_high = 0.0", "more than 0, or None")),
  (dict(preference__hp__beta=0.0), ("preference.hp.beta = 0.0", "more than 0")),
  (dict(preference__margin=-1.0), ("preference.margin = -1", "at least 0")),
  (dict(preference__buckets=(0, 8)), ("preference.buckets = (0, 8)", "at least 1")),
  (dict(seed=-1), ("seed = -1", "at least 0")),
  (dict(checkpoint__keep=0), ("checkpoint.keep = 0", "at least 1")),
  (dict(sim__groups=0), ("sim.groups = 0", "at least 1")),
])  # fmt: skip
def test_a_configuration_that_cannot_run_says_what_to_write(changes, words):
  checked()
  with pytest.raises(ConfigError) as caught:
    checked(**changes)
  assert all(word in str(caught.value) for word in words), caught.value


def test_what_only_interaction_needs_is_asked_of_no_other_phase():
  one_update = dict(sim__num_envs=8, sim__num_workers=2, interaction__batch=240, interaction__steps=30)
  with pytest.raises(ConfigError, match="single update"):
    checked(**one_update)
  checked(**one_update, phases=("imitation",))


def test_what_may_be_left_open():
  config = toy_run.get_config()
  with config.unlocked():
    del config.interaction.hp.clip_high  # as a configuration of one's own, made before there was one
    config.imitation.optimiser.clip_norm = ml_collections.config_dict.placeholder(float)  # no clipping
  validate(config, tasks.names)
  config = toy_run.get_config()
  config.imitation.optimiser.clip_norm = float("inf")
  validate(config, tasks.names)


def test_an_evaluation_does_not_ask_what_only_training_needs():
  """configs/eval.py inherits batches and rewards from the presets, and trains nothing."""
  unfit = {"sim.num_envs": 20, "preference.buckets": (7,), "interaction.stop_on_success": False}
  for config, fits in ((evaluation.get_config("default"), True), (ipi.get_config("default"), False)):
    config.update_from_flattened_dict(unfit)
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="does not divide a rollout"):
      validate(resolved(config), tasks.names)
    with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="over 7 devices"):
      check_batches(config, 7)
