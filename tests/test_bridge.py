"""The SimplerEnv scenes: how starts decode, the WidowX expert by hand, and the scene against stock ManiSkill."""

from __future__ import annotations

import difflib
import importlib.util
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from stare_jax import sims, stages, tasks
from stare_jax.episode import unpack_signals
from stare_jax.pipeline import evaluation_starts
from stare_jax.policies import ActionStats, action_stats
from stare_jax.policies.tokenizer import ActionCodec
from stare_jax.rollout import ExpertActor, Start
from stare_jax.sims import bridge, lanczos, lite
from stare_jax.tasks import experts
from stare_jax.tasks.bridge import STEP, TURN, WidowX, pointing_down
from tests.test_tasks import BRIDGE, quaternion, state

JITTER = (0.015, 0.35, 0.01)
LANCZOS = Image.Resampling.LANCZOS


# ---- starts


def published(rng):
  """Six places of two objects in each of three orientations, in the order of the environment's tables."""
  return np.repeat(rng.normal(size=(6, 2, 3)), 3, axis=0), np.tile(rng.normal(size=(3, 2, 4)), (6, 1, 1))


def test_published_starts_are_the_table(rng):
  places, turns = published(rng)
  for seed in range(18):
    place, turn = bridge.decode(seed, places, turns, JITTER)
    np.testing.assert_array_equal(place, places[seed])
    np.testing.assert_array_equal(turn, turns[seed])
  place[0] = 0
  assert places[17].all()  # what comes back is a copy


def test_other_seeds_are_displaced_published_starts(rng):
  places, turns = published(rng)
  turns /= np.linalg.norm(turns, axis=-1, keepdims=True)
  seen = []
  for seed in range(18, 418):
    (place, turn), index = bridge.decode(seed, places, turns, JITTER), seed % 18
    moved = place - places[index]
    assert (np.abs(moved[0, :2]) <= 0.015).all() and (np.abs(moved[1, :2]) <= 0.01).all() and not moved[:, 2].any()
    np.testing.assert_array_equal(turn[1], turns[index][1])
    relative = experts.rotation_matrix(turn[0]) @ experts.rotation_matrix(turns[index][0]).T
    vector = experts.rotation_vector(relative)
    np.testing.assert_allclose(vector[:2], 0, atol=1e-6)  # about the vertical alone
    seen.append([*moved[0, :2], vector[2], *moved[1, :2]])
  spread = np.abs(seen).max(0)
  np.testing.assert_allclose(spread, [0.015, 0.015, 0.35, 0.01, 0.01], rtol=0.03)  # all of the range, nothing outside
  again = bridge.decode(100, places, turns, JITTER)[0]
  np.testing.assert_array_equal(again, bridge.decode(100, places, turns, JITTER)[0])


def test_evaluation_goes_through_the_published_starts():
  carrot = tasks.get("put_carrot_on_plate")
  assert evaluation_starts(carrot, 26, 1_000_000)[22:] == [Start(22, 0), Start(23, 0), Start(0, 1), Start(1, 1)]
  assert evaluation_starts(tasks.get("pull_cube"), 2, 1_000_000) == [Start(1_000_000), Start(1_000_001)]


# ---- actions


def test_bridge_statistics_speak_the_simulators_gripper():
  """Published token ids of OpenVLA: closed is 31872 and open 31744; a bin is its token less 31744."""
  codec = ActionCodec(**action_stats.for_environment(action_stats.named("bridge_orig"))._asdict(), bins=256)
  actions = np.array([[0.01, -0.02, 0.03, 0.05, -0.05, 0.1, -1], [0.01, -0.02, 0.03, 0.05, -0.05, 0.1, 1]], np.float32)
  tokens = codec.tokenize(actions)
  assert (tokens[:, 6] + 31744).tolist() == [31872, 31744]
  assert (np.abs(codec.decode(tokens) - actions) <= [*[4e-4] * 3, *[1e-3] * 2, 2e-3, 2e-2]).all()  # half a bin
  bins = np.arange(256)
  gripper = codec.decode(np.repeat(bins[:, None], 7, axis=1))[:, 6]
  published = ActionCodec(**action_stats.BRIDGE_ORIG._asdict(), bins=256).decode(np.repeat(bins[:, None], 7, axis=1))
  np.testing.assert_array_equal(gripper > 0, published[:, 6] > 0.5)  # the scene opens where OpenVLA's wrapper does


