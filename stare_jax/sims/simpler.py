"""The WidowX tasks of SimplerEnv's own package: ManiSkill2 on SAPIEN 2.2, beside `bridge`, ManiSkill3's port of them.

Runs in a worker under an interpreter of its own (`sim.python`), because SAPIEN 2.2 wants what the learner cannot have;
docs/simpler_env.md says how to make one. The same signals, camera, actions and start states as `bridge`, with this
package's physics and its own success test: figures of the two are never to be put in one column.

Every reset builds the scene anew, so that the same (task, seed, actions) gives the same bits whatever ran before in the
process. A snapshot is the seed and the actions, as in `maniskill`.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import pickle
import sys
from typing import Any

import numpy as np

from stare_jax.episode import SIGNALS
from stare_jax.sims import SimulatorError
from stare_jax.sims.bridge import _INTRINSICS, FRAME, FULL_FROM, _photograph, decode
from stare_jax.sims.lanczos import resized
from stare_jax.sims.maniskill import _joints

_CAMERA = "3rd_view_camera"
_SNAPSHOT_VERSION = 1
_PACKAGES = ("simpler_env", "mani_skill2_real2sim", "sapien", "cv2", "PIL")
_SETUP = (
  "  git clone --recurse-submodules https://github.com/simpler-env/SimplerEnv\n"
  "  python3.10 -m venv simpler\n"
  '  simpler/bin/pip install "numpy<2" -e SimplerEnv/ManiSkill2_real2sim -e SimplerEnv sapien==2.2.2\n'
)
_POINTER = b"version https://git-lfs"  # how a file begins that git-lfs has not fetched
_NO_DEVICE = (
  "SAPIEN 2.2 found no Vulkan device that it can use. It needs a GPU's driver with its graphics libraries (in a "
  "container: NVIDIA_DRIVER_CAPABILITIES=all), or another driver that lists VK_KHR_external_memory_fd and "
  "VK_KHR_external_semaphore_fd"
)


class Simpler:
  """A `worker.Environment` over one WidowX task of SimplerEnv.

  Options of a task's env_options:
    jitter: as in `bridge.Bridge`.
  """

  def __init__(
    self,
    *,
    env_id: str,
    actors: tuple[str, str | None],
    camera: Any,
    env_options: dict[str, Any],
    image_size: int,
    shader: str = "ibl",
    draw: bool = True,
  ):
    """Builds the environment and draws once, so that a process that is ready is warm: minutes, without a GPU.

    Args:
      env_id: SimplerEnv's name of the task, such as widowx_carrot_on_plate.
      actors, camera: the scene has its own.
      env_options: see the class.
      image_size: H = W, pixels.
      shader: SAPIEN's shader directory. "ibl" is what the published figures were drawn with.
      draw: False leaves every image black, for statistics of experts, which see signals alone.
    """
    options = dict(env_options)
    self._jitter = options.pop("jitter")
    self._env_id, self._image_size, self._draw = env_id, image_size, draw
    frame = FRAME if image_size >= FULL_FROM else (2 * image_size, 2 * image_size)
    self._env = _build(env_id, shader, **options)
    self._set_camera(frame)
    self._places = np.asarray(self._env._xy_configs, np.float64)
    self._turns = np.asarray(self._env._quat_configs, np.float64)
    self._background = _photograph(self._env.rgb_overlay_path, frame)
    self.reset(0)
    if draw:
      self._picture()

  def versions(self) -> dict[str, str]:
    """What figures of this simulator depend on."""
    import sapien

    return {"sapien": sapien.__version__, "simulator": "simpler_env (ManiSkill2_real2sim)"}

  def starts(self) -> tuple[np.ndarray, np.ndarray]:
    """The published start states, as in `bridge.Bridge.starts` but for the height: positions are float64[n, 2, 2].

    Start i is SimplerEnv's `episode_id`: the orientation varies fastest.
    """
    count = len(self._turns)
    return np.repeat(self._places, count, axis=0), np.tile(self._turns, (len(self._places), 1, 1))

  def reset(self, seed: int, suite: dict[str, Any] | None = None) -> None:
    """The initial state that `seed` names (see `bridge.decode`), in a scene without a past.

    Of what an evaluation suite changes only the instruction may come, which is the policy's matter.
    """
    if suite is not None and (kinds := set(suite["changes"]) - {"instruction"}):
      raise SimulatorError(f"the simulator 'simpler' cannot change: {', '.join(sorted(kinds))}")
    self._seed, self._actions = seed, []
    place, turn = decode(seed, *self.starts(), self._jitter)
    self._env._xy_configs, self._env._quat_configs = [place], [turn]
    self._env.reset(seed=seed, options=dict(reconfigure=True, obj_init_options=dict(episode_id=0)))
    self._source, self._target = self._env.episode_source_obj, self._env.episode_target_obj
    agent = self._env.agent
    self._fingers = agent.finger_left_link, agent.finger_right_link

  def step(self, action: np.ndarray) -> None:
    """float32[7]: metres and roll, pitch, yaw in the robot's base frame, added to the controller's target; gripper.

    The rotation is Rz(yaw) Ry(pitch) Rx(roll), as SimplerEnv's policies have it, and the controller wants it as a
    rotation vector. The gripper is open (above 0) or closed.
    """
    self._actions.append(action)
    self._env._elapsed_steps += 1
    grip = 1.0 if action[6] > 0 else -1.0
    self._env.step_action(np.concatenate([action[:3], rotation_vector(action[3:6]), [grip]]).astype(np.float64))

  def observe(self, image: np.ndarray, signals: np.ndarray) -> None:
    """Draws into uint8[H, W, 3] and writes float32[S]."""
    image[...] = resized(self._picture(), self._image_size) if self._draw else 0
    signals[...] = self._signals()

  def snapshot(self) -> bytes:
    """The episode so far: seed, actions, and the state that they led to; plain lists, whatever numpy reads them."""
    actions = [action.tolist() for action in self._actions]
    content = dict(version=_SNAPSHOT_VERSION, env_id=self._env_id, seed=self._seed, actions=actions,
                   state=self._env.get_state().tolist())  # fmt: skip
    return pickle.dumps(content)

  def restore(self, data: bytes) -> str | None:
    """Plays the episode of a snapshot again, without drawing; exact, or a note says by how much it was off."""
    content = pickle.loads(data)
    if content["version"] != _SNAPSHOT_VERSION or content["env_id"] != self._env_id:
      found = f"version {content['version']} of {content['env_id']}"
      raise SimulatorError(f"snapshot is {found}, expected version {_SNAPSHOT_VERSION} of {self._env_id}")
    self.reset(content["seed"])
    for action in content["actions"]:
      self.step(np.asarray(action, np.float32))
    state = np.asarray(content["state"])
    error = float(np.max(np.abs(self._env.get_state() - state)))
    if error == 0.0:
      return None
    self._env.set_state(state)
    return f"the replay of a snapshot (seed {self._seed}, {len(self._actions)} steps) was off by {error:.3g}"

  # --------------------------------------------------------------------------------------------------- the scene

  def _set_camera(self, frame: tuple[int, int]) -> None:
    """The scene's camera in the size of `frame`, from the next reset on, and none that nobody looks through."""
    config = self._env._camera_cfgs[_CAMERA]
    scale = np.array([[frame[0] / FRAME[0]], [frame[1] / FRAME[1]], [1.0]])
    config.width, config.height, config.intrinsic = *frame, _INTRINSICS * scale
    for name in [name for name in self._env._camera_cfgs if name != _CAMERA]:
      del self._env._camera_cfgs[name]

  # ------------------------------------------------------------------------------------------------ what it shows

  def _picture(self) -> np.ndarray:
    """uint8[H, W, 3]: the robot and the objects before the photograph, in the size of the frame."""
    import cv2

    self._env.update_render()
    camera = self._env._cameras[_CAMERA].camera
    camera.take_picture()
    drawn = np.clip(camera.get_float_texture("Color")[..., :3] * 255, 0, 255).astype(np.uint8)
    actor = camera.get_uint32_texture("Segmentation")[..., 1]
    kept = np.isin(actor, self._kept()).astype(np.uint8)
    return cv2.copyTo(np.ascontiguousarray(drawn), kept, self._background.copy())

  def _kept(self) -> list[int]:
    """Ids of what the photograph does not replace: the robot, and the objects that the environment does not hide."""
    links = [link.id for link in self._env.agent.robot.get_links()]
    objects = [x for x in (self._source, self._target) if x.name not in self._env.rgb_always_overlay_objects]
    return [*links, *(x.id for x in objects)]

  def _signals(self) -> np.ndarray:
    """float32[S] in the order of `episode.SIGNALS`."""
    robot, source = self._env.agent.robot, self._source
    values = dict(
      tcp_pose=_pose(self._env.tcp),
      object_pose=_pose(source),
      goal_pose=_pose(self._target),
      object_velocity=np.concatenate([source.velocity, source.angular_velocity]),
      qpos=_joints(robot.get_qpos()),
      qvel=_joints(robot.get_qvel()),
      finger_force=self._finger_forces(),
      grasped=self._env.agent.check_grasp(source),
      success=self._env.evaluate()["success"],
    )
    return np.concatenate([np.asarray(values[name], np.float32).reshape(-1) for name in SIGNALS])

  def _finger_forces(self) -> list[float]:
    """Newtons between each finger and the object: the impulse of the last physics step over its time."""
    contacts = self._env._scene.get_contacts()
    forces = []
    for finger in self._fingers:
      total = np.zeros(3)
      for contact in contacts:
        pair = contact.actor0, contact.actor1
        if pair in ((finger, self._source), (self._source, finger)):
          sign = 1.0 if pair[0] == finger else -1.0
          total += sign * np.sum([point.impulse for point in contact.points], axis=0)
      forces.append(float(np.linalg.norm(total)) * self._env.sim_freq)
    return forces


