"""The report page: one self-contained HTML file made from a run folder, at any moment of the run.

Nothing here is estimated or filled in: a section whose data is not in the folder is left out or says so.
report_data.py reads the folder, report_charts.py draws, report_learning.py chooses the curves; the looks are in
report.css and the little that moves in report.js.
"""

from __future__ import annotations

import base64
import datetime
import json
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from stare_jax.report_charts import (
  esc,
  interval,
  interval_mark,
  number,
  percent,
  phase_colour,
  pretty,
  stacked_bar,
  timeline,
  whisker_bar,
)
from stare_jax.report_data import PHASES, Run, is_number, load
from stare_jax.report_learning import learning

OVERALL = ("this launch", "total")  # entries of wall_seconds that contain the others


# --- the page ---


def render(workdir: str | os.PathLike, *, max_bytes: int | None = None) -> str:
  """The whole page as text. `max_bytes`: leave sample videos out, the longest files first, until it fits."""
  run = load(workdir)
  videos = _choose_videos(run.samples)
  page = _page(run, videos)
  while max_bytes is not None and len(page.encode()) > max_bytes and videos:
    del videos[max(videos, key=lambda p: p.stat().st_size)]
    page = _page(run, videos)
  if max_bytes is not None and len(page.encode()) > max_bytes:
    raise ValueError(f"the report without videos has {len(page.encode())} bytes, more than max_bytes={max_bytes}")
  return page


def _choose_videos(samples: Sequence[dict]) -> dict[pathlib.Path, str]:
  return {s["video"]: base64.b64encode(s["video"].read_bytes()).decode() for s in samples if s["video"].exists()}


def _page(run: Run, videos: Mapping[pathlib.Path, str]) -> str:
  here = pathlib.Path(__file__).parent
  named = [str(run.summary[name]) for name in ("method", "preset") if name in run.summary]
  named += [f"seed {run.summary['seed']}"] if "seed" in run.summary else []
  title = " · ".join([_task(run), *named, "stare_jax"])
  sections = [
    ("outcome", "Outcome", _outcome(run)),
    ("stages", "Stages", _stages(run)),
    ("episodes", "Episodes", _episodes(run, videos)),
    ("learning", "Learning", learning(run)),
    ("time", "Time", _time(run)),
    ("reproduce", "Reproduce", _reproduce(run)),
  ]
  sections = [(key, name, body) for key, name, body in sections if body]
  nav = "".join(f'<a href="#{key}">{name}</a>' for key, name, _ in sections)
  main = "".join(f'<section id="{key}">{body}</section>' for key, _, body in sections)
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width,initial-scale=1">'
    '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
    f"<title>{esc(title)}</title><style>{(here / 'report.css').read_text()}</style></head><body>"
    f"{_header(run)}<nav aria-label=\"Sections\"><div>{nav}</div></nav><main>{main}</main>{_footer(run)}"
    f"<script>{(here / 'report.js').read_text()}</script></body></html>\n"
  )


def _task(run: Run) -> str:
  name = run.summary.get("task") or run.config.get("task") or next((e["task"] for e in run.evaluated), "Run")
  return str(name).replace("_", " ").capitalize()


def _instruction(run: Run) -> str:
  return next((s["instruction"] for s in run.samples if s.get("instruction")), "")


