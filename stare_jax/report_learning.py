"""The report's learning curves: which metrics are shown, how, and what the preference pairs were made of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stare_jax.report_charts import curve, esc, number, phase_colour, pretty
from stare_jax.report_data import RESERVED, Run, is_number

PHASE_NOTES = {
  "imitation": "Supervised learning from demonstrations: cross-entropy on the expert’s action tokens.",
  "preference": "Offline learning from pairs of the policy’s own episodes.",
  "interaction": "Online reinforcement learning in the simulator.",
}
# Shown first and open, in this order; everything else a phase logs is one click away.
FEATURED = {
  "imitation": ("loss", "accuracy", "l1"),
  "preference": ("loss", "accuracy", "margin"),
  "interaction": (
    "success", "return_shaped", "return_raw", "kl", "clip_fraction", "explained_variance", "entropy",
  ),
}
RATES = ("success", "accuracy")
NOTES = {
  "success": "Share of the training episodes that succeeded; actions are sampled, and rollouts may be shorter than the "
             "horizon.",
  "return_shaped": "Of the reward that is learnt from, discounted.",
  "return_raw": "The task’s own reward, discounted.",
  "kl": "From the policy that acted to the one before each update, nats, in the mean over the last epoch.",
  "entropy": "Of an action, nats.",
  "clip_fraction": "Share of actions outside the clip range.",
  "margin": "By how much the preferred one is ahead.",
  "explained_variance": "1: the value predicts the returns; 0: no better than their mean.",
}
PAIR_KEYS = ("stage_pairs", "by_completion", "by_cost")


def learning(run: Run) -> str:
  """The section, or nothing where no metrics were written."""
  phases = [p for p in run.phases if run.rows.get(p)]
  body = "".join(_phase_curves(run, phase) for phase in phases)
  if not body:
    return ""
  return ("<h2>Learning</h2><p class=\"lead\">Thin lines are the logged values, thick lines their moving mean; the "
          "figure beside a title is where the thick line ends.</p>" + body)


def _phase_curves(run: Run, phase: str) -> str:
  rows = run.rows[phase]
  names = list(dict.fromkeys(n for row in rows for n, v in row.items() if n not in RESERVED and is_number(v)))
  column = {n: np.array([row[n] if is_number(row.get(n)) else np.nan for row in rows], float) for n in names}
  x, x_name = _x_axis(rows)
  stage_names = _stage_columns(run, phase, names)
  featured = [n for n in FEATURED.get(phase, ("loss", "accuracy", "success")) if n in names]
  colour = phase_colour(phase)
  def draw(name: str) -> str:
    rate = name in RATES and bool(np.nanmin(column[name]) >= 0 and np.nanmax(column[name]) <= 1)
    series = {name: (column[name], colour)}
    return curve(pretty(name), x, series, x_name=x_name, rate=rate, note=NOTES.get(name, ""))
  flat = [n for n in names if n not in featured and n not in stage_names and _constant(column[n])]
  rest = [n for n in names if n not in featured and n not in stage_names and n not in flat]
  charts = [draw(n) for n in featured]
  if {"chosen", "rejected"} <= set(rest):
    both = {"preferred": (column["chosen"], "var(--good)"), "other": (column["rejected"], "var(--stage-4)")}
    charts.append(curve("Log-ratio to the reference", x, both, x_name=x_name,
                        note="Of what the loss compares, nats."))
    rest = [n for n in rest if n not in ("chosen", "rejected")]
  if stage_names:
    series = {label: (column[n], f"var(--stage-{k + 1})") for k, (n, label) in enumerate(stage_names.items())}
    charts.insert(1, curve("Stage completion", x, series, x_name=x_name, rate=True, full=False, wide=True,
                           note="P(k | k−1) in the training episodes."))
  if not charts:
    charts, rest = [draw(n) for n in rest], []
  more = "".join(draw(n) for n in rest)
  constant = ", ".join(f"{pretty(n)} {number(float(column[n][np.isfinite(column[n])][0]))}" for n in flat)
  end = number(float(x[-1]))
  span = f"{len(rows)} rows, to " + (f"{end} {x_name}" if x_name != "step" else f"step {end}")
  return (
    f'<div class="phase-head"><h3>{esc(phase.capitalize())}</h3><small>{esc(span)}</small></div>'
    f'<p class="note">{esc(PHASE_NOTES.get(phase, ""))}</p><div class="charts">{"".join(charts)}</div>'
    + (_pairs(run) if phase == "preference" else "")
    + (f'<details><summary>{len(rest)} more</summary><div class="charts">{more}</div></details>' if more else "")
    + (f'<p class="note constant">Constant: {esc(constant)}.</p>' if constant else "")
  )


def _pairs(run: Run) -> str:
  """What the preference pairs were made of, from data/preference/pairs.json."""
  p = run.pairs
  names = next((s["stages"] for s in run.samples), None)
  names = names or next(([s["name"] for s in e["stages"]] for e in run.evaluated), [])
  if not p or any(len(p.get(key, ())) != len(names) for key in PAIR_KEYS):
    return ""
  rows = "".join(
    f'<tr><th scope="row"><i class="swatch" style="background:var(--stage-{k + 1})"></i>{esc(name)}</th>'
    + "".join(f"<td>{number(p[key][k])}</td>" for key in PAIR_KEYS) + "</tr>" for k, name in enumerate(names)
  )
  rollouts = p.get("starts_by_rollouts") or {}
  spread = ", ".join(f"{number(starts)} with {n}" for n, starts in rollouts.items())
  spread = f" Starts by their number of rollouts: {spread}." if len(rollouts) > 1 else ""
  return (
    '<div class="card figures"><h3>Pairs</h3>'
    f'<p class="note">{number(p["pairs"])} pairs of episodes with the same start, from {number(p["episodes"])} '
    f'episodes over {number(p["starts"])} starts; a pair says something about stages that both episodes reached.'
    f"{spread}</p>"
    '<table class="plain"><thead><tr><th scope="col"></th><th scope="col">pairs</th>'
    f'<th scope="col">by completion</th><th scope="col">by cost</th></tr></thead><tbody>{rows}</tbody></table></div>'
  )


def _constant(values: np.ndarray) -> bool:
  return bool(np.nanmax(values) == np.nanmin(values))


def _x_axis(rows: Sequence[dict]) -> tuple[np.ndarray, str]:
  """Environment steps where a phase consumes them, its own steps otherwise."""
  env = np.array([row.get("env_steps") or 0 for row in rows], float)
  if len(env) > 1 and np.all(np.diff(env) >= 0) and env[-1] > env[0]:
    return env, "environment steps"
  return np.array([row["step"] for row in rows], float), "step"


def _stage_columns(run: Run, phase: str, names: Sequence[str]) -> dict[str, str]:
  """Column stage_k -> the stage's name, where the run says what its stages are."""
  known = next(([s["name"] for s in e["stages"]] for e in reversed(run.evaluated) if e.get("stages")), None)
  known = known or next((s["stages"] for s in run.samples), [])
  columns = [n for n in names if n.startswith("stage_") and n[6:].isdigit()]
  columns.sort(key=lambda n: int(n[6:]))
  return {n: known[int(n[6:]) - 1] if 0 < int(n[6:]) <= len(known) else pretty(n) for n in columns}
