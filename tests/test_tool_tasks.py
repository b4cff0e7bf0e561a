"""PullCubeTool, RollBall and PegInsertionSide by hand: the words that they brought, their stages, their plans."""

from __future__ import annotations

import numpy as np
import pytest

from stare_jax import stages, tasks
from stare_jax.episode import pack_signals, unpack_signals
from stare_jax.tasks import experts, rules
from stare_jax.tasks.pull_cube_tool import next_step
from tests.test_tasks import quaternion, state

# ---- words


def test_points_of_the_object_and_of_the_world():
  along_y = np.array([1, 2, 3, *quaternion([0, 0, 1], np.pi / 2)])
  now = state(object_pose=along_y, goal_pose=[4, 6, 0])
  np.testing.assert_allclose(rules.attached((0.1, 0.2, 0.3))(now, state()), [0.8, 2.1, 3.3], atol=1e-6)
  np.testing.assert_allclose(rules.behind(0.5)(now, state()), [1 - 0.3, 2 - 0.4, 3], atol=1e-6)
  np.testing.assert_array_equal(rules.behind(0.5)(state(), state()), [0, 0, 0])  # over the goal nothing is behind
  tool = state(tcp_pose=[0.05, 3, 0.2], object_pose=along_y)
  ahead = rules.on_axis(0.12, middle=rules.attached((0.1, 0, 0)))
  np.testing.assert_allclose(ahead(tool, state()), [1, 2.22, 3], atol=1e-6)  # 12 cm beyond a point 10 cm ahead
  here = rules.fixed((1, 0, 0))({key: np.stack([value] * 4) for key, value in now.items()}, state())
  np.testing.assert_array_equal(here, [[1, 0, 0]] * 4)


def test_off_the_line_of_the_goal():
  """The goal's x axis points along the world's y: what counts is x and z."""
  now = state(object_pose=[1.3, 7, 2.4], goal_pose=np.array([1, 0, 2, *quaternion([0, 0, 1], np.pi / 2)]))
  assert rules.off_line(rules.thing)(now, now) == pytest.approx(0.5, rel=1e-5)
  assert rules.off_line(rules.shifted(rules.thing, (-0.3, 5, -0.4)))(now, now) == pytest.approx(0, abs=1e-5)


def test_speed_toward_the_goal():
  toward = lambda *v: rules.missing_speed(0.4)(state(goal_pose=[3, 4, -9], object_velocity=[*v, 0, 0, 0]), state())
  assert toward(0.06, 0.08, 5) == pytest.approx(0.3)  # the vertical does not count
  assert toward(-0.08, 0.06, 0) == pytest.approx(0.4) and toward(-0.06, -0.08, 0) == pytest.approx(0.5)
  assert toward(0.3, 0.4, 0) == 0


def test_limits_of_a_distance():
  far = state(tcp_pose=[0.5, 0, 0])
  tool = rules.between(rules.tool, rules.thing)
  assert rules.beyond(tool, 0.3)(far, far) == pytest.approx(0.2) and rules.beyond(tool, 0.6)(far, far) == 0
  assert rules.within(tool, 0.5)(far, far) and not rules.within(tool, 0.49)(far, far)


# ---- stages


def states_of(*rows: dict) -> np.ndarray:
  """float32[T+1, S] of what changes from state to state; the last one is a success."""
  return np.stack([pack_signals(state(**row)) for row in (*rows[:-1], {**rows[-1], "success": 1})])


def test_pull_cube_tool_stages_by_hand():
  """The cube lies 22 cm ahead of the tool; the hook passes it, comes in behind it, and both move to the robot."""
  cube, at = [0.1, 0, 0.02], lambda x, y: dict(object_pose=[x, y, 0.025], grasped=1)
  trajectory = states_of(
    dict(object_pose=[-0.12, -0.1, 0.025], tcp_pose=[-0.1, -0.1, 0.2], goal_pose=cube),
    dict(object_pose=[-0.12, -0.1, 0.025], tcp_pose=[-0.09, -0.1, 0.045], goal_pose=cube),  # 2 cm over the handle
    at(-0.12, -0.1) | dict(goal_pose=cube),
    at(-0.02, -0.15) | dict(goal_pose=cube),  # beside it: the cube is at (0.12, 0.15) of the tool
    at(-0.02, -0.07) | dict(goal_pose=cube),  # at (0.12, 0.07): hooked
    at(-0.17, -0.07) | dict(goal_pose=[-0.05, 0, 0.02]),
  )
  task = tasks.get("pull_cube_tool")
  stage_id, completed_at, _ = stages.label(task, trajectory)
  assert completed_at.tolist() == [1, 2, 4, 5] and stage_id.tolist() == [0, 1, 2, 2, 3]
  left = task.stages[3].distance(unpack_signals(trajectory), unpack_signals(trajectory[:1]))
  np.testing.assert_allclose(left, [0.115] * 5 + [0], atol=1e-6)  # base at -0.615, success within 0.6 of it


