"""Tasks: what the robot is told, in which order the stages of the work end, and who can demonstrate it.

A task is a value. It names a simulator environment and declares an ordered tuple of stages (METHOD: StARe); it holds
no state and imports no simulator. Each family has a file of its own and each task one line in `REGISTRY`.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from stare_jax.episode import Signals

REGISTRY: dict[str, str] = {
  "push_cube": "stare_jax.tasks.push_pull:PUSH_CUBE",
  "pull_cube": "stare_jax.tasks.push_pull:PULL_CUBE",
  "pick_cube": "stare_jax.tasks.pick_place:PICK_CUBE",
  "stack_cube": "stare_jax.tasks.pick_place:STACK_CUBE",
  "place_sphere": "stare_jax.tasks.pick_place:PLACE_SPHERE",
  "lift_peg_upright": "stare_jax.tasks.lift_peg:LIFT_PEG_UPRIGHT",
  "poke_cube": "stare_jax.tasks.poke_cube:POKE_CUBE",
  "pull_cube_tool": "stare_jax.tasks.pull_cube_tool:PULL_CUBE_TOOL",
  "roll_ball": "stare_jax.tasks.roll_ball:ROLL_BALL",
  "peg_insertion_side": "stare_jax.tasks.peg_insertion:PEG_INSERTION_SIDE",
  "put_carrot_on_plate": "stare_jax.tasks.bridge:PUT_CARROT_ON_PLATE",
  "put_spoon_on_towel": "stare_jax.tasks.bridge:PUT_SPOON_ON_TOWEL",
  "stack_green_on_yellow": "stare_jax.tasks.bridge:STACK_GREEN_ON_YELLOW",
  "put_eggplant_in_basket": "stare_jax.tasks.bridge:PUT_EGGPLANT_IN_BASKET",
  "simpler_put_carrot_on_plate": "stare_jax.tasks.simpler:PUT_CARROT_ON_PLATE",
  "simpler_put_spoon_on_towel": "stare_jax.tasks.simpler:PUT_SPOON_ON_TOWEL",
  "simpler_stack_green_on_yellow": "stare_jax.tasks.simpler:STACK_GREEN_ON_YELLOW",
  "simpler_put_eggplant_in_basket": "stare_jax.tasks.simpler:PUT_EGGPLANT_IN_BASKET",
}

# The controller that the experts and the policies drive: see `experts.Controller` for what its action means.
PANDA: Mapping[str, Any] = {"robot_uids": "panda", "control_mode": "pd_ee_delta_pose"}


class Expert(Protocol):
  """A feedback controller for one episode of one environment; a new object is made for every episode."""

  def act(self, signals: Signals) -> np.ndarray:
    """Unbatched signals of the current state -> float32[7] in the units of the task's controller."""
    ...


class Camera(NamedTuple):
  """A fixed camera: eye and target in metres (world frame), vertical field of view in radians."""

  eye: tuple[float, float, float]
  target: tuple[float, float, float]
  fov: float


class Actors(NamedTuple):
  """Attributes of the simulator environment from which the signals are read.

  The goal may also be a pose that the environment works out, such as PegInsertionSide's; None: the task has none.
  """

  object: str
  goal: str | None


class Region(NamedTuple):
  """Where a task's object starts (x, y in metres, world frame), for suites that put it elsewhere.

  Attributes:
    low, high: corners of the rectangle that holds every start of training.
    outer_low, outer_high: of the one that an arm still reaches and the camera shows.
    along: the simulator's names of what keeps its place relative to the object, such as a goal at a fixed distance.
  """

  low: tuple[float, float]
  high: tuple[float, float]
  outer_low: tuple[float, float]
  outer_high: tuple[float, float]
  along: tuple[str, ...] = ()


class Substitute(NamedTuple):
  """Another object that a scene has a model of, and what the policy is told where it takes the place of the task's."""

  model: str
  instruction: str


