"""Episodes that differ from training's in one named way: the suites of `stare_jax.suites`, inside the worker.

`Perturbed` lies over a scene. A reset without a suite is the scene's own, bit for bit: what the last episode changed is
put back first. What an episode needs (a texture, noise, places to move the object to) is drawn at its reset, so that a
step costs what it always did.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from stare_jax import suites
from stare_jax.sims import SimulatorError, lite, textures
from stare_jax.sims.bridge import FRAME, Bridge, among, label_layer
from stare_jax.sims.lanczos import EVERYWHERE, Part
from stare_jax.sims.maniskill import ManiSkill

_CLEAR = 0.05  # metres between the tool and the bounding box of what is put elsewhere
_BESIDE = 0.03  # metres on the table between a distractor and everything else
_DROP = 5e-4  # metres from which another object settles
_AWAY = 100.0  # metres above the ground, where no camera looks
_ABOVE = 0.06  # metres that the tool stays above it, whatever the joints' angles
_TRIES = 200
_GAMMA = 2.2  # of sRGB, nearly
Range = tuple[float, float]


class Perturbed(ManiSkill):
  """What every scene can change. `reset` takes a suite beside the seed; None changes nothing."""

  TABLE = 0.0  # height of what the objects stand on, metres
  GAP = 0.08  # metres between the centres of two things on it

  _undo: tuple[Callable[[], None], ...] = ()  # puts back what the last episode changed
  _overlay: tuple[np.ndarray, float] | None = None  # a picture and how much of it is seen
  _noise: np.ndarray | None = None
  _move: tuple[int, float, np.ndarray] | None = None  # a control step, a least distance, and places (x, y) to try then

  def reset(self, seed: int, suite: dict[str, Any] | None = None) -> None:
    """The initial state that `seed` names, changed as `suite` (see `suites.for_worker`) says."""
    for undo in reversed(self._undo):
      undo()
    self._undo, self._overlay, self._noise, self._move = (), None, None, None
    super().reset(seed)
    self._suite, self._changed = suite, () if suite is None else (suite,)
    if suite is None:
      return
    self._rng = suites.generator(suite["name"], seed)
    for kind, ranges in suite["changes"].items():
      if kind != "instruction":  # which is the policy's matter
        getattr(self, f"_change_{kind}")(**ranges)

  def step(self, action: np.ndarray) -> None:
    """One control step; before it, the object moves where a suite says so, or in a later one if it cannot in this."""
    if self._move is not None and len(self._actions) >= self._move[0]:
      _, least, places = self._move
      here = self._body.entity.pose.p[:2]
      if self._put(places[np.linalg.norm(places - here, axis=1) >= least]):
        self._move = None
    super().step(action)

  def _set(self, thing: Any, name: str, value: Any) -> None:
    """Sets an attribute until the next reset."""
    before = getattr(thing, name)
    setattr(thing, name, value)
    self._undo = (*self._undo, lambda: setattr(thing, name, before))

  # ------------------------------------------------------------------------------------------------ what it shows

  def _picture(self) -> np.ndarray:
    image = self._drawn()
    if self._noise is None:
      return image
    import cv2

    here = textures.cut(self._noise, self._image_size, len(self._actions))
    return cv2.add(np.ascontiguousarray(image), here, dtype=cv2.CV_8U)

  def _drawn(self) -> np.ndarray:
    """The picture without what is added to all of it."""
    return super()._picture()

  def _overlaid(self, image: np.ndarray, foreground: np.ndarray, part: Part = EVERYWHERE) -> np.ndarray:
    """A part of a picture, uint8[h, w, 3], with the overlay over the pixels that are not 0 in uint8[h, w]."""
    import cv2

    picture, alpha = self._overlay
    return cv2.copyTo(cv2.addWeighted(image, 1 - alpha, picture[part], alpha, 0), foreground, image.copy())

  def _change_noise(self, sigma: Range) -> None:
    self._noise = textures.noise(self._rng, self._image_size, self._rng.uniform(*sigma))

  def _change_overlay(self, alpha: float) -> None:
    import cv2

    width, height = self._camera.width, self._camera.height
    square = cv2.resize(textures.texture(self._rng), (max(width, height),) * 2)
    self._overlay = np.ascontiguousarray(square[:height, :width]), alpha

  def _change_camera(self, azimuth: Range, elevation: Range) -> None:
    """Turns the camera about the point of the table that it looks at: about the vertical, and about its own left."""
    sideways, up = (np.deg2rad(self._either(limits)) for limits in (azimuth, elevation))
    camera = self._camera
    world = camera.entity.pose * camera.local_pose
    matrix = world.to_transformation_matrix().astype(np.float64)
    eye, forward, left = matrix[:3, 3], matrix[:3, 0], matrix[:3, 1]
    pivot = eye + forward * (self.TABLE - eye[2]) / forward[2]
    turn = _rotation(np.array([0.0, 0.0, 1.0]), sideways) @ _rotation(left, up)
    moved = np.eye(4)
    moved[:3, :3], moved[:3, 3] = turn @ matrix[:3, :3], pivot + turn @ (eye - pivot)
    self._set(camera, "local_pose", camera.entity.pose.inv() * type(world)(moved))

  def _projection(self) -> np.ndarray:
    """float64[3, 4]: (x, y, z, 1), metres, to pixels in homogeneous coordinates."""
    camera = self._camera
    world = (camera.entity.pose * camera.local_pose).to_transformation_matrix().astype(np.float64)
    axes = np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]) @ world[:3, :3].T  # SAPIEN looks along x, z is up
    return camera.get_intrinsic_matrix() @ np.concatenate([axes, -axes @ world[:3, 3:]], axis=1)

  def _in_view(self, point: np.ndarray) -> bool:
    u, v, depth = self._projection() @ np.append(point, 1.0)
    return depth > 0 and 0 <= u / depth <= self._camera.width and 0 <= v / depth <= self._camera.height

  def _change_light(self, dark: Range, bright: Range, tint: float) -> np.ndarray:
    """Multiplies every light by one colour, float64[3], and returns it."""
    import sapien.render

    strength = self._rng.uniform(*(dark if self._rng.random() < 0.5 else bright))
    colour = strength * self._rng.uniform(1 - tint, 1 + tint, 3)
    scene = self._env.scene.sub_scenes[0]
    self._set(scene.render_system, "ambient_light", np.array(scene.render_system.ambient_light) * colour)
    for entity in scene.get_entities():
      for light in entity.components:
        if isinstance(light, sapien.render.RenderLightComponent):
          self._set(light, "color", np.array(light.color) * colour)
    return colour

  def _change_colour(self) -> None:
    """Paints the object; the policy is told of the same colour (`suites.instruction`)."""
    colours = self._suite["colours"]
    colour = colours[suites.colour_index(self._suite["name"], self._seed, len(colours))]
    for material in _materials(self._object._objs[0]):
      if material.base_color_texture is not None:
        self._set(material, "base_color_texture", _on_card(np.full((4, 4, 3), np.rint(np.multiply(colour, 255)))))
      self._set(material, "base_color", [*np.power(colour, _GAMMA), 1.0])

  # --------------------------------------------------------------------------------------------- where things are

  def _change_arm(self, joint: Range, tool: Range) -> None:
    """Turns every joint of the arm, drawn again until the tool has moved far enough, not too far, and can be seen."""
    robot, usual, place = self._robot, self._robot.get_qpos(), self._tcp.pose.p
    for _ in range(_TRIES):
      qpos = usual.copy()
      qpos[:-2] += np.array([self._either(joint) for _ in qpos[:-2]])  # the last two are the fingers
      robot.set_qpos(qpos)
      here = self._tcp.pose.p
      far = tool[0] <= np.linalg.norm(here - place) <= tool[1]
      if far and here[2] >= self.TABLE + _ABOVE and self._in_view(here):
        self._env.agent.reset(init_qpos=qpos)
        return self._env.agent.controller.reset()  # it may hold a target of its own, and pull the arm back there
    raise self._nowhere("another pose of the arm")

  def _change_place(self) -> None:
    """Puts the object outside the inner rectangle of its region and inside the outer one."""
    region = self._suite["region"]
    places = self._rng.uniform(region["outer_low"], region["outer_high"], (_TRIES, 2))
    if not self._put(places[((places < region["low"]) | (places > region["high"])).any(axis=1)]):
      raise self._nowhere("a place for the object outside the range of training")

  def _nowhere(self, what: str) -> SimulatorError:
    return SimulatorError(f"{self._env_id}, suite {self._suite['name']}, seed {self._seed}: {_TRIES} draws found not "
                          f"{what}; change the suite's ranges or the task's region")

  def _change_move(self, step: tuple[int, int], least: float) -> None:
    region = self._suite["region"]
    at = int(self._rng.integers(step[0], step[1] + 1))
    self._move = at, least, self._rng.uniform(region["low"], region["high"], (_TRIES, 2))

  def _put(self, places: np.ndarray) -> bool:
    """Puts the object at the first of `places` float64[n, 2] that is clear of the tool and the goal, if there is one.

    Height and orientation stay; what belongs along with it moves as it does. One that is held stays where it is.
    """
    body = self._body.entity
    moving = [body, *(getattr(self._env, name)._objs[0] for name in self._suite["region"]["along"])]
    standing, box = self._standing(moving), _box(body)
    from_tool = lambda place: _outside(self._tcp.pose.p - [*(place - body.pose.p[:2]), 0.0], box)
    free = [p for p in places if _distance(p, standing) >= self.GAP and from_tool(p) >= _CLEAR]
    if not free or bool(self._is_grasping(self._object)):
      return False
    by, asleep = np.array([*(free[0] - body.pose.p[:2]), 0.0]), self._body.is_sleeping
    for entity in moving:
      entity.pose = type(entity.pose)(entity.pose.p + by, entity.pose.q)
    self._body.linear_velocity = self._body.angular_velocity = np.zeros(3)
    self._body.put_to_sleep() if asleep else self._body.wake_up()  # a round thing that lay still does so there, too
    return True

  def _standing(self, moving: Sequence[Any]) -> list[Any]:
    """The goal, if it is a thing that stands on the table and not one of `moving`: no object belongs into it."""
    import sapien.physx

    goal = None if self._goal is None else self._goal._objs[0]
    if goal is None or goal in moving:
      return []
    body = goal.find_component_by_type(sapien.physx.PhysxRigidBaseComponent)
    return [goal] if body is not None and body.collision_shapes else []

  def _change_distractor(self, half: Range) -> None:
    """Adds a box or a ball that nothing asks for, in the object's region, as far from everything as it takes."""
    import sapien

    rng, region, colours = self._rng, self._suite["region"], self._suite["colours"]
    ball = rng.random() < 0.4
    size = np.full(3, rng.uniform(*half)) if ball else rng.uniform(*half, 3)
    material = sapien.render.RenderMaterial(base_color=[*np.power(colours[rng.integers(len(colours))], _GAMMA), 1.0])
    others = [self._body.entity, self._tcp, *([] if self._goal is None else [self._goal._objs[0]])]
    boxes = [_box(e)[:, :2] for e in [*others, *(getattr(self._env, name)._objs[0] for name in region["along"])]]
    places, reach = rng.uniform(region["low"], region["high"], (_TRIES, 2)), float(np.linalg.norm(size[:2]))
    far = [min(_outside(place, box) for box in boxes) for place in places]
    if max(far) < reach:
      raise self._nowhere("a place for a distractor")
    place, angle = places[int(np.argmax(np.minimum(far, reach + _BESIDE)))], rng.uniform(-np.pi, np.pi) / 2
    builder = self._env.scene.sub_scenes[0].create_actor_builder()
    if ball:
      builder.add_sphere_collision(radius=size[0])
      builder.add_sphere_visual(radius=size[0], material=material)
    else:
      builder.add_box_collision(half_size=size)
      builder.add_box_visual(half_size=size, material=material)
    builder.set_initial_pose(sapien.Pose([*place, self.TABLE + size[2]], [np.cos(angle), 0, 0, np.sin(angle)]))
    self._set(self, "_distractor", builder.build(name="distractor"))
    self._undo = (*self._undo, self._distractor.remove_from_scene)

  _distractor: Any = None

  def _either(self, limits: Range) -> float:
    """A number of either sign whose size lies in `limits`."""
    return float(self._rng.uniform(*limits) * self._rng.choice((-1.0, 1.0)))


