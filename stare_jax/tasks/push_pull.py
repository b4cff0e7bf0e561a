"""PushCube and PullCube: slide a cube 20 cm along x into a goal region, away from the robot or toward it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Stage, Task, experts, rules

REACH = 0.03  # metres from the contact point at which Reach ends
FINGERS = 0.055  # metres from the cube's centre to the closed fingers' before they touch it


def push(arm: experts.Controller) -> Iterator[experts.Target]:
  """Come down behind the cube with closed fingers and drive it forward."""
  yield from _slide(arm, side=-1, above=0.05)


def pull(arm: experts.Controller) -> Iterator[experts.Target]:
  """Come down beyond the cube with closed fingers and drag it back."""
  yield from _slide(arm, side=1, above=0.09)


def _slide(arm: experts.Controller, side: int, above: float) -> Iterator[experts.Target]:
  """`side` is where the fingers are, seen from the cube: -1 nearer to the robot, +1 beyond it.

  The hand is vertical to within a few degrees from the start and a cube does not mind, so it is never turned: three
  action dimensions carry the task, and a policy that learns from this need not learn to correct what it cannot see.
  """
  beside = lambda: arm.thing + [side * (FINGERS + 0.01), 0, above]
  behind = lambda: np.array([arm.thing[0] + side * FINGERS, arm.thing[1], 0.018])
  yield from arm.goto(beside, None, experts.CLOSED, within=0.025)
  yield from arm.goto(behind, None, experts.CLOSED, within=0.012)
  end = arm.goal[0] + side * 0.02  # the goal does not move, and the region is much wider than this
  while True:
    ahead = arm.tool[0] - side * 0.05
    x = min(ahead, end) if side < 0 else max(ahead, end)
    yield experts.Target(np.array([x, arm.thing[1], 0.018]), None, experts.CLOSED)


def _stages(name: str, side: int) -> tuple[Stage, ...]:
  contact_point = rules.shifted(rules.thing, (side * FINGERS, 0, 0))
  return (
    Stage(
      "Reach",
      end=rules.any_of(rules.near(rules.tool, contact_point, REACH), rules.in_contact(), rules.succeeded),
      distance=rules.between(rules.tool, contact_point),
      scale=0.1,
    ),
    Stage(name, end=rules.succeeded, distance=rules.between(rules.thing, rules.goal, axes="xy"), scale=0.1),
  )


PUSH_CUBE = Task(
  name="push_cube",
  env_id="PushCube-v1",
  instruction="push the cube to the goal",
  stages=_stages("Push", side=-1),
  actors=Actors(object="obj", goal="goal_region"),
  expert=experts.scripted(push),
  camera=Camera(eye=(0.92, 0.0, 0.83), target=(0.14, 0.0, 0.05), fov=0.5),
)

PULL_CUBE = Task(
  name="pull_cube",
  env_id="PullCube-v1",
  instruction="pull the cube to the goal",
  stages=_stages("Pull", side=1),
  actors=Actors(object="obj", goal="goal_region"),
  expert=experts.scripted(pull),
  camera=Camera(eye=(0.30, 0.42, 0.45), target=(-0.08, 0.0, 0.05), fov=0.75),  # from the side: the hand hides little
)
