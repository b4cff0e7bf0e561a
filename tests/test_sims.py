"""Simulators: the pool's promises on a toy, and ManiSkill's determinism, physics and faults (marker sim)."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from stare_jax import sims, tasks
from stare_jax.episode import SIGNAL_SIZE, unpack_signals
from stare_jax.sims import lite, worker
from stare_jax.sims import pool as pools
from stare_jax.sims.toy import Toy

ROOT = pathlib.Path(__file__).resolve().parents[1]
TASK = types.SimpleNamespace(env_id="Toy", actors=("cube", None), camera=None, env_options={})


class Faulty(Toy):
  """Raises at actions that start with 0.75; sleeps for good at 0.5."""

  def step(self, action: np.ndarray) -> None:
    if action[0] == 0.75:
      raise RuntimeError("the device is gone")
    if action[0] == 0.5:
      signal.pause()
    super().step(action)


class Hopeless(Toy):
  def __init__(self, **kw):
    raise sims.SimulatorError("no device here; run launch/setup.sh")


def toy(num_envs=4, num_workers=2, environment="stare_jax.sims.toy:Toy", **options):
  spec = dict(image_size=16)
  return pools.Pool(environment, spec, num_envs=num_envs, num_workers=num_workers, image_size=16, **options)


def actions(seed, steps, num_envs=1):
  return np.random.default_rng(seed).uniform(-1, 1, (steps, num_envs, 7)).astype(np.float32)


def process_of(sim, env):
  return sim._workers[env % sim.num_workers].process


# ------------------------------------------------------------------------------------------------------- the pool


def test_pool_equals_environments_in_this_process():
  plan = actions(0, 12, 5)
  with sims.make("toy", task=TASK, num_envs=5, num_workers=2, image_size=16) as sim:
    alone = [Toy(image_size=16) for _ in range(5)]
    frame = sim.reset(range(5), [7, 1, 2, 3, 4])
    for env, seed in zip(alone, [7, 1, 2, 3, 4], strict=True):
      env.reset(seed)
    for step in plan:
      image, signals = np.zeros((16, 16, 3), np.uint8), np.zeros(SIGNAL_SIZE, np.float32)
      for i, env in enumerate(alone):
        env.observe(image, signals)
        np.testing.assert_array_equal(frame.images[i], image)
        np.testing.assert_array_equal(frame.signals[i], signals)
        env.step(step[i])
      frame = sim.step(range(5), step)
    assert not frame.lost.any() and sim.restarts == 0 and sim.events == []


def test_groups_overlap_and_frames_come_in_the_order_asked_for():
  plan = actions(1, 1, 4)[0]
  with toy() as sim:
    first = sim.reset([0, 1, 2, 3], [5, 6, 7, 8])
    sim.send_step([1, 0], plan[[1, 0]])
    sim.send_step([2, 3], plan[[2, 3]])
    late, early = sim.receive([3, 2]), sim.receive([0, 1])
    kept = first.signals.copy()
    sim.reset([0, 1, 2, 3], [5, 6, 7, 8])
    np.testing.assert_array_equal(first.signals, kept)  # a frame is a copy
    again = sim.step([3, 2, 1, 0], plan[[3, 2, 1, 0]])
    np.testing.assert_array_equal(again.signals, np.concatenate([late.signals, early.signals[::-1]]))
    np.testing.assert_array_equal(again.images, np.concatenate([late.images, early.images[::-1]]))


def test_snapshot_continues_in_another_environment():
  plan = actions(2, 9, 1)
  with toy() as sim:
    sim.reset([0], [3])
    for step in plan[:4]:
      sim.step([0], step)
    (saved,) = sim.snapshot([0])
    straight = [sim.step([0], step) for step in plan[4:]]
    sim.restore([3], [saved])
    for step, frame in zip(plan[4:], straight, strict=True):
      np.testing.assert_array_equal(sim.step([3], step).signals, frame.signals)


class Slow:
  """Draws in the background, and notes what it is asked for."""

  def __init__(self, name, notes):
    self.note = lambda what: notes.append(what + name)

  def step(self, action):
    self.note("move ")
    return None

  def start_picture(self):
    self.note("start ")

  def fetch_picture(self):
    self.note("fetch ")

  def observe(self, image, signals):
    self.note("see ")

  def snapshot(self):
    return b"state"


def test_one_environment_moves_while_another_is_drawn():
  notes = []
  slots = types.SimpleNamespace(actions=np.zeros((3, 7)), images=np.zeros(3), signals=np.zeros(3))
  environments = {i: Slow("abc"[i], notes) for i in range(3)}
  answers = []
  for env, answer in worker._serve(environments, slots, "step", [(2, None), (0, None), (1, None)]):
    notes.append(f"answer {'abc'[env]}")
    answers.append((env, answer))
  assert answers == [(2, None), (0, None), (1, None)]
  assert notes == [
    "move c", "start c",
    "move a", "fetch c", "start a",
    "move b", "fetch a", "start b", "see c", "answer c",
    "see a", "answer a", "see b", "answer b",
  ]  # fmt: skip
  assert list(worker._serve(environments, slots, "snapshot", [(1, None)])) == [(1, b"state")]
  assert list(worker._serve(environments, slots, "step", [])) == []
  for order in ([(1, None)], [(1, None), (0, None)]):
    assert list(worker._serve(environments, slots, "step", order)) == order


def test_an_exception_while_others_are_drawn_leaves_them_unanswered():
  """What was drawn is not answered with a picture that nobody looked at; the pool counts it as lost."""
  notes, answered = [], []
  slots = types.SimpleNamespace(actions=np.zeros((4, 7)), images=np.zeros(4), signals=np.zeros(4))
  environments = {i: Slow("abcd"[i], notes) for i in range(4)}
  environments[1].step = lambda action: 1 / 0
  with pytest.raises(ZeroDivisionError):
    for env, _ in worker._serve(environments, slots, "step", [(2, None), (0, None), (3, None), (1, None)]):
      answered.append(env)
  assert answered == [2] and notes[-1] == "see c"


def test_a_killed_worker_is_replaced_and_its_episodes_are_lost():
  zeros = np.zeros((4, 7), np.float32)
  with toy() as sim:
    sim.reset(range(4), range(4))
    process_of(sim, 1).send_signal(signal.SIGKILL)
    frame = sim.step(range(4), zeros)
    assert frame.lost.tolist() == [False, True, False, True]
    assert not frame.images[1].any() and not frame.signals[3].any()
    assert sim.restarts == 1 and "SIGKILL" in sim.events[0] and "[1, 3]" in sim.events[0]
    assert sim.step([1, 0], zeros[:2]).lost.tolist() == [True, False]  # lost until it is reset
    assert sim.snapshot([1, 0])[0] == b""
    healed = sim.reset([1, 3], [1, 3])
    assert not healed.lost.any() and not sim.step(range(4), zeros).lost.any()
    assert sim.restore([1], [b""]).lost.all()


def test_an_idle_worker_dies_before_a_reset():
  with toy() as sim:
    sim.reset(range(4), range(4))
    process = process_of(sim, 0)
    process.kill()
    process.wait()
    frame = sim.reset([0], [5])
    if frame.lost[0]:  # the request went to the dead worker
      frame = sim.reset([0], [5])
    assert not frame.lost.any() and sim.restarts == 1


def test_a_hung_worker_is_replaced_after_the_timeout():
  with toy(timeout=1.0) as sim:
    sim.reset(range(4), range(4))
    process_of(sim, 0).send_signal(signal.SIGSTOP)
    frame = sim.step(range(4), np.zeros((4, 7), np.float32))
    assert frame.lost.tolist() == [True, False, True, False]
    assert "did not answer within 1 s" in sim.events[0]
    assert not sim.reset([0, 2], [1, 2]).lost.any()


def test_an_exception_is_an_event_and_repeated_ones_end_the_run():
  bad = np.full((1, 7), 0.75, np.float32)
  with toy(environment=f"{__name__}:Faulty", max_failures=2) as sim:
    sim.reset([0, 1], [0, 1])
    assert sim.step([0], bad).lost.all() and "the device is gone" in sim.events[0]
    assert not sim.reset([0], [0]).lost.any()  # one answer in between: counting starts again
    assert sim.step([0], bad).lost.all()
    process_of(sim, 0).kill()
    with pytest.raises(sims.SimulatorError, match="failed 2 times"):
      for _ in range(3):
        sim.reset([0], [0])


def test_an_episode_that_fails_whenever_it_is_played_ends_the_run():
  """Others are played meanwhile, so the worker never fails without an answer in between."""
  bad = np.full((1, 7), 0.75, np.float32)
  with toy(environment=f"{__name__}:Faulty") as sim:
    for _ in range(3):  # another episode in between is no repetition
      sim.reset([0, 1], [7, 1])
      assert sim.step([0], bad).lost.all() and not sim.reset([0], [8]).lost.any()
    with pytest.raises(sims.SimulatorError, match=rf"seeds \[7\].* lost {pools.MAX_LOSSES} times each"):
      for _ in range(pools.MAX_LOSSES + 1):
        assert not sim.reset([0], [7]).lost.any()
        assert not sim.step([1], np.zeros((1, 7), np.float32)).lost.any()
        assert sim.step([0], bad).lost.all()
    assert sim.restarts == 3 + pools.MAX_LOSSES - 1


def test_a_signal_to_all_processes_of_a_job_ends_no_worker_that_starts():
  with toy(wait=False) as sim:
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
      for env in (0, 1):
        process_of(sim, env).send_signal(number)  # most likely before it has imported anything
    assert not sim.reset(range(4), range(4)).lost.any() and sim.restarts == 0


@pytest.mark.parametrize("heard", [0, 1])
def test_a_job_that_was_suspended_loses_no_worker(monkeypatch, heard):
  real, first = pools.connection.wait, []

  def wait(pipes, timeout):
    if first:
      return real(pipes, timeout)
    first.append(time.sleep(timeout + 1.1))  # as if stopped meanwhile: longer than was asked for
    return real(pipes, 0)[:heard]

  with toy(timeout=1.0) as sim:
    sim.reset(range(4), range(4))
    monkeypatch.setattr(pools.connection, "wait", wait)
    assert not sim.step(range(4), np.zeros((4, 7), np.float32)).lost.any()
    assert first and sim.restarts == 0


def test_a_hang_inside_a_step_and_the_others_go_on():
  plan = np.zeros((2, 7), np.float32)
  plan[0, 0] = 0.5
  with toy(environment=f"{__name__}:Faulty", timeout=1.0) as sim:
    sim.reset([0, 1], [0, 1])
    assert sim.step([0, 1], plan).lost.tolist() == [True, False]


def test_a_failing_start_says_what_to_do():
  with pytest.raises(sims.SimulatorError, match=r"launch/setup\.sh[\s\S]*could not be started"):
    toy(environment=f"{__name__}:Hopeless")


def test_wrong_requests_are_errors():
  with toy() as sim:
    with pytest.raises(ValueError, match="no pending request"):
      sim.receive([0])
    with pytest.raises(ValueError, match="does not exist"):
      sim.send_reset([9], [0])
    sim.send_reset([0], [0])
    with pytest.raises(ValueError, match="answer waiting"):
      sim.send_step([0], np.zeros((1, 7)))
    sim.receive([0])
    with pytest.raises(ValueError, match=r"expected \(1, 7\)"):
      sim.step([0], np.zeros((2, 7)))
    with pytest.raises(ValueError, match="not finite"):
      sim.step([0], np.full((1, 7), np.nan))
  with pytest.raises(sims.SimulatorError, match="closed"):
    sim.reset([0], [0])
  with pytest.raises(ValueError, match="num_workers"):
    toy(num_envs=1, num_workers=2)
  with pytest.raises(ValueError, match="Did you mean 'maniskill'"):
    sims.make("maniskil", task=TASK, num_envs=1, num_workers=1, image_size=16)


def test_workers_end_with_their_parent():
  script = (
    "import os, signal; from stare_jax.sims import pool;"
    "p = pool.Pool('stare_jax.sims.toy:Toy', dict(image_size=8), num_envs=2, num_workers=2, image_size=8);"
    "print(*[w.process.pid for w in p._workers], flush=True); os.kill(os.getpid(), signal.SIGKILL)"
  )
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
  pids = [int(pid) for pid in done.stdout.split()]
  assert len(pids) == 2, done.stderr
  for _ in range(100):
    alive = [pid for pid in pids if running(pid)]
    if not alive:
      return
    signal.sigtimedwait([], 0.1)
  raise AssertionError(f"processes {alive} outlived their parent")


def running(pid):
  try:
    state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
  except FileNotFoundError:
    return False
  return state != "Z"


def test_the_learner_stays_free_of_the_simulator():
  script = (
    "import sys; from stare_jax import sims, tasks; from stare_jax.sims import pool;"
    "sims.resolve('maniskill'); tasks.get('pick_cube');"
    "print([m for m in ('torch', 'mani_skill', 'sapien', 'jax') if m in sys.modules])"
  )
  out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
  assert out.stdout.strip() == "[]"


# ------------------------------------------------------------------------------------------------------ ManiSkill


# One whose robot stands elsewhere, and one that builds its scene anew for every episode and has a pose for a goal.
ODD = [pytest.param(name, marks=pytest.mark.slow) for name in ("roll_ball", "peg_insertion_side")]


@pytest.fixture(scope="module", params=["pick_cube", "pull_cube", *ODD])
def real(request):
  """Three environments on two workers: 0 and 2 share a process."""
  task = tasks.get(request.param)
  with sims.make("maniskill", task=task, num_envs=3, num_workers=2, image_size=64) as sim:
    yield task, sim


def demonstrate(task, sim, env, seed, steps, noise=0.0):
  """The expert in one environment: actions[T, 7], then `play`'s record of the same."""
  expert = task.expert(np.random.default_rng(seed), noise)
  frame, plan, record = sim.reset([env], [seed]), [], []
  for _ in range(steps):
    record.append(frame)
    plan.append(expert.act(unpack_signals(frame.signals[0])))
    frame = sim.step([env], plan[-1][None])
  return np.stack(plan), collect([*record, frame])


