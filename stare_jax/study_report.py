"""What a study found: tables and learning curves over seeds, computed from the cells' folders alone.

A method's figure is the mean over its seeds with Student's 95 % interval of that mean, and all episodes of its seeds
together with Wilson's, which knows nothing of the spread between seeds; a difference of two methods is paired by seed,
because both started from the same policy. Curves are the success of the training rollouts, smoothed in
each seed by a centred mean over SMOOTHING iterations, then averaged over the seeds.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from stare_jax import evaluate, report
from stare_jax.report_charts import curve, esc, smooth

SMOOTHING = 7  # iterations
COLOURS = ("#4477aa", "#ee6677", "#228833", "#aa7700", "#aa3377", "#33a0c0", "#888888", "#000000")
START = "sft"


class Estimate(NamedTuple):
  """A mean over seeds and its 95 % interval; the limits are None where one seed says nothing of their spread."""

  mean: float
  low: float | None
  high: float | None
  values: tuple[float, ...]


class Curve(NamedTuple):
  """float64[n]: environment steps, the mean over seeds, and the limits of its interval (NaN of one seed)."""

  x: np.ndarray
  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray
  seeds: int


def half_width(values: np.ndarray) -> np.ndarray:
  """float64[n, ...] -> [...]: t_{0.975, n-1} s / sqrt(n), half of the interval of the mean of n; NaN where n < 2."""
  n = len(values)
  if n < 2:
    return np.full(values.shape[1:], np.nan)
  from scipy.special import stdtrit

  return stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / math.sqrt(n)


def estimate(values: Sequence[float], *, bounds: tuple[float, float] = (0.0, 1.0)) -> Estimate:
  """The mean of at least one value; `bounds` are what the quantity cannot leave."""
  array = np.asarray(values, float)
  mean, half = float(array.mean()), float(half_width(array))
  if math.isnan(half):
    return Estimate(mean, None, None, tuple(array.tolist()))
  return Estimate(mean, max(bounds[0], mean - half), min(bounds[1], mean + half), tuple(array.tolist()))


def difference(a: Mapping[int, float], b: Mapping[int, float]) -> Estimate | None:
  """b - a over the seeds that both have; None where there is none."""
  seeds = sorted(set(a) & set(b))
  return estimate([b[s] - a[s] for s in seeds], bounds=(-1.0, 1.0)) if seeds else None


def learning_curve(runs: Sequence[Sequence[Mapping[str, Any]]], name: str = "success") -> Curve | None:
  """From the rows of Interaction of each seed; as far as the shortest goes. None where there is nothing."""
  runs = [rows for rows in runs if rows]
  if not runs:
    return None
  n = min(map(len, runs))
  x = np.array([row["env_steps"] for row in runs[0][:n]], float)
  width = min(SMOOTHING, n)
  smoothed = [smooth(np.array([_float(row.get(name)) for row in rows[:n]]), width) for rows in runs]
  values = np.stack(smoothed)
  mean, half = values.mean(axis=0), half_width(values)
  return Curve(x, mean, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1), len(runs))


def _float(value: Any) -> float:
  return math.nan if value is None else float(value)


# --- from folders to figures ---


def evaluations(cells: Sequence[Any], task: str) -> dict[str, dict[int, dict]]:
  """{method: {seed: evaluation}} of the cells of `task` that are finished, in the order of the study."""
  out: dict[str, dict[int, dict]] = {}
  for cell in cells:
    if cell.task == task and cell.finished():
      out.setdefault(cell.method, {})[cell.seed] = cell.evaluation() | {"env_steps": cell.env_steps}
  return out


def curves(cells: Sequence[Any], task: str) -> dict[str, Curve]:
  """{method: learning curve} of those that interact: of the finished cells, or as far as all are where none is."""
  runs: dict[str, dict[bool, list]] = {}
  for cell in cells:
    if cell.task == task and "interaction" in cell.phases:
      done = cell.finished()
      before = cell.steps_of("preference rollouts") if done else 0
      rows = [row for row in report.read_metrics(cell.folder / "metrics.jsonl") if row["phase"] == "interaction"]
      rows = [row | {"env_steps": row["env_steps"] + before} for row in rows]
      runs.setdefault(cell.method, {True: [], False: []})[done].append(rows)
  found = {method: learning_curve(rows[True] or rows[False]) for method, rows in runs.items()}
  return {method: line for method, line in found.items() if line is not None}


def rates(found: Mapping[int, Mapping], key: str) -> dict[int, float]:
  return {seed: evaluation[key]["rate"] for seed, evaluation in found.items()}


def completed(found: Mapping[int, Mapping], k: int) -> dict[int, float]:
  """Of all episodes of each seed, how many completed stage k."""
  return {seed: evaluation["stages"][k]["marginal"]["rate"] for seed, evaluation in found.items()}


def stage_rates(found: Mapping[int, Mapping]) -> dict[str, Estimate | None]:
  """{"P(k | k-1)": estimate} of the conditional completion; a seed in which the stage was never reached is left out."""
  names = [stage["name"] for stage in next(iter(found.values()))["stages"]]
  out = {}
  for k, name in enumerate(names):
    values = [evaluation["stages"][k]["conditional"]["rate"] for evaluation in found.values()]
    known = [value for value in values if value is not None]
    out[f"P({name} | {names[k - 1]})" if k else f"P({name})"] = estimate(known) if known else None
  return out


# --- tables ---


def percent(value: float) -> str:
  return f"{100 * value:.1f}"


def text(e: Estimate | None, *, each: bool = False, signed: bool = False, of: int = 0) -> str:
  """"54.2 [40.1, 68.3]", in percent; behind it the seeds' values where asked for, or their number if it is not `of`."""
  if e is None:
    return "–"
  show = (lambda v: f"{100 * v:+.1f}") if signed else percent
  limits = "" if e.low is None or e.high is None else f" [{show(e.low)}, {show(e.high)}]"
  some = f" ({len(e.values)} of {of} seeds)" if of > len(e.values) else ""
  return show(e.mean) + limits + (f" ({', '.join(map(show, e.values))})" if each else "") + some


