"""PickCube, StackCube and PlaceSphere: Reach -> Grasp -> Transport -> Place."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import PANDA, Actors, Camera, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED, OPEN

REACH = 0.03  # d_reach, metres from the tool to the object's centre
LIFT = 0.02  # h_lift, metres above the place at reset
BASE = np.array([-0.615, 0.0])  # of the robot, metres
VERTICAL_REACH, HAND = 0.75, 0.21  # metres: from the base, with the hand vertical; from the wrist to the tool
CUBE = 0.04  # edge of a cube, metres
ON_BIN = 0.0225  # height of the sphere's centre above the bin's when it lies in it, metres


def pick_cube(arm: experts.Controller) -> Iterator[experts.Target]:
  """Grasp the cube along a pair of its faces and bring it to the goal point."""
  grip = across_faces(arm)
  yield from pick(arm, grip)
  while True:
    yield experts.Target(arm.goal + arm.grip_offset, grip, CLOSED)


def stack_cube(arm: experts.Controller) -> Iterator[experts.Target]:
  """Grasp one cube, carry it over the other, set it down and let go."""
  grip = reaching_out(arm, across_faces(arm, avoid=arm.goal))
  yield from pick(arm, grip, lower=0.005)
  carried = arm.grip_offset
  yield from arm.goto(np.array([*arm.tool[:2], 0.10]), grip, CLOSED, within=0.04)
  yield from arm.goto(lambda: arm.goal + carried + [0, 0, CUBE + 0.03], grip, CLOSED, within=0.01)
  yield from place(arm, grip, above=CUBE + 0.001)


def place_sphere(arm: experts.Controller) -> Iterator[experts.Target]:
  """Grasp the sphere, carry it over the bin, set it down and let go."""
  grip = arm.down_along_y()
  yield from pick(arm, grip, above=0.07, within=0.008)
  yield from arm.goto(np.array([*arm.tool[:2], 0.09]), grip, CLOSED, within=0.03)
  yield from arm.goto(lambda: arm.goal + arm.grip_offset + [0, 0, 0.06], grip, CLOSED, within=0.01)
  yield from place(arm, grip, above=ON_BIN + 0.004)


def across_faces(arm: experts.Controller, avoid: np.ndarray | None = None) -> np.ndarray:
  """The nearest vertical grip that closes on two opposite faces of the cube.

  A neighbour at `avoid` closer than a finger is wide leaves only the faces that look past it.
  """
  faces = [arm.thing_rotation[:, 0], arm.thing_rotation[:, 1]]
  if avoid is not None:
    away = (avoid - arm.thing)[:2]
    if np.linalg.norm(away) < 0.085:
      faces = [min(faces, key=lambda face: abs(face[:2] @ away))]
  return arm.nearest([experts.pointing_down(sign * face) for face in faces for sign in (1, -1)])


def reaching_out(arm: experts.Controller, grip: np.ndarray) -> np.ndarray:
  """`grip` with the hand pitched outward, about its closing axis, as far as the object or its goal demands.

  A vertical hand reaches about VERTICAL_REACH from the base; pitching brings the wrist back. Turning about the
  closing axis leaves the fingers parallel to the faces they hold.
  """
  away = max(arm.thing[:2] - BASE, arm.goal[:2] - BASE, key=np.linalg.norm)
  distance = np.linalg.norm(away)
  pitch = np.arcsin(np.clip((distance - VERTICAL_REACH) / HAND, 0.0, 0.5))
  forward = np.sign(grip[:2, 0] @ away)  # the tool's x axis is where the approach turns to
  return experts.from_rotation_vector(forward * pitch * grip[:, 1]) @ grip


def pick(
  arm: experts.Controller, grip: np.ndarray, above: float = 0.08, lower: float = 0.0, within: float = 0.01
) -> Iterator[experts.Target]:
  """Come down on the object from `above` metres and close the fingers `lower` metres above its centre."""
  yield from arm.goto(lambda: arm.thing + [0, 0, above], grip, OPEN, within=0.03, turn=0.25)
  yield from arm.goto(lambda: arm.thing + [0, 0, lower], grip, OPEN, within=within)
  yield from arm.grasp(arm.thing + [0, 0, lower], grip)


def place(arm: experts.Controller, grip: np.ndarray, above: float) -> Iterator[experts.Target]:
  """Lower what is held until it is `above` metres over the goal, let go and retreat upward."""
  yield from arm.goto(lambda: arm.goal + arm.grip_offset + [0, 0, above], grip, CLOSED, within=0.004, steps=12)
  here = arm.tool
  yield from arm.hold(here, grip, OPEN, steps=3)
  yield from arm.hold(here + [0, 0, 0.08], grip, OPEN, steps=1)


def _stages(target: rules.Point, d_goal: float, axes: str) -> tuple[Stage, ...]:
  """`target` is where the object's centre belongs; it has arrived when it is within `d_goal` of it along `axes`."""
  arrived = rules.at_goal(d_goal, target, axes)
  # A goal can be lower than LIFT: there the object that is held and has arrived was grasped, too.
  held = rules.all_of(rules.grasped, rules.any_of(rules.lifted(LIFT), arrived))
  touching = rules.any_of(rules.near(rules.tool, rules.thing, REACH), rules.grasped)
  to_thing, to_target = rules.between(rules.tool, rules.thing), rules.between(rules.thing, target)
  return (
    Stage("Reach", end=rules.any_of(touching, rules.succeeded), distance=to_thing, scale=0.2),
    Stage(
      "Grasp",
      end=rules.any_of(held, rules.succeeded),
      distance=rules.plus(to_thing, rules.missing_height(LIFT)),
      scale=0.05,
    ),
    Stage("Transport", end=rules.any_of(arrived, rules.succeeded), distance=to_target, scale=0.2),
    Stage("Place", end=rules.succeeded, distance=rules.plus(to_target, rules.speed), scale=0.1),
  )


PICK_CUBE = Task(
  name="pick_cube",
  env_id="PickCube-v1",
  instruction="pick up the cube and move it to the goal",
  stages=_stages(rules.goal, d_goal=0.05, axes="xyz"),  # the goal floats in the air
  actors=Actors(object="cube", goal="goal_site"),
  expert=experts.scripted(pick_cube),
  camera=Camera(eye=(0.65, 0.0, 0.83), target=(-0.13, 0.0, 0.05), fov=0.5),
  env_options={**PANDA, "show_goal": True},
)

STACK_CUBE = Task(
  name="stack_cube",
  env_id="StackCube-v1",
  instruction="stack the red cube on the green cube",
  stages=_stages(rules.shifted(rules.goal, (0, 0, CUBE)), d_goal=0.035, axes="xy"),
  actors=Actors(object="cubeA", goal="cubeB"),
  expert=experts.scripted(stack_cube),
  camera=Camera(eye=(0.81, 0.0, 0.83), target=(0.03, 0.0, 0.05), fov=0.69),
)

PLACE_SPHERE = Task(
  name="place_sphere",
  env_id="PlaceSphere-v1",
  instruction="place the sphere in the bin",
  stages=_stages(rules.shifted(rules.goal, (0, 0, ON_BIN)), d_goal=0.03, axes="xy"),
  actors=Actors(object="obj", goal="bin"),
  expert=experts.scripted(place_sphere),
  camera=Camera(eye=(0.76, 0.0, 0.83), target=(-0.02, 0.0, 0.05), fov=0.36),
)