def rotation_vector(angles: np.ndarray) -> np.ndarray:
  """float64[3], axis times angle of Rz(yaw) Ry(pitch) Rx(roll); angles float[3] are roll, pitch, yaw in radians."""
  half = np.asarray(angles, np.float64) / 2
  (cx, cy, cz), (sx, sy, sz) = np.cos(half), np.sin(half)
  w = cx * cy * cz + sx * sy * sz
  axis = np.array([sx * cy * cz - cx * sy * sz, cx * sy * cz + sx * cy * sz, cx * cy * sz - sx * sy * cz])
  length = float(np.linalg.norm(axis))
  if length < 1e-12:
    return np.zeros(3)
  return axis * (2 * np.arctan2(np.copysign(length, w), abs(w)) / length)


def _pose(actor: Any) -> np.ndarray:
  pose = actor.get_pose()
  return np.concatenate([pose.p, pose.q])


# ------------------------------------------------------------------------------------------------------- building it


def _build(env_id: str, shader: str, **options: Any) -> Any:
  """The bare environment in SimplerEnv's own set-up for evaluation, which draws nothing by itself."""
  missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
  if missing:
    raise SimulatorError(
      f"the interpreter {sys.executable} has no {', '.join(missing)}. The simulator 'simpler' is SimplerEnv's own "
      f"package, in a virtual environment of its own because it cannot live beside the learner's:\n{_SETUP}"
      f"and then --config.sim.python=simpler/bin/python; docs/simpler_env.md has the whole of it"
    )
  os.environ.setdefault("MS2_RENDERER_LOG_LEVEL", "error")
  import gymnasium
  import simpler_env

  if env_id not in simpler_env.ENVIRONMENT_MAP:
    known = [name for name in simpler_env.ENVIRONMENTS if name.startswith("widowx")]
    raise SimulatorError(f"SimplerEnv has no task {env_id!r}; its WidowX tasks are {', '.join(known)}")
  name, defaults = simpler_env.ENVIRONMENT_MAP[env_id]
  arguments = defaults | options | dict(obs_mode="none", prepackaged_config=True, shader_dir=shader)
  try:
    env = gymnasium.make(name, **arguments).unwrapped
  except (RuntimeError, OSError) as error:
    text = str(error)
    if "vk::" in text or "ulkan" in text:
      raise SimulatorError(f"{_NO_DEVICE}.\n(SAPIEN said: {text})") from error
    import mani_skill2_real2sim

    of_assets = isinstance(error, FileNotFoundError) or str(mani_skill2_real2sim.ASSET_DIR) in text
    advice = f"\n{_where_assets_are()}" if of_assets else ""
    raise SimulatorError(f"SimplerEnv's scene could not be built: {type(error).__name__}: {text}{advice}") from error
  if missing := missing_assets(env):
    raise SimulatorError(f"the assets of {env_id} are not whole; missing: {', '.join(missing)}\n{_where_assets_are()}")
  return env


