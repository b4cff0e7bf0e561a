"""Tasks: the registry, every word of the rule vocabulary by hand, what the stages must obey, and the experts."""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest

from stare_jax import stages, tasks
from stare_jax.episode import SIGNAL_SIZE, SIGNALS, pack_signals, unpack_signals
from stare_jax.tasks import experts, rules
from tests.test_stages import online

NAMES = tasks.names()
BASIC = ("push_cube", "pull_cube", "pick_cube", "stack_cube", "place_sphere", "lift_peg_upright")
PICK_AND_PLACE = ("pick_cube", "stack_cube", "place_sphere")
CONTACT = {"push_cube": "Push", "pull_cube": "Pull"}
DIRECTED = (*CONTACT, "poke_cube")  # tasks with a distance along a direction of its own
# Stages of the other Panda tasks, and where they are cut: after ManiSkill's own limit.
TOOLS = {
  "poke_cube": ("Reach Grasp Poke", 50),
  "pull_cube_tool": ("Reach Grasp Hook Pull", 100),
  "roll_ball": ("Reach Launch Roll", 80),
  "peg_insertion_side": ("Reach Grasp Align Insert", 100),
}
BRIDGE = ("put_carrot_on_plate", "put_spoon_on_towel", "stack_green_on_yellow", "put_eggplant_in_basket")
SIMPLER = tuple(f"simpler_{name}" for name in BRIDGE)


def quaternion(axis, angle: float) -> np.ndarray:
  """wxyz of a turn by `angle` radians."""
  axis = np.asarray(axis, float) / np.linalg.norm(axis)
  return np.array([np.cos(angle / 2), *(np.sin(angle / 2) * axis)], np.float32)


def state(**values) -> dict[str, np.ndarray]:
  """One unbatched state: zeros, unit quaternions, and what is given."""
  signals = {name: np.zeros(shape, np.float32) for name, shape in SIGNALS.items()}
  for name in ("tcp_pose", "object_pose", "goal_pose"):
    signals[name][3] = 1
  for name, value in values.items():
    value = np.asarray(value, np.float32)
    signals[name] = np.concatenate([value, signals[name][3:]]) if SIGNALS[name] == (7,) and len(value) == 3 else value
  return signals


def random_signals(rng: np.random.Generator, *lead: int) -> dict[str, np.ndarray]:
  """Independent states with unit quaternions, within a metre, with both flags on and off."""
  signals = unpack_signals(rng.normal(scale=0.1, size=(*lead, SIGNAL_SIZE)).astype(np.float32))
  for name in ("tcp_pose", "object_pose", "goal_pose"):
    turn = rng.normal(size=(*lead, 4))
    signals[name][..., 3:] = turn / np.linalg.norm(turn, axis=-1, keepdims=True)
  signals["finger_force"][...] = np.abs(signals["finger_force"]) * 10
  for name in ("grasped", "success"):
    signals[name][...] = rng.random(lead) < 0.5
  return signals


def words(task: tasks.Task):
  """Every event and distance of a task, labelled."""
  return [(f"{s.name}.{kind}", getattr(s, kind)) for s in task.stages for kind in ("end", "distance")]


# ---- registry


@pytest.mark.parametrize("name", NAMES)
def test_registry(name):
  task = tasks.get(name)
  assert task.name == name and task.instruction == task.instruction.lower().strip()
  assert tasks.get(name) is task and pickle.loads(pickle.dumps(task)) is task
  if name in BRIDGE:
    assert task.env_options["scene"] == "bridge" and task.control_hz == 5 and task.unit == 0.035
    assert (task.horizon, task.starts) == ((120, 64) if name == "put_eggplant_in_basket" else (60, 24))
  elif name in SIMPLER:
    assert task.simulator == "simpler" and task.control_hz == 5 and task.unit == 0.035 and task.starts == 24
    assert task.horizon == (120 if "eggplant" in name else 60)
  else:
    assert task.env_options["control_mode"] == "pd_ee_delta_pose" and task.env_options["robot_uids"] == "panda"
    assert (task.horizon, task.control_hz, task.starts, task.unit) == (TOOLS.get(name, ("", 50))[1], 20, None, 1.0)
  assert hash(task) is not None


