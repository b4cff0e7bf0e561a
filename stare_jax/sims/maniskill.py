"""One ManiSkill environment on the CPU, inside a worker process. Torch stays here and in `arm` and `bridge`.

It keeps ManiSkill's physics and drops what a learner never looks at: observation dictionaries, rewards, spaces and
camera matrices. A control step is the controller's action, the physics substeps, a picture and a signal vector.

Every reset starts from a new physics scene. PhysX keeps contact caches, the order of contact pairs and sleep timers
from one episode to the next, so that ManiSkill's own reset repeats an episode only approximately. Here the same (task,
seed, actions) gives the same bits whatever ran before in the process, which is also what makes a snapshot exact: it
holds the seed and the actions, and `restore` plays them again.
"""

from __future__ import annotations

import logging
import operator
import pickle
import warnings
from typing import Any

import numpy as np

from stare_jax.episode import SIGNALS
from stare_jax.sims import SimulatorError, lite, load
from stare_jax.sims.arm import Arm, Gripper

_SNAPSHOT_VERSION = 2
_GRASP_FORCE = 0.5  # newtons per finger, and
_GRASP_ANGLE = 85.0  # degrees from the finger's opening direction: ManiSkill's definition of a grasp
_NO_DEVICE = (
  "No usable Vulkan device: SAPIEN found none with VK_KHR_external_memory_fd.\n"
  "Run launch/setup.sh. By hand, with a GPU: its driver with the graphics libraries (in a container\n"
  "NVIDIA_DRIVER_CAPABILITIES=all), libvulkan1 and libegl1. Without one: Mesa's software renderer, version 24.3 or\n"
  "newer; on Debian 12, whose own is 22.3, with\n"
  "  apt-get install -t bookworm-backports mesa-vulkan-drivers libvulkan1\n"
  "`vulkaninfo --summary` should then list the GPU, or llvmpipe."
)
_COMMON = dict(num_envs=1, sim_backend="physx_cpu", render_mode=None, reward_mode="none")
# A task names its scene in env_options: how the robot, the camera and the start of an episode are found.
SCENES = {"table": "stare_jax.sims.perturbed:Table", "bridge": "stare_jax.sims.perturbed:Photographed"}


def make(*, env_options: dict[str, Any], **spec: Any) -> ManiSkill:
  """The environment of a task's scene: `perturbed.Table` unless its options name another of `SCENES`."""
  options = dict(env_options)
  scene = options.pop("scene", "table")
  if scene not in SCENES:
    raise SimulatorError(f"unknown scene {scene!r} in the task's env_options: known are {', '.join(SCENES)}")
  return load(SCENES[scene])(env_options=options, **spec)