def collect(frames):
  assert not any(frame.lost.any() for frame in frames)
  return np.concatenate([f.signals for f in frames]), np.concatenate([f.images for f in frames])


def play(sim, env, seed, plan):
  return collect([sim.reset([env], [seed]), *(sim.step([env], action[None]) for action in plan)])


def same(a, b):
  return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.sim
def test_an_episode_repeats_bit_for_bit_whatever_came_before(real):
  task, sim = real
  plan, first = demonstrate(task, sim, 0, seed=1, steps=20)
  still = np.zeros((20, 7), np.float32)  # long enough for bodies at rest to fall asleep
  resting = play(sim, 1, 2, still)
  demonstrate(task, sim, 0, seed=4, steps=12, noise=0.3)
  demonstrate(task, sim, 2, seed=5, steps=20)
  assert same(play(sim, 0, 1, plan), first), "same environment, another past"
  assert same(play(sim, 0, 2, still), resting)
  assert same(play(sim, 2, 1, plan), first), "another environment of the same process"
  assert same(play(sim, 1, 1, plan), first), "another process"


@pytest.mark.sim
def test_a_snapshot_continues_bit_for_bit(real):
  task, sim = real
  plan, whole = demonstrate(task, sim, 0, seed=3, steps=16)
  play(sim, 0, 3, plan[:9])  # hands on the cube
  (saved,) = sim.snapshot([0])
  demonstrate(task, sim, 1, seed=6, steps=5, noise=0.3)
  start = sim.restore([1], [saved])
  rest = collect([start, *(sim.step([1], action[None]) for action in plan[9:])])
  assert same(rest, (whole[0][9:], whole[1][9:]))
  assert sim.events == []


