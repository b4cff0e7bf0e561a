"""A table-top without physics: for tests of everything around the simulator, in milliseconds and without ManiSkill.

A point gripper moves where it is told, pushes a cube that it touches, and carries it when it closes around it. The
goal lies 20 cm in front of the cube. It speaks the same signals as ManiSkill; PullCube's expert solves it.
"""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np

from stare_jax import suites
from stare_jax.episode import pack_signals
from stare_jax.sims import textures

_REACH = 0.05  # metres that an action of 1 moves the gripper
_RADIUS = 0.05  # the gripper touches the cube within this distance, metres
_TABLE = 0.3  # half the side of the square that the camera sees, metres
_DOWN = (0.0, 1.0, 0.0, 0.0)  # the gripper's orientation, wxyz


class Toy:
  """A `worker.Environment` in numpy. Takes the arguments that every simulator gets; most do not matter here."""

  def __init__(self, *, image_size: int, **_: Any):
    self._size = image_size
    self.reset(0)

  def reset(self, seed: int, suite: dict[str, Any] | None = None) -> None:
    """The initial state that `seed` names; of a suite's changes it knows noise."""
    self._noise, self._steps = None, 0
    if suite is not None and "noise" in suite["changes"]:
      draw = suites.generator(suite["name"], seed)
      self._noise = textures.noise(draw, self._size, draw.uniform(*suite["changes"]["noise"]["sigma"]))
    rng = np.random.default_rng(seed)
    self._cube = np.append(rng.uniform(-0.1, 0.1, 2), 0.02)
    self._goal = self._cube + [-0.2, 0.0, -0.02]
    self._tcp = np.array([0.0, 0.0, 0.17])
    self._velocity = np.zeros(3)
    self._open, self._held = 1.0, False

  def step(self, action: np.ndarray) -> None:
    """float32[7]: three displacements, three rotations that nothing turns, gripper (+1 open)."""
    self._steps += 1
    before = self._cube.copy()
    motion = _REACH * np.clip(action[:3], -1, 1).astype(np.float64)
    near = float(np.linalg.norm(self._tcp - self._cube)) < 0.02
    opened, self._open = self._open, float(action[6] > 0)
    self._held = not self._open and (self._held or (near and bool(opened)))
    self._tcp = self._tcp + motion
    self._tcp[2] = max(self._tcp[2], 0.01)
    if self._held:
      self._cube = self._cube + motion
      self._cube[2] = max(self._cube[2], 0.02)
    else:
      self._push()
    self._velocity = (self._cube - before) * 20.0  # 20 control steps per second

  def _push(self) -> None:
    """A gripper low enough shoves the cube out of its radius, along the table; open fingers may close around it."""
    away = self._cube[:2] - self._tcp[:2]
    distance = float(np.linalg.norm(away))
    around = 0.02 if self._open else 1e-6
    if self._tcp[2] < 0.05 and around < distance < _RADIUS:
      self._cube[:2] = self._tcp[:2] + away * (_RADIUS / distance)

  def observe(self, image: np.ndarray, signals: np.ndarray) -> None:
    """The table from above: goal white, cube blue, gripper red (darker when high)."""
    image[...] = 90
    height = int(255 * np.clip(1 - self._tcp[2], 0.3, 1))
    drawing = (
      (self._goal, 0.06, (230, 230, 230)),
      (self._cube, 0.04, (20, 40, 200)),
      (self._tcp, 0.03, (height, 30, 30)),
    )
    for position, half, colour in drawing:
      low, high = (position[:2] - half + _TABLE), (position[:2] + half + _TABLE)
      rows, columns = (slice(*np.clip([a, b], 0, self._size).astype(int)) for a, b in self._pixels(low, high))
      image[rows, columns] = colour
    if self._noise is not None:
      image[...] = np.clip(image + textures.cut(self._noise, self._size, self._steps), 0, 255)
    signals[...] = pack_signals(self._signals())

  def _pixels(self, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.stack([low, high], axis=1) / (2 * _TABLE) * self._size

  def _signals(self) -> dict[str, np.ndarray]:
    fingers = np.full(2, 0.04 if self._open else 0.02 if self._held else 0.0)
    values = dict(
      tcp_pose=np.concatenate([self._tcp, _DOWN]),
      object_pose=np.concatenate([self._cube, (1.0, 0.0, 0.0, 0.0)]),
      goal_pose=np.concatenate([self._goal, (1.0, 0.0, 0.0, 0.0)]),
      object_velocity=np.concatenate([self._velocity, np.zeros(3)]),
      qpos=np.concatenate([np.zeros(7), fingers]),
      qvel=np.zeros(9),
      finger_force=np.full(2, 20.0 * self._held),
      grasped=np.float32(self._held),
      success=np.float32(np.linalg.norm(self._cube[:2] - self._goal[:2]) < 0.1),
    )
    return {name: np.asarray(value, np.float32) for name, value in values.items()}

  def snapshot(self) -> bytes:
    """The whole state."""
    return pickle.dumps(vars(self))

  def restore(self, data: bytes) -> None:
    """Exact."""
    vars(self).update(pickle.loads(data))
