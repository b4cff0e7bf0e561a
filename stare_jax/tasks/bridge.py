"""The four SimplerEnv scenes of ManiSkill3 (WidowX, Bridge data set): Reach -> Grasp -> Transport -> Place.

Actions are the Bridge data set's: metres and XYZ Euler angles in the robot's base frame, added to where the controller
is heading, and the gripper, +1 open, -1 closed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from stare_jax.tasks import Actors, Region, Stage, Substitute, Task, experts, rules
from stare_jax.tasks.experts import CLOSED, OPEN

REACH = 0.03  # d_reach, metres from the tool to the object's centre
LIFT = 0.02  # h_lift, metres above the place at reset
STEP, TURN = 0.035, 0.25  # the expert's longest step: metres, radians
# Share of the way to its target that the arm covers in one control step of 0.2 s, measured on every axis.
FOLLOWED = 0.6
BASE = np.diag([-1.0, -1.0, 1.0])  # rotation of the robot's base in the world: half a turn about the vertical


class WidowX(experts.Controller):
  """Runs a plan on `arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos`.

  The simulator adds an action to its own target, which the arm follows with a delay and no signal shows. It is
  estimated from the last two tool poses: the arm covers FOLLOWED of the way per step.
  """

  def __init__(self, plan: experts.Plan, rng: np.random.Generator, noise: float = 0.0):
    super().__init__(plan, rng, noise)
    self._last: tuple[np.ndarray, np.ndarray] | None = None  # tool position and rotation one step ago

  def _toward(self, target: experts.Target) -> np.ndarray:
    position, rotation = self.tool, self.tool_rotation
    heading, facing = position, rotation
    if self._last is not None:
      before, turned = self._last
      heading = before + (position - before) / FOLLOWED
      facing = experts.from_rotation_vector(experts.rotation_vector(rotation @ turned.T) / FOLLOWED) @ turned
    self._last = position, rotation
    move = _within(BASE.T @ (target.position - heading), STEP)
    turn = np.zeros(3)
    if target.rotation is not None:
      turn = _within(BASE.T @ experts.rotation_vector(target.rotation @ facing.T), TURN)
    if self._noise:
      move = move + self._noise * STEP * self._rng.standard_normal(3)
      turn = turn + self._noise * TURN * self._rng.standard_normal(3)
    angles = experts.euler_xyz(experts.from_rotation_vector(turn))
    return np.concatenate([move, angles, [target.grip]]).astype(np.float32)


def _within(vector: np.ndarray, length: float) -> np.ndarray:
  """The vector, shortened to `length` where it is longer."""
  return vector * (length / max(float(np.linalg.norm(vector)), length))


def scripted(plan: experts.Plan) -> Callable[[np.random.Generator, float], WidowX]:
  """A plan as the `expert` of a task."""

  def expert(rng: np.random.Generator, noise: float = 0.0) -> WidowX:
    return WidowX(plan, rng, noise)

  return expert


def pointing_down(closing: np.ndarray) -> np.ndarray:
  """Tool rotation with the hand vertical and the fingers closing along `closing` (x, y): the tool's x and y axes."""
  approach = np.array([0.0, 0.0, -1.0])
  across = np.array([closing[0], closing[1], 0.0]) / np.linalg.norm(closing[:2])
  return np.stack([approach, across, np.cross(approach, across)], axis=1)


def across(arm: experts.Controller, square: bool) -> np.ndarray:
  """The nearest vertical grip that closes across the object's long (x) axis; `square`: along it will do, too."""
  along = arm.thing_rotation[:2, 0]
  side = np.array([-along[1], along[0]])
  return arm.nearest([pointing_down(sign * way) for way in ([side, along] if square else [side]) for sign in (1, -1)])


def pick_and_place(
  *, lower: float = 0.0, along: float = 0.0, lift: float = 0.08, above: float, square: bool = False
) -> experts.Plan:
  """Grasp the object, lift it, carry it over the target, let go `above` metres over the target's centre, retreat.

  Args:
    lower, along: metres from the object's centre to where it is held, down and along its own x axis.
    lift: metres that it is raised before it is carried.
    above: height of the object's centre over the target's at which it is released, metres.
    square: see `across`.
  """

  def plan(arm: experts.Controller) -> Iterator[experts.Target]:
    grip = across(arm, square)
    hold_at = lambda: arm.thing + along * arm.thing_rotation[:, 0] * [1, 1, 0] - [0, 0, lower]
    yield from arm.goto(lambda: hold_at() + [0, 0, 0.06], grip, OPEN, within=0.012, turn=0.12, steps=30)
    yield from arm.goto(hold_at(), grip, OPEN, within=0.006, turn=0.12, steps=8)
    yield from arm.grasp(hold_at(), grip, steps=4)
    here = arm.tool
    carried = here[2] + lift
    yield from arm.goto(np.array([*here[:2], carried]), grip, CLOSED, within=0.02, steps=30)
    over = lambda: np.array([*(arm.goal + arm.grip_offset)[:2], carried])
    yield from arm.goto(over, grip, CLOSED, within=0.012, turn=0.12, steps=30)
    place = arm.goal + arm.grip_offset + [0, 0, above]
    yield from arm.goto(place, grip, CLOSED, within=0.006, turn=0.12, steps=8)
    yield from arm.hold(place, grip, OPEN, steps=2)
    yield experts.Target(place + [0, 0, 0.07], grip, OPEN)

  return plan