STOCK = """
import sys, warnings; warnings.filterwarnings("ignore")
import gymnasium as gym, mani_skill.envs, numpy as np
env_id, seed, out, objects = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
env = gym.make(env_id, num_envs=1, sim_backend="physx_cpu", render_backend="cpu", robot_uids="panda",
               control_mode="pd_ee_delta_pose")
e = env.unwrapped
def record():
  robot, actor = e.agent.robot, getattr(e, objects)
  force = [np.linalg.norm(e.scene.get_pairwise_contact_forces(f, actor)[0].numpy())
           for f in (e.agent.finger1_link, e.agent.finger2_link)]
  return np.concatenate([e.agent.tcp.pose.raw_pose[0], actor.pose.raw_pose[0], actor.linear_velocity[0],
    actor.angular_velocity[0], robot.get_qpos()[0], robot.get_qvel()[0], force, e.agent.is_grasping(actor),
    e.evaluate()["success"]]).astype(np.float32)
env.reset(seed=seed)
rows = [record()]
for action in np.load(out + ".plan.npy"):
  env.step(action)
  rows.append(record())
np.save(out, np.stack(rows))
"""


@pytest.mark.sim
def test_physics_equals_stock_maniskill(real, tmp_path):
  task, sim = real
  plan, (signals, _) = demonstrate(task, sim, 1, seed=11, steps=20)
  out = str(tmp_path / "stock.npy")
  np.save(out + ".plan.npy", plan)
  command = [sys.executable, "-c", STOCK, task.env_id, "11", out, task.actors.object]
  subprocess.run(command, check=True, timeout=300, capture_output=True)
  ours = unpack_signals(signals)
  names = ("tcp_pose", "object_pose", "object_velocity", "qpos", "qvel", "finger_force", "grasped", "success")
  stock, at = np.load(out), 0
  for name in names:
    value = ours[name].reshape(len(signals), -1)
    rounding = 1e-6 if name == "finger_force" else 0.0  # summed in float64 here, in float32 there; the state is equal
    np.testing.assert_allclose(value, stock[:, at : at + value.shape[1]], rtol=rounding, atol=0, err_msg=name)
    at += value.shape[1]
  assert at == stock.shape[1]
  if task.name == "pick_cube":
    assert ours["grasped"].any() and not ours["grasped"].all()  # the comparison saw both