def _header(run: Run) -> str:
  facts = [f"{name} {run.summary.get(name, run.config.get(name))}" for name in ("method", "preset", "seed")
           if run.summary.get(name, run.config.get(name)) is not None]
  simulator = run.config.get("sim", {}).get("name", "maniskill")
  if simulator != "maniskill":  # figures of two simulators are never compared by mistake
    facts.append(f"simulator {simulator}")
  if is_number(run.summary.get("parameters")):
    facts.append(f"{number(run.summary['parameters'])} parameters")
  trained = " → ".join(p.capitalize() for p in run.phases)
  instruction = _instruction(run)
  waiting = [p for p in run.config.get("phases", ()) if p not in run.evaluations]
  last = {p: max((row.get("step", 0) for row in run.rows.get(p, ())), default=0) for p in run.evaluations}
  behind = [f"{p} evaluated after step {e['after']} of the {last[p]} that it has by now"
            for p, e in run.evaluations.items() if is_number(e.get("after")) and e["after"] < last[p]]
  left = ([f"{', '.join(waiting)} not evaluated yet"] if waiting else []) + behind
  unfinished = "" if run.summary and not left else (
    '<p class="banner">This run is still going or was stopped'
    + (f": {esc('; '.join(left))}" if left else ": it has no summary yet")
    + ". The page shows what it has written so far.</p>"
  )
  return (
    f'<header><p class="eyebrow">stare_jax{"".join(f" · {esc(f)}" for f in facts)}</p><h1>{esc(_task(run))}</h1>'
    + (f'<p class="instruction">“{esc(instruction)}”</p>' if instruction else "")
    + (f'<p class="flow">{esc(trained)}</p>' if trained else "") + unfinished + "</header>"
  )


# --- outcome ---


def _outcome(run: Run) -> str:
  if not run.evaluated:
    return '<h2>Outcome</h2><p class="empty">No evaluation has been written yet.</p>'
  last = run.evaluated[-1]
  final = last["success_once"]
  rows = []
  for i, evaluation in enumerate(run.evaluated):
    once, at_end = evaluation["success_once"], evaluation["success_at_end"]
    change = ""
    if i:
      delta, low, high = difference(run.evaluated[i - 1]["success_once"], once)
      limits = f"({_signed(low)} to {_signed(high)})"
      change = f'<small>{_signed(delta)} points<span class="wide"> {limits}</span></small>'
    rows.append(
      f'<div class="phase"><div class="name">{esc(evaluation["label"].capitalize())}{change}</div>'
      f'{whisker_bar(once, phase_colour(evaluation["label"]), mark=at_end["rate"])}'
      f'<div class="value">{percent(once["rate"])}<small>{once["count"]} of {once["n"]}</small></div></div>'
    )
  return (
    f'<h2>Outcome</h2><div class="headline"><div class="figure"><b>{percent(final["rate"])}</b>'
    f'<span><em>success after {esc(last["label"])}</em> <em>95 % interval '
    f'{interval(final["low"], final["high"])} %</em> <em>{final["n"]} episodes</em></span></div>'
    f'<div class="phases">{"".join(rows)}<p class="key"><span><i class="k-bar"></i>succeeded at least once</span>'
    '<span><i class="k-diamond"></i>succeeded at the last step</span>'
    '<span><i class="k-whisker"></i>95 % Wilson interval</span></p></div></div>'
    f'<div class="prose">{_story(run)}</div>{_figures(run)}<p class="protocol">{_protocol(run)}</p>'
  )


def _figures(run: Run) -> str:
  """Both success rates in figures: published numbers differ in which of the two they mean."""
  def cell(result: Mapping) -> str:
    return (f'<td>{percent(result["rate"])}<small>{interval(result["low"], result["high"])}</small>'
            f'<small>{result["count"]}/{result["n"]}</small></td>')
  rows = "".join(
    f'<tr><th scope="row"><i class="swatch" style="background:{phase_colour(e["label"])}"></i>'
    f'{esc(e["label"].capitalize())}</th>{cell(e["success_once"])}{cell(e["success_at_end"])}'
    f'<td>{number(e.get("mean_length"))}</td></tr>' for e in run.evaluated
  )
  return (
    '<div class="card figures"><table class="plain"><thead><tr><th scope="col">after</th>'
    '<th scope="col">success once</th><th scope="col">at the last step</th><th scope="col">mean steps</th>'
    f"</tr></thead><tbody>{rows}</tbody></table></div>"
  )


