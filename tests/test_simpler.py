"""SimplerEnv's own package under its own Python, against itself: marker simpler, see docs/simpler_env.md."""

from __future__ import annotations

import os
import pathlib
import subprocess
import types

import numpy as np
import pytest

from stare_jax import sims, stages, tasks
from stare_jax.episode import unpack_signals
from stare_jax.sims import lanczos, simpler
from stare_jax.tasks import experts

PYTHON = os.environ.get("STARE_JAX_SIMPLER_PYTHON", "")
NAMES = tasks.names("simpler")


def test_rotations_are_simplerenvs(rng):
  """Roll, pitch and yaw about fixed axes, as a rotation vector; by way of matrices here."""
  turn = lambda axis, angle: experts.from_rotation_vector(angle * np.eye(3)[axis])
  for angles in (*rng.uniform(-0.3, 0.3, (20, 3)), *rng.uniform(-np.pi, np.pi, (20, 3)), np.zeros(3)):
    roll, pitch, yaw = angles
    got = simpler.rotation_vector(angles)
    matrix = turn(2, yaw) @ turn(1, pitch) @ turn(0, roll)
    np.testing.assert_allclose(experts.from_rotation_vector(got), matrix, atol=1e-9)
    assert np.linalg.norm(got) <= np.pi + 1e-9


def test_files_without_which_sapien_says_nothing(tmp_path):
  """A scene without its table would be built all the same: everything falls, and a benchmark reads 0 %."""
  env = types.SimpleNamespace(
    scene_root=tmp_path, scene_name="table", asset_root=tmp_path, episode_model_ids=["carrot", "plate"]
  )
  wanted = {"stages/table.glb": b"glTF", "models/carrot/collision.obj": b"v", "models/carrot/textured.dae": b"<",
            "models/plate/collision.obj": b"v", "models/plate/textured.glb": b"glTF"}  # fmt: skip
  assert len(simpler.missing_assets(env)) == 5
  for name, content in wanted.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
  assert simpler.missing_assets(env) == []
  (tmp_path / "stages/table.glb").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  (tmp_path / "models/plate/textured.glb").unlink()
  env.sink = object()
  missing = [str(pathlib.Path(path).relative_to(tmp_path)) for path in simpler.missing_assets(env)]
  assert missing == ["stages/table.glb", "models/plate/textured.dae", "models/sink/collision.obj",
                     "models/sink/textured.dae"]  # fmt: skip


def test_a_suite_that_it_cannot_have_is_refused():
  """Ignored, it would be in-distribution under another name."""
  with pytest.raises(sims.SimulatorError, match="cannot change: camera, light"):
    simpler.Simpler.reset(None, 0, dict(name="x", changes=dict(light={}, instruction={}, camera={})))


def demonstrate(task, sim, env, seed):
  """The expert until it has let go: actions[T, 7], signals[T+1, S], images[T+1, H, W, 3]."""
  expert = task.expert(np.random.default_rng(0), 0.0)
  frames, plan = [sim.reset([env], [seed])], []
  for _ in range(40):
    plan.append(expert.act(unpack_signals(frames[-1].signals[0])))
    frames.append(sim.step([env], plan[-1][None]))
  assert not any(frame.lost.any() for frame in frames)
  return np.stack(plan), *(np.concatenate([getattr(f, key) for f in frames]) for key in ("signals", "images"))