def test_unknown_statistics():
  with pytest.raises(ValueError, match="did you mean 'bridge_orig'"):
    action_stats.named("bridge")
  with pytest.raises(ValueError, match="mask True"):
    action_stats.for_environment(action_stats.for_environment(action_stats.BRIDGE_ORIG))
  once = action_stats.in_environment(action_stats.BRIDGE_ORIG)
  for ours, want in zip(once, action_stats.for_environment(action_stats.BRIDGE_ORIG), strict=True):
    np.testing.assert_array_equal(ours, want)
  assert action_stats.in_environment(once) is once  # statistics in the simulator's terms stay


def test_statistics_go_back_to_the_data_set_where_they_came_from_one():
  back = action_stats.in_data_set(action_stats.for_environment(action_stats.BRIDGE_ORIG))
  for ours, want in zip(back, action_stats.BRIDGE_ORIG, strict=True):
    np.testing.assert_array_equal(ours, want)
  own = ActionStats.from_actions(np.linspace(-1, 1, 70, dtype=np.float32).reshape(10, 7))
  for stats in (back, own, ActionStats(own.q01, own.q99, np.ones(7, bool))):  # normalised over another range
    assert action_stats.in_data_set(stats) is stats


def always(target: experts.Target, noise: float = 0.0) -> WidowX:
  def plan(arm):
    while True:
      yield target

  return WidowX(plan, np.random.default_rng(0), noise)


def test_action_by_hand():
  """Metres in the base frame, which is turned by half a turn; a turn about the vertical keeps its sign."""
  turned = experts.from_rotation_vector(np.array([0.05, 0, 0.1]))
  action = always(experts.Target(np.array([0.01, -0.02, 0.005]), turned, -1.0)).act(state())
  assert action.dtype == np.float32
  np.testing.assert_allclose(action[:3], [-0.01, 0.02, 0.005], atol=1e-7)
  back = [experts.from_rotation_vector(a * np.eye(3)[i]) for i, a in enumerate(action[3:6].astype(float))]
  np.testing.assert_allclose(
    experts.rotation_vector(back[0] @ back[1] @ back[2]), [-0.05, 0, 0.1], atol=1e-6
  )  # x is reversed, z is not
  assert action[6] == -1
  far = always(experts.Target(np.array([3.0, 4.0, 0]), None, 1.0)).act(state())
  np.testing.assert_allclose(far, [-0.6 * STEP, -0.8 * STEP, 0, 0, 0, 0, 1], atol=1e-7)


def test_expert_settles_behind_an_arm_that_lags():
  """The simulator's arm: a target that sums the actions up, of which 60 % is covered per step, and a disturbance."""
  goal = experts.Target(np.array([0.1, -0.05, 0.2]), pointing_down(np.array([1.0, 0.3])), 1.0)
  arm, rng = always(goal), np.random.default_rng(1)
  position, heading = np.zeros(3), np.zeros(3)
  rotation = facing = experts.from_rotation_vector(np.array([0.0, np.pi / 2, 0.0]))  # hand down
  turned_base = np.diag([-1.0, -1.0, 1.0])
  errors = []
  for step in range(40):
    w = np.array(_quaternion(rotation))
    action = arm.act(state(tcp_pose=[*position, *w])).astype(np.float64)
    assert np.linalg.norm(action[:3]) <= STEP + 1e-6 and np.abs(action[3:6]).max() <= 1.1 * TURN
    disturbance = 0.01 * rng.standard_normal(3) if step < 25 else 0.0
    heading = heading + turned_base @ action[:3] + disturbance
    a, b, c = (experts.from_rotation_vector(x * np.eye(3)[i]) for i, x in enumerate(action[3:6]))
    facing = turned_base @ (a @ b @ c) @ turned_base.T @ facing
    position = position + 0.6 * (heading - position)
    rotation = experts.from_rotation_vector(0.6 * experts.rotation_vector(facing @ rotation.T)) @ rotation
    errors.append(np.linalg.norm(position - goal.position))
  assert max(errors[15:25]) < 0.04 and errors[-1] < 0.002
  assert np.linalg.norm(experts.rotation_vector(goal.rotation @ rotation.T)) < 0.02