def test_stage_names():
  for name in BASIC:
    expected = ["Reach", CONTACT[name]] if name in CONTACT else ["Reach", "Grasp"]
    expected += ["Transport", "Place"] if name in PICK_AND_PLACE else []
    expected += ["Upright"] if name == "lift_peg_upright" else []
    assert [stage.name for stage in tasks.get(name).stages] == expected
  for name in (*BRIDGE, *SIMPLER):
    assert [stage.name for stage in tasks.get(name).stages] == ["Reach", "Grasp", "Transport", "Place"]
  for name, (expected, _) in TOOLS.items():
    assert [stage.name for stage in tasks.get(name).stages] == expected.split()
  assert {*BASIC, *TOOLS, *BRIDGE, *SIMPLER} == set(NAMES)


@pytest.mark.parametrize(
  "wrong, right", [("pul_cube", "pull_cube"), ("PickCube-v1", "pick_cube"), ("lift_peg", "lift_peg_upright")]
)
def test_unknown_task_suggests_the_nearest(wrong, right):
  with pytest.raises(ValueError, match=f"did you mean '{right}'.*known tasks: push_cube") as error:
    tasks.get(wrong)
  assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(stages=()), "no stages"),
    (dict(horizon=0), "horizon is 0"),
    (dict(instruction=" "), "instruction is empty"),
  ],
)
def test_invalid_task(change, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(tasks.get("push_cube"), **change)


def test_invalid_stages():
  task = tasks.get("push_cube")
  with pytest.raises(ValueError, match="not unique"):
    dataclasses.replace(task, stages=(task.stages[0], task.stages[0]))
  for scale in (0.0, -1.0, np.nan, np.inf):
    with pytest.raises(ValueError, match="'Reach'.*scale"):
      dataclasses.replace(task, stages=(dataclasses.replace(task.stages[0], scale=scale), task.stages[1]))


def test_registry_entry_of_another_name(monkeypatch):
  monkeypatch.setitem(tasks.REGISTRY, "other", tasks.REGISTRY["push_cube"])
  with pytest.raises(ValueError, match="'other'.*calls itself 'push_cube'"):
    tasks.get("other")
  monkeypatch.setitem(tasks.REGISTRY, "other", "stare_jax.tasks.rules:grasped")
  with pytest.raises(TypeError, match="expected a Task"):
    tasks.get("other")


# ---- the vocabulary, by hand


def test_points_and_distances():
  now = state(
    tcp_pose=[0.3, 0.4, 0.12], object_pose=[0, 0, 0], goal_pose=[0, 0, 0.12], object_velocity=[3, 4, 0, 9, 9, 9]
  )
  start = state(object_pose=[0, 0, -0.01])
  assert rules.between(rules.tool, rules.thing)(now, start) == pytest.approx(0.5141984)
  assert rules.between(rules.tool, rules.thing, axes="xy")(now, start) == pytest.approx(0.5)
  assert rules.between(rules.shifted(rules.tool, (-0.3, -0.4, 0)), rules.goal)(now, start) == pytest.approx(0)
  assert rules.height(now, start) == pytest.approx(0.01)
  assert rules.missing_height(0.03)(now, start) == pytest.approx(0.02)
  assert rules.missing_height(0.005)(now, start) == 0
  assert rules.speed(now, start) == pytest.approx(5)
  assert rules.plus(rules.speed, rules.missing_height(0.03))(now, start) == pytest.approx(5.02)
  with pytest.raises(ValueError, match="axes is 'yz'"):
    rules.between(rules.tool, rules.thing, axes="yz")


def test_on_axis():
  along_y = np.array([0, 0, 0, *quaternion([0, 0, 1], np.pi / 2)])  # the object's x axis points along the world's y
  point = rules.on_axis(0.12)
  at = lambda *tool: point(state(tcp_pose=tool, object_pose=along_y), state())
  np.testing.assert_allclose(at(0.05, 0.07, 0.2), [0, 0.07, 0], atol=1e-7)
  np.testing.assert_allclose(at(0.05, 0.5, 0.2), [0, 0.12, 0], atol=1e-7)
  np.testing.assert_allclose(at(0.05, -0.5, 0.2), [0, -0.12, 0], atol=1e-7)




def test_rules():
  start = state()
  near = rules.near(rules.tool, rules.thing, 0.03)
  assert near(state(tcp_pose=[0.029, 0, 0]), start) and not near(state(tcp_pose=[0.031, 0, 0]), start)
  floating = state(object_pose=[0.02, 0, 0.3])
  assert not rules.at_goal(0.05)(floating, start) and rules.at_goal(0.05, axes="xy")(floating, start)
  assert rules.at_goal(0.05, rules.shifted(rules.goal, (0, 0, 0.3)))(floating, start)
  assert rules.in_contact(0.3)(state(finger_force=[0, 0.4]), start)
  assert not rules.in_contact(0.3)(state(finger_force=[0.2, 0.29]), start)
  held = state(grasped=1)
  assert rules.grasped(held, start) and not rules.released(held, start) and rules.released(start, start)
  assert rules.static(0.02)(state(object_velocity=[0.01, 0, 0, 5, 0, 0]), start)
  assert not rules.static(0.02)(state(object_velocity=[0, 0, -0.03, 0, 0, 0]), start)
  assert rules.succeeded(state(success=1), start) and not rules.succeeded(start, start)


def test_lifted_is_relative_to_the_reset():
  rule = rules.lifted(0.02)
  assert rule(state(object_pose=[0, 0, 0.045]), state(object_pose=[0, 0, 0.02]))
  assert not rule(state(object_pose=[0, 0, 0.045]), state(object_pose=[0, 0, 0.04]))


@pytest.mark.parametrize("lean", [0.0, 1e-4, 0.079, 0.3, 1.2, np.pi / 2])
@pytest.mark.parametrize("end", [1, -1])
def test_tilt_and_upright(lean, end):
  """A peg along x, stood up by a quarter turn about y, leaning by `lean`; either end may be up."""
  now = state(object_pose=[0, 0, 0, *quaternion([0, 1, 0], end * (np.pi / 2 - lean))])
  assert rules.tilt()(now, now) == pytest.approx(lean, abs=1e-6)  # arccos would be wrong by 3e-4 near upright
  assert rules.upright(lean + 1e-5)(now, now) and (lean == 0 or not rules.upright(lean - 1e-5)(now, now))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_axis_is_the_rotation_matrix_column(axis, rng):
  turns = random_signals(rng, 20)["object_pose"][:, 3:]
  expected = [experts.rotation_matrix(turn)[:, axis] for turn in turns]
  np.testing.assert_allclose(rules._axis(turns, axis), expected, atol=1e-6)


def test_combinators_broadcast():
  now, start = unpack_signals(np.zeros((4, SIGNAL_SIZE), np.float32)), state()
  now["grasped"][1::2], now["success"][2:] = 1, 1
  always = lambda now, start: np.bool_(True)
  assert rules.any_of(rules.grasped, rules.succeeded)(now, start).tolist() == [False, True, True, True]
  assert rules.all_of(rules.grasped, rules.succeeded, always)(now, start).tolist() == [False, False, False, True]


# ---- what the stages of every task must obey


@pytest.mark.parametrize("name", NAMES)
def test_leading_axes(name, rng):
  """One state, [N] against [N] and [T+1] against [1] or [] agree with a loop over single states."""
  now, start = random_signals(rng, 3, 5), random_signals(rng, 3, 5)
  first = {key: value[:1, :1] for key, value in start.items()}
  for signals in (*now.values(), *start.values()):
    signals.flags.writeable = False  # rules only read
  pick = lambda signals, i, j: {key: value[i, j] for key, value in signals.items()}
  for label, word in words(tasks.get(name)):
    whole, against_first = word(now, start), word(now, first)
    assert whole.dtype == (bool if label.endswith("end") else np.float32), label
    assert whole.shape == against_first.shape == (3, 5), label
    for i, j in np.ndindex(3, 5):
      one = word(pick(now, i, j), pick(start, i, j))
      assert np.shape(one) == () and one == pytest.approx(whole[i, j], rel=1e-5), label
      assert word(pick(now, i, j), pick(start, 0, 0)) == pytest.approx(against_first[i, j], rel=1e-5), label


@pytest.mark.parametrize("name", NAMES)
def test_success_ends_every_stage(name, rng):
  """A successful episode completes all its stages, whatever else the signals say; only success ends the last one."""
  task, now, start = tasks.get(name), random_signals(rng, 200), random_signals(rng, 200)
  np.testing.assert_array_equal(task.stages[-1].end(now, start), now["success"] > 0.5)
  now["success"][...] = 1
  assert all(stage.end(now, start).all() for stage in task.stages)


@pytest.mark.parametrize("name", NAMES)
def test_distances_are_finite_and_not_negative(name, rng):
  task, now, start = tasks.get(name), random_signals(rng, 200), random_signals(rng, 200)
  for stage in task.stages:
    distance = stage.distance(now, start)
    assert np.isfinite(distance).all() and (distance >= 0).all() and distance.max() > 0


def moved(signals: dict[str, np.ndarray], turn: float, by: np.ndarray) -> dict[str, np.ndarray]:
  """The same scene turned about the vertical and shifted."""
  q = quaternion([0, 0, 1], turn).astype(np.float64)
  matrix, out = experts.rotation_matrix(q), {key: value.copy() for key, value in signals.items()}
  for name in ("tcp_pose", "object_pose", "goal_pose"):
    w, x, y, z = np.moveaxis(signals[name][..., 3:], -1, 0)
    out[name][..., :3] = signals[name][..., :3] @ matrix.T + by
    c, s = q[0], q[3]
    out[name][..., 3:] = np.stack([c * w - s * z, c * x - s * y, c * y + s * x, c * z + s * w], axis=-1)
  out["object_velocity"] = np.concatenate([v @ matrix.T for v in np.split(signals["object_velocity"], 2, -1)], -1)
  return out


@pytest.mark.parametrize("name", NAMES)
def test_invariant_to_where_the_scene_is(name, rng):
  """All tasks ignore a shift; those without a direction of their own also ignore a turn about the vertical.

  One distance is measured from the robot's base, which no signal shows.
  """
  now, start = random_signals(rng, 100), random_signals(rng, 100)
  turn, by = 0.0 if name in DIRECTED else 1.1, np.array([0.3, -0.2, 0.1], np.float32)
  for label, word in words(tasks.get(name)):
    if (name, label) == ("pull_cube_tool", "Pull.distance"):
      continue
    here, there = word(now, start), word(moved(now, turn, by), moved(start, turn, by))
    np.testing.assert_allclose(there.astype(np.float32), here.astype(np.float32), atol=2e-6,
                               err_msg=f"{label} changes where the scene is moved and turned; if it has a direction of "
                                       f"its own, name {name} in DIRECTED")  # fmt: skip


def cube_episode(task: tasks.Task, heights, grasped, at=(0.1, 0.0, 0.2)) -> np.ndarray:
  """float32[T+1, S]: the tool on a cube that rises through `heights` above (0.1, 0); the goal is `at`."""
  states = []
  for height, held in zip(heights, grasped, strict=True):
    here = [0.1, 0, height]
    states.append(pack_signals(state(tcp_pose=here, object_pose=here, goal_pose=list(at), grasped=held)))
  states[-1] = pack_signals({**unpack_signals(states[-1]), "success": np.float32(1)})
  return np.stack(states)


def test_pick_cube_stages_by_hand():
  task = tasks.get("pick_cube")
  high = cube_episode(task, [0.02, 0.02, 0.03, 0.05, 0.10, 0.16, 0.19], [0, 1, 1, 1, 1, 1, 1])
  stage_id, completed_at, _ = stages.label(task, high)
  assert completed_at.tolist() == [1, 3, 5, 6]  # near from the start but judged from s_1; 3 cm up; 4 cm away; success
  assert stage_id.tolist() == [0, 1, 1, 2, 2, 3]


def test_pick_cube_with_a_goal_on_the_table():
  """A goal lower than the lifting height: the cube that is held and there was grasped, too."""
  task = tasks.get("pick_cube")
  low = cube_episode(task, [0.02, 0.02, 0.025, 0.03], [0, 0, 1, 1], at=(0.1, 0.03, 0.03))
  _, completed_at, _ = stages.label(task, low)
  assert completed_at.tolist() == [1, 2, 2, 3]


def test_a_cube_pushed_to_its_goal_was_not_grasped():
  task = tasks.get("pick_cube")
  pushed = cube_episode(task, [0.02] * 4, [0] * 4, at=(0.1, 0, 0.02))[:-1]
  assert stages.label(task, pushed)[1].tolist() == [1, -1, -1, -1]


def test_documented_stages_and_scales(root):
  """docs/tasks.md lists every task, its instruction, and its stages in order with their scales."""
  text = (root / "docs" / "tasks.md").read_text()
  listed, name = {}, ""
  for line in text.split("## Stages")[1].splitlines():
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    if len(cells) == 5 and cells[1][:1].isupper():
      name = cells[0].strip("`") or name
      listed.setdefault(name, []).append((cells[1], cells[4]))
  scale = lambda stage: "π/2" if stage.scale == np.pi / 2 else f"{stage.scale:g} m"
  assert listed == {n: [(stage.name, scale(stage)) for stage in tasks.get(n).stages] for n in NAMES}
  for n in NAMES:
    task = tasks.get(n)
    assert f"| `{n}` | {task.env_id} | {task.instruction} |" in text


# ---- experts


@pytest.mark.parametrize("angle", [1e-8, 1e-4, 0.3, 2.0, 3.14, np.pi])
def test_rotation_vector_round_trip(angle, rng):
  for axis in (*np.eye(3), rng.normal(size=3)):
    vector = angle * axis / np.linalg.norm(axis)
    back = experts.rotation_vector(experts.from_rotation_vector(vector))
    assert min(np.abs(back - vector).max(), np.abs(back + vector).max() if angle > 3.1 else np.inf) < 1e-3 * angle


def test_euler_xyz_is_rx_ry_rz(rng):
  a, b, c = rng.uniform(-1.4, 1.4, 3)
  turn = lambda axis, angle: experts.from_rotation_vector(angle * np.eye(3)[axis])
  np.testing.assert_allclose(experts.euler_xyz(turn(0, a) @ turn(1, b) @ turn(2, c)), [a, b, c], atol=1e-12)


def to(target: experts.Target, noise: float = 0.0, seed: int = 0) -> experts.Controller:
  """A controller that always wants the same."""

  def plan(arm):
    while True:
      yield target

  return experts.Controller(plan, np.random.default_rng(seed), noise)


def test_action_by_hand():
  """Translation in units of 0.1 m, rotation in units of minus 0.1 rad, both times the gain; the gripper as it is."""
  turned = experts.from_rotation_vector(np.array([0, 0, 0.02]))
  action = to(experts.Target(np.array([0.05, 0, -0.01]), turned, -1.0)).act(state())
  assert action.dtype == np.float32 and action.shape == (7,)
  np.testing.assert_allclose(action, [0.65, 0, -0.13, 0, 0, -0.26, -1], atol=1e-6)


def test_long_moves_keep_their_direction():
  turned = experts.from_rotation_vector(np.array([0, 2.0, 0]))
  action = to(experts.Target(np.array([0.3, 0.4, 0]), turned, 1.0)).act(state())
  np.testing.assert_allclose(action, [0.6, 0.8, 0, 0, -1, 0, 1], atol=1e-6)


def test_a_frozen_arm_is_asked_for_less():
  arm = to(experts.Target(np.array([0.5, 0, 0]), np.eye(3), 1.0))
  strides = [arm.act(state())[0] for _ in range(8)]
  np.testing.assert_allclose(strides, [1, 0.6, 0.36, 0.216, 0.15, 0.15, 0.15, 0.15], rtol=1e-5)
  assert arm.act(state(tcp_pose=[0.01, 0, 0]))[0] == pytest.approx(0.15 * 1.3)


def test_noise():
  """On the six motion dimensions, from the generator alone, clipped; none on the gripper."""
  still = experts.Target(np.zeros(3), np.eye(3), -1.0)
  sample = lambda seed: np.stack([to(still, 0.25, seed).act(state())])
  draws = np.stack([arm.act(state()) for arm in [to(still, 0.25, 1)] for _ in range(2000)])
  np.testing.assert_array_equal(sample(3), sample(3))
  assert (draws[:, 6] == -1).all() and np.abs(draws).max() <= 1
  np.testing.assert_allclose(draws[:, :6].std(axis=0), 0.25, rtol=0.1)
  with pytest.raises(ValueError, match="noise is -1"):
    to(still, -1.0)


def test_expert_refuses_a_batch(rng):
  with pytest.raises(ValueError, match="one environment"):
    to(experts.Target(np.zeros(3), np.eye(3), 1.0)).act(random_signals(rng, 4))


@pytest.mark.parametrize("name", NAMES)
def test_first_actions(name, rng):
  """Every expert starts from any plausible state with a finite action in range, and the same one for the same seed."""
  task = tasks.get(name)
  home = quaternion([0, 1, 0], np.pi)
  for _ in range(20):
    thing, goal = rng.uniform(-0.1, 0.1, 2), rng.uniform(-0.1, 0.1, 2)
    now = state(tcp_pose=[0, 0, 0.17, *home], object_pose=[*thing, 0.02], goal_pose=[*goal, 0.02])
    first, again = (task.expert(np.random.default_rng(5), 0.1).act(now) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (7,) and first.dtype == np.float32 and np.isfinite(first).all() and np.abs(first).max() <= 1


def test_goto_reaches_its_target():
  """An ideal arm that realises 45 % of every request, with the sign that the simulator's rotation has."""
  target = experts.Target(np.array([0.1, -0.2, 0.05]), experts.from_rotation_vector(np.array([0.4, -0.2, 0.8])), 1.0)
  arm = experts.Controller(lambda arm: arm.goto(target.position, target.rotation, 1.0), np.random.default_rng(0))
  position, rotation, steps = np.zeros(3), np.eye(3), 0
  turn = lambda axis, angle: experts.from_rotation_vector(angle * np.eye(3)[axis])
  while np.linalg.norm(position - target.position) > 0.008 or steps < 30:
    w = np.sqrt(max(0.0, 1 + np.trace(rotation))) / 2
    skew = rotation - rotation.T
    pose = [*position, w, *(np.array([skew[2, 1], skew[0, 2], skew[1, 0]]) / (4 * w))]
    action = arm.act(state(tcp_pose=pose)).astype(np.float64)
    position = position + 0.45 * 0.1 * action[:3]
    a, b, c = -0.1 * 0.45 * action[3:6]
    rotation = turn(0, a) @ turn(1, b) @ turn(2, c) @ rotation
    steps += 1
    assert steps < 60
  assert np.linalg.norm(experts.rotation_vector(target.rotation @ rotation.T)) < 0.06


# ---- in the simulator


SCENES = [pytest.param(name, marks=[pytest.mark.assets, pytest.mark.slow] if name in BRIDGE else [])
          for name in tasks.names("maniskill")]  # fmt: skip


@pytest.mark.sim
@pytest.mark.parametrize("name", SCENES)
def test_experts_in_the_simulator(name):
  """From fresh starts every expert succeeds and completes every stage, in order; online labels equal offline ones."""
  from stare_jax import sims

  task, envs = tasks.get(name), [0, 1, 2]
  with sims.make("maniskill", task=task, num_envs=len(envs), num_workers=1, image_size=32, draw=False) as sim:
    doers = [task.expert(np.random.default_rng(env), 0.0) for env in envs]
    states = [sim.reset(envs, [60_000 + env for env in envs]).signals]
    for _ in range(task.horizon):
      actions = [doer.act(unpack_signals(signals)) for doer, signals in zip(doers, states[-1], strict=True)]
      frame = sim.step(envs, np.stack(actions))
      assert not frame.lost.any()
      states.append(frame.signals)
      if unpack_signals(np.stack(states))["success"].any(axis=0).all():
        break
  for trajectory in np.stack(states, axis=1):
    assert unpack_signals(trajectory)["success"].any(), "the expert failed"
    completed_at = stages.label(task, trajectory)[1]
    assert (completed_at >= 1).all() and (np.diff(completed_at) >= 0).all()
  seen, done = online(task, np.stack(states), regress=False)
  for env, trajectory in enumerate(np.stack(states, axis=1)):
    stage_id, completed_at, last = stages.label(task, trajectory)
    assert seen[:, env].tolist() == [*stage_id, last] and done[env].tolist() == completed_at.tolist()
