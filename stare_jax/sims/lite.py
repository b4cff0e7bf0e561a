"""Cheap visuals for software rendering: a decimated Panda, a two-triangle floor, no pass over a sky that is not there.

Software rendering of the table-top scenes is bound by vertices: the Panda's visual meshes hold 135 thousand triangles,
the floor 20 thousand. `enable` makes ManiSkill draw a decimated copy; collision shapes are untouched. `share_vertices`
leaves out those that a mesh file repeats. Large pictures are bound by pixels, and `register_bare` offers shaders that
touch each only once. Panda and shaders are files, written once per user and version to $XDG_CACHE_HOME/stare_jax
(~/.cache/stare_jax) and reused by every worker. Runs in the worker process.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.metadata
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np

from stare_jax.sims import SimulatorError

BARE = "bare"  # the shader pack of `register_bare`, and its layers beside DEPTH:
COLOUR, ENTITY = "ColorRaw", "Entity"  # uint8[H, W, 4]; float32[H, W], the number of what a pixel shows, 0 for nothing
DEPTH = "GbufferDepth"  # of other shader packs, too; float32[H, W], what the renderer compares, 1 for nothing
_PANDA, _SHADERS = 1, 3  # versions of the two recipes below: a change of one makes a new cache folder
_MIN_FACES = 60
_CREASE = 35.0  # degrees; sharper edges keep flat shading


def cache_root() -> pathlib.Path:
  """The per-user cache folder; where it cannot be written, one of the user's among the temporary files."""
  base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
  root = pathlib.Path(base) / "stare_jax"
  with contextlib.suppress(OSError):
    root.mkdir(parents=True, exist_ok=True)
  if os.access(root, os.W_OK):
    return root
  root = pathlib.Path(tempfile.gettempdir()) / f"stare_jax-{os.getuid()}"
  root.mkdir(mode=0o700, exist_ok=True)
  if root.stat().st_uid != os.getuid():
    raise PermissionError(f"{root} belongs to another user: set XDG_CACHE_HOME to a folder of yours")
  return root


def panda_folder(ratio: float) -> pathlib.Path:
  """A copy of the Panda's description whose visual meshes keep `ratio` of their triangles; built at the first call."""
  version = importlib.metadata.version("mani_skill")
  return _cached(f"panda-lite{_PANDA}-maniskill{version}-{ratio:g}", lambda folder: _write_panda(folder, ratio))


