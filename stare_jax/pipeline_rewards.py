"""What a step of Interaction pays (`interaction.reward`), for the method and for what it is compared with.

  potential   the success reward, and the difference of the potential Phi(s, g) (Eq. Shape): StA-PPO
  stages      the same with Phi = offset * (g - 1): completed stages count, progress inside a stage does not (ablation)
  success     the success reward alone: PPO
  milestones  the success reward in equal parts, one for each completed stage; no potential, nothing is paid back
  shaped_milestones  those, and the difference of phi_g, the potential without its offset: a completed stage is paid
              for good, and progress inside a stage is lent
  levels      differences of RL4VLA's level, 0.1 [grasped so far] + 0.1 [grasped for 5 steps in a row so far]
              + [success now, grasped so far]: what is lost again after a success is taken back
"""

from __future__ import annotations

from typing import Any

import numpy as np

from stare_jax import stages
from stare_jax.episode import StagedEpisode, unpack_signals

MILESTONES = ("milestones", "shaped_milestones")
SHAPED = ("potential", "stages", "shaped_milestones")
HOLD = 5  # steps in a row that a grasp must last to be RL4VLA's second level


def rewards(item: StagedEpisode, c: Any) -> np.ndarray:
  """float32[T]: r, or where the reward is a shaped one r' (Eq. Shape). c: config.interaction."""
  reward = raw(item, c)
  if c.reward not in SHAPED:
    return reward
  jumps = np.float32(c.offset) * stage_of(item)
  potential = {"potential": item.potential, "stages": jumps, "shaped_milestones": item.potential - jumps}[c.reward]
  done = np.array(item.episode.terminated)
  return stages.shaped_reward(reward, potential, done, discount=c.hp.discount, terminal=c.terminal)


def raw(item: StagedEpisode, c: Any) -> np.ndarray:
  """float32[T]: r without any shaping."""
  if c.reward == "levels":
    return levels(item.episode.signals)
  reward = np.zeros(len(item.episode), np.float32)
  if c.reward in MILESTONES:
    done = item.completed_at[item.completed_at > 0]  # states s_1 .. s_T; what was completed before is not paid
    np.add.at(reward, done - 1, np.float32(c.success_reward / len(item.completed_at)))
    reward[-1] += (c.success_reward - reward.sum()) * item.episode.terminated  # a success is all stages, on any way
  else:
    reward[-1] = c.success_reward * item.episode.terminated
  return reward


def levels(signals: np.ndarray) -> np.ndarray:
  """Differences of RL4VLA's level: float32[T+1, S] -> float32[T]; s_0 is level 0."""
  here = unpack_signals(signals)
  grasped, success = here["grasped"] > 0.5, here["success"] > 0.5
  grasped[0] = False
  time = np.arange(len(grasped))
  in_a_row = time - np.maximum.accumulate(np.where(grasped, 0, time))
  ever, held = (np.maximum.accumulate(flag) for flag in (grasped, in_a_row >= HOLD))
  level = 0.1 * ever + 0.1 * held + 1.0 * (success & ever)
  return np.diff(level).astype(np.float32)


def stage_of(item: StagedEpisode) -> np.ndarray:
  """float32[T+1]: g(t) from 0, of the state after the last action too."""
  last = min(int(item.completed.sum()), len(item.completed) - 1)
  return np.append(item.stage_id, last).astype(np.float32)
