"""Action statistics of public data sets, and how their gripper becomes the simulator's.

OpenVLA's data sets hold the gripper in [0, 1], 1 open, outside the normalisation. The simulator's is -1 closed, +1
open. `for_environment` writes that change of scale, e = 2 g - 1, into the statistics: tokens stay the data set's, and
`decode` and `tokenize` speak the simulator's actions. The WidowX scenes then open above 0, which is g > 0.5. Public
folders hold the data set's scale: `in_data_set` goes back.
"""

from __future__ import annotations

import difflib

import numpy as np

from stare_jax.policies import ActionStats

# Metres and radians per step at 5 Hz, as the public checkpoints of OpenVLA carry them under this name.
BRIDGE_ORIG = ActionStats(
  q01=np.array(
    [
      -0.02872725307941437, -0.04170349963009357, -0.026093858778476715,
      -0.08092105075716972, -0.09288699507713317, -0.20718276381492615, 0.0,
    ], np.float32,
  ),
  q99=np.array(
    [
      0.028309678435325586, 0.040855254605412394, 0.040161586627364146,
      0.08192047759890528, 0.07792850524187081, 0.20382574498653397, 1.0,
    ], np.float32,
  ),
  mask=np.array([True] * 6 + [False]),
)  # fmt: skip
SIMULATOR = (-3.0, 1.0)  # q01 and q99 of a gripper in [0, 1] that is written as the simulator's
REGISTRY = {"bridge_orig": BRIDGE_ORIG}


def named(name: str) -> ActionStats:
  """The published statistics of a data set, gripper in [0, 1]."""
  if name not in REGISTRY:
    near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown action statistics {name!r}: {hint}known: {', '.join(REGISTRY)}")
  return REGISTRY[name]


def in_environment(stats: ActionStats) -> ActionStats:
  """`for_environment` where the gripper is in [0, 1], as public data sets have it; otherwise as they are."""
  public = not stats.mask[-1] and 0 <= stats.q01[-1] < stats.q99[-1] <= 1
  return for_environment(stats) if public else stats


def for_environment(stats: ActionStats) -> ActionStats:
  """The same tokens for the same behaviour, with the gripper (the last dimension) in the simulator's [-1, 1].

  Normalisation takes x to 2 (x - q01) / (q99 - q01) - 1. With q01 = -3 and q99 = 1 that is (x + 1) / 2: closed, -1,
  becomes the data set's 0 and open, 1, its 1.

  Raises:
    ValueError: the last dimension is not a gripper in [0, 1] that the normalisation leaves alone.
  """
  q01, q99, mask = (np.array(x) for x in stats)
  if mask[-1] or not 0 <= q01[-1] < q99[-1] <= 1:
    raise ValueError(
      f"the last dimension has mask {mask[-1]} and range {q01[-1]:g} to {q99[-1]:g}: expected a gripper in [0, 1] with "
      "mask False, as OpenVLA's data sets have it"
    )
  q01[-1], q99[-1], mask[-1] = *SIMULATOR, True
  return ActionStats(q01, q99, mask)


def in_data_set(stats: ActionStats) -> ActionStats:
  """The inverse of `for_environment`, gripper in [0, 1], where it was applied; otherwise as they are.

  No other statistics have that range: those of demonstrations leave the gripper outside the normalisation.
  """
  q01, q99, mask = (np.array(x) for x in stats)
  if not mask[-1] or (q01[-1], q99[-1]) != SIMULATOR:
    return stats
  q01[-1], q99[-1], mask[-1] = 0.0, 1.0, False
  return ActionStats(q01, q99, mask)