def _cached(name: str, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """The folder of that name in the cache, filled by `write` at the first call.

  Safe under concurrent workers (one builds, the others wait) and under kill -9 (a half-written copy is never seen).
  """
  root = cache_root()
  target = root / name
  if target.is_dir():
    return target
  root.mkdir(parents=True, exist_ok=True)
  with open(root / f"{name.partition('-')[0]}.lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not target.is_dir():
      for stale in root.glob(f".{target.name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
      building = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=root))
      write(building)
      building.rename(target)
  return target


def _write_panda(out: pathlib.Path, ratio: float) -> None:
  import mani_skill

  source = pathlib.Path(mani_skill.__file__).parent / "assets/robots/panda"
  shutil.copytree(source / "franka_description", out / "franka_description")
  for name in ("panda_v2.urdf", "panda_v2.srdf"):
    shutil.copy(source / name, out)
  for path in sorted((out / "franka_description/meshes/visual").glob("*.glb")):
    _decimate(path, ratio)


def _decimate(path: pathlib.Path, ratio: float) -> None:
  """Rewrites one mesh file in place; materials stay, textures are not used by these meshes."""
  import trimesh
  from trimesh.visual import TextureVisuals

  scene, lighter = trimesh.load(path), trimesh.Scene()
  for node in scene.graph.nodes_geometry:
    transform, name = scene.graph[node]
    part = scene.geometry[name]
    mesh = trimesh.Trimesh(part.vertices.copy(), part.faces.copy(), process=False)
    mesh.apply_transform(transform)
    mesh.merge_vertices(merge_norm=True, merge_tex=True)
    if len(mesh.faces) > _MIN_FACES:
      faces = max(_MIN_FACES, int(len(mesh.faces) * ratio))
      mesh = mesh.simplify_quadric_decimation(face_count=faces, aggression=4)
    mesh = trimesh.graph.smooth_shade(mesh, angle=np.deg2rad(_CREASE))
    mesh.visual = TextureVisuals(material=part.visual.material)
    mesh.vertex_normals  # noqa: B018 - computed and cached here, so that the export writes them
    lighter.add_geometry(mesh, geom_name=name, node_name=node)
  lighter.export(path)


def register_bare() -> None:
  """Makes ManiSkill know the shader pack `BARE`: SAPIEN's "minimal" without what no picture of ours needs.

  The second pass of "minimal" goes over every pixel and puts the sky behind what the first one drew: black where there
  is black, as none of the scenes has a sky. In software it is half of what drawing 640 x 480 pixels takes. Its first
  pass adds the light that the sky sheds, which is 0, at the price of three looks into a texture for every pixel of
  every triangle; and it writes where in space a pixel lies beside the entity that it shows, in eight bytes. `ENTITY`
  has four.
  """
  import sapien.render
  from mani_skill.render import shaders

  version = importlib.metadata.version("sapien")
  folder = str(_cached(f"shaders-lite{_SHADERS}-sapien{version}", _write_shaders) / BARE)
  shaders.PREBUILT_SHADER_CONFIGS[BARE] = shaders.ShaderConfig(
    shader_pack=folder,
    texture_names={COLOUR: ["rgb"], ENTITY: ["segmentation"]},
    texture_transforms={
      COLOUR: lambda layer: {"rgb": layer[..., :3]},
      ENTITY: lambda layer: {"segmentation": layer[..., None].short()},
    },
  )
  sapien.render.set_picture_format(COLOUR, "r8g8b8a8unorm")  # as ManiSkill does for "minimal"
  sapien.render.set_picture_format(ENTITY, "r32sfloat")  # SAPIEN cannot draw one integer


def _write_shaders(out: pathlib.Path) -> None:
  import sapien

  source = pathlib.Path(sapien.__file__).parent / "vulkan_shader"
  shutil.copytree(source / "common", out / "common")  # which the pack's files include
  shutil.copytree(source / "minimal", out / BARE, ignore=shutil.ignore_patterns("composite*"))
  path = out / BARE / "gbuffer.frag"
  path.write_text(shortened(path.read_text()))


_SHORTER = (  # of minimal/gbuffer.frag: what it does, how that is written, what takes its place
  (
    "adds the light of the sky",
    r"  vec3 wnormal = [^;]*;\s*color \+= diffuseIBL\([^;]*;\s*color \+= specularIBL\([^;]*;\n",
    "",
  ),
  ("declares a layer of positions", r"out ivec4 outPositionSegmentation;", f"out vec4 out{ENTITY};"),
  # The fourth number is how much of it is seen: layers of floats are blended.
  ("writes it", r"outPositionSegmentation = .*;", f"out{ENTITY} = vec4(inSegmentation[1], 0, 0, 1);"),
)


def shortened(shader: str) -> str:
  """The source of SAPIEN's fragment shader as `register_bare` says: without a sky it draws the same colours."""
  for what, written, instead in _SHORTER:
    shader, found = re.subn(written, instead, shader)
    if found != 1:
      raise SimulatorError(
        f"SAPIEN's minimal/gbuffer.frag {what} {found} times, expected once; "
        f'fit {__name__}._SHORTER to this version of it, or draw with shader="minimal"'
      )
  return shader


def render_body(entity: Any) -> Any:
  """What the renderer draws of a SAPIEN entity, or None."""
  import sapien.render

  return entity.find_component_by_type(sapien.render.RenderBodyComponent)


def triangles(entity: Any) -> int:
  """How many an entity is drawn with; primitives count as none."""
  shapes = () if (body := render_body(entity)) is None else body.render_shapes
  return sum(len(part.triangles) for shape in shapes for part in getattr(shape, "parts", ()))


def share_vertices(entity: Any) -> None:
  """Has an entity's meshes drawn from one vertex where their files repeat it for every triangle that meets there.

  The WidowX, the towel and the spoon come with three vertices for each triangle, and a shader runs for each of them:
  87 thousand in that scene, of which 38 thousand differ in place, normal or texture coordinates. The pictures are the
  same to the byte. Bodies that hold anything but meshes stay as they are.
  """
  import sapien.render

  body = render_body(entity)
  if not all(isinstance(shape, sapien.render.RenderShapeTriangleMesh) for shape in body.render_shapes):
    return
  lighter = sapien.render.RenderBodyComponent()
  for shape in body.render_shapes:
    for part in shape.parts:
      arrays = part.vertices, part.get_vertex_normal(), part.get_vertex_uv()
      first, faces = _shared(np.concatenate(arrays, axis=1), part.triangles)
      places, normals, uvs = (array[first] for array in arrays)
      mesh = sapien.render.RenderShapeTriangleMesh(places, faces, normals, uvs, part.material)
      mesh.local_pose, mesh.scale, mesh.front_face = shape.local_pose, shape.scale, shape.front_face
      lighter.attach(mesh)
  lighter.visibility, lighter.shading_mode = body.visibility, body.shading_mode
  entity.remove_component(body)
  entity.add_component(lighter)


def _shared(vertices: np.ndarray, triangles: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where each vertex, a row of float32[n, d], comes first, in order; and uint32[m, 3] triangles of those vertices."""
  rows = np.ascontiguousarray(vertices).view(np.dtype((np.void, vertices.itemsize * vertices.shape[1])))[:, 0]
  _, first, which = np.unique(rows, return_index=True, return_inverse=True)
  order = np.argsort(first)
  new = np.argsort(order)  # of each distinct vertex, its place among `first` in order
  return first[order], new[which][triangles].astype(np.uint32)


def show(entity: Any, visible: bool) -> None:
  """Puts an entity into every picture or takes it out; its collision shapes stay."""
  if (body := render_body(entity)) is not None:
    body.visibility = float(visible)


def enable(ratio: float) -> None:
  """Makes the environments built from here on in this process draw the light Panda and floor."""
  from mani_skill.agents.robots import Panda

  Panda.urdf_path = str(panda_folder(ratio) / "panda_v2.urdf")
  builder = importlib.import_module("mani_skill.utils.scene_builder.table.scene_builder")
  builder.build_ground = _build_ground


def _build_ground(scene, floor_width: int = 100, altitude: float = 0.0, name: str = "ground"):
  """ManiSkill's floor as one quad: same collision plane, texture and texture coordinates."""
  import sapien
  import sapien.render

  ground = importlib.import_module("mani_skill.utils.building.ground")
  texture = os.path.join(os.path.dirname(ground.__file__), "assets/grid_texture.png")
  builder = scene.create_actor_builder()
  builder.add_plane_collision(sapien.Pose(p=[0, 0, altitude], q=[0.7071068, 0, -0.7071068, 0]))
  builder.initial_pose = sapien.Pose()
  actor = builder.build_static(name=name)
  if not scene.can_render():
    return actor
  half, tile = floor_width / 2, 4.0  # metres; one texture tile is 4 m wide
  corners = np.array([[-half, -half], [half, -half], [-half, half], [half, half]])
  vertices = np.concatenate([corners, np.full((4, 1), altitude)], axis=1)
  material = sapien.render.RenderMaterial()
  material.base_color_texture = sapien.render.RenderTexture2D(filename=texture, mipmap_levels=4)
  shape = sapien.render.RenderShapeTriangleMesh(
    vertices=vertices,
    triangles=np.array([[0, 1, 2], [1, 3, 2]]),
    normals=np.tile([0.0, 0.0, 1.0], (4, 1)),
    uvs=(corners * (floor_width / tile) + half) / floor_width,
    material=material,
  )
  for entity in actor._objs:
    body = sapien.render.RenderBodyComponent()
    body.attach(shape)
    entity.add_component(body)
  return actor