def difference(before: Mapping, after: Mapping) -> tuple[float, float, float]:
  """after - before of two rates with Newcombe's 95 % interval, made of the two Wilson intervals.

      low  = d - sqrt((p2 - l2)^2 + (u1 - p1)^2),   high = d + sqrt((u2 - p2)^2 + (p1 - l1)^2)
  """
  p1, l1, u1 = (before[k] for k in ("rate", "low", "high"))
  p2, l2, u2 = (after[k] for k in ("rate", "low", "high"))
  return p2 - p1, p2 - p1 - math.hypot(p2 - l2, u1 - p1), p2 - p1 + math.hypot(u2 - p2, p1 - l1)


def _signed(value: float) -> str:
  points = round(100 * value, 1)
  return f"{'+' if points > 0 else '−' if points < 0 else '±'}{abs(points):.1f}"


def _rate_text(result: Mapping) -> str:
  return (f"{percent(result['rate'])} ({result['count']} of {result['n']} episodes, "
          f"95 % interval {interval(result['low'], result['high'])})")


def _story(run: Run) -> str:
  """What happened, in words, from the evaluations alone."""
  evaluated = run.evaluated
  first, last = evaluated[0], evaluated[-1]
  parts = [f"After <b>{esc(first['label'])}</b> the policy succeeded in {_rate_text(first['success_once'])}."]
  for before, after in zip(evaluated, evaluated[1:], strict=False):
    delta, low, high = difference(before["success_once"], after["success_once"])
    now = percent(after["success_once"]["rate"])
    change = f"({_signed(delta)} points, 95 % interval {_signed(low)} to {_signed(high)})"
    name = f"<b>{esc(after['label'].capitalize())}</b>"
    if low > 0:
      parts.append(f"{name} raised this to {now} {change}.")
    elif high < 0:
      parts.append(f"{name} lowered this to {now} {change}.")
    else:
      parts.append(f"{name} ended at {now} {change}; as that interval includes zero, this run alone does not "
                   "show a difference.")
  if len(evaluated) > 1:
    a, b = first["success_once"], last["success_once"]
    apart = b["low"] > a["high"] or b["high"] < a["low"]
    parts.append(f"The intervals of the first and the last phase {'do not overlap' if apart else 'overlap'}.")
  return f"<p>{' '.join(parts)}</p>{_story_of_stages(first, last)}"


def _story_of_stages(first: Mapping, last: Mapping) -> str:
  parts = []
  if first is not last and [s["name"] for s in first["stages"]] == [s["name"] for s in last["stages"]]:
    gains = [(b["conditional"]["rate"] - a["conditional"]["rate"], a, b)
             for a, b in zip(first["stages"], last["stages"], strict=True)
             if None not in (a["conditional"]["rate"], b["conditional"]["rate"])]
    if gains and max(gains, key=lambda g: g[0])[0] > 0:
      _, a, b = max(gains, key=lambda g: g[0])
      parts.append(f"The stage that gained most is <b>{esc(a['name'])}</b>: once reached, it was completed in "
                   f"{percent(a['conditional']['rate'])} of the cases at first and in "
                   f"{percent(b['conditional']['rate'])} at the end.")
  ends = [share for share in where_they_end(last)[:-1] if share[1]]
  if ends:
    name, count = max(ends, key=lambda e: e[1])
    failed = sum(c for _, c in ends)
    parts.append(f"Of the {failed} episodes that did not complete every stage at the end, {count} stopped in "
                 f"<b>{esc(name)}</b>." if failed > 1 else
                 f"The one episode that did not complete every stage stopped in <b>{esc(name)}</b>.")
  elif last["stages"]:
    parts.append("At the end every evaluation episode completed every stage.")
  return f"<p>{' '.join(parts)}</p>" if parts else ""


