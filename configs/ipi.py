"""Imitation -> Preference -> Interaction on one ManiSkill3 task: the main job.

  python -m stare_jax.main --config=configs/ipi.py                              # 11 to 25 minutes on two cores
  python -m stare_jax.main --config=configs/ipi.py:smoke                        # the same path in minutes
  python -m stare_jax.main --config=configs/ipi.py:default,task=push_cube,seed=3 --config.interaction.hp.clip=0.1
  python -m stare_jax.main --config=configs/ipi.py:default,method=sta_ppo      # a baseline or an ablation: METHODS
  CONFIG=configs/ipi.py:openvla_7b_lora bash launch/one_gpu.sh --config.policy.checkpoint=FOLDER   # one 80 GB GPU
  CONFIG=configs/ipi.py:openvla_7b TPU=... ZONE=... NFS=... bash launch/tpu_pod.sh \
    --config.policy.checkpoint=/mnt/stare_jax/openvla-7b                                             # a TPU pod
"""

import ml_collections

from stare_jax.config import LEFT_OPEN, ConfigError, parse_arg, suggest

# What a preset changes, as dotted fields of the default below.
PRESETS = {
  "default": {},
  "smoke": {
    "imitation.demonstrations": 24, "imitation.updates": 60, "imitation.checkpoint_every": 20,
    "preference.starts": 4, "preference.samples": 4, "preference.batch": 8, "preference.updates": 4,
    "preference.checkpoint_every": 2, "preference.optimiser.warmup_steps": 1,
    "interaction.iterations": 3, "interaction.critic_warmup": 1, "interaction.steps": 20,
    "interaction.batch": 80, "interaction.checkpoint_every": 1,
    "sim.num_envs": 8, "evaluation.episodes": 8, "report.videos": 2,
  },
}  # fmt: skip

# OpenVLA-7B, from a public checkpoint: add --config.policy.checkpoint=FOLDER. Rates, clipping and rollouts are those of
# the public full fine-tuning and LoRA recipes; docs/scaling.md says what each needs and where the batches come from.
SEVEN_B = {
  "policy.size": "7b", "policy.options": {"remat": "block"}, "sim.image_size": 224,
  "sim.num_envs": 64, "sim.num_workers": 8, "imitation.optimiser.schedule": "constant",
  "imitation.optimiser.warmup_steps": 0, "imitation.optimiser.betas": (0.9, 0.999), "imitation.hp.smoothing_sigma": 0.0,
  "imitation.checkpoint_every": 500, "preference.optimiser.schedule": "constant",
  "preference.optimiser.warmup_steps": 0, "preference.hp.beta": 0.1, "preference.hp.cost_weight": 0.5,
  "preference.parts_before": 0, "preference.tail": 0, "preference.samples": 4, "preference.both_failed": False,
  "preference.margin": 0.05, "preference.pairs_per_start": 4, "interaction.critic": "policy",
  "interaction.steps": 80, "interaction.offset": 1.0, "interaction.hp.discount": 0.99, "interaction.hp.lam": 0.95,
  "interaction.hp.value_clip": 0.2, "interaction.optimiser.clip_norm": 10.0, "evaluation.temperature": 0.6,
}  # fmt: skip
# Everything is trained. As written: v5e of 128 chips and more, v6e and v4 of 32, v5p of 16, 16 GPUs of 80 GB (8 with
# mesh.fsdp=8); smaller slices of 16 chips and more with the micro-batches that docs/scaling.md lists. 250 GiB of disk
# in each phase.
PRESETS["openvla_7b"] = SEVEN_B | {
  "mesh.fsdp": 16,
  "policy.options": {"remat": "block", "param_dtype": "float32", "compute_dtype": "bfloat16"},
  "imitation.demonstrations": 16384, "imitation.batch": 1024, "imitation.updates": 2000,
  "imitation.optimiser.learning_rate": 2e-5, "imitation.optimiser.weight_decay": 0.0,
  "preference.starts": 512, "preference.batch": 256, "preference.micro_batch": 1024, "preference.updates": 40,
  "preference.optimiser.learning_rate": 2e-6, "sim.num_envs": 256, "interaction.batch": 1024,
  "interaction.optimiser.learning_rate": 5e-6, "interaction.optimiser.value_lr_scale": 100.0,
}  # fmt: skip
PRESETS["openvla_7b_lora"] = SEVEN_B | {  # adapters on frozen bfloat16 weights, on one GPU of 80 GB
  "policy.options": {"remat": "products"},  # 55 GB with 32 rows, "block" 22: docs/scaling.md
  "policy.lora.rank": 32, "imitation.demonstrations": 1024, "imitation.batch": 32, "imitation.updates": 2000,
  "imitation.optimiser.learning_rate": 5e-4, "preference.starts": 64, "preference.batch": 16,
  "preference.micro_batch": 32, "preference.updates": 200, "preference.optimiser.learning_rate": 2e-5,
  "interaction.batch": 160, "interaction.micro_batches": 5, "interaction.optimiser.learning_rate": 1e-4,
  "interaction.optimiser.value_lr_scale": 30.0,
}  # fmt: skip