@pytest.mark.sim
def test_the_shorter_shader_draws_the_same_pixels(real):
  task, sim = real
  plan = actions(5, 6)[:, 0]
  with sims.make(task=task, num_envs=1, num_workers=1, image_size=64, shader="minimal") as minimal:
    assert same(play(minimal, 0, 12, plan), play(sim, 0, 12, plan))


@pytest.mark.sim
def test_the_hidden_goal_is_drawn(real):
  task, sim = real
  if task.name != "pick_cube":
    pytest.skip("only PickCube hides its goal")
  image = sim.reset([0, 1], [1, 9]).images.astype(int)  # seeds whose goal the camera sees
  green = (image[..., 1] > image[..., 0] + 60) & (image[..., 1] > image[..., 2] + 60)
  assert (green.sum(axis=(1, 2)) >= 20).all()


@pytest.mark.sim
@pytest.mark.slow
def test_a_killed_simulator_comes_back_the_same(real):
  task, sim = real
  plan, first = demonstrate(task, sim, 1, seed=1, steps=10)
  before = sim.restarts
  process_of(sim, 1).send_signal(signal.SIGKILL)
  frame = sim.step([0, 1], np.zeros((2, 7), np.float32))
  assert frame.lost.tolist() == [False, True] and sim.restarts == before + 1
  assert same(play(sim, 1, 1, plan), first)
  sim.events.clear()