def _protocol(run: Run) -> str:
  """How the evaluations were made; said once where they agree, per phase where they do not."""
  def line(e: Mapping) -> str:
    temperature = e.get("temperature")
    acting = "" if temperature is None else (
      "most likely actions" if temperature == 0 else f"actions sampled at temperature {number(temperature)}")
    stop = e.get("stopped_at_success")
    ended = "" if stop is None else "episodes end at success" if stop else "episodes run on after success"
    seeds = e.get("seeds")
    repeated = e.get("distinct_seeds", e["episodes"]) != e["episodes"]
    return ", ".join(filter(None, [
      f"{e['episodes']} episodes", f"seeds {seeds[0]} to {seeds[1]}" if seeds else "",
      f"only {e['distinct_seeds']} of them distinct" if repeated else "", acting,
      f"at most {e['max_length']} steps" if e.get("max_length") else "", ended]))
  lines = [line(e) for e in run.evaluated]
  same = " The same seeds in every phase; the intervals of differences treat the phases as independent."
  if len(set(lines)) == 1:
    return f"Protocol: {esc(lines[0])}.{same if len(lines) > 1 else ''}"
  return "Protocol. " + " ".join(f"{esc(e['label'].capitalize())}: {esc(text)}."
                                 for e, text in zip(run.evaluated, lines, strict=True))


# --- stages ---


def where_they_end(evaluation: Mapping) -> list[tuple[str, int]]:
  """(stage, episodes that reached it and did not complete it) of every stage, then ("completed", the rest)."""
  reached = evaluation["episodes"]
  out = []
  for stage in evaluation["stages"]:
    count = stage["marginal"]["count"]
    out.append((stage["name"], reached - count))
    reached = count
  return [*out, ("completed", reached)]


def _stages(run: Run) -> str:
  evaluated = [e for e in run.evaluated if e.get("stages")]
  if not evaluated:
    return ""
  bars, names = [], [s["name"] for s in evaluated[-1]["stages"]]
  for evaluation in evaluated:
    ends = where_they_end(evaluation)
    parts = [(name, count / evaluation["episodes"], f"var(--stage-{k + 1})", str(count))
             for k, (name, count) in enumerate(ends[:-1])]
    whole = ends[-1][1]
    parts = [("all stages completed", whole / evaluation["episodes"], "var(--good)", str(whole)), *parts]
    bars.append(f'<div class="phase"><div class="name">{esc(evaluation["label"].capitalize())}</div>'
                f"{stacked_bar(parts)}</div>")
  key = '<span><i class="swatch" style="background:var(--good)"></i>all completed</span>' + "".join(
    f'<span><i class="swatch" style="background:var(--stage-{k + 1})"></i>stopped in {esc(n)}</span>'
    for k, n in enumerate(names))
  return (
    "<h2>Stages</h2><p class=\"lead\">A task is cut into stages by events in the simulator. "
    "Where an episode stops says what the policy still has to learn.</p>"
    f'<h3>Where episodes end</h3><div class="phases ends">{"".join(bars)}<p class="key">{key}</p></div>'
    '<div class="pair">'
    + _stage_table(run, evaluated, "conditional", "Step by step", "P(k | k−1): of the episodes that reached a "
                   "stage, how many completed it.")
    + _stage_table(run, evaluated, "marginal", "In all", "P(k): of all episodes, how many completed the stage.")
    + "</div>"
  )


def _stage_table(run: Run, evaluated: Sequence[Mapping], kind: str, title: str, note: str) -> str:
  names = list(dict.fromkeys(s["name"] for e in evaluated for s in e["stages"]))
  body = []
  for k, name in enumerate(names):
    body.append(f'<tr class="stage"><th colspan="4" scope="rowgroup">'
                f'<i style="background:var(--stage-{k + 1})"></i>{esc(name)}</th></tr>')
    for e in evaluated:
      result = next((s[kind] for s in e["stages"] if s["name"] == name), None)
      if result is None:
        continue
      limits = interval(result["low"], result["high"])
      body.append(
        f'<tr><th scope="row">{esc(e["label"].capitalize())}</th>'
        f'<td class="bar">{interval_mark(result, phase_colour(e["label"]))}</td>'
        f'<td class="rate">{percent(result["rate"])}<small>{limits or "not reached"}</small></td>'
        f'<td class="count">{result["count"]}/{result["n"]}</td></tr>'
      )
  return (
    f'<div class="card"><h3>{title}</h3><p class="note">{note}</p><table class="rates"><thead><tr><th scope="col">'
    'after</th><th scope="col"></th><th scope="col">rate, 95 %</th><th scope="col">count</th></tr></thead>'
    f'<tbody>{"".join(body)}</tbody></table></div>'
  )


