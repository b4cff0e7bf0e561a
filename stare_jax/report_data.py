"""What a run folder holds, read for the report; damaged or missing files are noted, not fatal."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from typing import Any

PHASES = ("imitation", "preference", "interaction")  # as in config.py, of which a report needs nothing else
RESERVED = ("phase", "step", "env_steps", "time")  # of a row of metrics.jsonl; the rest are metrics
EVALUATION_KEYS = ("label", "task", "episodes", "success_once", "success_at_end", "stages")
SAMPLE_KEYS = ("label", "seed", "success", "fps", "stages", "stage_id", "completed_at", "potential")


@dataclasses.dataclass
class Run:
  """What was found. `problems` are files that could not be read; the page lists them."""

  workdir: pathlib.Path
  summary: dict
  config: dict
  rows: dict[str, list[dict]]  # phase -> its rows of metrics.jsonl
  evaluations: dict[str, dict]  # label -> evaluations/<label>.json
  samples: list[dict]  # videos/*.json, with "video": the path of the mp4
  pairs: dict  # data/preference/pairs.json
  problems: list[str]

  @property
  def phases(self) -> list[str]:
    """Every phase that left a trace, in the order of the method."""
    found = [*self.rows, *self.evaluations]
    return [p for p in dict.fromkeys([*PHASES, *found]) if p in found]

  @property
  def evaluated(self) -> list[dict]:
    return [self.evaluations[p] for p in self.phases if p in self.evaluations]


def load(workdir: str | os.PathLike) -> Run:
  workdir = pathlib.Path(workdir)
  if not workdir.is_dir():
    raise FileNotFoundError(f"no run folder at {workdir}; pass the --workdir of a run")
  problems: list[str] = []
  summary = _read_json(workdir / "summary.json", problems) or {}
  config = summary.get("config") or _read_json(workdir / "config.json", problems) or {}
  evaluations = summary.get("phases") or {}
  evaluations = {k: v for k, v in evaluations.items() if all(key in v for key in EVALUATION_KEYS)}
  for path in sorted((workdir / "evaluations").glob("*.json")):
    if evaluation := _read_json(path, problems):
      if missing := [key for key in EVALUATION_KEYS if key not in evaluation]:
        problems.append(f"{path.name} has no {', '.join(missing)}")
      else:
        evaluations[evaluation["label"]] = evaluation
  samples = []
  for path in sorted((workdir / "videos").glob("*.json"), key=lambda p: (len(p.name), p.name)):
    if sample := _read_json(path, problems):
      if missing := [key for key in SAMPLE_KEYS if key not in sample]:
        problems.append(f"{path.name} has no {', '.join(missing)}")
      else:
        samples.append({**sample, "video": path.with_suffix(".mp4")})
  rows = _read_rows(workdir / "metrics.jsonl", problems)
  pairs = _read_json(workdir / "data" / "preference" / "pairs.json", problems) or {}
  return Run(workdir, summary, config, rows, evaluations, samples, pairs, problems)


def _read_json(path: pathlib.Path, problems: list[str]) -> dict | None:
  if not path.exists():
    return None
  try:
    value = json.loads(path.read_text())
    if isinstance(value, dict):
      return value
    problems.append(f"{path.name} holds a {type(value).__name__} where an object was expected")
  except (OSError, ValueError) as error:
    problems.append(f"{path.name} could not be read ({error})")
  return None


def _read_rows(path: pathlib.Path, problems: list[str]) -> dict[str, list[dict]]:
  rows: dict[str, list[dict]] = {}
  damaged = 0
  for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
    try:
      row = json.loads(line)
      rows.setdefault(row["phase"], []).append({**row, "step": float(row["step"])})
    except (ValueError, KeyError, TypeError):
      damaged += bool(line.strip())
  if damaged:
    problems.append(f"{path.name}: {damaged} line(s) could not be read, perhaps cut off when the run stopped")
  return rows


def is_number(value: Any) -> bool:
  return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