@pytest.mark.sim
def test_no_vulkan_device_says_what_to_do(monkeypatch):
  for name in ("VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
    monkeypatch.setenv(name, os.devnull)
  with pytest.raises(sims.SimulatorError, match=r"launch/setup\.sh"):
    sims.make("maniskill", task=tasks.get("pull_cube"), num_envs=1, num_workers=1, image_size=32)


@pytest.mark.sim
def test_an_unknown_actor_is_named():
  task = types.SimpleNamespace(env_id="PullCube-v1", actors=("cubeA", None), camera=None, env_options={})
  with pytest.raises(sims.SimulatorError, match=r"no actor 'cubeA'; it has goal_region, obj"):
    sims.make("maniskill", task=task, num_envs=1, num_workers=1, image_size=32)


def test_where_the_home_cannot_be_written_the_cache_is_among_the_temporary_files(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
  assert lite.cache_root() == tmp_path / "mine" / "stare_jax"
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  monkeypatch.setattr(lite.tempfile, "gettempdir", lambda: str(tmp_path))
  assert lite.cache_root().parent == tmp_path and lite.cache_root().is_dir()


def test_a_crash_in_native_code_shows_its_stack(tmp_path):
  """faulthandler ends with one long line of module names."""
  with (tmp_path / "log").open("w+b") as log:
    log.write(b'Fatal Python error: Segmentation fault\n  File "scene.py", line 3\n')
    log.write(b"Extension modules: " + b"scipy, " * 999)
    said = pools._Worker.output(types.SimpleNamespace(log=log))
  assert said.endswith('File "scene.py", line 3') and said.startswith("Fatal")
