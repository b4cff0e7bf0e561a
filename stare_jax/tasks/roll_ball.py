"""RollBall: roll a ball into a goal region at the far end of the table. Reach -> Launch -> Roll."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from stare_jax.tasks import Actors, Camera, Stage, Task, experts, rules
from stare_jax.tasks.experts import CLOSED

CONTACT, REACH = 0.045, 0.03  # metres: from the ball's centre to the fingers that touch it; from there, Reach ends
LAUNCHED = 0.4  # m/s toward the goal, half of what the arm gives: at less the ball is not there within an episode
BEHIND = 0.075  # metres from the ball's centre to where the fingers come down
HEIGHT, ABOVE = 0.03, 0.12  # metres of the tool over the table: while it pushes, and before it comes down
# Metres beyond where the ball lay that the fingers follow it. They hold on to it by friction, and a longer push only
# gives it a spin: after 25 cm, one ball in twenty left the line by more than the goal's radius.
FOLLOW = 0.03
ROBOT, BASE = np.array([-0.1, 1.0]), experts.from_rotation_vector(np.array([0.0, 0.0, -np.pi / 2]))  # it looks along -y
VERTICAL_REACH, HAND = 0.33, 0.21  # metres: the nearest to the base for a vertical hand; from the wrist to the tool


def roll(arm: experts.Controller) -> Iterator[experts.Target]:
  """Come down behind the ball with closed fingers, flat across the way to the goal, and give it one straight push."""
  way = (arm.goal - arm.thing) * [1, 1, 0]
  way /= np.linalg.norm(way)
  start = arm.thing - BEHIND * way
  hand = arm.nearest([experts.pointing_down((sign * way[1], -sign * way[0])) for sign in (1, -1)])
  # A hand that leans over the ball reaches nearer to the base than one that is vertical.
  lean = np.arcsin(np.clip((VERTICAL_REACH - np.linalg.norm(start[:2] - ROBOT)) / HAND, 0.0, 0.6))
  hand = experts.from_rotation_vector(lean * np.cross([0, 0, 1], way)) @ hand
  yield from arm.goto(np.array([*start[:2], ABOVE]), hand, CLOSED, within=0.03, turn=0.15)
  yield from arm.goto(np.array([*start[:2], HEIGHT]), hand, CLOSED, within=0.01, turn=0.04)
  origin = np.array([*(start + BEHIND * way)[:2], HEIGHT])
  while (along := (arm.tool - origin) @ way) < FOLLOW:
    yield experts.Target(origin + (along + 0.1) * way, hand, CLOSED)
  yield experts.Target(arm.tool, hand, CLOSED)


CONTACT_POINT = rules.behind(CONTACT)
TOUCHING = rules.any_of(rules.near(rules.tool, CONTACT_POINT, REACH), rules.in_contact())
SLOWNESS = rules.missing_speed(LAUNCHED)

ROLL_BALL = Task(
  name="roll_ball",
  env_id="RollBall-v1",
  instruction="roll the ball to the goal",
  colour="blue",
  phrasings=("push the ball to the target", "roll the sphere toward the target", "move the ball into the goal"),
  stages=(
    Stage("Reach", rules.any_of(TOUCHING, rules.succeeded), rules.between(rules.tool, CONTACT_POINT), scale=0.2),
    Stage("Launch", rules.any_of(rules.within(SLOWNESS, 0.0), rules.succeeded), SLOWNESS, scale=0.4),
    Stage("Roll", rules.succeeded, rules.between(rules.thing, rules.goal, axes="xy"), scale=0.5),
  ),
  actors=Actors(object="ball", goal="goal_region"),
  expert=experts.scripted(roll, BASE),
  camera=Camera(eye=(-0.1, -1.75, 1.1), target=(-0.1, -0.32, 0.0), fov=0.68),
  horizon=80,
)
