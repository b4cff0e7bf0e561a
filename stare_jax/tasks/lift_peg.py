"""LiftPegUpright: stand a lying peg on its end. Reach -> Grasp -> Upright."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Region, Stage, Task, experts, rules
from stare_jax.tasks.experts import OPEN

REACH, LIFT = 0.025, 0.01  # metres: from the tool to the peg's axis; rise of the peg's centre
HALF_LENGTH, HALF_WIDTH = 0.12, 0.025  # of the peg, whose axis is its own x
GRIP = 0.10  # metres from the peg's centre to where the expert holds it
# Half closed, so that the peg turns about the fingers: joint 6 ends before the hand itself could pitch 90 degrees.
LOOSE = 0.3
FIRST_PITCH, LAST_PITCH = np.deg2rad(20), np.deg2rad(45)  # of the hand, forward
LEAD = 0.4  # radians that the commanded peg angle is ahead of the real one
STABLE = np.deg2rad(8)  # from upright, where the peg settles by itself


def lift_peg(arm: experts.Controller) -> Iterator[experts.Target]:
  """Hold the far end and lead it along the arc around the peg's near edge on the table; let go when it stands."""
  down = arm.nearest([experts.pointing_down((0, -1)), experts.pointing_down((0, 1))])
  pitched = lambda angle: experts.about_y(-angle) @ down
  hand = pitched(FIRST_PITCH)
  hold_at = np.array([arm.thing[0] + GRIP, arm.thing[1], HALF_WIDTH])
  yield from arm.goto(hold_at - 0.06 * hand[:, 2], hand, OPEN, within=0.03, turn=0.25)
  yield from arm.goto(hold_at, hand, OPEN, within=0.010, turn=0.15)
  yield from arm.grasp(hold_at, hand, steps=5)
  edge = arm.thing[0] - HALF_LENGTH  # x of the lower edge, around which the peg turns
  while True:
    angle = _elevation(arm.thing_rotation[:, 0])
    if abs(np.pi / 2 - angle) < STABLE and arm.thing[2] < HALF_LENGTH + 0.02:
      break
    wanted = angle + np.clip(2 * (np.pi / 2 - angle), -LEAD, LEAD)
    along = np.array([np.cos(wanted), 0.0, np.sin(wanted)])
    centre = np.array(
      [
        edge + HALF_LENGTH * np.cos(wanted) + HALF_WIDTH * (1 - np.sin(wanted)),
        arm.thing[1],
        HALF_LENGTH * np.sin(wanted) + HALF_WIDTH * max(np.cos(wanted), 0) + 0.004,
      ]
    )
    hand = pitched(min(FIRST_PITCH + wanted, LAST_PITCH))
    yield experts.Target(centre + GRIP * along, hand, LOOSE)
  here, hand = arm.tool, arm.tool_rotation
  yield from arm.hold(here - [0, 0, arm.thing[2] - HALF_LENGTH], hand, LOOSE, steps=2)
  here, hand = arm.tool, arm.tool_rotation
  yield from arm.hold(here, hand, OPEN, steps=2)
  yield from arm.hold(here - 0.10 * hand[:, 2], hand, OPEN, steps=1)


def _elevation(axis: np.ndarray) -> float:
  """Angle of the peg above the table in the x-z plane, seen from its far end; 0 lying, pi/2 standing."""
  far = axis if 0.3 * axis[0] + 2.0 * axis[2] > -0.02 else -axis
  return float(np.arctan2(far[2], far[0]))


PEG_AXIS = rules.on_axis(HALF_LENGTH)

LIFT_PEG_UPRIGHT = Task(
  name="lift_peg_upright",
  env_id="LiftPegUpright-v1",
  instruction="lift the peg and stand it upright",
  colour="red blue",  # of its halves
  stages=(
    Stage(
      "Reach",
      end=rules.any_of(rules.near(rules.tool, PEG_AXIS, REACH), rules.grasped, rules.succeeded),
      distance=rules.between(rules.tool, PEG_AXIS),
      scale=0.2,
    ),
    Stage(
      "Grasp",
      end=rules.any_of(rules.all_of(rules.grasped, rules.lifted(LIFT)), rules.succeeded),
      distance=rules.plus(rules.between(rules.tool, PEG_AXIS), rules.missing_height(LIFT)),
      scale=0.05,
    ),
    Stage("Upright", end=rules.succeeded, distance=rules.tilt(), scale=np.pi / 2),
  ),
  actors=Actors(object="peg", goal=None),
  expert=experts.scripted(lift_peg),
  region=Region((-0.1, -0.1), (0.1, 0.1), (-0.13, -0.15), (0.1, 0.15)),
  phrasings=("stand the stick up", "pick up the stick and turn it upright", "grasp the peg and put it upright"),
)