def pooled(found: Mapping[int, Mapping]) -> str:
  """"120/200 [53.1, 66.5]": successes of all seeds' episodes, with Wilson's interval in percent."""
  sums = [sum(evaluation["success_once"][key] for evaluation in found.values()) for key in ("count", "n")]
  all_of = evaluate.rate(*sums)
  return f"{all_of['count']}/{all_of['n']} [{percent(all_of['low'])}, {percent(all_of['high'])}]"


def tables(task: str, found: Mapping[str, Mapping[int, Mapping]], compare: Sequence[str]) -> list[tuple]:
  """[(title, header, rows)] of one task."""
  any_of = next(iter(next(iter(found.values())).values()))
  stages = list(stage_rates(next(iter(found.values()))))
  inner = [stage["name"] for stage in any_of["stages"][:-1]]  # the last one's end is success
  main, differences = [], []
  for method, by_seed in found.items():
    once, end = (estimate(list(rates(by_seed, key).values())) for key in ("success_once", "success_at_end"))
    by_stage = stage_rates(by_seed)
    steps = max(evaluation["env_steps"] for evaluation in by_seed.values())
    main.append((method, str(len(by_seed)), f"{steps:,}", text(once, each=True), pooled(by_seed), text(end),
                 *(text(by_stage[s], of=len(by_seed)) for s in stages)))  # fmt: skip
  pairs = [tuple(pair.split(":")) for pair in compare]
  pairs += [(START, method) for method in found if method != START]
  for a, b in pairs:
    if a in found and b in found:
      changes = [difference(rates(found[a], key), rates(found[b], key)) for key in ("success_once", "success_at_end")]
      changes += [difference(completed(found[a], k), completed(found[b], k)) for k in range(len(inner))]
      differences.append((f"{b} − {a}", *(text(change, each=True, signed=True) for change in changes)))
  header = ("method", "seeds", "environment steps", "success once, % (each seed)", "all episodes", "at end, %",
            *(f"{stage}, %" for stage in stages))  # fmt: skip
  starts = any_of.get("distinct_seeds", any_of["episodes"])
  of = f" of {starts} starts" if starts < any_of["episodes"] else ""
  title = f"{task}: {any_of['episodes']} episodes{of} a seed, temperature {any_of['temperature']:g}"
  return [
    (title, header, main),
    (f"{task}: differences in points (each seed), paired by seed",
     ("", "success once", "at end", *(f"{name} completed" for name in inner)), differences),
  ]  # fmt: skip


NOTE = (
  "Means over seeds with Student's 95 % interval of the mean; all episodes together with Wilson's, as if the seeds "
  "were one; differences are paired by seed, as methods of a task and seed share their start (sft)."
)
CURVE_NOTE = (
  f"Success of the training rollouts, in each seed a centred mean over {SMOOTHING} iterations; the line is the mean "
  f"over seeds, the band Student's 95 % interval of it. A rollout is interaction.steps long, which may be less than an "
  f"episode; what a method's Preference used comes before. The evaluations above have the figures to quote."
)


def markdown(sections: Sequence[tuple], figures: Sequence[str], missing: Sequence[str]) -> str:
  out = ["# Results", "", NOTE]
  line = lambda row: f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
  for title, header, rows in sections:
    out += ["", f"## {title}", "", line(header), "|---" * len(header) + "|", *map(line, rows)]
  if figures:
    out += ["", "## Learning curves", "", CURVE_NOTE, "", *(f"![{name}]({name})" for name in figures)]
  return "\n".join([*out, *_unfinished(missing)]) + "\n"


