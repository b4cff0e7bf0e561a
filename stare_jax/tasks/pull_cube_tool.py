"""PullCubeTool: hook a cube that lies far away with an L-shaped tool and pull it in. Reach -> Grasp -> Hook -> Pull."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED, OPEN

# The tool lies flat. Its frame is at the tail of the handle: x along the handle, y the way the hook points. The hook is
# 15 to 20 cm along the handle and reaches 10 cm to the side; the cube's edge is 4 cm. Metres.
HANDLE = 0.2
POCKET = (0.125, 0.06, 0.0)  # the centre of a cube that the hook holds
REACH, HOOKED = 0.025, 0.04  # from the tool centre point to the handle's axis; from the cube to the pocket
BASE, NEAR = (-0.615, 0.0, 0.0), 0.6  # of the robot; success is a cube nearer than this to it, horizontally
GRIP = 0.025  # from the tail, where the expert holds it: every centimetre counts where the cube is far
ASIDE = 0.15  # of the cube beside the handle, when the hook passes it
VERTICAL_REACH, HAND = 0.75, 0.21  # from the base, with the hand vertical; from the wrist to the tool centre point


def pull(arm: experts.Controller) -> Iterator[experts.Target]:
  """Take the handle by its tail, slide the hook past the cube and behind it, and draw the tool back.

  The tool stays on the table: lifted by its tail, it would sink in the fingers.
  """
  away = arm.goal[:2] - BASE[:2]
  yaw = np.clip(np.arctan2(away[1], away[0]) - 0.2, -0.5, 0.0)  # points the hook inward, and keeps the hand near
  turned = experts.from_rotation_vector(np.array([0.0, 0.0, yaw]))
  farthest = max(np.linalg.norm(away - turned[:2, :2] @ [POCKET[0] - 0.02 - GRIP, y]) for y in (ASIDE, POCKET[1]))
  pitch = np.arcsin(np.clip((farthest - VERTICAL_REACH) / HAND, 0.0, 0.5))
  hand = experts.about_y(-pitch) @ arm.down_along_y()
  tail = lambda: arm.thing + [GRIP, 0, 0]
  yield from arm.goto(lambda: tail() + [0, 0, 0.07], hand, OPEN, within=0.03, turn=0.25)
  yield from arm.goto(tail, hand, OPEN, within=0.01)
  yield from arm.grasp(tail(), hand)
  height = arm.tool[2] + 0.002
  while True:
    cube = arm.thing_rotation.T @ (arm.goal - arm.thing)
    step = arm.thing_rotation @ [*next_step(*cube[:2]), 0]
    yield experts.Target(np.array([*(arm.tool + step)[:2], height]), turned @ hand, CLOSED)


def next_step(x: float, y: float) -> tuple[float, float]:
  """Where the tool goes, in its own frame, when the cube is at (x, y) in it; metres."""
  if 0.07 < x < 0.15 and 0.03 < y < 0.11:  # in the pocket
    return -0.06, 0.0
  if x < HANDLE + 0.035 and y < 0:  # on the wrong side of the handle: back
    return x - HANDLE - 0.05, 0.0
  if x < 0.12:  # the hook is beyond it
    return x - 0.11, y - POCKET[1]
  if y > ASIDE - 0.015:  # free to pass
    return x - 0.105, y - ASIDE
  return 0.0, y - ASIDE - 0.01


HANDLE_AXIS = rules.on_axis(HANDLE / 2, middle=rules.attached((HANDLE / 2, 0, 0)))
TO_HANDLE = rules.between(rules.tool, HANDLE_AXIS)
TOUCHING = rules.any_of(rules.near(rules.tool, HANDLE_AXIS, REACH), rules.grasped)
TO_POCKET = rules.between(rules.goal, rules.attached(POCKET))
TOO_FAR = rules.beyond(rules.between(rules.goal, rules.fixed(BASE), axes="xy"), NEAR)

PULL_CUBE_TOOL = Task(
  name="pull_cube_tool",
  env_id="PullCubeTool-v1",
  instruction="pull the cube with the hook",
  colour="red blue",  # and the cube's
  phrasings=("move the block toward the robot with the hook", "hook the cube and pull it to the robot",
             "grasp the hook and pull the block with it"),
  stages=(
    Stage("Reach", rules.any_of(TOUCHING, rules.succeeded), TO_HANDLE, scale=0.2),
    Stage("Grasp", rules.any_of(rules.grasped, rules.succeeded), TO_HANDLE, scale=0.05),
    Stage("Hook", rules.any_of(rules.within(TO_POCKET, HOOKED), rules.succeeded), TO_POCKET, scale=0.2),
    Stage("Pull", rules.succeeded, TOO_FAR, scale=0.2),
  ),
  actors=Actors(object="l_shape_tool", goal="cube"),
  expert=experts.scripted(pull),
  # From the side, with the pocket in front: the hand hides the cube from the front.
  camera=Camera(eye=(0.35, 0.75, 0.8), target=(-0.02, -0.13, 0.0), fov=0.58),
  horizon=100,
)
