"""Evaluation suites: what an evaluation changes that training never varied. numpy only; simulator workers read it too.

A suite is a value. It names a family (vision, semantics, execution) and what it changes, as kind -> ranges. What an
episode gets of it is drawn from a generator of (suite, environment seed) alone, so that a seed means the same pictures
and the same start in every process, whatever ran before. `in_distribution` changes nothing.

  kind          ranges                                   what an episode gets
  camera        azimuth, elevation: degrees              the camera, turned about the point of the table it looks at
  light         dark, bright: factors; tint: share       brightness and colour of every light (and of a photograph)
  table         -                                        another texture on the table, or on the photograph's table
  noise         sigma: of 255                            Gaussian noise, new in every picture
  overlay       alpha                                    a texture blended over robot and objects
  instruction   -                                        one of the task's other phrasings
  distractor    half: metres                             a box or ball of another colour beside the objects
  colour        -                                        another colour of the object, and of its name if it has one
  object        -                                        another object (`Task.substitute`), and its name
  arm           joint: rad; tool: metres                 other joint angles at the start, and where the tool is then
  place         -                                        the object outside the range of training (`Task.region`)
  move          step: control steps; least: metres       the object put elsewhere in that range, in mid-episode
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

FAMILIES = ("in-distribution", "vision", "semantics", "execution")
# Colours of objects, as the tiny policy's vocabulary names them; sRGB in [0, 1].
COLOURS: dict[str, tuple[float, float, float]] = {
  "red": (0.80, 0.08, 0.08), "blue": (0.10, 0.20, 0.85), "yellow": (0.95, 0.85, 0.10), "purple": (0.55, 0.15, 0.75),
  "orange": (1.00, 0.50, 0.05),
}  # fmt: skip
# What each simulator can change; an instruction is the policy's matter and needs none.
CAN_CHANGE: dict[str, tuple[str, ...]] = {
  "maniskill": ("camera", "light", "table", "noise", "overlay", "distractor", "colour", "object",
                "arm", "place", "move"),
  "toy": ("noise",),
}
_TEMPLATES = ("please {}", "robot {}", "{} now")  # for a task that lists no phrasings


@dataclasses.dataclass(frozen=True)
class Suite:
  """One evaluation suite.

  Attributes:
    name: how it is asked for.
    family: one of `FAMILIES`.
    description: what it changes, in a sentence of the table.
    changes: kind -> ranges, see above.
    shown: control steps whose pictures show what it does.
  """

  name: str
  family: str
  description: str
  changes: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
  shown: tuple[int, ...] = (0,)


IN_DISTRIBUTION = Suite("in_distribution", "in-distribution", "nothing: starts and pictures as training evaluates them")
SUITES: tuple[Suite, ...] = (
  IN_DISTRIBUTION,
  Suite(
    "camera_shift", "vision", "camera turned about the table by 5 to 12 degrees sideways and 2 to 6 up or down",
    {"camera": dict(azimuth=(5.0, 12.0), elevation=(2.0, 6.0))},
  ),
  Suite(
    "lighting", "vision", "light at 0.35 to 0.6 or 1.5 to 2 times its strength, tinted by up to a quarter",
    {"light": dict(dark=(0.35, 0.6), bright=(1.5, 2.0), tint=0.25)},
  ),
  Suite("table_texture", "vision", "another texture on the table", {"table": {}}),
  Suite("image_noise", "vision", "Gaussian noise of 15 to 30 of 255, new in every picture",
        {"noise": dict(sigma=(15.0, 30.0))}),
  Suite("foreground_texture", "vision", "a texture over the pixels of robot and objects, half transparent",
        {"overlay": dict(alpha=0.5)}),
  Suite("instruction", "semantics", "a phrasing of the instruction that training never used", {"instruction": {}}),
  Suite("distractor", "semantics", "a box or ball of another colour beside the objects",
        {"distractor": dict(half=(0.014, 0.024))}),
  Suite("object_colour", "semantics", "another colour of the object", {"colour": {}}),
  Suite("object_unseen", "semantics", "an object that training never had, and its name", {"object": {}}),
  Suite("arm_pose", "execution", "the arm's joints turned by 0.03 to 0.15 rad each, the tool 4 to 12 cm off",
        {"arm": dict(joint=(0.03, 0.15), tool=(0.04, 0.12))}),
  Suite("object_position", "execution", "the object outside the range of training", {"place": {}}),
  Suite("object_moved", "execution", "the object put elsewhere between control steps 3 and 6",
        {"move": dict(step=(3, 6), least=0.06)}, shown=(0, 8)),
)  # fmt: skip


def names() -> tuple[str, ...]:
  """Every suite, in-distribution first, by family."""
  return tuple(suite.name for suite in SUITES)


def get(name: str) -> Suite:
  """The suite of a name."""
  for suite in SUITES:
    if suite.name == name:
      return suite
  near = difflib.get_close_matches(str(name), names(), n=1, cutoff=0.4)
  hint = f'did you mean "{near[0]}"? ' if near else ""
  raise ValueError(f'unknown suite "{name}": {hint}Known: all, {", ".join((*FAMILIES[1:], *names()))}.')


def choose(asked: Sequence[str]) -> tuple[tuple[Suite, ...], frozenset[str]]:
  """The suites of names, families or "all", each once and in the table's order; and which of them were asked by name.

  In-distribution is always the first: without it no other figure can be read.
  """
  named = frozenset(name for name in asked if name != "all" and name not in FAMILIES)
  for name in named:
    get(name)
  wanted = lambda s: s is IN_DISTRIBUTION or "all" in asked or s.family in asked or s.name in named
  return tuple(suite for suite in SUITES if wanted(suite)), named


def why_not(suite: Suite, task: Any, simulator: str) -> str:
  """Why a task in a simulator cannot have a suite; empty if it can."""
  able = ("instruction", *CAN_CHANGE.get(simulator, ()))
  if missing := [kind for kind in suite.changes if kind not in able]:
    return f"the simulator {simulator!r} cannot change: {', '.join(missing)}"
  if task.region is None and (moving := [kind for kind in suite.changes if kind in ("distractor", "place", "move")]):
    return f"{task.name} says of no range that its object starts in (Task.region), so {moving[0]} knows no place"
  if task.substitute is None and "object" in suite.changes:
    return f"{task.name} has no other object (Task.substitute)"
  return ""


def generator(name: str, seed: int) -> np.random.Generator:
  """The generator of what suite `name` changes in the episode of an environment seed."""
  return np.random.default_rng([seed, *name.encode()])


def for_worker(suite: Suite, task: Any) -> dict[str, Any]:
  """What a simulator's worker needs to change an episode: plain values."""
  region = None if task.region is None else task.region._asdict()
  return dict(
    name=suite.name, changes={kind: dict(ranges) for kind, ranges in suite.changes.items()}, region=region,
    colours=tuple(COLOURS[word] for word in colour_words(task)), model=task.substitute and task.substitute.model,
  )  # fmt: skip


