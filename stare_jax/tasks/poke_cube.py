"""PokeCube: take a peg and push a cube into the goal region with its tip. Reach -> Grasp -> Poke."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Region, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED, OPEN

HALF_LENGTH, HALF_WIDTH = 0.12, 0.025  # of the peg, metres
GRIP = -0.08  # metres from the peg's centre, toward the robot: the cube's goal is at the end of the arm's reach
TIP = rules.shifted(rules.thing, (HALF_LENGTH, 0, 0))  # the peg points along x and stays so
PEG_AXIS = rules.on_axis(HALF_LENGTH)


def poke(arm: experts.Controller) -> Iterator[experts.Target]:
  """Take the peg by its tail, bring it in line with the cube, push the cube onto the goal and stand still."""
  down = arm.down_along_y()
  tail = lambda: arm.thing + [GRIP, 0, 0]
  yield from arm.goto(lambda: tail() + [0, 0, 0.07], down, OPEN, within=0.03, turn=0.25)
  yield from arm.goto(tail, down, OPEN, within=0.01)
  yield from arm.grasp(tail(), down)
  in_line = lambda: np.array([arm.thing[0], arm.goal[1], HALF_WIDTH + 0.002]) + arm.grip_offset
  yield from arm.goto(in_line, down, CLOSED, within=0.01)
  while True:  # slowly from the cube on, or it slides away
    tip = arm.thing[0] + HALF_LENGTH
    step = 0.1 if tip < arm.goal[0] - 0.18 else 0.03
    end = min(tip + step, arm.goal[0] - 0.04)
    yield experts.Target(np.array([end - HALF_LENGTH, *in_line()[1:]]) + [arm.grip_offset[0], 0, 0], down, CLOSED)


POKE_CUBE = Task(
  name="poke_cube",
  env_id="PokeCube-v1",
  instruction="poke the cube to the goal with the peg",
  stages=(
    Stage(
      "Reach",
      end=rules.any_of(rules.near(rules.tool, PEG_AXIS, 0.025), rules.grasped, rules.succeeded),
      distance=rules.between(rules.tool, PEG_AXIS),
      scale=0.2,
    ),
    Stage("Grasp", rules.any_of(rules.grasped, rules.succeeded), rules.between(rules.tool, PEG_AXIS), scale=0.05),
    Stage("Poke", end=rules.succeeded, distance=rules.between(TIP, rules.goal, axes="xy"), scale=0.2),
  ),
  actors=Actors(object="peg", goal="goal_region"),
  expert=experts.scripted(poke),
  camera=Camera(eye=(0.97, 0.0, 0.83), target=(0.19, 0.0, 0.05), fov=0.54),
  colour="blue red",  # and the cube's
  region=Region((-0.1, -0.1), (0.1, 0.1), (-0.13, -0.15), (0.1, 0.15), along=("cube", "goal_region")),
  phrasings=("push the block to the target with the stick", "grasp the stick and push the cube with it",
             "press the cube forward with the peg"),
)