def _stages(rest: float, d_goal: float) -> tuple[Stage, ...]:
  """`rest`: height of the object's centre over the target's when it lies there; within `d_goal` of that it arrived."""
  place = rules.shifted(rules.goal, (0, 0, rest))
  arrived = rules.at_goal(d_goal, place, axes="xy")
  touching = rules.any_of(rules.near(rules.tool, rules.thing, REACH), rules.grasped)
  held = rules.all_of(rules.grasped, rules.any_of(rules.lifted(LIFT), arrived))
  to_thing, to_place = rules.between(rules.tool, rules.thing), rules.between(rules.thing, place)
  return (
    Stage("Reach", end=rules.any_of(touching, rules.succeeded), distance=to_thing, scale=0.1),
    Stage(
      "Grasp",
      end=rules.any_of(held, rules.succeeded),
      distance=rules.plus(to_thing, rules.missing_height(LIFT)),
      scale=0.05,
    ),
    Stage("Transport", end=rules.any_of(arrived, rules.succeeded), distance=to_place, scale=0.1),
    Stage("Place", end=rules.succeeded, distance=rules.plus(to_place, rules.speed), scale=0.05),
  )


def _task(name: str, *, env_id: str, instruction: str, stages: tuple[Stage, ...], plan: experts.Plan, starts: int,
          horizon: int = 60, jitter: tuple[float, float, float] = (0.015, 0.35, 0.015),
          **words: Any) -> Task:  # fmt: skip
  """`words`: the task's colour, region and phrasings."""
  options: dict[str, Any] = dict(scene="bridge", jitter=jitter)
  return Task(
    name=name, env_id=env_id, instruction=instruction, stages=stages, actors=Actors(object="source", goal="target"),
    expert=scripted(plan), camera=None, horizon=horizon, control_hz=5, starts=starts, unit=STEP, env_options=options,
    **words,
  )  # fmt: skip


# The published starts of the table, which displaced ones leave by 1.5 cm; and further out on the photograph's table.
TABLE = Region((-0.25, -0.09), (-0.07, 0.09), (-0.28, -0.13), (-0.04, 0.13))
BLOCKS = Region((-0.275, -0.115), (-0.045, 0.115), (-0.30, -0.14), (-0.02, 0.14))  # of the wider of its two squares

PUT_CARROT_ON_PLATE = _task(
  "put_carrot_on_plate",
  env_id="PutCarrotOnPlateInScene-v1",
  instruction="put carrot on plate",
  stages=_stages(rest=0.024, d_goal=0.03),
  plan=pick_and_place(lower=0.004, above=0.022),
  starts=24,
  colour="orange",
  region=TABLE,
  phrasings=("place the carrot onto the plate", "pick up the carrot and put it on the plate", "move carrot to plate"),
  substitute=Substitute("eggplant", "put eggplant on plate"),
)

PUT_SPOON_ON_TOWEL = _task(
  "put_spoon_on_towel",
  env_id="PutSpoonOnTableClothInScene-v1",
  instruction="put the spoon on the towel",
  stages=_stages(rest=0.014, d_goal=0.03),
  plan=pick_and_place(along=0.01, above=0.018),
  starts=24,
  colour="green yellow",  # between the two
  region=TABLE,
  phrasings=("place the spoon on top of the cloth", "pick up the spoon and put it on the towel", "move spoon to cloth"),
)

STACK_GREEN_ON_YELLOW = _task(
  "stack_green_on_yellow",
  env_id="StackGreenCubeOnYellowCubeBakedTexInScene-v1",
  instruction="stack the green block on the yellow block",
  stages=_stages(rest=0.03, d_goal=0.02),
  plan=pick_and_place(lower=0.002, above=0.033, square=True),
  starts=24,
  colour="green",
  region=BLOCKS,
  phrasings=("put the green cube on top of the yellow cube", "place the green cube onto the yellow cube",
             "lift the green block onto the yellow block"),
)

PUT_EGGPLANT_IN_BASKET = _task(
  "put_eggplant_in_basket",
  env_id="PutEggplantInBasketScene-v1",
  instruction="put eggplant into yellow basket",
  stages=_stages(rest=0.017, d_goal=0.04),
  plan=pick_and_place(lift=0.12, above=0.06),
  starts=64,
  horizon=120,
  jitter=(0.01, 0.35, 0.0),  # the basket does not move
  colour="purple",  # and no region: between the sink's walls there is no room
  phrasings=("place the eggplant in the yellow basket", "move eggplant into the basket",
             "pick up the eggplant and put it in the basket"),
)