@dataclasses.dataclass(frozen=True)
class Stage:
  """One stage of a task.

  Attributes:
    name: "Reach".
    end: the end event e_k: (signals now, signals at reset) -> bool[...]. Leading axes broadcast: [N] against [N]
      online; [T+1] against [1] offline.
    distance: d_k: (signals now, signals at reset) -> float32[...] >= 0, what the stage shrinks; metres or radians.
    scale: L_k > 0, in the unit of the distance; costs and potentials are functions of distance / scale.
  """

  name: str
  end: Callable[[Signals, Signals], np.ndarray]
  distance: Callable[[Signals, Signals], np.ndarray]
  scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
  """A task; compared and hashed by identity, because `get` returns the same object every time.

  Attributes:
    name: its key in `REGISTRY`.
    env_id: the simulator's name of the environment.
    instruction: what the policy is told.
    stages: in the order in which they must end. The last one ends when the simulator reports success.
    actors: which of the environment's actors are the object and the goal.
    expert: (rng, noise) -> Expert; noise is the standard deviation added to the six motion dimensions.
    camera: opposite the robot, 45 degrees down. It frames the workspace with the goal and no more, because images are
      small: 4 cm are 4 to 6 pixels of 64. None: the environment's own.
    horizon: control steps after which an episode is cut.
    control_hz: control steps per second.
    starts: how many start states were published to evaluate on; seeds 0 to starts - 1 name them, and any other seed
      another start. None: there are none, and every seed is as good.
    simulator: the one that has the environment, a key of `sims.REGISTRY`.
    unit: the translation that noise of 1 stands for, in the action's own units: 1 where actions lie in [-1, 1].
    colour: colours that a suite must not give the object, in words: first its own, which the instruction's word follows
      where that names it, then further ones of its parts and of what it should not be taken for.
    region: where the object starts; None: not known, and nothing puts it elsewhere.
    phrasings: other ways to say the instruction, never used in training.
    substitute: an object that training never saw, of about the size of the task's, so that stages mean the same.
    env_options: further arguments of the environment. `scene` and `show_goal` are the simulator's own: which kind of
      scene it is, and to draw the goal marker that the environment hides from its cameras.
  """

  name: str
  env_id: str
  instruction: str
  stages: tuple[Stage, ...]
  actors: Actors
  expert: Callable[[np.random.Generator, float], Expert]
  camera: Camera | None = Camera(eye=(0.74, 0.0, 0.83), target=(-0.04, 0.0, 0.05), fov=0.5)
  horizon: int = 50
  control_hz: int = 20
  starts: int | None = None
  simulator: str = "maniskill"
  unit: float = 1.0
  colour: str = ""
  region: Region | None = None
  phrasings: tuple[str, ...] = ()
  substitute: Substitute | None = None
  env_options: Mapping[str, Any] = dataclasses.field(default_factory=lambda: dict(PANDA))

  def __post_init__(self):
    where = f"task {self.name!r}"
    if not self.stages:
      raise ValueError(f"{where} has no stages: give at least one Stage(name, end, distance, scale)")
    names = [stage.name for stage in self.stages]
    if len(set(names)) < len(names):
      raise ValueError(f"{where}: stage names {names} are not unique; rename the repeated one")
    for stage in self.stages:
      if not (np.isfinite(stage.scale) and stage.scale > 0):
        raise ValueError(f"{where}, stage {stage.name!r}: scale is {stage.scale}, expected a positive length or angle")
    if self.horizon < 1:
      raise ValueError(f"{where}: horizon is {self.horizon}, expected at least 1 control step")
    if not self.instruction.strip():
      raise ValueError(f"{where}: the instruction is empty; say in a plain sentence what the robot should do")

  def __reduce__(self):
    # Stages hold functions, which do not pickle; a simulator worker finds the same task by its name.
    return get, (self.name,)


def names(simulator: str | None = None) -> tuple[str, ...]:
  """Every registered task, or those of one simulator."""
  return tuple(name for name in REGISTRY if simulator is None or get(name).simulator == simulator)


def get(name: str) -> Task:
  """The task registered as `name`."""
  if name not in REGISTRY:
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), REGISTRY, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"unknown task {name!r}: {hint}known tasks: {', '.join(REGISTRY)}")
  module, attribute = REGISTRY[name].split(":")
  task = getattr(importlib.import_module(module), attribute)
  if not isinstance(task, Task):
    raise TypeError(f"task {name!r}: {REGISTRY[name]} is a {type(task).__name__}, expected a Task")
  if task.name != name:
    raise ValueError(f"task {name!r}: {REGISTRY[name]} calls itself {task.name!r}; use one name in both places")
  return task
