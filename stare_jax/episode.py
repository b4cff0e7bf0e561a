"""The vocabulary: axes, the signal table, and what an episode is. numpy only.

Axes, named once and used everywhere:

  B  episodes or pairs in a batch      T  control steps          K  stages of the task
  N  environments (or flat steps)      A  action tokens (7)      V  action bins (256)
  D  action dimensions (7)             S  packed signals         H, W  image height and width

`s_t` is the privileged simulator state ("signals"), `o_t` the image and instruction that the policy sees. An episode
of T steps has T observations and actions but T + 1 states: s_0 at reset, s_{t+1} after action t.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Privileged signals, float32, in the order in which they are packed into one vector of length S.
# Positions in metres, quaternions wxyz, velocities in m/s and rad/s, joints in rad (the two fingers in m), forces in N;
# world frame with z = 0 on the table. Flags are 0 or 1.
SIGNALS: dict[str, tuple[int, ...]] = {
  "tcp_pose": (7,),  # tool centre point: position, quaternion
  "object_pose": (7,),  # the object that the task moves
  "goal_pose": (7,),  # goal site, or the object to stack or place on; zeros where a task has none
  "object_velocity": (6,),  # linear, angular
  "qpos": (9,),
  "qvel": (9,),
  "finger_force": (2,),  # contact force between each finger and the object
  "grasped": (),
  "success": (),  # the simulator's own success test at this state
}
SIGNAL_SIZE = sum(int(np.prod(shape)) for shape in SIGNALS.values())

Signals = dict[str, np.ndarray]  # name -> float32[..., *shape]; the leading axes are [N] online and [T+1] offline


def unpack_signals(packed: np.ndarray) -> Signals:
  """Views into float32[..., S] by name; a scalar signal has the leading shape alone."""
  if packed.shape[-1] != SIGNAL_SIZE:
    raise ValueError(f"signals: last axis is {packed.shape[-1]}, expected {SIGNAL_SIZE} ({', '.join(SIGNALS)})")
  out, at = {}, 0
  for name, shape in SIGNALS.items():
    size = int(np.prod(shape))
    out[name] = packed[..., at : at + size].reshape(packed.shape[:-1] + shape)
    at += size
  return out


def pack_signals(signals: Signals) -> np.ndarray:
  """The inverse of `unpack_signals`: float32[..., S]."""
  if missing := [name for name in SIGNALS if name not in signals]:
    raise ValueError(f"signals: missing {missing}; expected exactly {list(SIGNALS)}")
  lead = np.shape(signals["success"])
  return np.concatenate([np.asarray(signals[n], np.float32).reshape(lead + (-1,)) for n in SIGNALS], axis=-1)


@dataclasses.dataclass(frozen=True)
class Episode:
  """One trajectory as the simulator and the policy left it.

  Attributes:
    task: registry name.
    seed: the environment seed; with the task it fixes the initial state.
    instruction: the task's own; an evaluation suite may have told the policy another.
    images: uint8[T, H, W, 3], o_0 .. o_{T-1}.
    signals: float32[T+1, S], s_0 .. s_T, packed as in `SIGNALS`.
    actions: float32[T, D], as decided; a noisy expert's disturbance is not in them.
    tokens: int32[T, A], action bins in [0, V).
    log_prob: float32[T, A], nats, of each token under the behaviour policy at its temperature; zeros for an expert.
    value: float32[T], the behaviour policy's V(o_t); zeros for an expert.
    last_value: V(o_T), the bootstrap at a truncation; 0 where `terminated`.
    terminated: the episode ended by success; otherwise it was cut (time limit or end of a rollout).
  """

  task: str
  seed: int
  instruction: str
  images: np.ndarray
  signals: np.ndarray
  actions: np.ndarray
  tokens: np.ndarray
  log_prob: np.ndarray
  value: np.ndarray
  last_value: float
  terminated: bool

  def __len__(self) -> int:
    return len(self.actions)

  @property
  def success(self) -> np.ndarray:
    """bool[T+1], the simulator's success test at every state."""
    return unpack_signals(self.signals)["success"] > 0.5


@dataclasses.dataclass(frozen=True)
class StagedEpisode:
  """An episode with its stages (METHOD: StARe). Stages are numbered from 0 here, from 1 in the equations.

  Attributes:
    episode: the trajectory.
    stage_id: int32[T], g(t).
    completed_at: int32[K], the state index t >= 1 at which stage k's end event fired; -1 if it never did.
    cost: float32[K], unitless; the mean of d_k / L_k over the steps of stage k; NaN where stage k has no steps.
    potential: float32[T+1], Phi(s_t, g(t)); g(T) is the stage after the last action. Not zeroed at the end: the
      shaping decides what a terminal state is worth.
    distance: float32[T], unitless, d_g / L_g at s_t in its stage g(t); `cost` is its mean by stage.
  """

  episode: Episode
  stage_id: np.ndarray
  completed_at: np.ndarray
  cost: np.ndarray
  potential: np.ndarray
  distance: np.ndarray

  @property
  def completed(self) -> np.ndarray:
    """bool[K]."""
    return self.completed_at >= 0
