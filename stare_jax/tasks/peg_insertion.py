"""PegInsertionSide: put the end of a peg into a hole in the side of a box. Reach -> Grasp -> Align -> Insert."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED, OPEN

SHORTEST, LONGEST = 0.085, 0.125  # half lengths of pegs; a peg's own axis is x, and its head is at +x
GRIP = 0.06  # metres from the peg's centre toward its tail
LIFT = 0.02
IN_LINE = 0.01


def insert(arm: experts.Controller) -> Iterator[experts.Target]:
  axis = lambda: arm.thing_rotation[:, 0]
  side = lambda: np.array([-axis()[1], axis()[0]])
  grip = arm.nearest([experts.pointing_down(sign * side()) for sign in (1, -1)])
  tail = lambda: arm.thing - GRIP * axis()
  yield from arm.goto(lambda: tail() + [0, 0, 0.07], grip, OPEN, within=0.03, turn=0.15)
  yield from arm.goto(tail, grip, OPEN, within=0.008, turn=0.05)
  yield from arm.grasp(tail(), grip)
  yield from arm.goto(arm.tool + [0, 0, 0.05], grip, CLOSED, within=0.02)
  drift = np.zeros(3)

  def target(depth: float, gain: float = 0.15) -> experts.Target:
    nonlocal drift
    want = arm.goal - depth * arm.goal_rotation[:, 0]
    turn = arm.goal_rotation @ arm.thing_rotation.T
    offset = turn @ arm.grip_offset
    error = want - arm.thing
    if np.linalg.norm(error) < 0.02:
      drift = np.clip(drift + gain * error, -0.01, 0.01)
    return experts.Target(want + offset + drift, turn @ arm.tool_rotation, CLOSED)

  for _ in range(60):
    goal = target(LONGEST + 0.03)
    yield goal
    head = arm.thing + 0.1 * axis() - (arm.goal + 0.1 * arm.goal_rotation[:, 0])
    off = lambda v: np.linalg.norm(v - (v @ arm.goal_rotation[:, 0]) * arm.goal_rotation[:, 0])
    if off(arm.thing - arm.goal) < 0.002 and off(head) < 0.002:
      break
  while True:
    depth = (arm.goal - arm.thing) @ arm.goal_rotation[:, 0]
    yield target(depth - 0.03)


PEG_AXIS = rules.on_axis(SHORTEST)
TO_PEG = rules.between(rules.tool, PEG_AXIS)
HEAD = rules.attached((0.1, 0, 0))
OFF = (rules.off_line(rules.thing), rules.off_line(HEAD))

PEG_INSERTION_SIDE = Task(
  name="peg_insertion_side",
  env_id="PegInsertionSide-v1",
  instruction="insert the peg into the hole in the side of the box",
  stages=(
    Stage("Reach", rules.any_of(rules.near(rules.tool, PEG_AXIS, 0.025), rules.grasped, rules.succeeded), TO_PEG, scale=0.2),
    Stage("Grasp", rules.any_of(rules.all_of(rules.grasped, rules.lifted(LIFT)), rules.succeeded), rules.plus(TO_PEG, rules.missing_height(LIFT)), scale=0.05),
    Stage("Align", rules.any_of(rules.all_of(*(rules.within(off, IN_LINE) for off in OFF)), rules.succeeded), rules.plus(*OFF), scale=0.2),
    Stage("Insert", rules.succeeded, rules.between(rules.thing, rules.goal), scale=0.1),
  ),
  actors=Actors(object="peg", goal="goal_pose"),
  expert=experts.scripted(insert),
  camera=Camera(eye=(0.81, 0.0, 0.83), target=(0.03, 0.0, 0.05), fov=0.6),
  horizon=100,
)
