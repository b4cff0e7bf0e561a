"""The SimplerEnv scenes of ManiSkill3: a WidowX on the Bridge data set's tables, seen through a photograph.

What differs from the table-top scenes: the tool is the link between the fingers, the two objects are found by role,
the camera is the data set's own, and everything but the robot and the objects is replaced by a photograph of the real
table ("green screen"). An episode's seed decodes to its whole start state, see `Bridge.starts`. Runs in the worker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import numpy as np

from stare_jax.sims import lite
from stare_jax.sims.lanczos import EVERYWHERE, Background, Part
from stare_jax.sims.maniskill import _COMMON, ManiSkill, rgb

_CAMERA = "3rd_view_camera"
_TOGETHER = "PositionSegmentation"  # a layer: x, y, z and the entity
_MANY = 2000  # triangles; a body of fewer is drawn in less time than its layers are fetched and laid over the others'
_NEARLY = 1e-4  # metres
_GAPS = {"PutEggplantInBasketScene-v1": 0.06, "PutSpoonOnTableClothInScene-v1": 0.02}  # metres; see `Bridge._success`
FRAME = (640, 480)  # width and height of the data set's frames, pixels
FULL_FROM = 224  # pixels; from this image size on the frame is drawn whole and then resized, as OpenVLA was trained
_STRIP, _GAP = 120, 64  # rows and columns of a frame; smaller ones leave little more out, and each part costs two calls
_INTRINSICS = np.array([[623.588, 0, 319.501], [0, 623.588, 239.545], [0, 0, 1]])  # of a frame of FRAME


@dataclasses.dataclass
class _Lying:
  """What is drawn once for as long as it lies still."""

  entity: Any
  lay: bytes | None = None  # where it was in the last picture
  over: tuple[Part, dict[str, np.ndarray]] | None = None  # where it is seen, and its layers there


class Bridge(ManiSkill):
  """A `worker.Environment` over one SimplerEnv scene.

  Options of a task's env_options beside ManiSkill's own:
    jitter: (metres of the object, radians about the vertical, metres of the target); how far the starts that are not
      the published ones lie from them at most.
  """

  ROBOT_ASSETS = ("widowx250s",)

  def __init__(self, *, env_options: dict[str, Any], image_size: int, **options: Any):
    env_options = dict(env_options)
    self._jitter = env_options.pop("jitter")
    self._frame = FRAME if image_size >= FULL_FROM else (2 * image_size, 2 * image_size)
    self._published: tuple[np.ndarray, np.ndarray] | None = None
    super().__init__(env_options=env_options, image_size=image_size, **options)

  def starts(self) -> tuple[np.ndarray, np.ndarray]:
    """The published start states: positions float64[n, 2, 3] and quaternions float64[n, 2, 4] of object and target.

    In ManiSkill's order, in which the orientation varies fastest: start i is positions i // orientations and
    orientation i % orientations.
    """
    if self._published is None:
      places, turns = (np.asarray(x, np.float64) for x in (self._env.xyz_configs, self._env.quat_configs))
      self._published = np.repeat(places, len(turns), axis=0), np.tile(turns, (len(places), 1, 1))
    return self._published

  def _start(self, seed: int) -> dict[str, Any]:
    """Seeds below the number of published starts are those; any other one is a published start, displaced by chance.

    The environment reads its start from a table by episode id; it is given a table of this one start.
    """
    import torch

    place, turn = decode(seed, *self.starts(), self._jitter)
    self._env.xyz_configs = torch.tensor(place[None], dtype=torch.float32)
    self._env.quat_configs = torch.tensor(turn[None], dtype=torch.float32)
    return dict(episode_id=torch.tensor([0]))

  def step(self, action: np.ndarray) -> None:
    """float32[7]: metres and radians in the robot's base frame, added to the controller's target; gripper.

    The gripper is open (above 0) or closed, as in the Bridge data set, whatever lies between.
    """
    super().step(np.append(action[:6], np.float32(1 if action[6] > 0 else -1)))

  # --------------------------------------------------------------------------------------------------- the scene

  def _arguments(self, camera: tuple[Any, Any, float] | None, shader: str) -> dict[str, Any]:
    width, height = self._frame
    scale = np.array([[width / FRAME[0]], [height / FRAME[1]], [1.0]])
    sensor = dict(width=width, height=height, intrinsic=_INTRINSICS * scale, shader_pack=shader)
    return _COMMON | dict(
      obs_mode="rgb+segmentation",  # the only one that the scenes allow; `_bind` turns it off
      control_mode="arm_pd_ee_target_delta_pose_align2_gripper_pd_joint_pos",
      sensor_configs={_CAMERA: sensor},
    )

  def _bind(self) -> None:
    self._env._obs_mode = "none"  # a reset need not draw what nobody reads
    super()._bind()
    self._behind, self._replaced, self._lying = None, [], []
    if self._mesh_ratio is not None:
      self._lighten()
    if self._draw:
      self._background = _photograph(self._env.rgb_overlay_paths[_CAMERA], self._frame)

  def _lighten(self) -> None:
    """Draws nothing of what the photograph replaces; the sink, which can hide the eggplant, once for its depth.

    And an object or a goal of many triangles, the spoon and the towel, once for as long as it lies still. Both where
    the shader draws everything at once: another's depths may not be those of what shines through.
    """
    bodies = [entity for entity in self._env.scene.sub_scenes[0].entities if lite.render_body(entity)]
    for entity in bodies:
      lite.share_vertices(entity)
    arena = self._env.scene.actors["arena"]._objs[0]
    lite.show(arena, False)
    layers = {*self._camera.get_picture_names()} if self._draw else set()
    if lite.DEPTH not in layers or not layers & {lite.ENTITY, _TOGETHER}:
      return
    kept = self._kept()
    self._replaced = [_Lying(entity) for entity in bodies if entity != arena and entity.per_scene_id not in kept]
    for thing in self._replaced:
      lite.show(thing.entity, False)
    width, height = self._frame
    self._behind = np.ones((height, width), np.float32)
    things = (thing for thing in bodies if thing in (self._object._objs[0], self._goal._objs[0]))
    self._lying = [_Lying(e) for e in things if e.per_scene_id in kept and lite.triangles(e) >= _MANY]

  _replaced: list[_Lying]  # drawn once for their depth, for as long as neither they move nor the camera
  _behind: np.ndarray | None  # float32[H, W]: the least of these depths, 1 where there is none; None: labels tell

  def _look_behind(self) -> None:
    """Draws the depth of what has moved, or what the camera sees from elsewhere.

    What lies behind the sink is told by a comparison, not by drawing it: 16 of 28 ms, in software at 640 x 480.
    """
    camera = [part for pose in (self._camera.entity.pose, self._camera.local_pose) for part in (pose.p, pose.q)]
    moved = []
    for thing in self._replaced:
      where = b"".join(part.tobytes() for part in (*camera, thing.entity.pose.p, thing.entity.pose.q))
      if where != thing.lay:
        thing.lay, thing.over = where, (EVERYWHERE, self._drawn_alone(thing.entity))
        moved.append(thing)
    if moved:
      self._behind = np.minimum.reduce([thing.over[1][lite.DEPTH] for thing in self._replaced])

  def _drawn_alone(self, entity: Any) -> dict[str, np.ndarray]:
    """The layers of a picture of nothing but `entity`."""
    entities = [e for scene in self._env.scene.sub_scenes for e in scene.entities]
    bodies = [(e == entity, body) for e in entities if (body := lite.render_body(e))]
    before = [body.visibility for _, body in bodies]
    for seen, body in bodies:
      body.visibility = float(seen)
    super().start_picture()
    layers = {name: self._camera.get_picture(name) for name in (self._layer, lite.DEPTH)}
    self._asked = False  # this picture is not the state's
    for (_, body), visibility in zip(bodies, before, strict=True):
      body.visibility = visibility
    return layers

  # ---------------------------------------------------------------------------------------------- what lies still

  _lying: list[_Lying]  # in the order in which they are drawn

  def start_picture(self) -> None:
    """The spoon and the towel are most of what there is to draw there, and seldom move: they are laid over the rest."""
    self._look_behind()
    for thing in self._lying:
      self._look_at(thing)
    super().start_picture()

  def _look_at(self, thing: _Lying) -> None:
    """Has it drawn with everything else, unless it lies where it lay in the last picture."""
    pose, body = thing.entity.pose, lite.render_body(thing.entity)
    lies = pose.p.tobytes() + pose.q.tobytes()
    if lies != thing.lay:
      thing.lay, thing.over = lies, None
      body.visibility = 1
    elif thing.over is None:
      thing.over = self._seen_alone(thing.entity)
      body.visibility = 0

  def _seen_alone(self, entity: Any) -> tuple[Part, dict[str, np.ndarray]]:
    import cv2

    layers = self._drawn_alone(entity)
    x, y, width, height = cv2.boundingRect(cv2.compare(layers[lite.DEPTH], 1.0, cv2.CMP_LT))
    part = slice(y, y + height), slice(x, x + width)
    return part, {name: layer[part].copy() for name, layer in layers.items()}

  def fetch_picture(self) -> None:
    new = self._layers is None
    super().fetch_picture()
    for thing in self._lying:
      if new and thing.over is not None:
        part, over = thing.over
        lay_over({name: layer[part] for name, layer in self._layers.items()}, over)

  def _before_start(self) -> None:
    """The start state settles in physics steps, as in a scene just built: bodies awake, the robot as it is loaded.

    Where the last episode left the arm it could touch what settles now.
    """
    for thing in self._lying:
      thing.lay = None  # it may lie there in another light, before another camera
    self._wake()
    robot = self._env.agent.robot
    articulation = robot._objs[0]
    articulation.set_root_pose(robot.initial_pose.sp)
    articulation.set_qpos(np.zeros_like(articulation.get_qpos()))
    articulation.set_qvel(np.zeros_like(articulation.get_qvel()))
    for joint in articulation.get_active_joints():
      joint.set_drive_target(0.0)
      joint.set_drive_velocity_target(0.0)

  def _after_start(self) -> None:
    """Nothing: a body that fell asleep while it settled stays so."""

  def _tool_link(self, agent: Any) -> Any:
    return agent.robot.links_map["ee_gripper_link"]

  def _actor(self, name: str) -> Any:
    roles = {"source": self._env.source_obj_name, "target": self._env.target_obj_name}
    return self._env.objs[roles[name]]

  def _success(self) -> Any:
    """The scene's own test, which takes 0.9 ms, where it may go either way; elsewhere where the object is decides.

    It asks for the centres' distance, seen from above, to be at most half the diagonal of the target's box and 3 mm;
    for the object to be higher, by no more than half of both heights and a gap; and in scenes not in `_GAPS` for
    contact.
    """
    away = self._body.entity.pose.p - self._goal._objs[0].pose.p
    boxes = self._env.episode_target_obj_bbox_world, self._env.episode_source_obj_bbox_world
    target, thing = (box.numpy() / 2 for box in boxes)
    gap = _GAPS.get(self._env_id, np.inf)
    room = np.hypot(*target[:2]) + 0.003 - np.hypot(*away[:2]), away[2], target[2] + thing[2] + gap - away[2]
    if abs(min(room)) < _NEARLY or (min(room) > 0 and self._env_id not in _GAPS):
      return super()._success()
    return min(room) > 0

  # ------------------------------------------------------------------------------------------------ what it shows

  def _needed(self) -> tuple[str, ...]:
    """And depths where something is hidden or laid over; else the colour's fourth number says what is drawn at all."""
    if self._behind is None:
      return *super()._needed(), label_layer(self._camera)
    flat = self._layer == lite.COLOUR and not self._replaced and all(thing.over is None for thing in self._lying)
    return super()._needed() if flat else (*super()._needed(), lite.DEPTH)

  def _picture(self) -> np.ndarray:
    """The robot and the objects before the photograph: the frame, resized where it shows more than the photograph.

    Resizing is the largest part of a picture beside the drawing.
    """
    self._finish()
    self._mask = self._seen()
    if self._still is None or self._still.frame is not self._background:
      self._still = Background(self._background, self._image_size)
    return self._still.resized(self._composed, busy(self._mask))

  _still: Background | None = None

  def _seen(self) -> np.ndarray:
    """uint8[H, W]: 255 where the last picture shows what the photograph does not replace, else 0."""
    import cv2

    if self._behind is None:
      return among(self._labels(), self._kept())
    if lite.DEPTH not in self._layers:
      return cv2.extractChannel(self._layers[self._layer], 3)
    return cv2.compare(self._layers[lite.DEPTH], self._behind, cv2.CMP_LT)

  def _composed(self, part: Part) -> np.ndarray:
    """uint8[h, w, 3]: a part of the frame, in which `_mask` says where the photograph is hidden."""
    import cv2

    return cv2.copyTo(rgb(self._layers[self._layer][part]), self._mask[part], self._background[part].copy())

  def _labels(self) -> np.ndarray:
    """[H, W]: the entity that each pixel of the last picture shows, in a type that `among` can compare."""
    import cv2

    name = label_layer(self._camera)
    found = self._layers[name]
    if name == _TOGETHER:
      return cv2.extractChannel(found, 3)
    return (found if name == lite.ENTITY else found[..., 1]).astype(np.int32)

  def _kept(self) -> list[int]:
    """Labels of what the photograph does not replace; an entity gets a new one in every new scene."""
    links = [link._objs[0].entity for link in self._env.agent.robot.get_links()]
    objects = [self._env.objs[name]._objs[0] for name in self._env.objects_excluded_from_greenscreening]
    return [entity.per_scene_id for entity in (*links, *objects)]