# --- episodes ---


def _episodes(run: Run, videos: Mapping[pathlib.Path, str]) -> str:
  labels = list(dict.fromkeys([*run.phases, *(s.get("label", "") for s in run.samples)]))
  groups = []
  # The finished policy first: it is what the reader came for.
  for label in reversed(labels):
    cards = [_episode(s, videos) for s in run.samples if s.get("label") == label]
    if cards:
      groups.append(f'<h3>After {esc(label)}</h3><div class="episodes">{"".join(cards)}</div>')
  if not groups:
    return ""
  return (
    "<h2>Episodes</h2><p class=\"lead\">What the policy saw, its stage at every step, and the potential Φ that "
    "shapes the reward. Play a video, or drag along its timeline.</p>" + "".join(groups)
  )


def _episode(sample: Mapping, videos: Mapping[pathlib.Path, str]) -> str:
  stages, stage_id, done = sample["stages"], sample["stage_id"], sample["completed_at"]
  steps = len(stage_id)
  data = {"fps": sample["fps"], "steps": steps, "stages": stages, "stage": stage_id,
          "phi": [None if p is None else round(p, 2) for p in sample["potential"]]}
  video = videos.get(sample["video"])
  poster = f"data:image/png;base64,{sample['poster']}" if sample.get("poster") else ""
  if video:
    screen = (
      f'<div class="screen"><video muted loop playsinline preload="auto" poster="{poster}" '
      f'src="data:video/mp4;base64,{video}"></video>'
      '<button type="button" class="play" aria-label="Play">▶</button></div>'
    )
  elif poster:
    screen = f'<div class="screen"><img alt="first frame" src="{poster}"></div>'
  else:
    screen = '<p class="screen none">no video on this page</p>'
  chips = "".join(
    f'<li{"" if at >= 0 else " class=missed"}><i style="background:var(--stage-{k + 1})"></i>{esc(name)} '
    f'<b>{f"step {at}" if at >= 0 else "not completed"}</b></li>'
    for k, (name, at) in enumerate(zip(stages, done, strict=True))
  )
  outcome = ('<span class="tag good">✓ success</span>' if sample["success"]
             else '<span class="tag bad">✕ no success</span>')
  return (
    f'<article class="card episode" data-episode="{esc(json.dumps(data, separators=(",", ":")))}">'
    f"<div class=\"top\">{screen}<div class=\"facts\"><p>{outcome} "
    f'<small>seed {esc(sample["seed"])} · {steps} steps</small></p><ul class="chips">{chips}</ul></div></div>'
    '<p class="readout"></p>'
    f"{timeline(stages, stage_id, sample['potential'])}</article>"
  )


# --- time, reproduction ---