def missing_assets(env: Any) -> list[str]:
  """The files behind a built scene that are not there. SAPIEN builds it without them: no table, an unseen object."""
  missing = []
  stage = pathlib.Path(env.scene_root) / "stages" / f"{env.scene_name}.glb"
  if not _there(stage):
    missing.append(str(stage))
  for model in dict.fromkeys([*env.episode_model_ids, *(["sink"] if hasattr(env, "sink") else [])]):
    folder = pathlib.Path(env.asset_root) / "models" / model
    if not _there(folder / "collision.obj"):
      missing.append(str(folder / "collision.obj"))
    if not any(_there(folder / f"textured.{kind}") for kind in ("obj", "dae", "glb")):
      missing.append(str(folder / "textured.dae"))
  return missing


def _there(path: pathlib.Path) -> bool:
  """Whether a file is, and is itself and no pointer to where it is kept."""
  if not path.is_file():
    return False
  with path.open("rb") as file:
    return file.read(len(_POINTER)) != _POINTER


def _where_assets_are() -> str:
  import mani_skill2_real2sim

  folder = pathlib.Path(mani_skill2_real2sim.ASSET_DIR)
  return (
    f"They are read from {folder}{'' if folder.is_dir() else ', which is not there'}: the folder data/ of "
    f"ManiSkill2_real2sim's repository, whole, with its largest files. Get it with\n{_SETUP}"
    f"or set MS2_REAL2SIM_ASSET_DIR to it"
  )
