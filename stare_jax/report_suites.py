"""The table of evaluation suites: suites.json, suites.md, suites.html and a strip of pictures for each suite.

A row is a suite: both success rates over all evaluation seeds with their Wilson intervals, the rate of every seed, the
difference to in-distribution with Newcombe's interval, and stage completion. Nothing is estimated: a suite that a scene
cannot have is a row that says why.
"""

from __future__ import annotations

import base64
import io
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from stare_jax import report
from stare_jax.report_charts import esc, percent, whisker_bar
from stare_jax.report_html import difference

PICTURE = 112  # pixels of a picture in a strip
Rate = Callable[[int, int], dict]  # evaluate.rate


def write_strip(
  workdir: Any, label: str, episodes: Sequence[np.ndarray], steps: Sequence[int] = (0,), size: int = PICTURE
) -> pathlib.Path:
  """pictures/<label>.jpg: of every episode uint8[T, H, W, 3] its pictures at `steps`, side by side; atomically."""
  from PIL import Image

  shown = [frames[min(step, len(frames) - 1)] for frames in episodes for step in steps]
  strip = Image.new("RGB", (size * len(shown), size))
  for column, frame in enumerate(shown):
    how = Image.Resampling.NEAREST if frame.shape[0] < size else Image.Resampling.LANCZOS
    strip.paste(Image.fromarray(frame).resize((size, size), how), (column * size, 0))
  data = io.BytesIO()
  strip.save(data, "JPEG", quality=85, optimize=True)
  return report.write_atomically(pathlib.Path(workdir) / "pictures" / f"{label}.jpg", data.getvalue())


def row(suite: Any, evaluations: Sequence[Mapping], rate: Rate) -> dict[str, Any]:
  """A suite's row, of its evaluations by seed (`evaluate.summarise`); their counts are added."""

  def pooled(get: Callable[[Mapping], Mapping]) -> dict:
    return rate(sum(get(e)["count"] for e in evaluations), sum(get(e)["n"] for e in evaluations))

  stages = [
    {"name": stage["name"], "marginal": pooled(lambda e, k=k: e["stages"][k]["marginal"]),
     "conditional": pooled(lambda e, k=k: e["stages"][k]["conditional"])}
    for k, stage in enumerate(evaluations[0]["stages"])
  ]  # fmt: skip
  return {
    "suite": suite.name, "family": suite.family, "changes": suite.description,
    "success_once": pooled(lambda e: e["success_once"]), "success_at_end": pooled(lambda e: e["success_at_end"]),
    "seeds": len(evaluations), "distinct_starts": evaluations[0]["distinct_seeds"],
    "by_seed": [{"seeds": e["seeds"], "success_once": e["success_once"], "success_at_end": e["success_at_end"]}
                for e in evaluations],
    "stages": stages, "mean_length": float(np.mean([e["mean_length"] for e in evaluations])),
    "pictures": f"pictures/{evaluations[0]['label']}.jpg", "told": evaluations[0].get("told", []),
  }  # fmt: skip


def missing(suite: Any, why: str) -> dict[str, Any]:
  """The row of a suite that was not run."""
  return {"suite": suite.name, "family": suite.family, "changes": suite.description, "not_run": why}


def table(rows: Sequence[Mapping], **about: Any) -> dict[str, Any]:
  """suites.json: `about` (task, checkpoint, ...), rows with their differences to in-distribution, means by family."""
  rows, run = [dict(r) for r in rows], [r for r in rows if "not_run" not in r]
  usual = next((r for r in run if r["family"] == "in-distribution"), None)
  for r in rows:
    if "not_run" not in r and usual is not None and r["suite"] != usual["suite"]:
      parts = {name: difference(usual[name], r[name]) for name in ("success_once", "success_at_end")}
      r["difference"] = {name: dict(zip(("value", "low", "high"), part, strict=True)) for name, part in parts.items()}
  families = {}
  for family in dict.fromkeys(r["family"] for r in run):
    mine = [r for r in run if r["family"] == family]
    families[family] = {"suites": len(mine)} | {
      name: float(np.mean([r[name]["rate"] for r in mine])) for name in ("success_once", "success_at_end")
    }
  return {**about, "rows": rows, "families": families}


def write(workdir: Any, found: Mapping[str, Any]) -> None:
  """suites.json, suites.md and suites.html in `workdir`, each whole or as it was."""
  workdir = pathlib.Path(workdir)
  report.write_json(workdir / "suites.json", found)
  report.write_atomically(workdir / "suites.md", markdown(found).encode())
  report.write_atomically(workdir / "suites.html", page(found, workdir).encode())


# --- Markdown ---


def _rate(r: Mapping) -> str:
  return f"{percent(r['rate'])} [{100 * r['low']:.1f}, {100 * r['high']:.1f}]"


def _change(r: Mapping) -> str:
  if "difference" not in r:
    return "–"
  d = r["difference"]["success_once"]
  return f"{100 * d['value']:+.1f} [{100 * d['low']:+.1f}, {100 * d['high']:+.1f}]"


def _by_seed(r: Mapping) -> str:
  return " / ".join(percent(seed["success_once"]["rate"]) for seed in r["by_seed"])