# What a method changes, after its preset. docs/baselines.md tells what each stands for and what it keeps of its source.
SFT = {"phases": ("imitation",)}
STA_TPO = {  # the paper's form: whole rollouts, stages of them where the one before was completed, their costs
  "phases": ("imitation", "preference"), "preference.parts_before": 0, "preference.tail": 0,
  "preference.both_failed": False, "preference.margin": 0.05, "preference.hp.cost_weight": 0.5,
  "preference.hp.chosen_weight": 0.0,
}  # fmt: skip
TPO = STA_TPO | {"preference.loss": "tpo", "preference.pairs": "trajectory"}
STA_PPO = {"phases": ("imitation", "interaction")}
PPO = STA_PPO | {"interaction.reward": "success"}
MILESTONES = STA_PPO | {"interaction.reward": "milestones"}
STA_MILESTONES = STA_PPO | {"interaction.reward": "shaped_milestones"}
RL4VLA = STA_PPO | {
  "interaction.reward": "levels", "interaction.stop_on_success": False, "interaction.steps": 0,
  "interaction.bootstrap": False, "interaction.epochs": 1, "interaction.batch": 160, "interaction.temperature": 1.0,
  "interaction.critic": "policy", "interaction.critic_warmup": 0, "interaction.target_kl": 0.0,
  "interaction.hp.discount": 0.99, "interaction.hp.lam": 0.95, "interaction.hp.clip": 0.2,
  "interaction.hp.value_clip": 0.2, "interaction.hp.huber_delta": 10.0, "interaction.hp.policy_weight": 7.0,
  "interaction.hp.value_weight": 1.0, "interaction.hp.entropy_weight": 0.0, "interaction.hp.kl_weight": 0.0,
  "interaction.hp.ratio": "action", "interaction.optimiser.value_lr_scale": 30.0,
  "interaction.optimiser.clip_norm": 10.0,
}  # fmt: skip
METHODS = {
  "ipi": {},  # the preset as it is: all three phases
  "sft": SFT,
  "preference": {"phases": ("imitation", "preference")},  # the preset's own, without what comes after
  "tpo": TPO,
  "grape": TPO | {
    "preference.loss": "window_tpo", "preference.hp.beta": 0.1, "preference.samples": 6, "preference.samples_max": 11,
  },
  "sta_tpo": STA_TPO,
  "ppo_clean": PPO,
  "ppo_far": PPO | {"interaction.hp.discount": 0.99, "interaction.hp.lam": 0.95},  # as far as a sparse reward asks
  "rl4vla_faithful": RL4VLA,
  "milestone_ppo": MILESTONES,
  "milestone_sta_ppo": STA_MILESTONES,
  "sta_ppo": STA_PPO,
  # The paper's critic, a head on the policy, where the default preset's sees the simulator's state.
  "ppo_pixels": PPO | {"interaction.critic": "policy"},
  "sta_ppo_pixels": STA_PPO | {"interaction.critic": "policy"},
  "by_stage_pixels": STA_PPO | {"interaction.critic": "policy", "interaction.standardise": "stage"},
  "milestone_pixels": MILESTONES | {"interaction.critic": "policy"},
  "milestone_sta_pixels": STA_MILESTONES | {"interaction.critic": "policy"},
  # Ablations: of sta_tpo the first two, of sta_ppo the others.
  "no_cost": STA_TPO | {"preference.hp.cost_weight": 0.0},
  "tpo_same_pairs": STA_TPO | {"preference.loss": "tpo"},
  "no_gating": STA_TPO | {"preference.hp.gating": False},
  "offset_1": STA_PPO | {"interaction.offset": 1.0},
  "by_stage": STA_PPO | {"interaction.standardise": "stage"},
  "offset_0": STA_PPO | {"interaction.offset": 0.0},
  "no_potential": STA_PPO | {"interaction.reward": "stages"},
}  # fmt: skip

STARTS_FROM = dict(
  checkpoint="",  # a public OpenVLA folder; "": from scratch, or from init_from
  unnorm_key="",  # the data set of that folder whose action statistics count; "": the demonstrations' own
  # rank 0: everything is trained. targets: "all-linear", names ("q_proj,v_proj"), or a regular expression
  lora=dict(rank=0, alpha=16, targets="all-linear"),
)  # fmt: skip


def options(chosen: dict) -> dict:
  """`policy.options` with these fields chosen, and a place on the command line for each that is left open."""
  return {name: ml_collections.config_dict.placeholder(kind) for name, kind in LEFT_OPEN.items()} | chosen


def change(c: ml_collections.ConfigDict, fields: dict) -> None:
  if "policy.options" in fields:  # those of `tiny` mean nothing to another size
    c.policy.options = options(fields.pop("policy.options"))
  c.update_from_flattened_dict(fields)