def _quaternion(rotation: np.ndarray) -> list[float]:
  vector = experts.rotation_vector(rotation)
  return list(quaternion(vector, float(np.linalg.norm(vector))))


def test_disturbance_is_in_the_tasks_unit():
  """Noise 0.3 moves a WidowX by centimetres, not by 30 cm."""
  task = tasks.get("put_carrot_on_plate")
  signals = np.stack([np.concatenate([v.reshape(-1) for v in state(tcp_pose=[0, 0, 1]).values()])] * 400)
  starts = [Start(seed) for seed in range(400)]
  decision = ExpertActor(task, noise=0.3)(None, signals, starts, np.zeros(400, int), np.ones(400, bool))
  spread = (decision.sent - decision.actions)[:, :3].std(0)
  np.testing.assert_allclose(spread, 0.3 * STEP, rtol=0.15)
  np.testing.assert_array_equal(decision.sent[:, 3:], decision.actions[:, 3:])


# ---- the scene


@pytest.fixture(scope="module")
def scene():
  """Two environments in one process, where ManiSkill's own share their background."""
  task = tasks.get("put_carrot_on_plate")
  with sims.make(task=task, num_envs=2, num_workers=1, image_size=32) as sim:
    yield task, sim


def demonstrate(task, sim, env, seed):
  """The expert to the end of its plan: actions[T, 7], signals[T+1, S], images[T+1, H, W, 3]."""
  expert = task.expert(np.random.default_rng(0), 0.0)
  frames, plan = [sim.reset([env], [seed])], []
  while len(plan) < task.horizon and len(plan) < 45:
    plan.append(expert.act(unpack_signals(frames[-1].signals[0])))
    frames.append(sim.step([env], plan[-1][None]))
  assert not any(frame.lost.any() for frame in frames)
  return np.stack(plan), *(np.concatenate([getattr(f, key) for f in frames]) for key in ("signals", "images"))


@pytest.mark.sim
@pytest.mark.assets
def test_a_scene_from_reset_to_release(scene):
  """Start, stages, success after release, and a snapshot in another environment, in one pass: each episode is dear."""
  task, sim = scene
  plan, signals, images = demonstrate(task, sim, 0, seed=9)
  named = unpack_signals(signals)
  # Start 9 of 24: place 4 of 12 (object at x = -0.235, y = 0.075; plate across it), orientation 1 of 2.
  np.testing.assert_allclose(named["object_pose"][0, :2], [-0.235, 0.075], atol=2e-3)
  np.testing.assert_allclose(named["goal_pose"][0, :2], [-0.085, -0.075], atol=2e-3)
  assert named["success"][-1] and not named["grasped"][-1], "success does not outlast the release"
  completed_at = stages.label(task, signals)[1]
  assert (completed_at >= 1).all() and (np.diff(completed_at) >= 0).all()
  assert not named["qpos"][:, 6].any() and (named["qpos"][:, 7:] > 0.01).all()  # six joints, a gap, two fingers
  assert images.std() > 20 and np.abs(images[0].astype(int) - images[-1]).max() > 50
  down = np.array([0.02, -0.03, -0.035, 0, 0, 0, 1], np.float32)  # an arm left where the objects of a start lie
  for _ in range(12):
    sim.step([0], down[None])
  np.testing.assert_array_equal(sim.reset([0], [9]).signals[0], signals[0])
  for action in plan[:15]:
    sim.step([0], action[None])
  (saved,) = sim.snapshot([0])
  frame = sim.restore([1], [saved])
  for t in range(15, 22):
    np.testing.assert_array_equal(frame.signals[0], signals[t])
    np.testing.assert_array_equal(frame.images[0], images[t])
    frame = sim.step([1], plan[t][None])
  assert sim.events == []


