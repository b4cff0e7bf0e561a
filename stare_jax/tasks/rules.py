"""The words in which tasks describe their stages: points, distances and rules on signals. numpy only.

Every word is a function of (signals now, signals at reset). Leading axes are arbitrary and broadcast, so the same rule
reads one state, N environments online ([N] and [N]) or a whole trajectory offline ([T+1] and [1]).

  Point      float32[..., 3], metres, world frame: tool, thing, goal, shifted(...), attached(...), behind(...),
             on_axis(...), fixed(...)
  Distance   float32[...], >= 0, metres or radians:  between(...), off_line(...), missing_height(...), speed,
             missing_speed(...), tilt, plus(...), beyond(...)
  Rule       bool[...]:  near, in_contact, grasped, lifted, at_goal, upright, released, static, succeeded;
             joined by any_of, all_of

`thing` is the object that the task moves; `tool` is the point between the fingertips.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from stare_jax.episode import Signals

Point = Callable[[Signals, Signals], np.ndarray]
Distance = Callable[[Signals, Signals], np.ndarray]
Rule = Callable[[Signals, Signals], np.ndarray]

AXES = {"xyz": 3, "xy": 2}  # the leading coordinates that count


# ---- points


def tool(now: Signals, start: Signals) -> np.ndarray:
  """The tool centre point, between the fingertips."""
  return now["tcp_pose"][..., :3]


def thing(now: Signals, start: Signals) -> np.ndarray:
  """The centre of the object that the task moves."""
  return now["object_pose"][..., :3]


def goal(now: Signals, start: Signals) -> np.ndarray:
  """The goal site, or the centre of the object to stack or place on."""
  return now["goal_pose"][..., :3]


def shifted(point: Point, by: tuple[float, float, float]) -> Point:
  """`point` moved by `by` metres along the world axes."""
  offset = np.asarray(by, np.float32)
  return lambda now, start: point(now, start) + offset


def attached(at: tuple[float, float, float]) -> Point:
  """The point of the object that is at `at`, metres, in its own frame."""

  def point(now: Signals, start: Signals) -> np.ndarray:
    axes = (_axis(now["object_pose"][..., 3:], axis) * np.float32(by) for axis, by in enumerate(at))
    return thing(now, start) + sum(axes)

  return point


def fixed(at: tuple[float, float, float]) -> Point:
  """A point of the world that never moves, such as the robot's base."""
  where = np.asarray(at, np.float32)
  return lambda now, start: np.broadcast_to(where, thing(now, start).shape)


def behind(gap: float) -> Point:
  """The point `gap` metres behind the object as seen from the goal, at the object's height."""

  def point(now: Signals, start: Signals) -> np.ndarray:
    return thing(now, start) - np.float32(gap) * _to_goal(now, start)

  return point


def on_axis(half_length: float, axis: int = 0, middle: Point = thing) -> Point:
  """The point nearest to the tool on the object's own axis through `middle`, at most `half_length` metres from it."""

  def closest(now: Signals, start: Signals) -> np.ndarray:
    direction = _axis(now["object_pose"][..., 3:], axis)
    centre = middle(now, start)
    along = np.sum((tool(now, start) - centre) * direction, axis=-1, keepdims=True)
    return centre + np.clip(along, -half_length, half_length) * direction

  return closest


# ---- distances


def between(a: Point, b: Point, axes: str = "xyz") -> Distance:
  """Metres between two points; `axes="xy"` measures horizontally."""
  if axes not in AXES:
    raise ValueError(f"between: axes is {axes!r}, expected one of {list(AXES)}")
  count = AXES[axes]
  return lambda now, start: _length(a(now, start)[..., :count] - b(now, start)[..., :count])


def off_line(point: Point, axis: int = 0) -> Distance:
  """Metres from a point to the line through the goal along the goal's own axis."""

  def distance(now: Signals, start: Signals) -> np.ndarray:
    direction = _axis(now["goal_pose"][..., 3:], axis)
    away = point(now, start) - goal(now, start)
    return _length(away - np.sum(away * direction, axis=-1, keepdims=True) * direction)

  return distance


def height(now: Signals, start: Signals) -> np.ndarray:
  """Metres that the object is above its place at reset; negative below it."""
  return now["object_pose"][..., 2] - start["object_pose"][..., 2]


def missing_height(goal_height: float) -> Distance:
  """Metres that the object still has to rise to be `goal_height` above its place at reset."""
  return lambda now, start: np.clip(np.float32(goal_height) - height(now, start), 0, None)


def speed(now: Signals, start: Signals) -> np.ndarray:
  """Speed of the object in m/s: as a distance, the metres that it covers in one second."""
  return _length(now["object_velocity"][..., :3])


