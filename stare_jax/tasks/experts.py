"""What the scripted experts share: turning "put the tool there" into actions, from signals alone. numpy only.

An expert is a plan: a generator over one `Controller` that yields a `Target` per control step and reads the latest
state from the controller when it is resumed. Being feedback controllers, plans also recover from their own noise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from stare_jax.episode import Signals

OPEN, CLOSED = 1.0, -1.0  # gripper action
METRES, RADIANS = 0.1, 0.1  # what one unit of action asks for
# The simulator takes the delta from the current pose, so a step realises about 45 % of it: ask for more.
GAIN = 1.3
STUCK_STEP = 0.002  # metres; less than this after asking for a real motion means that the arm is frozen


class Target(NamedTuple):
  """Where the tool should go: position float[3], rotation float[3, 3] (None: do not turn), gripper in [-1, 1]."""

  position: np.ndarray
  rotation: np.ndarray | None
  grip: float


Plan = Callable[["Controller"], Iterator[Target]]
Where = np.ndarray | Callable[[], np.ndarray]  # fixed, or looked up again at every step


class Controller:
  """Runs a plan: the Expert that a task registers.

  Actions are those of `pd_ee_delta_pose` in ManiSkill 3.0.1, float32[7] in [-1, 1]: translation in units of 0.1 m along
  the axes of the robot's base; rotation as XYZ Euler angles, left-multiplied, in units of *minus* 0.1 rad (the
  simulator scales by its lower limit); gripper +1 open, -1 closed. `base` is the rotation of that base in the world.
  """

  def __init__(self, plan: Plan, rng: np.random.Generator, noise: float = 0.0, base: np.ndarray | None = None):
    if noise < 0:
      raise ValueError(f"expert: noise is {noise}, expected a standard deviation >= 0")
    self._rng, self._noise = rng, noise
    self._base = np.eye(3) if base is None else base
    self._plan = plan(self)
    self._target: Target | None = None
    self._before: np.ndarray | None = None  # tool position one step ago
    self._stride = 1.0
    self.now: Signals = {}

  def act(self, signals: Signals) -> np.ndarray:
    """Unbatched signals -> float32[7] in [-1, 1]; after the end of the plan it holds the last target."""
    if np.ndim(signals["success"]) != 0:
      raise ValueError(f"expert: signals have leading shape {np.shape(signals['success'])}; pass one environment's")
    self.now = signals
    target = next(self._plan, self._target)
    if target is None:
      raise ValueError("expert: its plan ended before its first target; a plan yields at least one")
    self._target = target
    return self._toward(target)

  def _toward(self, target: Target) -> np.ndarray:
    position = self.tool
    move = self._base.T @ (target.position - position) / METRES * GAIN
    length: Any = np.linalg.norm(move)
    # Inverse kinematics that finds no solution leaves the arm where it is. Asked to move and did not: ask for less.
    frozen = self._before is not None and length > 0.15 and np.linalg.norm(position - self._before) < STUCK_STEP
    self._stride = max(0.15, 0.6 * self._stride) if frozen else min(1.0, 1.3 * self._stride)
    self._before = position
    move *= self._stride / max(length, 1.0)
    turn = self._base.T @ self._turn_to(target.rotation) * GAIN
    angle: Any = np.linalg.norm(turn)
    turn *= RADIANS / max(angle, RADIANS)
    action = np.concatenate([move, -euler_xyz(from_rotation_vector(turn)) / RADIANS, [target.grip]])
    if self._noise:
      action[:6] += self._noise * self._rng.standard_normal(6)
    return np.clip(action, -1, 1).astype(np.float32)

  # ---- what a plan sees

  @property
  def tool(self) -> np.ndarray:
    return np.asarray(self.now["tcp_pose"][:3], np.float64)

  @property
  def tool_rotation(self) -> np.ndarray:
    return rotation_matrix(self.now["tcp_pose"][3:])

  @property
  def thing(self) -> np.ndarray:
    return np.asarray(self.now["object_pose"][:3], np.float64)

  @property
  def thing_rotation(self) -> np.ndarray:
    return rotation_matrix(self.now["object_pose"][3:])

  @property
  def goal(self) -> np.ndarray:
    return np.asarray(self.now["goal_pose"][:3], np.float64)

  @property
  def goal_rotation(self) -> np.ndarray:
    return rotation_matrix(self.now["goal_pose"][3:])

  @property
  def grip_offset(self) -> np.ndarray:
    """From the object to the tool that holds it."""
    return self.tool - self.thing

  def _turn_to(self, rotation: np.ndarray | None) -> np.ndarray:
    return np.zeros(3) if rotation is None else rotation_vector(rotation @ self.tool_rotation.T)

  def nearest(self, rotations: list[np.ndarray]) -> np.ndarray:
    """The rotation that the tool reaches with the smallest turn."""
    turns = [np.linalg.norm(rotation_vector(rotation @ self.tool_rotation.T)) for rotation in rotations]
    return rotations[int(np.argmin(turns))]

  def down_along_y(self) -> np.ndarray:
    """Hand vertical, fingers closing along the world's y axis."""
    return self.nearest([pointing_down((0, 1)), pointing_down((0, -1))])

  # ---- what a plan does

  def goto(
    self, where: Where, rotation: np.ndarray | None, grip: float,
    within: float = 0.008, turn: float = 0.06, steps: int = 60,
  ) -> Iterator[Target]:
    """Until the tool is within metres and radians of the target, or `steps` have passed."""
    look = where if callable(where) else lambda: where
    for _ in range(steps):
      position = look()
      yield Target(position, rotation, grip)
      if np.linalg.norm(self.tool - position) < within and np.linalg.norm(self._turn_to(rotation)) < turn:
        return

  def hold(self, position: np.ndarray, rotation: np.ndarray, grip: float, steps: int) -> Iterator[Target]:
    """The same target for `steps` steps."""
    for _ in range(steps):
      yield Target(position, rotation, grip)

  def grasp(self, position: np.ndarray, rotation: np.ndarray, steps: int = 8) -> Iterator[Target]:
    """Close the fingers until they hold the object: two steps at least, `steps` at most."""
    for step in range(steps):
      yield Target(position, rotation, CLOSED)
      if step >= 1 and self.now["grasped"] > 0.5:
        return


