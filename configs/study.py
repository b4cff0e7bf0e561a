"""Methods x tasks x seeds in one folder, and the tables and learning curves that compare them.

  python -m stare_jax.study --config=configs/study.py --workdir=runs/study --jobs=2 --threads=1
  python -m stare_jax.study --config=configs/study.py --workdir=runs/study --report     # the tables of what is there
  python -m stare_jax.study --config=configs/study.py:smoke --workdir=runs/study-smoke  # minutes, too short to learn

Every task and seed has one start, trained by supervised fine-tuning once, from which all its methods go on.
"""

import ml_collections

from stare_jax.config import parse_arg

# What docs/results.md was made with.
EVIDENCE = (
  "sim.num_workers=1",
  "pull_cube:preference.starts=80",
  # Imitation needs more where there is a grasp: ten demonstrations around each published start, with little noise.
  "put_carrot_on_plate:imitation.demonstrations=240", "put_carrot_on_plate:imitation.updates=2400",
  "put_carrot_on_plate:imitation.expert_noise=0.1", "put_carrot_on_plate:preference.starts=48",
  "put_carrot_on_plate:interaction.steps=40", "put_carrot_on_plate:interaction.batch=320",
  "report.videos=2",
  "pull_cube:interaction.iterations=40", "pull_cube:evaluation.episodes=256",
  "put_carrot_on_plate:interaction.iterations=30", "put_carrot_on_plate:evaluation.episodes=144",
)  # fmt: skip


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  preset, _ = parse_arg(arg, {"default": {}, "smoke": {}, "openvla_7b_lora": {}, "openvla_7b": {}})
  c = ml_collections.ConfigDict()
  c.base, c.preset = "configs/ipi.py", preset  # what a cell runs
  c.methods = ("ppo_clean", "sta_ppo", "tpo", "sta_tpo")  # of the METHODS there; sft, the start, is always run
  c.tasks = ("pull_cube", "put_carrot_on_plate")
  c.seeds = (0, 1, 2)
  c.compare = ("ppo_clean:sta_ppo", "tpo:sta_tpo")  # also shown: each less sft
  # The budget of a cell; 0: the preset's.
  c.interaction = dict(iterations=0)
  c.evaluation = dict(episodes=0)
  # Any other field of all cells, or of one task's: ("preference.starts=80", "pick_cube:interaction.hp.lam=0.95").
  c.changes = EVIDENCE if preset == "default" else ()
  if preset == "smoke":  # a policy that hardly succeeds has no success to prefer to a failure
    c.methods, c.tasks, c.seeds = ("ppo_clean", "sta_ppo", "sta_tpo"), ("pull_cube",), (0,)
  c.lock()
  return c
