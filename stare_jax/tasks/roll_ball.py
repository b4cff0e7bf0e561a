"""RollBall: roll a ball into a goal region at the far end of the table. Reach -> Launch -> Roll."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED

RADIUS = 0.035
BEHIND = 0.075  # metres from the ball's centre to where the closed fingers start
HEIGHT = 0.03
ABOVE = 0.12
ROBOT = np.array([-0.1, 1.0, 0.0])
NEAREST, HAND = 0.33, 0.21
PUSH, FAR = 0.03, 0.68
BASE = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])  # the robot looks along -y


def roll(arm: experts.Controller) -> Iterator[experts.Target]:
  way = lambda: _unit((arm.goal - arm.thing) * [1, 1, 0])
  across = np.array([way()[1], -way()[0]])
  face = arm.nearest([experts.pointing_down(sign * across) for sign in (1, -1)])
  start = lambda: arm.thing - BEHIND * way()
  near = np.linalg.norm((start() - ROBOT)[:2])
  lean = np.arcsin(np.clip((NEAREST - near) / HAND, 0.0, 0.6))
  face = experts.from_rotation_vector(np.cross([0, 0, 1.0], way()) * lean) @ face
  yield from arm.goto(lambda: np.array([*start()[:2], ABOVE]), face, CLOSED, within=0.03, turn=0.15)
  yield from arm.goto(lambda: np.array([*start()[:2], HEIGHT]), face, CLOSED, within=0.012, turn=0.08)
  line, heading = arm.thing, way()
  while True:
    along = (arm.tool - line) @ heading
    if along > PUSH or np.linalg.norm((arm.tool - ROBOT)[:2]) > FAR:
      break
    yield experts.Target(np.array([*(line + (along + 0.1) * heading)[:2], HEIGHT]), face, CLOSED)
  yield from arm.hold(arm.tool, face, CLOSED, 1)


def _unit(v):
  return v / np.linalg.norm(v)


CONTACT = rules.behind(0.055)
APPROACHES = lambda now, start: rules.missing_speed(0.3)(now, start) <= 0

ROLL_BALL = Task(
  name="roll_ball",
  env_id="RollBall-v1",
  instruction="roll the ball to the goal",
  stages=(
    Stage("Reach", rules.any_of(rules.near(rules.tool, CONTACT, 0.03), rules.in_contact(), rules.succeeded), rules.between(rules.tool, CONTACT), scale=0.2),
    Stage("Launch", rules.any_of(APPROACHES, rules.succeeded), rules.missing_speed(0.3), scale=0.3),
    Stage("Roll", rules.succeeded, rules.between(rules.thing, rules.goal, axes="xy"), scale=0.5),
  ),
  actors=Actors(object="ball", goal="goal_region"),
  expert=experts.scripted(roll, BASE),
  camera=Camera(eye=(1.2, -0.1, 1.2), target=(-0.1, -0.1, 0.0), fov=0.8),
  horizon=80,
)