def scripted(plan: Plan, base: np.ndarray | None = None) -> Callable[[np.random.Generator, float], Controller]:
  """A plan as the `expert` of a task; `base` as in `Controller`."""

  def expert(rng: np.random.Generator, noise: float = 0.0) -> Controller:
    return Controller(plan, rng, noise, base)

  return expert


# ---- rotations


def pointing_down(closing: tuple[float, float] | np.ndarray) -> np.ndarray:
  """Tool rotation with the hand vertical and the fingers closing along `closing` (x, y); columns are its axes."""
  approach = np.array([0.0, 0.0, -1.0])
  across = np.array([closing[0], closing[1], 0.0]) / np.linalg.norm(closing)
  return np.stack([np.cross(across, approach), across, approach], axis=1)


def rotation_matrix(quaternion: np.ndarray) -> np.ndarray:
  """float64[3, 3] of a quaternion wxyz, normalised here."""
  w, x, y, z = np.asarray(quaternion, np.float64) / np.linalg.norm(quaternion)
  return np.array(
    [
      [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
      [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
      [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
  )


def about_y(angle: float) -> np.ndarray:
  """Rotation by `angle` radians about the world's y axis."""
  return from_rotation_vector(np.array([0.0, angle, 0.0]))


def rotation_vector(rotation: np.ndarray) -> np.ndarray:
  """Axis times angle, float64[3]; at half a turn the axis comes from the symmetric part."""
  skew = np.array([rotation[2, 1] - rotation[1, 2], rotation[0, 2] - rotation[2, 0], rotation[1, 0] - rotation[0, 1]])
  angle = np.arctan2(np.linalg.norm(skew) / 2, (np.trace(rotation) - 1) / 2)
  if angle < 1e-6:
    return skew / 2
  if np.pi - angle < 1e-3:
    square = (rotation + np.eye(3)) / 2
    longest = int(np.argmax(np.diag(square)))
    return angle * square[:, longest] / np.sqrt(square[longest, longest])
  return skew * angle / (2 * np.sin(angle))


def from_rotation_vector(vector: np.ndarray) -> np.ndarray:
  """The rotation matrix of axis times angle (Rodrigues)."""
  angle = np.linalg.norm(vector)
  if angle < 1e-9:
    return np.eye(3)
  x, y, z = vector / angle
  cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
  return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def euler_xyz(rotation: np.ndarray) -> np.ndarray:
  """(a, b, c) with rotation = Rx(a) Ry(b) Rz(c), the convention of the simulator's controller."""
  return np.array(
    [
      np.arctan2(-rotation[1, 2], rotation[2, 2]),
      np.arcsin(np.clip(rotation[0, 2], -1, 1)),
      np.arctan2(-rotation[0, 1], rotation[0, 0]),
    ]
  )