def _unfinished(missing: Sequence[str]) -> list[str]:
  return ["", f"Not finished: {', '.join(missing)}."] if missing else []


def page(sections: Sequence[tuple], lines: Mapping[str, Mapping[str, Curve]], missing: Sequence[str]) -> str:
  """One self-contained HTML page."""
  here = pathlib.Path(__file__).parent
  body = []
  for title, header, rows in sections:
    head = "".join(f'<th scope="col">{esc(cell)}</th>' for cell in header)
    cells = "".join(f'<tr><th scope="row">{esc(name)}</th>{"".join(f"<td>{_cell(x)}</td>" for x in figures)}</tr>'
                    for name, *figures in rows)  # fmt: skip
    body.append(f'<section><h2>{esc(title)}</h2><div class="card figures study"><table class="plain">'
                f"<thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table></div></section>")  # fmt: skip
  charts = "".join(chart(task, found) for task, found in lines.items() if found)
  if charts:
    body.append(f'<section><h2>Learning curves</h2><p class="lead">{esc(CURVE_NOTE)}</p>'
                f'<div class="charts">{charts}</div></section>')  # fmt: skip
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,'
    'initial-scale=1"><meta name="color-scheme" content="light dark"><link rel="icon" href="data:,"><title>Study · '
    f"stare_jax</title><style>{(here / 'report.css').read_text()}</style></head><body><header><p class=\"eyebrow\">"
    f'stare_jax</p><h1>Study</h1><p class="instruction">{esc(NOTE)}</p></header><main>{"".join(body)}</main>'
    f"<footer>{esc(' '.join(_unfinished(missing)))}</footer><script>{(here / 'report.js').read_text()}</script>"
    "</body></html>\n"
  )


def _cell(text: str) -> str:
  """A figure, and below it its interval and its seeds."""
  value, *more = re.split(r" (?=[\[(])", text)
  return esc(value) + "".join(f"<small>{esc(x)}</small>" for x in more)


def chart(task: str, found: Mapping[str, Curve]) -> str:
  """The curves of a task on the grid of the longest; a method with other steps is read off in between."""
  x = max((line.x for line in found.values()), key=len)
  at = lambda line, y: np.interp(x, line.x, y, left=np.nan, right=np.nan)
  series = {m: (at(line, line.mean), COLOURS[i % len(COLOURS)]) for i, (m, line) in enumerate(found.items())}
  bands = {m: (at(line, line.low), at(line, line.high)) for m, line in found.items()}
  return curve(task, x, series, x_name="environment steps", rate=True, wide=True, bands=bands)


def draw(path: pathlib.Path, task: str, found: Mapping[str, Curve]) -> None:
  """The curves of a task as a picture; the kind follows from the path's suffix."""
  import matplotlib

  matplotlib.use("Agg")
  import matplotlib.pyplot as plt

  figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
  for i, (method, line) in enumerate(found.items()):
    colour = COLOURS[i % len(COLOURS)]
    axes.plot(line.x, 100 * line.mean, color=colour, label=f"{method} (n = {line.seeds})")
    axes.fill_between(line.x, 100 * line.low, 100 * line.high, color=colour, alpha=0.15, linewidth=0)
  highest = max((float(np.nanmax([*line.mean, *line.high])) for line in found.values()), default=1.0)
  top = min(100, 10 * max(math.ceil(11 * highest), 1))  # rare success would lie flat on the axis
  axes.set(title=task, xlabel="environment steps", ylabel="success in training rollouts, %", ylim=(0, top))
  axes.grid(alpha=0.3)
  axes.legend(loc="best", fontsize="small")
  figure.savefig(path, dpi=150)
  plt.close(figure)


def write(
  workdir: str | os.PathLike, config: Any, cells: Sequence[Any], *, pictures: bool = True
) -> list[pathlib.Path]:
  """results.md, results.html and the curves of every task, from what is in the folder now; returns what was written.

  pictures: the curves as .svg and .png too; the page has its own.
  """
  workdir = pathlib.Path(workdir)
  sections, lines, figures, out = [], {}, [], []
  for task in config.tasks:
    if found := evaluations(cells, task):
      sections += tables(task, found, config.compare)
    if line := curves(cells, task):
      lines[task] = line
      for suffix in ("svg", "png") if pictures else ():
        draw(workdir / f"curves-{task}.{suffix}", task, line)
        out.append(workdir / f"curves-{task}.{suffix}")
      figures += [f"curves-{task}.svg"] * pictures
  missing = [str(cell) for cell in cells if not cell.finished()]
  for name, content in (("results.md", markdown(sections, figures, missing)),
                        ("results.html", page(sections, lines, missing))):  # fmt: skip
    out.append(report.write_atomically(workdir / name, content.encode()))
  return out
