"""PegInsertionSide: put the end of a peg into a hole in the side of a box. Reach -> Grasp -> Align -> Insert.

Peg and hole are new in every episode: half lengths of 8.5 to 12.5 cm, half widths of 1.5 to 2.5 cm, 3 mm of play. The
goal is the pose of the peg when its head is in the middle of the box; its x axis is the hole's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED, OPEN

SHORTEST, LONGEST = 0.085, 0.125  # half lengths of pegs, metres; a peg's own axis is x, and its head is at +x
REACH, LIFT = 0.025, 0.02  # metres: from the tool to the peg's axis; rise of the peg's centre
IN_LINE = 0.01  # metres from the hole's axis, of the peg's centre and of a point near its head
NEAR_HEAD = (0.1, 0.0, 0.0)
GRIP = 0.06  # metres from the peg's centre to where the expert holds it, toward the tail
BEFORE = LONGEST + 0.03  # metres from the goal, at which even the longest peg is outside
FITS = 0.0015  # metres from the hole's axis at which the expert begins to push
STUCK = 0.001  # metres; a smaller advance for three steps means that the head is on the rim


def insert(arm: experts.Controller) -> Iterator[experts.Target]:
  """Hold the peg behind its middle, bring it before the hole in line with it, and push; start again where it jams."""
  axis = arm.thing_rotation[:, 0]
  grip = arm.nearest([experts.pointing_down(sign * np.array([-axis[1], axis[0]])) for sign in (1, -1)])
  tail = lambda: arm.thing - GRIP * arm.thing_rotation[:, 0]
  yield from arm.goto(lambda: tail() + [0, 0, 0.07], grip, OPEN, within=0.03, turn=0.15)
  yield from arm.goto(tail, grip, OPEN, within=0.008, turn=0.05)
  yield from arm.grasp(tail(), grip)
  yield from arm.goto(arm.tool + [0, 0, 0.05], grip, CLOSED, within=0.02)
  drift = np.zeros(3)  # what the arm yields to the peg's weight and to contact, summed up
  while True:
    for _ in range(40):
      drift = _integrated(arm, drift)
      yield _carry(arm, BEFORE, drift)
      if max(np.linalg.norm(_off_line(arm, along)) for along in (0.0, NEAR_HEAD[0])) < FITS:
        break
    still = 0
    while still < 3:
      depth = _depth(arm)
      drift = _integrated(arm, drift)
      yield _carry(arm, depth - 0.03, drift)
      still = still + 1 if depth - _depth(arm) < STUCK else 0


def _depth(arm: experts.Controller) -> float:
  """Metres that the peg has still to go along the hole's axis."""
  return float((arm.goal - arm.thing) @ arm.goal_rotation[:, 0])


def _off_line(arm: experts.Controller, along: float = 0.0) -> np.ndarray:
  """From the hole's axis to the point `along` metres from the peg's centre toward its head, float64[3]."""
  axis, away = arm.goal_rotation[:, 0], arm.thing + along * arm.thing_rotation[:, 0] - arm.goal
  return away - (away @ axis) * axis


def _integrated(arm: experts.Controller, drift: np.ndarray) -> np.ndarray:
  off = _off_line(arm)
  return drift if np.linalg.norm(off) > 0.02 else np.clip(drift - 0.15 * off, -0.01, 0.01)


def _carry(arm: experts.Controller, depth: float, drift: np.ndarray) -> experts.Target:
  """The tool that brings the peg, as it is held, into line with the hole `depth` metres before the goal."""
  turn = arm.goal_rotation @ arm.thing_rotation.T
  wanted = arm.goal - depth * arm.goal_rotation[:, 0]
  return experts.Target(wanted + turn @ arm.grip_offset + drift, turn @ arm.tool_rotation, CLOSED)


PEG_AXIS = rules.on_axis(SHORTEST)
TO_PEG = rules.between(rules.tool, PEG_AXIS)
OFF_LINE = tuple(rules.off_line(point) for point in (rules.thing, rules.attached(NEAR_HEAD)))
HELD = rules.all_of(rules.grasped, rules.lifted(LIFT))
ALIGNED = rules.all_of(*(rules.within(distance, IN_LINE) for distance in OFF_LINE))

PEG_INSERTION_SIDE = Task(
  name="peg_insertion_side",
  env_id="PegInsertionSide-v1",
  instruction="insert the peg into the hole of the box",
  colour="orange yellow",  # of its head, nearly, and the box's
  phrasings=("put the stick into the hole of the box", "push the peg into the box", "plug the peg into the hole"),
  stages=(
    Stage("Reach", rules.any_of(rules.near(rules.tool, PEG_AXIS, REACH), rules.grasped, rules.succeeded), TO_PEG, 0.2),
    Stage("Grasp", rules.any_of(HELD, rules.succeeded), rules.plus(TO_PEG, rules.missing_height(LIFT)), scale=0.05),
    Stage("Align", rules.any_of(ALIGNED, rules.succeeded), rules.plus(*OFF_LINE), scale=0.2),
    Stage("Insert", rules.succeeded, rules.between(rules.thing, rules.goal), scale=0.1),
  ),
  actors=Actors(object="peg", goal="goal_pose"),
  expert=experts.scripted(insert),
  camera=Camera(eye=(0.55, -0.7, 0.75), target=(-0.02, 0.02, 0.05), fov=0.8),  # sees the hole
  horizon=100,
)