def fields(suite: Suite | None, task: Any) -> dict[str, Any]:
  """What decides the episodes of an evaluation beside its starts: results of other values are not these."""
  if suite is None:
    return {}
  needs = {"colours": {"colour", "distractor"}, "region": {"distractor", "place", "move"}, "model": {"object"}}
  found = for_worker(suite, task) | {"instructions": instructions(suite, task)}
  return {key: value for key, value in found.items() if key not in needs or needs[key] & set(suite.changes)}


def colour_words(task: Any) -> tuple[str, ...]:
  """The colours that the task's object does not have, nor anything else that its instruction names."""
  taken = {*task.colour.split(), *task.instruction.lower().split()}
  return tuple(word for word in COLOURS if word not in taken)


def colour_index(name: str, seed: int, count: int) -> int:
  """Which of `count` colours the object has in an episode; learner and worker draw the same."""
  return int(generator(name, seed).integers(count))


def phrasings(task: Any) -> tuple[str, ...]:
  """What the policy may be told in place of the task's instruction."""
  return tuple(task.phrasings) or tuple(template.format(task.instruction) for template in _TEMPLATES)


def instructions(suite: Suite, task: Any) -> tuple[str, ...]:
  """Everything that the policy can be told under a suite."""
  if "instruction" in suite.changes:
    return phrasings(task)
  if "object" in suite.changes and task.substitute is not None:
    return (task.substitute.instruction,)
  if "colour" in suite.changes and _own_colour(task) in task.instruction.split():
    return tuple(_recoloured(task, word) for word in colour_words(task))
  return (task.instruction,)


def instruction(suite: Suite, task: Any, seed: int) -> str:
  """What the policy is told in the episode of an environment seed."""
  told = instructions(suite, task)
  if "colour" in suite.changes:
    return told[colour_index(suite.name, seed, len(told))]
  return told[int(generator(suite.name, seed).integers(len(told)))]


def _recoloured(task: Any, word: str) -> str:
  return " ".join(word if part == _own_colour(task) else part for part in task.instruction.split())


def _own_colour(task: Any) -> str:
  return task.colour.partition(" ")[0]