class Table(Perturbed):
  """The table-top scenes."""

  _labels = Bridge._labels  # which asks for nothing but the picture's layers

  def _needed(self) -> tuple[str, ...]:
    more = () if self._overlay is None else (label_layer(self._camera),)
    return *super()._needed(), *more

  def _drawn(self) -> np.ndarray:
    image = super()._drawn()
    if self._overlay is None:
      return image
    behind = [self._env.scene.actors[name]._objs[0].per_scene_id for name in ("table-workspace", "ground")]
    foreground = ~among(self._labels(), [0, *behind])
    return self._overlaid(np.ascontiguousarray(image), foreground)

  def _change_table(self) -> None:
    (top,) = (m for m in _materials(self._env.scene.actors["table-workspace"]._objs[0]) if m.base_color_texture)
    self._set(top, "base_color_texture", _on_card(textures.texture(self._rng)))


class Photographed(Perturbed, Bridge):
  """The SimplerEnv scenes: the photograph of the table changes with what lies on it."""

  TABLE, GAP = 0.868, 0.13  # a plate is wide
  # The table's top in the photograph, pixels of FRAME. The sink has no such plane: all of its photograph counts.
  OUTLINE = ((160, 74), (640, 214), (640, 480), (265, 480), (0, 332), (0, 180))

  def __init__(self, **options: Any):
    self._others: dict[str, Any] = {}  # what takes the object's place, by model: built once
    super().__init__(**options)

  def _composed(self, part: Part) -> np.ndarray:
    cut = super()._composed(part)
    return cut if self._overlay is None else self._overlaid(cut, self._mask[part], part)

  def _change_object(self) -> None:
    """Another object where the task's came to rest, which is kept above the camera until the next reset.

    The environment asks for both by the same name. What it measures of an object at a reset it is told of this one.
    """
    import torch

    env, scene, usual = self._env, self._env.scene.sub_scenes[0], self._robot.get_qpos()
    name, own, model = env.source_obj_name, self._object._objs[0], self._suite["model"]
    if model not in self._others:
      self._others[model] = self._built(model)
    other = self._others[model]
    entity, extent = other._objs[0], np.ptp([*env.model_db[model]["bbox"].values()], axis=0)
    along = own.pose.to_transformation_matrix()[:2, 0]  # the own one may have rolled: this one starts upright
    half = np.arctan2(along[1], along[0]) / 2
    place = [*own.pose.p[:2], self.TABLE + extent[2] / 2 + _DROP]
    entity.pose = type(own.pose)(place, [np.cos(half), 0, 0, np.sin(half)])
    entity.add_to_scene(scene)
    before = env.objs[name]
    self._undo = (*self._undo, entity.remove_from_scene, lambda: env.objs.update({name: before}))
    own.pose = type(own.pose)([0, 0, _AWAY])
    self._set(lite.render_body(own), "visibility", 0.0)
    self._set(self, "_lying", [thing for thing in self._lying if thing.entity != own])
    self._body.linear_velocity = self._body.angular_velocity = np.zeros(3)
    self._body.put_to_sleep()
    env.objs[name] = other
    self._set(self, "_object", other)
    self._set(self, "_body", other._bodies[0])
    self._body.linear_velocity = self._body.angular_velocity = np.zeros(3)
    self._body.wake_up()
    env._settle(0.5)
    if np.linalg.norm(self._body.linear_velocity) > 1e-3 or np.linalg.norm(self._body.angular_velocity) > 1e-2:
      env._settle(6)  # as the scene itself settles
    env.agent.reset(init_qpos=usual)
    env.agent.controller.reset()
    place, turn = other.pose.p, other.pose.to_transformation_matrix()[0, :3, :3]
    env.episode_source_obj_xyz_after_settle = env.episode_obj_xyzs_after_settle[name] = place
    env.episode_source_obj_bbox_world = turn @ torch.tensor(extent, dtype=torch.float32)

  def _built(self, model: str) -> Any:
    """An actor that is in no scene, and in no list of those that the environment keeps."""
    import sapien

    other, scene = self._env._build_actor_helper(model, initial_pose=sapien.Pose()), self._env.scene
    scene.remove_from_state_dict_registry(other)
    del scene.actors[model]
    if self._mesh_ratio is not None:
      lite.share_vertices(other._objs[0])
    other._objs[0].remove_from_scene()
    return other

  def _kept(self) -> list[int]:
    return super()._kept() + ([] if self._distractor is None else [self._distractor.per_scene_id])

  def _change_light(self, dark: Range, bright: Range, tint: float) -> np.ndarray:
    colour = super()._change_light(dark, bright, tint)
    if self._draw:
      lit = self._background * np.power(colour, 1 / _GAMMA)
      self._set(self, "_background", np.clip(lit, 0, 255).astype(np.uint8))
    return colour

  def _change_camera(self, azimuth: Range, elevation: Range) -> None:
    """The photograph is what the table's plane shows to the camera where it is now."""
    import cv2

    before = self._onto_image()
    super()._change_camera(azimuth, elevation)
    if self._draw:
      warp = self._onto_image() @ np.linalg.inv(before)
      moved = cv2.warpPerspective(self._background, warp, self._frame, borderMode=cv2.BORDER_REFLECT_101)
      self._set(self, "_background", moved)

  def _onto_image(self) -> np.ndarray:
    """float64[3, 3]: the table's (x, y, 1), metres, to pixels in homogeneous coordinates."""
    return self._projection() @ np.array([[1, 0, 0], [0, 1, 0], [0, 0, self.TABLE], [0, 0, 1]])

  def _change_table(self) -> None:
    """A texture in perspective on the table, under the photograph's light; half of it over all of the sink."""
    import cv2

    texture, sink = textures.texture(self._rng), self._env.scene_setting == "sink"
    if not self._draw:
      return
    scale = np.diag([0.5 / textures.SIZE, 0.5 / textures.SIZE, 1.0])  # a texture is half a metre wide
    turned = np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    laid = cv2.warpPerspective(texture, self._onto_image() @ scale @ turned, self._frame, borderMode=cv2.BORDER_WRAP)
    photograph = self._background
    mask = np.ones(photograph.shape[:2], np.uint8)
    if not sink:
      corners = np.array(self.OUTLINE) * np.divide(self._frame, FRAME)
      mask = cv2.fillPoly(np.zeros_like(mask), [np.rint(corners).astype(np.int32)], 1)
    grey = photograph.mean(axis=2, keepdims=True)
    lit = np.clip(laid * (grey / grey[mask > 0].mean()), 0, 255)
    share = (0.5 if sink else 1.0) * mask[..., None]
    self._set(self, "_background", (photograph * (1 - share) + lit * share).astype(np.uint8))