def lay_over(layers: dict[str, np.ndarray], over: dict[str, np.ndarray]) -> None:
  """Writes into `layers`, [H, W, ...] each, what the renderer would have drawn with what was drawn alone in `over`.

  It keeps what is nearer, and of two at the same depth the one that it draws later: that is `over`, as the robot is
  drawn first. (A distractor is drawn last, and a towel that moves after a spoon that does not. In the rare pixel where
  such a thing is as far as `over`, `over` is seen.)
  """
  import cv2

  if over[lite.DEPTH].size:  # else it is out of sight
    seen = cv2.compare(over[lite.DEPTH], layers[lite.DEPTH], cv2.CMP_LE)
    for name, layer in layers.items():
      cv2.copyTo(over[name], seen, layer)


def label_layer(camera: Any) -> str:
  """Name of the layer in which the camera's shader says what a pixel shows."""
  return next(name for name in (lite.ENTITY, _TOGETHER, "Segmentation") if name in camera.get_picture_names())


def among(labels: np.ndarray, wanted: Iterable[int]) -> np.ndarray:
  """uint8[H, W]: 255 where int16 or int32[H, W] is one of `wanted`, else 0.

  One comparison for each run of successive numbers, of which there are two or three: a table to look every pixel up in
  takes 1 ms longer.
  """
  import cv2

  numbers = np.unique(list(wanted))
  mask = np.zeros(labels.shape, np.uint8)
  for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1):
    mask |= cv2.inRange(labels, int(run[0]), int(run[-1]))
  return mask