@pytest.mark.sim
@pytest.mark.assets
@pytest.mark.parametrize(
  "name", ["put_carrot_on_plate", *(pytest.param(n, marks=pytest.mark.slow) for n in BRIDGE if "carrot" not in n)]
)
def test_the_shorter_shader_draws_the_same_pixels(name):
  task, frames = tasks.get(name), []
  plan = np.random.default_rng(2).uniform(-1, 1, (6, 1, 7)).astype(np.float32) * np.float32(task.unit)
  for options in ({}, dict(shader="minimal")):
    with sims.make(task=task, num_envs=1, num_workers=1, image_size=224, **options) as sim:
      frames.append([sim.reset([0], [3]), *(sim.step([0], action) for action in plan)])
  for ours, minimal in zip(*frames, strict=True):
    np.testing.assert_array_equal(ours.images, minimal.images)
    np.testing.assert_array_equal(ours.signals, minimal.signals)


def test_the_shorter_shader_is_sapiens():
  """But for the light of the sky, which is left out, and the layer of positions; another file is an error."""
  root = pathlib.Path(importlib.util.find_spec("sapien").origin).parent
  whole = (root / "vulkan_shader/minimal/gbuffer.frag").read_text()
  changes = list(difflib.ndiff(whole.split("\n"), lite.shortened(whole).split("\n")))
  added = [line.split() for line in changes if line[0] == "+"]
  assert [" ".join(line) for line in added] == [
    "+ layout(location = 1) out vec4 outEntity;", "+ outEntity = vec4(inSegmentation[1], 0, 0, 1);"
  ]  # fmt: skip
  left_out = "".join(line for line in changes if line[0] == "-")
  assert left_out.count("\n") == 0 and left_out.count("- ") == 7
  assert left_out.count("color += ") == 2 and left_out.count("PositionSegmentation") == 2
  assert "ambientLight" not in left_out and "outColorRaw" not in left_out
  with pytest.raises(sims.SimulatorError, match="0 times, expected once"):
    lite.shortened(lite.shortened(whole))


@pytest.mark.sim
def test_missing_assets_name_the_command(tmp_path, monkeypatch):
  monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
  with pytest.raises(sims.SimulatorError, match=r"download_asset bridge_v2_real2sim -y\n.*download_asset widowx250s"):
    sims.make(task=tasks.get("put_spoon_on_towel"), num_envs=1, num_workers=1, image_size=32)


TARGETS = """
import sys, numpy as np
from stare_jax import sims, tasks
from stare_jax.sims import maniskill
name, large = sys.argv[1], np.float32([0.05] * 3 + [3] * 3 + [1])
env = maniskill.make(**sims.spec(tasks.get(name), 64), draw=False)
ours, joints = env._controllers, env._robot.get_active_joints()
assert ours is not None, "ManiSkill's controllers are no longer those that `Arm` and `Gripper` copy"
def play(controllers, seed):
  env._controllers = controllers
  env.reset(seed)
  rng, rows = np.random.default_rng(seed), []
  for _ in range(30):
    env.step(rng.uniform(-1, 1, 7).astype(np.float32) * (large if seed % 2 else np.float32(tasks.get(name).unit)))
    rows.append(np.concatenate([*(joint.get_drive_target() for joint in joints), env._state()]))
  return np.stack(rows)
for seed in range(2):
  np.testing.assert_array_equal(rows := play(ours, seed), play(None, seed))
assert np.ptp(rows, axis=0).max() > 0.1, "nothing moved"
"""