def test_roll_ball_stages_by_hand():
  ball, goal = [0, 0.6, 0.035], [0, -0.8, 0]
  trajectory = states_of(
    dict(object_pose=ball, goal_pose=goal, tcp_pose=[0, 0.4, 0.2]),
    dict(object_pose=ball, goal_pose=goal, tcp_pose=[0, 0.56, 0.035]),  # on the wrong side
    dict(object_pose=ball, goal_pose=goal, tcp_pose=[0, 0.66, 0.035]),
    dict(object_pose=ball, goal_pose=goal, object_velocity=[0.5, -0.3, 0, 0, 0, 0]),  # fast, but past the goal
    dict(object_pose=ball, goal_pose=goal, object_velocity=[0.1, -0.5, 0, 0, 0, 0]),
    dict(object_pose=ball, goal_pose=goal),
    dict(object_pose=goal, goal_pose=goal),
  )
  stage_id, completed_at, _ = stages.label(tasks.get("roll_ball"), trajectory)
  assert completed_at.tolist() == [2, 4, 6] and stage_id.tolist() == [0, 0, 1, 1, 2, 2]


def test_peg_insertion_stages_by_hand():
  """The hole points along the world's y; a peg in line with it is turned by a quarter turn, too."""
  line, skew = quaternion([0, 0, 1], np.pi / 2), quaternion([0, 0, 1], np.pi / 2 + 0.2)
  at = lambda x, y, z, turn, **more: dict(object_pose=[x, y, z, *turn], goal_pose=[0, 0.2, 0.1, *line], **more)
  trajectory = states_of(
    at(0, -0.2, 0.02, skew, tcp_pose=[0, -0.2, 0.2]),
    at(0, -0.2, 0.02, skew, tcp_pose=[0, -0.25, 0.03]),  # five centimetres behind the middle, on the axis
    at(0, -0.2, 0.02, skew, grasped=1),
    at(0, -0.2, 0.06, skew, grasped=1),
    at(0, 0.05, 0.1, skew, grasped=1),  # its middle is in line, its head 2 cm off
    at(0.005, 0.05, 0.1, line, grasped=1),
    at(0, 0.19, 0.1, line, grasped=1),
  )
  stage_id, completed_at, _ = stages.label(tasks.get("peg_insertion_side"), trajectory)
  assert completed_at.tolist() == [1, 3, 5, 6] and stage_id.tolist() == [0, 1, 1, 2, 2, 3]


# ---- plans


def test_action_of_a_robot_that_is_turned():
  """Its base looks along the world's -y: forward there is the action's x, and left is the world's x."""
  base = experts.from_rotation_vector(np.array([0, 0, -np.pi / 2]))
  wanted = experts.Target(np.array([0.01, -0.05, 0.02]), experts.from_rotation_vector(np.array([0, -0.02, 0])), 1.0)
  arm = experts.Controller(lambda arm: arm.goto(*wanted), np.random.default_rng(0), base=base)
  np.testing.assert_allclose(arm.act(state()), [0.65, 0.13, 0.26, -0.26, 0, 0, 1], atol=1e-6)


def test_the_tool_passes_the_cube_without_touching_it():
  """Played with a tool that goes where it is told: it never covers the cube before the cube is in its pocket."""
  for x, y in ((0.3, -0.15), (0.3, 0.1), (0.24, 0.05), (0.35, 0.3), (0.15, 0.2), (0.1, -0.1)):
    for _ in range(60):
      dx, dy = next_step(x, y)
      step = np.array([dx, dy]) * min(1, 0.04 / np.hypot(dx, dy))
      x, y = x - step[0], y - step[1]
      inside_hook = 0.15 - 0.02 < x < 0.2 + 0.02 and -0.02 < y < 0.1 + 0.02
      assert not inside_hook and not (-0.02 < x < 0.2 and abs(y) < 0.025 + 0.02)
      if next_step(x, y) == (-0.06, 0.0):
        break
    else:
      pytest.fail("the cube never came to lie in the pocket")


def test_instructions_fit_the_default_prompt(root):
  """configs/ipi.py gives the prompt 12 tokens, whatever the task."""
  from configs import ipi
  from stare_jax.policies.tokenizer import WordTokenizer

  longest = ipi.get_config().policy.options.prompt_length
  sizes = {name: len(WordTokenizer()(tasks.get(name).instruction)) + 2 for name in tasks.names()}
  assert max(sizes.values()) <= longest, sizes
