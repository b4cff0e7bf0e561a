"""PullCubeTool: hook a cube that lies far away with an L-shaped tool and pull it in. Reach -> Grasp -> Hook -> Pull."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED, OPEN

# The tool lies flat; its frame is at the tail end of the handle, x along the handle, y the way the hook points.
HANDLE, HALF_WIDTH = 0.2, 0.025  # of the handle, metres
GRIP = 0.025  # metres from the tail: the cube lies up to 25 cm beyond the tool, and the arm's reach ends there
POCKET = (0.125, 0.06, 0.0)  # where the centre of a cube is that the hook holds, in the tool's frame
CLEAR = 0.10  # metres that the tool is lifted to pass over the cube
BASE, NEAR = (-0.615, 0.0, 0.0), 0.6  # of the robot; success is a cube nearer than this to it, horizontally


def pull(arm: experts.Controller) -> Iterator[experts.Target]:
  """Take the handle by its tail, slide the hook past the cube, then behind it, and draw the tool back.

  The tool stays on the table: held by its tail it would sink in the fingers. Where it goes next follows from where the
  cube is in its frame.
  """
  away = arm.goal[:2] - BASE[:2]
  yaw = np.clip(np.arctan2(away[1], away[0]) - 0.2, -0.5, 0.0)
  turned = experts.from_rotation_vector(np.array([0, 0, yaw]))
  reach = max(np.linalg.norm(away + turned[:2, :2] @ [GRIP - 0.105, -side]) for side in (0.15, 0.06))
  pitch = np.arcsin(np.clip((reach - 0.75) / 0.21, 0.0, 0.5))
  grip = experts.about_y(-pitch) @ arm.down_along_y()
  tail = lambda: arm.thing + [GRIP, 0, 0]
  yield from arm.goto(lambda: tail() + [0, 0, 0.07], grip, OPEN, within=0.03, turn=0.25)
  yield from arm.goto(tail, grip, OPEN, within=0.01)
  yield from arm.grasp(tail(), grip)
  height = arm.tool[2] + 0.002
  while True:
    way = arm.thing_rotation @ [*_next(*(arm.thing_rotation.T @ (arm.goal - arm.thing))[:2]), 0]
    yield experts.Target(np.array([*(arm.tool + way)[:2], height]), turned @ grip, CLOSED)


def _next(x: float, y: float) -> tuple[float, float]:
  """Where the tool moves, in its own frame, when the cube is at (x, y) in it; metres."""
  if 0.07 < x < 0.15 and 0.03 < y < 0.11:
    return -0.06, 0.0
  if x < 0.12:
    return x - 0.11, y - 0.06
  if y > 0.135:
    return x - 0.105, y - 0.15
  if x < 0.235 and y < 0:
    return x - 0.25, 0.0
  return 0.0, y - 0.16


HANDLE_AXIS = rules.on_axis(HANDLE / 2, middle=rules.attached((HANDLE / 2, 0, 0)))
TO_HANDLE = rules.between(rules.tool, HANDLE_AXIS)
IN_POCKET = rules.near(rules.attached(POCKET), rules.goal, 0.04)

PULL_CUBE_TOOL = Task(
  name="pull_cube_tool",
  env_id="PullCubeTool-v1",
  instruction="pull the cube closer with the tool",
  stages=(
    Stage("Reach", rules.any_of(rules.near(rules.tool, HANDLE_AXIS, 0.025), rules.grasped, rules.succeeded), TO_HANDLE, scale=0.2),
    Stage("Grasp", rules.any_of(rules.grasped, rules.succeeded), TO_HANDLE, scale=0.05),
    Stage("Hook", rules.any_of(IN_POCKET, rules.succeeded), rules.between(rules.attached(POCKET), rules.goal), scale=0.2),
    Stage("Pull", rules.succeeded, rules.beyond(rules.between(rules.goal, rules.fixed(BASE), axes="xy"), NEAR), scale=0.2),
  ),
  actors=Actors(object="l_shape_tool", goal="cube"),
  expert=experts.scripted(pull),
  camera=Camera(eye=(0.81, 0.0, 0.83), target=(0.03, 0.0, 0.05), fov=0.6),
  horizon=100,
)
