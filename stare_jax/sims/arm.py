"""The controllers of the arms and their grippers in numpy: the joint targets of an action. Runs in the worker."""

from __future__ import annotations

from typing import Any

import numpy as np


class Arm:
  """ManiSkill's `PDEEPoseController` with delta poses on one CPU environment, without its hundred tiny tensors.

  That of the table-top arm, which moves the hand from where it is, and SimplerEnv's, which moves its last target. The
  same operations in the same order and precision (float32), so that the joint targets are the same bits: where a
  library's own rounding matters (sine, norm, square root, matrix product) it is torch that computes. Tests compare the
  two.
  """

  def __init__(self, controller: Any):
    config, kinematics = controller.config, controller.kinematics
    self._controller, self._from_target, self._scaled = controller, config.use_target, config.normalize_action
    if self._scaled:
      low, high = (limit[:3].numpy() for limit in (controller.action_space_low, controller.action_space_high))
      self._offset, self._range = np.float32(0.5) * (high + low), np.float32(0.5) * (high - low)
      self._turn = np.float32(config.rot_lower)
    self._robot = controller.articulation._objs[0]
    self._root, self._hand = controller.root_link._objs[0], controller.ee_link._objs[0]
    self._joints = [joint._objs[0] for joint in controller.joints]
    self._own = controller.active_joint_indices.numpy()
    self._ordered = kinematics.pmodel_active_joint_indices.numpy()
    self._controlled = kinematics.pmodel_controlled_joint_indices.numpy()
    self._solve = kinematics.pmodel.compute_inverse_kinematics
    self._link, self._mask = kinematics.end_link_idx, kinematics.qmask.numpy()

  @classmethod
  def of(cls, controller: Any) -> Arm | None:
    """An `Arm` for exactly the configurations that it copies; None for any other controller."""
    from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController

    if type(controller) is not PDEEPoseController:
      return None
    config = controller.config
    copied = (
      config.use_delta and not config.interpolate and config.frame == "root_translation:root_aligned_body_rotation"
    )
    return cls(controller) if copied else None

  def set_action(self, action: np.ndarray) -> None:
    """Moves the joint targets to where the hand is displaced and turned by float32[6] in the controller's units.

    Raises:
      ValueError: a part of the action is not a number.
    """
    import sapien

    if np.isnan(action).any():
      raise ValueError(f"action cannot be NaN: {action}")
    shift, angles = self._scale(action) if self._scaled else (action[:3], action[3:])
    position, turn = self._last_target() if self._from_target else self._hand_at_base()
    position, turn = position + shift, _standard(_multiply(_rotation(angles), turn))
    if self._from_target:  # the controller keeps it, and sets it at every reset
      self._controller._target_pose.raw_pose[0] = _torch().from_numpy(np.concatenate([position, turn]))
    qpos = self._robot.get_qpos()
    result, success, _ = self._solve(
      self._link, sapien.Pose(position, turn), initial_qpos=qpos[self._ordered], active_qmask=self._mask,
      max_iterations=100,
    )  # fmt: skip
    targets = result[self._controlled].astype(np.float32) if success else qpos[self._own]
    for joint, target in zip(self._joints, targets, strict=True):
      joint.set_drive_target(target)

  def _scale(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Metres float32[3], each clipped, and radians float32[3], their norm clipped, of an action in [-1, 1]."""
    shift = self._offset + self._range * np.clip(action[:3], np.float32(-1), np.float32(1))
    angles = action[3:]
    norm = _torch().linalg.norm(_torch().from_numpy(angles)[None], axis=1).numpy()[0]
    if norm > 1:
      angles = angles * (np.float32(1) / norm)
    return shift, angles * self._turn

  def _last_target(self) -> tuple[np.ndarray, np.ndarray]:
    """In the frame of the root: position float32[3], quaternion float32[4] wxyz."""
    pose = self._controller._target_pose.raw_pose[0].numpy()
    return pose[:3], pose[3:]

  def _hand_at_base(self) -> tuple[np.ndarray, np.ndarray]:
    """root^-1 * hand: position float32[3], quaternion float32[4] wxyz."""
    root, hand = self._root.entity_pose, self._hand.entity_pose
    inverse = _conjugate(root.q)
    origin = _rotate(inverse, -root.p)
    return origin + _rotate(inverse, hand.p), _standard(_multiply(inverse, hand.q))


class Gripper:
  """ManiSkill's `PDJointPosMimicController` with targets on one CPU environment: one number moves both fingers.

  The same operations in the same precision (float32), without tensors. Tests compare the two.
  """

  def __init__(self, controller: Any):
    low, high = (limit.numpy()[0] for limit in (controller.action_space_low, controller.action_space_high))
    self._middle, self._half = np.float32(0.5) * (high + low), np.float32(0.5) * (high - low)
    ways = zip(controller._multiplier.numpy(), controller._offset.numpy(), strict=True)
    follows = dict(zip(controller.mimic_joint_indices.reshape(-1).tolist(), ways, strict=True))
    self._joints = [(joint._objs[0], follows.get(i)) for i, joint in enumerate(controller.joints)]

  @classmethod
  def of(cls, controller: Any) -> Gripper | None:
    """A `Gripper` for exactly the configurations that it copies; None for any other controller."""
    from mani_skill.agents.controllers.pd_joint_pos import PDJointPosMimicController

    if type(controller) is not PDJointPosMimicController:
      return None
    config = controller.config
    copied = not (config.use_delta or config.interpolate) and config.normalize_action and controller.effective_dof == 1
    return cls(controller) if copied else None

  def set_action(self, action: np.ndarray) -> None:
    """Moves the joint targets to where float32[1], -1 to 1, is between their limits."""
    target = self._middle + self._half * np.clip(action[0], np.float32(-1), np.float32(1))
    for joint, way in self._joints:
      joint.set_drive_target(target if way is None else target * way[0] + way[1])


def _torch() -> Any:
  import torch

  return torch


def _rotation(angles: np.ndarray) -> np.ndarray:
  """float32[4]: the quaternion of Euler angles XYZ, float32[3] in radians."""
  torch = _torch()
  angles = torch.from_numpy(angles)
  (cx, cy, cz), (sx, sy, sz) = torch.cos(angles).numpy(), torch.sin(angles).numpy()
  x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]], np.float32)
  y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]], np.float32)
  z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]], np.float32)
  x, y, z = (torch.from_numpy(matrix)[None] for matrix in (x, y, z))
  return _quaternion(torch.matmul(torch.matmul(x, y), z)[0].numpy())


def _quaternion(m: np.ndarray) -> np.ndarray:
  """float32[4] of a rotation matrix, worked out from its largest component."""
  one, (a, b, c) = np.float32(1), np.diagonal(m)
  squares = np.array([one + a + b + c, one + a - b - c, one - a + b - c, one - a - b + c], np.float32)
  twice = _torch().sqrt(_torch().from_numpy(np.maximum(squares, np.float32(0)))).numpy()  # of each component
  i = int(np.argmax(twice))
  square = twice[i] * twice[i]
  x, y, z = m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]
  xy, xz, yz = m[1, 0] + m[0, 1], m[0, 2] + m[2, 0], m[1, 2] + m[2, 1]
  rows = ([square, x, y, z], [x, square, xy, xz], [y, xy, square, yz], [z, xz, yz, square])
  return _standard(np.array(rows[i], np.float32) / (np.float32(2) * twice[i]))


def _conjugate(q: np.ndarray) -> np.ndarray:
  return q * np.array([1, -1, -1, -1], np.float32)


def _standard(q: np.ndarray) -> np.ndarray:
  return -q if q[0] < 0 else q


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """float32[4] * float32[4], wxyz; products are added from left to right."""
  aw, ax, ay, az = a
  bw, bx, by, bz = b
  return np.array(
    [
      aw * bw - ax * bx - ay * by - az * bz,
      aw * bx + ax * bw + ay * bz - az * by,
      aw * by - ax * bz + ay * bw + az * bx,
      aw * bz + ax * by - ay * bx + az * bw,
    ],
    np.float32,
  )


def _rotate(q: np.ndarray, point: np.ndarray) -> np.ndarray:
  """float32[3] turned by a quaternion."""
  return _multiply(_multiply(q, np.append(np.float32(0), point)), _conjugate(q))[1:]