class ManiSkill:
  """A `worker.Environment` over one `physx_cpu` ManiSkill environment with a fixed camera."""

  _changed: tuple[Any, ...] = ()  # further arguments of the last reset, of an environment that takes some
  ROBOT_ASSETS: tuple[str, ...] = ()  # ManiSkill's names of what the robot needs downloaded; the Panda is part of it

  def __init__(
    self,
    *,
    env_id: str,
    actors: tuple[str, str | None],
    camera: tuple[Any, Any, float] | None,
    env_options: dict[str, Any],
    image_size: int,
    mesh_ratio: float | None = 0.1,
    shader: str = lite.BARE,
    render_backend: str = "cpu",
    draw: bool = True,
  ):
    """Builds the environment and draws once, so that a process that is ready is warm.

    Args:
      env_id: ManiSkill's name of the environment.
      actors: attributes of the environment: the object, and the goal or the pose that is the goal (None: no goal).
      camera: (eye, target, vertical field of view in radians); None keeps the environment's own.
      env_options: further arguments of the environment, and `show_goal`: draw the goal that it hides from cameras.
      image_size: H = W, pixels.
      mesh_ratio: share of the robot's visual triangles that is kept; None draws ManiSkill's own meshes.
      shader: ManiSkill's name of a shader pack, or `lite.BARE`, which draws the pixels of "minimal" in less time. The
        others differ in the background's colour: never mix two in one data set.
      render_backend: "cpu" or "gpu".
      draw: False leaves every image black, for statistics of experts, which see signals alone.
    """
    warnings.filterwarnings("ignore")  # about a missing GPU and time limits that we do not use
    logging.getLogger("mani_skill").setLevel(logging.ERROR)
    self._env_id = env_id
    self._image_size, self._mesh_ratio, self._draw = image_size, mesh_ratio, draw
    if shader == lite.BARE:
      lite.register_bare()
    self._layer = lite.COLOUR if shader == lite.BARE else "Color"
    # SAPIEN builds a camera at its first picture with the pack that was named last, which is the other camera's.
    second = dict(human_render_camera_configs=dict(shader_pack=shader))
    options = self._arguments(camera, shader) | second | dict(render_backend=render_backend) | env_options
    self._show_goal = options.pop("show_goal", True)
    self._env = _build(env_id, options, mesh_ratio, self.ROBOT_ASSETS)
    self._object_name, self._goal_name = actors
    self._seed, self._actions = 0, []
    self._bind()
    self.reset(0)
    if draw:
      self._picture()

  def reset(self, seed: int) -> None:
    """The initial state that `seed` names, in a physics scene without a past."""
    self._seed, self._actions, self._asked = seed, [], False
    if self._env.reconfiguration_freq == 0:
      self._move_to_new_scene()
      self._before_start()
      self._env.reset(seed=seed, options=self._start(seed))
      self._after_start()
    else:  # the environment builds its own geometry anew anyway
      self._env.reset(seed=seed, options=self._start(seed) | dict(reconfigure=True))
      self._bind()

  def _start(self, seed: int) -> dict[str, Any]:
    """The environment's own options for the episode of `seed`."""
    return {}

  def step(self, action: np.ndarray) -> None:
    """One control step: float32[D] in the units of the task's controller."""
    self._actions.append(action)
    self._asked = False
    self._env._elapsed_steps += 1
    self._set_action(action)
    self._simulate()

  def observe(self, image: np.ndarray, signals: np.ndarray) -> None:
    """Draws into uint8[H, W, 3] and writes float32[S], the latter while the former is drawn."""
    if self._draw and not self._asked:
      self.start_picture()
    signals[...] = self._signals()
    image[...] = self._picture() if self._draw else 0

  _asked = False  # for a picture of the state as it is
  _layers: dict[str, np.ndarray] | None = None  # of that picture, once they are fetched

  def start_picture(self) -> None:
    """Asks for a picture of the state: the renderer's threads draw it while this one goes on."""
    if self._draw:
      self._env.scene.update_render(update_sensors=True, update_human_render_cameras=False)
      self._camera.take_picture()
      self._asked, self._layers = True, None

  def fetch_picture(self) -> None:
    """Waits until it is drawn and copies what `_picture` needs of it."""
    if self._draw and self._layers is None:
      self._layers = {name: self._camera.get_picture(name) for name in self._needed()}

  def snapshot(self) -> bytes:
    """The episode so far: seed, actions, and the state that they led to."""
    content = dict(
      version=_SNAPSHOT_VERSION, env_id=self._env_id, start=(self._seed, *self._changed), actions=self._actions,
      state=self._state(),
    )  # fmt: skip
    return pickle.dumps(content)

  def restore(self, data: bytes) -> str | None:
    """Plays the episode of a snapshot again, without drawing.

    On the machine that wrote it this is exact: the same bits now and in all that follows. Where another processor or
    version leads elsewhere, positions and velocities are set as recorded (contact caches and joint targets are those
    of the replay), and the returned note says by how much the replay was off.
    """
    content = pickle.loads(data)
    if content["version"] != _SNAPSHOT_VERSION or content["env_id"] != self._env_id:
      found = f"version {content['version']} of {content['env_id']}"
      raise SimulatorError(f"snapshot is {found}, expected version {_SNAPSHOT_VERSION} of {self._env_id}")
    self.reset(*content["start"])
    for action in content["actions"]:
      self.step(action)
    error = float(np.max(np.abs(self._state() - content["state"])))
    if error == 0.0:
      return None
    self._env.set_state(_torch().from_numpy(content["state"])[None])
    return f"the replay of a snapshot (seed {self._seed}, {len(self._actions)} steps) was off by {error:.3g}"

  # --------------------------------------------------------------------------------------------------- the scene

  def _arguments(self, camera: tuple[Any, Any, float] | None, shader: str) -> dict[str, Any]:
    """Arguments of gym.make; a task's own come on top."""
    sensor: dict[str, Any] = dict(width=self._image_size, height=self._image_size, shader_pack=shader)
    if camera is not None:
      import sapien
      from mani_skill.utils import sapien_utils

      eye, target, fov = camera
      pose = sapien_utils.look_at(eye, target).raw_pose[0].numpy()
      sensor |= dict(pose=sapien.Pose(pose[:3], pose[3:]), fov=fov)
    return _COMMON | dict(
      obs_mode="none", robot_uids="panda", control_mode="pd_ee_delta_pose", sensor_configs=sensor
    )

  def _bind(self) -> None:
    """Looks up the SAPIEN objects behind the signals; once after every reconfiguration."""
    env = self._env
    agent = env.agent
    if self._show_goal:
      for hidden in env._hidden_objects:
        hidden.show_visual()
      env._hidden_objects.clear()
    self._object = self._actor(self._object_name)
    self._goal = self._actor(self._goal_name) if self._goal_name else None
    self._robot = agent.robot._objs[0]
    self._tcp = self._tool_link(agent)._objs[0].entity
    self._fingers = (agent.finger1_link._objs[0].entity, agent.finger2_link._objs[0].entity)
    self._body = self._object._bodies[0]
    (sensor,) = env._sensors.values()
    self._camera = sensor.camera._render_cameras[0]
    controllers = getattr(agent.controller, "controllers", {})
    self._controllers = _in_numpy(controllers)
    self._bare = _bare(env, controllers)
    agent.is_grasping = self._is_grasping  # `evaluate` asks it too: ours reads the contacts once, without torch

  def _tool_link(self, agent: Any) -> Any:
    """The link whose frame lies between the fingertips."""
    return agent.tcp

  def _actor(self, name: str) -> Any:
    try:
      return operator.attrgetter(name)(self._env)
    except AttributeError:
      known = sorted(key for key, value in vars(self._env).items() if hasattr(value, "_bodies"))
      raise SimulatorError(f"{self._env_id} has no actor {name!r}; it has {', '.join(known)}") from None

  def _move_to_new_scene(self) -> None:
    """Moves every entity, in order, into a scene with a new physics system; models and renderer stay.

    The cheap half of ManiSkill's `reconfigure`, which also loads and builds everything again.
    """
    import sapien

    scene = self._env.scene
    old = scene.sub_scenes[0]
    entities = old.get_entities()
    self._env._set_scene_config()  # process-wide defaults that the constructor below reads
    physics = sapien.physx.PhysxCpuSystem()
    physics.timestep = old.physx_system.timestep
    new = sapien.Scene([physics, old.render_system])
    for entity in entities:
      entity.remove_from_scene()
    for entity in entities:
      entity.add_to_scene(new)
    for body in physics.get_rigid_dynamic_components():
      body.put_to_sleep()  # forgets velocities, forces and the sleep timer
    scene.sub_scenes[0], scene.px = new, physics

  def _before_start(self) -> None:
    """What a new physics scene needs before the environment fills in the start state."""

  def _after_start(self) -> None:
    """What it needs after that."""
    self._wake()

  def _wake(self) -> None:
    for body in self._env.scene.px.get_rigid_dynamic_components():
      body.wake_up()  # sets the sleep timer as on a new body

  # ---------------------------------------------------------------------------------------------------- one step

  def _set_action(self, action: np.ndarray) -> None:
    if self._controllers is None:
      self._env.agent.set_action(_torch().from_numpy(action)[None])
    else:
      arm, gripper = self._controllers
      arm.set_action(action[:6])
      gripper.set_action(action[6:])

  def _simulate(self) -> None:
    """The physics substeps of one control step, with the environment's own hooks around them (as `_step_action`)."""
    env = self._env
    env._before_control_step()
    if self._bare:
      step = env.scene.px.step
      for _ in range(env._sim_steps_per_control):
        step()
      env._after_control_step()
      return
    for _ in range(env._sim_steps_per_control):
      env.agent.before_simulation_step()
      env._before_simulation_step()
      env.scene.step()
      env._after_simulation_step()
    env._after_control_step()

  # ------------------------------------------------------------------------------------------------ what it shows

  def _needed(self) -> tuple[str, ...]:
    """Names of the renderer's layers that make a picture."""
    return (self._layer,)

  def _picture(self) -> np.ndarray:
    self._finish()
    return rgb(self._layers[self._layer])

  def _finish(self) -> None:
    """Waits for the picture of the state, and asks for it first where nobody did."""
    if not self._asked:
      self.start_picture()
    self.fetch_picture()

  def _signals(self) -> np.ndarray:
    """float32[S] in the order of `episode.SIGNALS`."""
    body, robot = self._body, self._robot
    self._contacts = self._touching()
    values = dict(
      tcp_pose=_pose(self._tcp),
      object_pose=_pose(body.entity),
      goal_pose=np.zeros(7) if self._goal is None else self._goal_pose(),
      object_velocity=np.concatenate([body.linear_velocity, body.angular_velocity]),
      qpos=_joints(robot.get_qpos()),
      qvel=_joints(robot.get_qvel()),
      finger_force=[np.linalg.norm(self._force(finger, body.entity)) for finger in self._fingers],
      grasped=self._is_grasping(self._object).numpy(),
      success=self._success(),
    )
    self._contacts = None
    return np.concatenate([np.asarray(values[name], np.float32).reshape(-1) for name in SIGNALS])

  def _success(self) -> Any:
    """What the environment says of the state, a truth value."""
    return self._env.evaluate()["success"].numpy()

  def _goal_pose(self) -> np.ndarray:
    if hasattr(self._goal, "_bodies"):
      return _pose(self._goal._bodies[0].entity)
    return self._actor(self._goal_name).raw_pose[0].numpy()  # a pose that the environment works out when asked

  def _force(self, first: Any, second: Any) -> np.ndarray:
    """float64[3], newtons, world frame: the contact force of `second` on `first`, a finger."""
    total = np.zeros(3)
    for a, b, contact in self._touching() if self._contacts is None else self._contacts:
      if a == first and b == second:
        total += sum(point.impulse for point in contact.points)
      elif a == second and b == first:
        total -= sum(point.impulse for point in contact.points)
    return total / self._env.scene.px.timestep

  _contacts: list[tuple[Any, Any, Any]] | None = None  # what `_touching` says, while one state's signals are collected

  def _touching(self) -> list[tuple[Any, Any, Any]]:
    """The contacts of the fingers, each after its two entities. A scene may have a hundred others."""
    found = [(*(body.entity for body in contact.bodies), contact) for contact in self._env.scene.px.get_contacts()]
    return [(a, b, contact) for a, b, contact in found if a in self._fingers or b in self._fingers]

  def _is_grasping(self, actor: Any, min_force: float = _GRASP_FORCE, max_angle: float = _GRASP_ANGLE) -> Any:
    """ManiSkill's `Panda.is_grasping`: both fingers press, each along its opening direction. bool[1]."""
    entity = actor._bodies[0].entity
    grasping = True
    for finger, sign in zip(self._fingers, (1.0, -1.0), strict=True):
      force = self._force(finger, entity)
      size = float(np.linalg.norm(force))
      opening = sign * finger.pose.to_transformation_matrix()[:3, 1]
      cosine = float(force @ opening) / size if size > 0 else 0.0
      angle = np.degrees(np.arccos(np.clip(cosine, -1.0, 1.0)))
      grasping = grasping and size >= min_force and angle <= max_angle
    return _torch().tensor([grasping])

  def _state(self) -> np.ndarray:
    """float32[...]: poses and velocities of every actor and joint, ManiSkill's flat state."""
    return self._env.get_state()[0].numpy().copy()