@pytest.mark.simpler
@pytest.mark.slow
def test_a_scene_from_reset_to_release():
  """Start, stages, success after release, repetition, and a snapshot in another environment of the process."""
  task = tasks.get("simpler_put_carrot_on_plate")
  with sims.make(task=task, num_envs=2, num_workers=1, image_size=32, python=PYTHON) as sim:
    assert sim.about["sapien"] == "2.2.2"
    plan, signals, images = demonstrate(task, sim, 0, seed=9)
    named = unpack_signals(signals)
    # Episode id 9 of 24: place 4 of 12 (object at x = -0.235, y = 0.075; plate across it), orientation 1 of 2.
    np.testing.assert_allclose(named["object_pose"][0, :2], [-0.235, 0.075], atol=3e-3)
    np.testing.assert_allclose(named["goal_pose"][0, :2], [-0.085, -0.075], atol=3e-3)
    assert named["success"][-1] and not named["grasped"][-1], "success does not outlast the release"
    assert named["grasped"].any() and named["finger_force"].max() > 1
    completed_at = stages.label(task, signals)[1]
    assert (completed_at >= 1).all() and (np.diff(completed_at) >= 0).all()
    assert not named["qpos"][:, 6].any() and (named["qpos"][:, 7:] > 0.01).all()  # six joints, a gap, two fingers
    assert images.std() > 20 and np.abs(images[0].astype(int) - images[-1]).max() > 50
    sim.reset([0], [400])
    frame = sim.reset([0], [9])
    for t in range(6):
      np.testing.assert_array_equal(frame.signals[0], signals[t])
      np.testing.assert_array_equal(frame.images[0], images[t])
      frame = sim.step([0], plan[t][None])
    for action in plan[6:15]:
      sim.step([0], action[None])
    frame = sim.restore([1], sim.snapshot([0]))
    for t in range(15, 20):
      np.testing.assert_array_equal(frame.signals[0], signals[t])
      np.testing.assert_array_equal(frame.images[0], images[t])
      frame = sim.step([1], plan[t][None])
    assert sim.events == []


STOCK = """
import sys, warnings; warnings.filterwarnings("ignore")
import numpy as np, simpler_env
from transforms3d.euler import euler2axangle
name, start, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
env = simpler_env.make(name, obs_mode="rgbd")
e = env.unwrapped
def record():
  robot, source, target = e.agent.robot, e.episode_source_obj, e.episode_target_obj
  pose = lambda x: np.concatenate([x.pose.p, x.pose.q])
  return np.concatenate([pose(e.tcp), pose(source), pose(target), source.velocity, source.angular_velocity,
    robot.get_qpos(), [e.agent.check_grasp(source), e.evaluate()["success"]]]).astype(np.float32)
obs, _ = env.reset(seed=start, options=dict(obj_init_options=dict(episode_id=start), reconfigure=True))
rows, frames, turned, t = [record()], [obs], np.load(folder + "/turned.npy"), 0
for action in np.load(folder + "/plan.npy"):
  axis, angle = euler2axangle(*action[3:6].astype(np.float64))
  assert np.abs(axis * angle - turned[t]).max() < 1e-7, (axis * angle, turned[t])
  sent = np.concatenate([action[:3], turned[t], [1.0 if action[6] > 0 else -1.0]])
  t += 1
  frames.append(env.step(sent)[0])
  rows.append(record())
np.save(folder + "/rows.npy", np.stack(rows))
np.save(folder + "/frames.npy", np.stack([f["image"]["3rd_view_camera"]["rgb"] for f in frames[::8]]))
"""


@pytest.mark.simpler
@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_physics_and_pictures_equal_stock_simplerenv(name, tmp_path):
  """The same states to the bit, and the same picture to the rounding."""
  task, start = tasks.get(name), 5
  with sims.make(task=task, num_envs=1, num_workers=1, image_size=224, python=PYTHON) as sim:
    plan, signals, images = demonstrate(task, sim, 0, start)
  np.save(tmp_path / "plan.npy", plan)
  np.save(tmp_path / "turned.npy", np.stack([simpler.rotation_vector(action[3:6]) for action in plan]))
  command = [PYTHON, "-c", STOCK, task.env_id, str(start), str(tmp_path)]
  done = subprocess.run(command, timeout=900, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-2000:]
  rows, frames = np.load(tmp_path / "rows.npy"), np.load(tmp_path / "frames.npy")
  ours = unpack_signals(signals)
  parts = [ours[key] for key in ("tcp_pose", "object_pose", "goal_pose", "object_velocity")]
  flags = [ours["grasped"][:, None], ours["success"][:, None]]
  ours = np.concatenate([*parts, np.delete(ours["qpos"], 6, axis=1), *flags], axis=1)
  np.testing.assert_array_equal(ours, rows)
  assert rows[:, -2].any() and rows[-1, -1], "the comparison saw no grasp, or no success"
  for stock, image in zip(frames, images[::8], strict=True):
    difference = np.abs(lanczos.resized(stock, 224).astype(int) - image).max(-1)
    assert (difference > 20).mean() < 0.005 and difference.mean() < 0.5
