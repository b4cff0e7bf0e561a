"""The table-top arm's controller in numpy: the joint targets of an action. Runs in the worker."""

from __future__ import annotations

from typing import Any

import numpy as np


class Arm:
  """ManiSkill's `PDEEPoseController` for pd_ee_delta_pose on one CPU environment, without its hundred tiny tensors.

  The same operations in the same order and precision (float32), so that the joint targets are the same bits: where a
  library's own rounding matters (sine, norm, matrix product) it is torch that computes. A test compares the two.
  """

  def __init__(self, controller: Any):
    config, kinematics = controller.config, controller.kinematics
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
    """An `Arm` for exactly the configuration that it copies; None for any other controller."""
    from mani_skill.agents.controllers.pd_ee_pose import PDEEPoseController

    if type(controller) is not PDEEPoseController:
      return None
    config = controller.config
    copied = (
      config.use_delta
      and not config.use_target
      and not config.interpolate
      and config.normalize_action
      and config.frame == "root_translation:root_aligned_body_rotation"
      and abs(config.rot_lower) < 1.0  # the quaternion's real part is its largest
    )
    return cls(controller) if copied else None

  def set_action(self, action: np.ndarray) -> None:
    """float32[6] in [-1, 1]: moves the joint targets to where the hand is displaced and turned so."""
    import sapien

    if np.isnan(action).any():
      raise ValueError(f"action cannot be NaN: {action}")
    position, turn = self._hand_at_base()
    position = position + (self._offset + self._range * np.clip(action[:3], np.float32(-1), np.float32(1)))
    turn = _multiply(self._delta(action[3:]), turn)
    qpos = self._robot.get_qpos()
    pose = sapien.Pose(position, _standard(turn))
    result, success, _ = self._solve(
      self._link, pose, initial_qpos=qpos[self._ordered], active_qmask=self._mask, max_iterations=100
    )
    targets = result[self._controlled].astype(np.float32) if success else qpos[self._own]
    for joint, target in zip(self._joints, targets, strict=True):
      joint.set_drive_target(target)

  def _hand_at_base(self) -> tuple[np.ndarray, np.ndarray]:
    """root^-1 * hand: position float32[3], quaternion float32[4] wxyz."""
    root, hand = self._root.entity_pose, self._hand.entity_pose
    inverse = _conjugate(root.q)
    origin = _rotate(inverse, -root.p)
    return origin + _rotate(inverse, hand.p), _standard(_multiply(inverse, hand.q))

  def _delta(self, rotation: np.ndarray) -> np.ndarray:
    """float32[4]: the quaternion of an action's rotation (Euler angles XYZ after clipping its norm to 1)."""
    import torch

    norm = torch.linalg.norm(torch.from_numpy(rotation)[None], axis=1).numpy()[0]
    if norm > 1:
      rotation = rotation * (np.float32(1) / norm)
    angles = torch.from_numpy(rotation * self._turn)
    (cx, cy, cz), (sx, sy, sz) = torch.cos(angles).numpy(), torch.sin(angles).numpy()
    x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]], np.float32)
    y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]], np.float32)
    z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]], np.float32)
    x, y, z = (torch.from_numpy(matrix)[None] for matrix in (x, y, z))
    m = torch.matmul(torch.matmul(x, y), z)[0].numpy()
    real = np.sqrt(np.float32(1) + m[0, 0] + m[1, 1] + m[2, 2])
    quaternion = np.array([real * real, m[2, 1] - m[1, 2], m[0, 2] - m[2, 0], m[1, 0] - m[0, 1]], np.float32)
    return quaternion / (np.float32(2) * real)


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