def protocol(found: Mapping[str, Any]) -> str:
  """How the figures were made, in one sentence or two."""
  acting = "most likely actions" if found["temperature"] == 0 else f"actions at temperature {found['temperature']:g}"
  run = [r for r in found["rows"] if "not_run" not in r]
  starts = f", {run[0]['distinct_starts']} distinct starts in each" if run else ""
  seeds = "1 evaluation seed" if found["seeds"] == 1 else f"{found['seeds']} evaluation seeds"
  after = f" after {found['after']} of its steps" if found.get("after") else ""
  return (f"{found['task']}, {found['checkpoint'] or 'untrained parameters'}{after}: {seeds} of "
          f"{found['episodes']} episodes{starts}, {found['horizon']} steps, {acting}. Brackets: 95 % intervals, Wilson "
          f"of a rate, Newcombe of a difference to in-distribution.")


def markdown(found: Mapping[str, Any]) -> str:
  """The table as Markdown."""
  run = [r for r in found["rows"] if "not_run" not in r]
  names = [stage["name"] for stage in run[0]["stages"]] if run else []
  head = ["suite", "success once", "success at end", "once, by seed", "difference", "N", *names]
  lines = [protocol(found), "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
  for r in found["rows"]:
    if "not_run" in r:
      lines.append(f"| {r['suite']} | not run: {r['not_run']} |{' |' * (len(head) - 2)}")
      continue
    cells = [r["suite"], _rate(r["success_once"]), _rate(r["success_at_end"]), _by_seed(r), _change(r),
             str(r["success_once"]["n"]), *(percent(stage["marginal"]["rate"]) for stage in r["stages"])]
    lines.append(f"| {' | '.join(cells)} |")
  lines += ["", "| family | suites | mean success once | mean success at end |", "|---|---|---|---|"]
  lines += [f"| {name} | {f['suites']} | {percent(f['success_once'])} | {percent(f['success_at_end'])} |"
            for name, f in found["families"].items()]
  return "\n".join(lines) + "\n"


# --- HTML ---

_STYLE = """
.suite { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1.25fr); gap: 8px 26px; padding: 20px 0; }
.suite { border-top: 1px solid var(--rule); }
.suite img { width: 100%; border-radius: 6px; image-rendering: auto; }
.suite table { width: 100%; border-collapse: collapse; font-size: 14px; margin-top: 8px; }
.suite td { padding: 2px 8px 2px 0; } .suite td + td { text-align: right; white-space: nowrap; }
.family { text-transform: capitalize; } @media (max-width: 720px) { .suite { grid-template-columns: 1fr; } }
"""


def page(found: Mapping[str, Any], workdir: pathlib.Path) -> str:
  """The table as one self-contained page."""
  here, body, family = pathlib.Path(__file__).parent, [], ""
  for r in found["rows"]:
    if r["family"] != family:
      family = r["family"]
      mean = found["families"].get(family)
      text = "" if mean is None or mean["suites"] < 2 else (
        f"<p class='note'>mean of {mean['suites']} suites: {percent(mean['success_once'])} once, "
        f"{percent(mean['success_at_end'])} at the end</p>")
      body.append(f'<section><h2 class="family">{esc(family)}</h2>{text}</section>')
    body.append(_suite(r, workdir))
  return (
    '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
    'content="width=device-width,initial-scale=1"><meta name="color-scheme" content="light dark">'
    f'<link rel="icon" href="data:,"><title>Suites · {esc(found["task"])}</title>'
    f"<style>{(here / 'report.css').read_text()}{_STYLE}</style></head><body><header>"
    f'<p class="eyebrow">stare_jax</p><h1>{esc(found["task"].replace("_", " ").capitalize())}: evaluation suites</h1>'
    f'<p class="lead">{esc(protocol(found))}</p></header><main>{"".join(body)}</main></body></html>\n'
  )


def _suite(r: Mapping, workdir: pathlib.Path) -> str:
  title = f"<h3>{esc(r['suite'])}</h3><p class='note'>{esc(r['changes'])}</p>"
  if "not_run" in r:
    return f'<div class="suite"><div>{title}</div><p class="empty">Not run: {esc(r["not_run"])}.</p></div>'
  lines = [("success once", _rate(r["success_once"])), ("success at end", _rate(r["success_at_end"])),
           ("once, by seed", _by_seed(r)), ("difference to in-distribution", _change(r)),
           ("episodes", str(r["success_once"]["n"]))]
  lines += [(f"completed {stage['name']}", _rate(stage["marginal"])) for stage in r["stages"]]
  cells = "".join(f"<tr><td>{esc(name)}</td><td>{esc(value)}</td></tr>" for name, value in lines)
  bar = whisker_bar(r["success_once"], "var(--phase-2)", mark=r["success_at_end"]["rate"])
  path, strip = workdir / r["pictures"], ""
  if path.exists():
    strip = (f'<img alt="first pictures under {esc(r["suite"])}" '
             f'src="data:image/jpeg;base64,{base64.b64encode(path.read_bytes()).decode()}">')
  told = "; ".join(f"“{text}”" for text in dict.fromkeys(r["told"]))
  return (f'<div class="suite"><div>{title}{bar}<table>{cells}</table></div>'
          f'<div>{strip}<p class="note">{esc(told)}</p></div></div>')