def rgb(layer: np.ndarray) -> np.ndarray:
  """uint8[H, W, 3] of what the renderer drew, [H, W, 4] of bytes or of numbers up to 1."""
  import cv2

  return cv2.cvtColor(layer if layer.dtype == np.uint8 else (layer * 255).astype(np.uint8), cv2.COLOR_RGBA2RGB)


def _in_numpy(controllers: dict[str, Any]) -> tuple[Arm, Gripper] | None:
  """The controllers of an arm and its gripper in numpy, where ManiSkill's are these two and both have one."""
  if list(controllers) != ["arm", "gripper"]:
    return None
  arm, gripper = Arm.of(controllers["arm"]), Gripper.of(controllers["gripper"])
  return None if arm is None or gripper is None else (arm, gripper)


def _bare(env: Any, controllers: dict[str, Any]) -> bool:
  """Nothing happens between two physics steps: no hook of the environment's, no controller that interpolates.

  A WidowX takes 100 physics steps per control step, and calling what does nothing takes longer than they do.
  """
  from mani_skill.envs.sapien_env import BaseEnv

  hooks = ("_before_simulation_step", "_after_simulation_step")
  own = any(getattr(type(env), name) is not getattr(BaseEnv, name) for name in hooks)
  return not own and all(not getattr(x.config, "interpolate", True) for x in controllers.values()) and bool(controllers)


