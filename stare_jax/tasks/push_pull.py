"""PushCube and PullCube: slide a cube 20 cm along x into a goal region, away from the robot or toward it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Region, Stage, Task, experts, rules

REACH = 0.03  # metres from the contact point at which Reach ends
FINGERS = 0.055  # metres from the cube's centre to the closed fingers' before they touch it
HEIGHT = 0.03  # metres of the tool over the table while it slides: at 0.01 the fingertips press on it, and stick
LOW = 0.05  # metres; below this the fingers meet the cube


def push(arm: experts.Controller) -> Iterator[experts.Target]:
  """Come down behind the cube with closed fingers and drive it forward."""
  return _slide(arm, side=-1, above=0.07)


def pull(arm: experts.Controller) -> Iterator[experts.Target]:
  """Come down beyond the cube with closed fingers and drag it back."""
  return _slide(arm, side=1, above=0.09)


def _slide(arm: experts.Controller, side: int, above: float) -> Iterator[experts.Target]:
  """`side` is where the fingers are, seen from the cube: -1 nearer to the robot, +1 beyond it; `above` is a height.

  The target follows from where tool and cube are now, never from what was done before: a policy that sees one image
  can learn nothing else. The hand is vertical to within a few degrees from the start and a cube does not mind, so it
  is never turned: three action dimensions carry the task.
  """
  end = arm.goal[0] + side * 0.02  # the goal does not move, and the region is much wider than this
  while True:
    x, y = arm.thing[:2]
    forward, aside = side * (arm.tool[0] - x), abs(arm.tool[1] - y)
    low = arm.tool[2] < LOW
    if low and forward > 0.03 and aside < 0.02:  # slide
      ahead = arm.tool[0] - side * 0.05
      target = (min(ahead, end) if side < 0 else max(ahead, end), y, HEIGHT)
    elif forward > 0.04 and (low or (forward < 0.09 and aside < 0.02)):  # beside its place on the table, or over it
      target = (x + side * FINGERS, y, HEIGHT)
    elif low:  # the cube is in the way
      target = (arm.tool[0], arm.tool[1], above)
    else:
      target = (x + side * (FINGERS + 0.01), y, above)
    yield experts.Target(np.array(target), None, experts.CLOSED)


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
  colour="blue",
  region=Region((-0.1, -0.1), (0.1, 0.1), (-0.13, -0.16), (0.1, 0.16), along=("goal_region",)),
  phrasings=("move the block forward to the target", "slide the cube ahead to the goal", "poke the block to the ring"),
)

PULL_CUBE = Task(
  name="pull_cube",
  env_id="PullCube-v1",
  instruction="pull the cube to the goal",
  stages=_stages("Pull", side=1),
  actors=Actors(object="obj", goal="goal_region"),
  expert=experts.scripted(pull),
  camera=Camera(eye=(0.30, 0.42, 0.45), target=(-0.08, 0.0, 0.05), fov=0.75),  # from the side: the hand hides little
  colour="blue",
  region=Region((-0.1, -0.1), (0.1, 0.1), (-0.1, -0.15), (0.13, 0.15), along=("goal_region",)),
  phrasings=("move the block to the target", "slide the cube toward the robot", "move the block to the ring"),
)