ROTATIONS = """
import numpy as np, torch
from mani_skill.utils.geometry import rotation_conversions as theirs
from stare_jax.sims.arm import _rotation
rng = np.random.default_rng(0)
angles = np.concatenate([rng.uniform(-limit, limit, (1500, 3)) for limit in (0.1, 0.3, 3.2)])
near = np.round(rng.uniform(-1, 1, (1500, 3))) * np.pi / 2 + rng.normal(0, 1e-7, (1500, 3))  # components of equal size
for row in np.concatenate([angles, near]).astype(np.float32):
  wanted = theirs.matrix_to_quaternion(theirs.euler_angles_to_matrix(torch.from_numpy(row)[None], "XYZ"))[0].numpy()
  np.testing.assert_array_equal(_rotation(row), wanted, err_msg=str(row))
"""


@pytest.mark.sim
@pytest.mark.parametrize("name", [pytest.param("put_carrot_on_plate", marks=pytest.mark.assets), "pick_cube"])
def test_joint_targets_are_those_of_maniskills_controller(name):
  """To the bit, over two episodes in one environment, the second with actions far outside the usual.

  One arm moves its last target, the other its hand.
  """
  done = subprocess.run([sys.executable, "-c", TARGETS, name], timeout=300, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.sim
def test_rotations_are_those_of_maniskill():
  """To the bit, one by one: one in two hundred is where libraries round differently."""
  done = subprocess.run([sys.executable, "-c", ROTATIONS], timeout=300, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr[-2000:]


STOCK = """
import sys, warnings; warnings.filterwarnings("ignore")
import gymnasium as gym, mani_skill.envs, numpy as np, torch
env_id, start, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
env = gym.make(env_id, num_envs=1, sim_backend="physx_cpu", render_backend="cpu", obs_mode="rgb+segmentation")
e = env.unwrapped
def record():
  robot, source, target = e.agent.robot, e.objs[e.source_obj_name], e.objs[e.target_obj_name]
  return np.concatenate([robot.links_map["ee_gripper_link"].pose.raw_pose[0], source.pose.raw_pose[0],
    target.pose.raw_pose[0], source.linear_velocity[0], source.angular_velocity[0], robot.get_qpos()[0],
    e.agent.is_grasping(source), e.evaluate()["success"]]).astype(np.float32)
# A new physics scene: in an old one PhysX carries over what it cached in the episode before.
obs, _ = env.reset(seed=start, options=dict(episode_id=torch.tensor([start]), reconfigure=True))
rows, frames = [record()], [obs]
for action in np.load(folder + "/plan.npy"):
  frames.append(env.step(action)[0])
  rows.append(record())
np.save(folder + "/rows.npy", np.stack(rows))
frames = [f["sensor_data"]["3rd_view_camera"]["rgb"][0].numpy().astype(np.uint8) for f in frames[::8]]
np.save(folder + "/frames.npy", np.stack(frames))
"""


@pytest.mark.sim
@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize("name", BRIDGE)
def test_physics_and_pictures_equal_stock_maniskill(name, tmp_path):
  """The same states to the bit, and the same picture but for the pixels of edges."""
  task, start = tasks.get(name), 5
  with sims.make(task=task, num_envs=1, num_workers=1, image_size=224) as sim:
    plan, signals, images = demonstrate(task, sim, 0, start)
  np.save(tmp_path / "plan.npy", plan)
  command = [sys.executable, "-c", STOCK, task.env_id, str(start), str(tmp_path)]
  subprocess.run(command, check=True, timeout=900, capture_output=True)
  rows, frames = np.load(tmp_path / "rows.npy"), np.load(tmp_path / "frames.npy")
  ours = unpack_signals(signals)
  parts = [ours[key] for key in ("tcp_pose", "object_pose", "goal_pose", "object_velocity")]
  joints = np.delete(ours["qpos"], 6, axis=1)
  flags = [ours["grasped"][:, None], ours["success"][:, None]]
  np.testing.assert_array_equal(np.concatenate([*parts, joints, *flags], axis=1), rows)
  assert rows[:, -2].any() and rows[-1, -1], "the comparison saw no grasp, or no success"
  for stock, image in zip(frames, images[::8], strict=True):
    difference = np.abs(lanczos.resized(stock, 224).astype(int) - image).max(-1)
    assert (difference > 20).mean() < 0.005 and difference.mean() < 0.5
