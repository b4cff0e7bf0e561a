"""Methods x tasks x seeds in one folder, and the tables and learning curves that compare them.

  python -m stare_jax.study --config=configs/study.py --workdir=runs/study --jobs=2 --threads=1
  python -m stare_jax.study --config=configs/study.py --workdir=runs/study --report     # the tables of what is there
  python -m stare_jax.study --config=configs/study.py:smoke --workdir=runs/study-smoke  # minutes, too short to learn

Every task and seed has one start, trained by supervised fine-tuning once, from which all its methods go on.
"""

import ml_collections

from stare_jax.config import parse_arg


def get_config(arg: str = "") -> ml_collections.ConfigDict:
  preset, _ = parse_arg(arg, {"default": {}, "smoke": {}, "openvla_7b_lora": {}, "openvla_7b": {}})
  c = ml_collections.ConfigDict()
  c.base, c.preset = "configs/ipi.py", preset  # what a cell runs
  # Of the METHODS there; sft, the start, is always run. PPO twice: the preset's short horizon suits shaped rewards.
  c.methods = ("ppo_clean", "ppo_far", "sta_ppo", "tpo", "sta_tpo")
  c.tasks = ("pull_cube", "pick_cube")
  c.seeds = (0, 1, 2)
  c.compare = ("ppo_clean:sta_ppo", "ppo_far:sta_ppo", "tpo:sta_tpo")  # also shown: each less sft
  # The budget of a cell; 0: the preset's.
  c.interaction = dict(iterations=0)
  c.evaluation = dict(episodes=0)
  c.changes = ()  # any other field of all cells: ("preference.starts=80", "interaction.hp.lam=0.95")
  if preset == "smoke":  # a policy that hardly succeeds has no success to prefer to a failure
    c.methods, c.tasks, c.seeds = ("ppo_clean", "sta_ppo", "sta_tpo"), ("pull_cube",), (0,)
  c.lock()
  return c