def missing_speed(wanted: float) -> Distance:
  """What the object's speed toward the goal, horizontally, lacks of `wanted` m/s: metres in one second."""
  approach = lambda now, start: np.sum(now["object_velocity"][..., :3] * _to_goal(now, start), axis=-1)
  return lambda now, start: np.clip(np.float32(wanted) - approach(now, start), 0, None)


def tilt(axis: int = 0) -> Distance:
  """Radians in [0, pi/2] between the object's own axis and the vertical; either end may be up."""

  def angle(now: Signals, start: Signals) -> np.ndarray:
    direction = _axis(now["object_pose"][..., 3:], axis)
    # atan2 and not arccos of z: arccos loses half of float32's digits near upright, where the threshold is.
    return np.arctan2(_length(direction[..., :2]), np.abs(direction[..., 2]))

  return angle


def plus(*distances: Distance) -> Distance:
  """The sum of several distances."""
  return lambda now, start: functools.reduce(np.add, (distance(now, start) for distance in distances))


def beyond(distance: Distance, limit: float) -> Distance:
  """By how much a distance exceeds `limit`."""
  return lambda now, start: np.clip(distance(now, start) - np.float32(limit), 0, None)


# ---- rules


def near(a: Point, b: Point, within: float, axes: str = "xyz") -> Rule:
  """The two points are at most `within` metres apart."""
  distance = between(a, b, axes)
  return lambda now, start: distance(now, start) <= within


def within(distance: Distance, limit: float) -> Rule:
  """The distance is at most `limit` metres or radians."""
  return lambda now, start: distance(now, start) <= limit


def at_goal(within: float, target: Point = goal, axes: str = "xyz") -> Rule:
  """The object is at most `within` metres from its goal."""
  return near(thing, target, within, axes)


def in_contact(force: float = 0.3) -> Rule:
  """A finger presses on the object with more than `force` newtons."""
  return lambda now, start: np.max(now["finger_force"], axis=-1) > force


def grasped(now: Signals, start: Signals) -> np.ndarray:
  """Both fingers hold the object between them (the simulator's own test)."""
  return now["grasped"] > 0.5


def released(now: Signals, start: Signals) -> np.ndarray:
  """The fingers do not hold the object."""
  return ~grasped(now, start)


def lifted(by: float) -> Rule:
  """The object is at least `by` metres above its place at reset."""
  return lambda now, start: height(now, start) >= by


def upright(within: float, axis: int = 0) -> Rule:
  """The object's own axis is at most `within` radians from the vertical."""
  angle = tilt(axis)
  return lambda now, start: angle(now, start) <= within


def static(below: float = 0.02) -> Rule:
  """The object moves slower than `below` m/s."""
  return lambda now, start: speed(now, start) < below


def succeeded(now: Signals, start: Signals) -> np.ndarray:
  """The simulator's own success test."""
  return now["success"] > 0.5


def any_of(*rules: Rule) -> Rule:
  """At least one rule holds."""
  return lambda now, start: np.logical_or.reduce(_evaluate(rules, now, start))


def all_of(*rules: Rule) -> Rule:
  """Every rule holds."""
  return lambda now, start: np.logical_and.reduce(_evaluate(rules, now, start))


def _evaluate(rules: tuple[Rule, ...], now: Signals, start: Signals) -> tuple[np.ndarray, ...]:
  return np.broadcast_arrays(*(rule(now, start) for rule in rules))


def _to_goal(now: Signals, start: Signals) -> np.ndarray:
  """float32[..., 3], the horizontal unit vector from the object to the goal; zeros where it is over the goal."""
  way = (goal(now, start) - thing(now, start)) * np.array([1, 1, 0], np.float32)
  return way / np.maximum(_length(way), np.float32(1e-6))[..., None]


def _length(vector: np.ndarray) -> np.ndarray:
  """Euclidean norm over the last axis; several times faster there than np.linalg.norm."""
  return np.sqrt(np.einsum("...i,...i->...", vector, vector))


# The columns of the rotation matrix of a unit quaternion wxyz: the body's axes in the world frame.
_COLUMNS = (
  lambda w, x, y, z: (1 - 2 * (y * y + z * z), 2 * (x * y + w * z), 2 * (x * z - w * y)),
  lambda w, x, y, z: (2 * (x * y - w * z), 1 - 2 * (x * x + z * z), 2 * (y * z + w * x)),
  lambda w, x, y, z: (2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)),
)


def _axis(quaternion: np.ndarray, axis: int) -> np.ndarray:
  """float32[..., 3], the unit vector along body axis 0, 1 or 2 for a quaternion [..., 4]."""
  return np.stack(_COLUMNS[axis](*np.moveaxis(quaternion, -1, 0)), axis=-1)