def _torch() -> Any:
  import torch

  return torch


def _joints(values: np.ndarray) -> np.ndarray:
  """float32[9]: zeros between the arm's joints, where they are fewer than the Panda's seven, and the two fingers'."""
  arm, fingers = values[:-2], values[-2:]
  return np.concatenate([arm, np.zeros(7 - len(arm), values.dtype), fingers])


def _pose(entity: Any) -> np.ndarray:
  pose = entity.pose
  return np.concatenate([pose.p, pose.q])


def _build(env_id: str, options: dict[str, Any], mesh_ratio: float | None, robot_assets: tuple[str, ...]) -> Any:
  """The bare environment: no time limit, no wrappers."""
  _torch().set_num_threads(1)
  import gymnasium
  import mani_skill.envs  # noqa: F401 - registers the environments

  if mesh_ratio is not None:
    lite.enable(mesh_ratio)
  check_assets(env_id, robot_assets)
  try:
    return gymnasium.make(env_id, **options).unwrapped
  except RuntimeError as error:
    text = str(error).lower()
    if any(word in text for word in ("rendering device", "vulkan", "vk::", "physical device")):
      raise SimulatorError(f"{_NO_DEVICE}\n(SAPIEN said: {error})") from error
    raise


def check_assets(env_id: str, robot: tuple[str, ...] = ()) -> None:
  """Raises where assets of an environment or its robot are missing, instead of ManiSkill's question on the terminal."""
  from mani_skill import ASSET_DIR
  from mani_skill.utils import assets
  from mani_skill.utils.registration import REGISTERED_ENVS

  needed = REGISTERED_ENVS[env_id].asset_download_ids if env_id in REGISTERED_ENVS else ()
  missing = []
  for name in (*(needed or ()), *robot):
    parts = assets.expand_data_group_into_individual_data_source_ids(name) if name in assets.DATA_GROUPS else [name]
    missing += [part for part in parts if not assets.is_data_source_downloaded(part)]
  if missing:
    commands = "\n".join(f"  python -m mani_skill.utils.download_asset {name} -y" for name in missing)
    raise SimulatorError(
      f"{env_id} needs assets that are not under {ASSET_DIR}: {', '.join(missing)}. Download them once with\n"
      f"{commands}\nor set MS_ASSET_DIR to the folder whose data/ holds them."
    )