def interaction() -> dict:
  """StA-PPO in the simulator."""
  return dict(
    iterations=140, steps=30,  # of every environment; 0: the horizon
    epochs=1, batch=240, micro_batches=1, temperature=1.0, checkpoint_every=5,
    critic="state",  # "policy": a head on the policy's hidden state; "state": a network on the simulator's state
    critic_hp=dict(epochs=16, learning_rate=1e-3),  # of "state"
    critic_warmup=2,  # iterations that fit the critic alone
    target_kl=0.01,  # nats per action, mean over an epoch's minibatches; stops epochs, adapts the learning rate
    reward="potential",  # stare_jax/pipeline_rewards.py lists them
    terminal="zero",
    stop_on_success=True,  # False: episodes of a fixed length, for a reward that goes on after the first success
    standardise="all",  # advantages of the whole rollout together; "stage": those of each stage by themselves
    bootstrap=True,  # False: nothing is worth anything after the time limit
    offset=0.5,  # stage to stage; small, so that progress inside a stage is not drowned by the jump to the next
    success_reward=0.0,  # 0: K * max(offset, 0.5) + 0.5 (shaped_milestones: K + 0.5), more than a success gives back
    optimiser=dict(
      learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=1.0, value_lr_scale=3.0,
    ),
    hp=dict(
      discount=0.95, lam=0.7, clip=0.2, clip_high=ml_collections.config_dict.placeholder(float),  # None: clip
      value_clip=ml_collections.config_dict.placeholder(float),  # None: without
      huber_delta=ml_collections.config_dict.placeholder(float), policy_weight=1.0, value_weight=0.5,
      entropy_weight=0.0, kl_weight=0.0, ratio="action",
    ),
  )  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  preset, chosen = parse_arg(arg, PRESETS, method="ipi", task="pull_cube", seed=0)
  method = chosen["method"]
  if method not in METHODS:
    raise ConfigError(f'unknown method "{method}": {suggest(method, tuple(METHODS))}')
  c = ml_collections.ConfigDict()
  c.preset, c.method, c.task, c.seed = preset, method, chosen["task"], chosen["seed"]
  c.phases = ("imitation", "preference", "interaction")
  c.mesh = dict(data=-1, fsdp=1, tensor=1)  # -1: the remaining devices

  c.sim = dict(
    name="maniskill", num_envs=32, num_workers=2, groups=2, image_size=64, horizon=0,  # control steps; 0: the task's
    timeout=60.0, python="",  # seconds until a silent worker is replaced; its Python (docs/simpler_env.md), "": ours
  )  # fmt: skip
  tiny = options(dict(patch_size=16, prompt_length=12, bins=16))
  c.policy = dict(name="openvla", size="tiny", options=tiny, **STARTS_FROM)
  c.init_from = ""  # a checkpoint folder of another run, such as runs/x/checkpoints/imitation

  # Supervised fine-tuning on scripted demonstrations.
  c.imitation = dict(
    loss="cross_entropy", demonstrations=150, expert_noise=0.3,
    updates=600, batch=64, micro_batches=1, checkpoint_every=100,
    optimiser=dict(
      learning_rate=1.5e-3, schedule="cosine", warmup_steps=30, weight_decay=0.01, clip_norm=1.0, betas=(0.9, 0.95),
    ),
    hp=dict(smoothing_sigma=0.5),  # Gaussian soft targets over neighbouring bins; 0 is plain cross-entropy
  )  # fmt: skip

  # StA-TPO on pairs of the policy's own rollouts that begin alike.
  c.preference = dict(
    loss="stage_tpo", starts=160, samples=8, temperature=1.0, pairs_per_start=8, margin=0.1,
    samples_max=0,  # a start without any pair gets more samples, up to so many; 0: no more than `samples`
    pairs="stage",  # or "trajectory": successes against failures of the same start
    parts_before=20,  # the samples of a start part at a step drawn up to here; 0: at its beginning
    tail=8,  # steps after they part; 0: to the horizon
    both_failed=True,  # two that have not completed a stage are compared by its cost
    updates=60, batch=32, micro_batch=256, buckets=(), checkpoint_every=20,  # no buckets: one, of the tail's length
    optimiser=dict(learning_rate=1e-4, schedule="cosine", warmup_steps=5, weight_decay=0.0, clip_norm=1.0),
    hp=dict(beta=2.0, cost_weight=0.0, chosen_weight=0.0, gating=True),
  )  # fmt: skip

  c.interaction = interaction()
  c.evaluation = dict(episodes=128, temperature=1.0, seed=1_000_000)  # 1: as it acts in training; 0: argmax
  c.checkpoint = dict(keep=2)
  c.report = dict(videos=4)
  change(c, dict(PRESETS[preset]))
  change(c, dict(METHODS[method]))
  c.lock()
  return c