def _materials(entity: Any) -> list[Any]:
  """Every material that an entity is drawn with."""
  shapes = lite.render_body(entity).render_shapes
  return [part.material for shape in shapes for part in getattr(shape, "parts", (shape,))]


def _on_card(picture: np.ndarray) -> Any:
  """uint8[H, W, 3], sRGB, as the renderer's texture."""
  import sapien.render

  opaque = np.concatenate([picture, np.full((*picture.shape[:2], 1), 255)], axis=-1).astype(np.uint8)
  return sapien.render.RenderTexture2D(opaque, "R8G8B8A8Unorm", mipmap_levels=4, srgb=True)


def _distance(place: np.ndarray, entities: Sequence[Any]) -> float:
  """Metres on the table from (x, y) to the nearest of `entities`; infinite where there are none."""
  return min((float(np.linalg.norm(place - entity.pose.p[:2])) for entity in entities), default=np.inf)


def _box(entity: Any) -> np.ndarray:
  """float64[2, 3], metres: opposite corners of what an entity takes of the world; else its place, twice."""
  import sapien.physx

  body = entity.find_component_by_type(sapien.physx.PhysxRigidBaseComponent)
  return np.array(body.compute_global_aabb_tight() if body and body.collision_shapes else [entity.pose.p] * 2)


def _outside(place: np.ndarray, box: np.ndarray) -> float:
  """Metres from a place to the nearest point of a box of two corners; 0 inside."""
  return float(np.linalg.norm(place - np.clip(place, *box)))


def _rotation(axis: np.ndarray, angle: float) -> np.ndarray:
  """float64[3, 3]: by `angle` radians about a unit axis (Rodrigues)."""
  x, y, z = axis
  cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
  return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
