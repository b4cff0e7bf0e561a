"""Imitation -> Preference -> Interaction on one ManiSkill3 task: the main job.

  python -m stare_jax.main --config=configs/ipi.py                              # about half an hour on two cores
  python -m stare_jax.main --config=configs/ipi.py:smoke                        # the same path in minutes
  python -m stare_jax.main --config=configs/ipi.py:default,task=push_cube,seed=3 --config.interaction.hp.clip=0.1
"""

import ml_collections

from stare_jax.config import parse_arg

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

STARTS_FROM = dict(
  checkpoint="",  # a public OpenVLA folder; "": from scratch, or from init_from
  unnorm_key="",  # the data set of that folder whose action statistics count; "": the demonstrations' own
  # rank 0: everything is trained. targets: "all-linear", names ("q_proj,v_proj"), or a regular expression
  lora=dict(rank=0, alpha=16, targets="all-linear"),
)  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  preset, chosen = parse_arg(arg, PRESETS, task="pull_cube", seed=0)
  c = ml_collections.ConfigDict()
  c.preset, c.task, c.seed = preset, chosen["task"], chosen["seed"]
  c.phases = ("imitation", "preference", "interaction")
  c.mesh = dict(data=-1, fsdp=1, tensor=1)  # -1: the remaining devices

  c.sim = dict(
    name="maniskill", num_envs=32, num_workers=2, groups=2, image_size=64, horizon=0,  # control steps; 0: the task's
    timeout=60.0,  # seconds without an answer until a worker is replaced
  )  # fmt: skip
  c.policy = dict(name="openvla", size="tiny", options=dict(patch_size=16, prompt_length=12, bins=16), **STARTS_FROM)
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
    parts_before=20,  # the samples of a start part at a step drawn up to here; 0: at its beginning
    tail=8,  # steps after they part; 0: to the horizon
    both_failed=True,  # two that have not completed a stage are compared by its cost
    updates=60, batch=32, micro_batch=256, buckets=(), checkpoint_every=20,  # no buckets: one, of the tail's length
    optimiser=dict(learning_rate=1e-4, schedule="cosine", warmup_steps=5, weight_decay=0.0, clip_norm=1.0),
    hp=dict(beta=2.0, cost_weight=0.0, chosen_weight=0.0),
  )  # fmt: skip

  # StA-PPO in the simulator.
  c.interaction = dict(
    iterations=140, steps=30, epochs=1, batch=240, micro_batches=1, temperature=1.0, checkpoint_every=5,
    critic="state",  # "policy": a head on the policy's hidden state; "state": a network on the simulator's state
    critic_hp=dict(epochs=16, learning_rate=1e-3),  # of "state"
    critic_warmup=2,  # iterations that fit the critic alone
    target_kl=0.01,  # nats per action, mean over an epoch's minibatches; stops epochs, adapts the learning rate
    shaping=True, terminal="zero",
    offset=0.5,  # stage to stage; small, so that progress inside a stage is not drowned by the jump to the next
    success_reward=0.0,  # 0: K * offset + 0.5, more than any potential that success ends
    optimiser=dict(
      learning_rate=1e-4, schedule="constant", warmup_steps=0, weight_decay=0.0, clip_norm=1.0, value_lr_scale=3.0,
    ),
    hp=dict(
      discount=0.95, lam=0.7, clip=0.2, value_clip=None, value_weight=0.5, entropy_weight=0.0, kl_weight=0.0,
      ratio="action",
    ),
  )  # fmt: skip

  c.evaluation = dict(episodes=128, temperature=1.0, seed=1_000_000)  # 1: as it acts in training; 0: argmax
  c.checkpoint = dict(keep=2)
  c.report = dict(videos=4)
  c.update_from_flattened_dict(PRESETS[preset])
  c.lock()
  return c