def busy(mask: np.ndarray) -> list[Part]:
  """Parts that hold every pixel of uint8[H, W] that is not 0: in each strip of rows the columns without wide gaps.

  An arm lies across the frame, the target elsewhere, and most of one box around all of it would be empty.
  """
  import cv2

  parts = []
  for top in range(0, len(mask), _STRIP):
    strip = mask[top : top + _STRIP]
    columns = np.flatnonzero(strip.max(axis=0))
    for group in np.split(columns, np.flatnonzero(np.diff(columns) > _GAP) + 1):
      if group.size:
        left, right = int(group[0]), int(group[-1]) + 1
        _, y, _, height = cv2.boundingRect(strip[:, left:right])
        parts.append((slice(top + y, top + y + height), slice(left, right)))
  return parts


def decode(
  seed: int, places: np.ndarray, turns: np.ndarray, jitter: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
  """The start state of a seed: positions float64[2, 3] and quaternions float64[2, 4] of object and target.

  Args:
    places, turns: the published starts, as `Bridge.starts` gives them.
    jitter: see `Bridge`; seeds from the number of published starts on are start seed % n, displaced by chance.
  """
  index = seed % len(places)
  place, turn = places[index].copy(), turns[index].copy()
  if seed >= len(places):
    rng, (near, angle, near_target) = np.random.default_rng(seed), jitter
    place[0, :2] += rng.uniform(-near, near, 2)
    place[1, :2] += rng.uniform(-near_target, near_target, 2)
    turn[0] = _turned(turn[0], rng.uniform(-angle, angle))
  return place, turn


def _turned(quaternion: np.ndarray, angle: float) -> np.ndarray:
  """float64[4] of a quaternion wxyz, turned by `angle` radians about the vertical."""
  w, x, y, z = quaternion
  c, s = np.cos(angle / 2), np.sin(angle / 2)
  return np.array([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w])


def _photograph(path: str, frame: tuple[int, int]) -> np.ndarray:
  """uint8[H, W, 3]: the real scene, in the size of the frame."""
  import cv2

  image = cv2.cvtColor(cv2.imread(path), cv2.COLOR_BGR2RGB)
  smaller = frame[0] < image.shape[1]
  return cv2.resize(image, frame, interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)