def _time(run: Run) -> str:
  wall = {k: v for k, v in (run.summary.get("wall_seconds") or {}).items() if is_number(v) and v > 0}
  wall = {k: v for k, v in wall.items() if k not in OVERALL}
  evaluating = sum(e["seconds"] for e in run.evaluated if is_number(e.get("seconds")))
  if evaluating and not any("evaluation" in name for name in wall):
    wall["evaluation"] = evaluating
  steps = dict(run.summary.get("env_steps") or {})
  steps["evaluation"] = sum(e.get("env_steps") or 0 for e in run.evaluated)
  if not wall:
    return ""
  total = sum(wall.values())
  colours = {name: phase_colour(name) if name in PHASES else f"var(--other-{i % 3 + 1})"
             for i, name in enumerate(sorted(wall, key=lambda n: n in PHASES))}
  parts = [(pretty(n), s / total, colours[n], _duration(s)) for n, s in wall.items()]
  rows = "".join(
    f'<tr><th scope="row"><i class="swatch" style="background:{colours[n]}"></i>{esc(pretty(n))}</th>'
    f"<td>{_duration(s)}</td><td>{100 * s / total:.0f}\u2009%</td><td>{number(steps.get(n))}</td></tr>"
    for n, s in wall.items()
  )
  return (
    f'<h2>Time</h2><p class="lead">{_duration(total)} of wall-clock time in all.</p>{stacked_bar(parts)}'
    '<div class="card"><table class="plain"><thead><tr><th scope="col"></th><th scope="col">time</th>'
    '<th scope="col">share</th><th scope="col">env steps</th></tr></thead>'
    f"<tbody>{rows}</tbody></table></div>"
  )


def _duration(seconds: float) -> str:
  seconds = round(seconds)
  if seconds < 60:
    return f"{seconds}\u2009s"
  if seconds < 3600:
    return f"{seconds // 60}\u2009min {seconds % 60:02d}\u2009s"
  return f"{seconds // 3600}\u2009h {seconds % 3600 // 60:02d}\u2009min"


def _flatten(value: Any, prefix: str = "") -> list[tuple[str, str]]:
  if isinstance(value, dict) and value:
    return [item for k, v in value.items() for item in _flatten(v, f"{prefix}.{k}" if prefix else str(k))]
  return [(prefix, value if isinstance(value, str) else json.dumps(value))]


def _facts(title: str, facts: Mapping) -> str:
  rows = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in _flatten(dict(facts)))
  return f'<div class="card"><h3>{title}</h3><dl>{rows}</dl></div>' if facts else ""


def _reproduce(run: Run) -> str:
  s = run.summary
  body = ""
  if command := s.get("command"):
    words = " ".join(f"<span>{esc(word)}</span>" for word in str(command).split(" "))
    body += (f'<div class="command"><pre><code>{words}</code></pre>'
             '<button type="button" class="copy">Copy</button></div>')
  if sha := s.get("params_sha256"):
    body += (f'<p class="sha">Final parameters, SHA-256: <code>{esc(sha)}</code>. '
             "Compare it with that of the same command on the same machine and versions.</p>")
  if events := s.get("simulator_events"):
    lines = "".join(f"<li>{esc(event)}</li>" for event in events)
    body += (f"<details><summary>{len(events)} simulator event(s)</summary>"
             f'<ul class="events">{lines}</ul></details>')
  cards = _facts("Versions", s.get("versions") or {}) + _facts("Hardware", s.get("hardware") or {})
  if cards:
    body += f'<div class="pair">{cards}</div>'
  if run.config:
    rows = "".join(f"<dt>{esc(k)}</dt><dd>{esc(v)}</dd>" for k, v in _flatten(run.config))
    body += f'<details class="config"><summary>Configuration</summary><dl>{rows}</dl></details>'
  return f"<h2>Reproduce</h2>{body}" if body else ""


def _footer(run: Run) -> str:
  problems = "".join(f"<li>{esc(p)}</li>" for p in run.problems)
  times = [row["time"] for rows in run.rows.values() for row in rows if is_number(row.get("time"))]
  when = ""
  if times:
    stamp = datetime.datetime.fromtimestamp(max(times), datetime.UTC)
    when = f"Last metric written {stamp:%Y-%m-%d %H:%M} UTC. "
  return (
    (f'<aside class="banner"><b>Not everything could be read</b><ul>{problems}</ul></aside>' if problems else "")
    + f"<footer>{when}Every figure on this page is computed from the run folder.</footer>"
  )
