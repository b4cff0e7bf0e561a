"""The report's drawings as small pieces of HTML and SVG: learning curves, bars with whiskers, episode timelines.

Lines are SVG stretched to the width of the page, with strokes that do not stretch; every word is HTML, so that it
has the same size on a phone and on a desktop. Colours are CSS variables (report.css).
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence

import numpy as np

from stare_jax.report_data import PHASES

MAX_POINTS = 360  # per curve; more than a phone or a column of the page can show
WIDTH, HEIGHT = 1000.0, 400.0  # of a drawing's own coordinates


def esc(text: object) -> str:
  return html.escape(str(text), quote=True)


def phase_colour(label: str) -> str:
  """Phases are shades of one colour, the last the strongest; stages have hues of their own."""
  return f"var(--phase-{PHASES.index(label) + 1 if label in PHASES else 1})"


# --- numbers as text ---


def number(value: float | None, digits: int = 3) -> str:
  """A figure with `digits` significant digits: "0.931", "52.1", "1.2e-05", "12 800"; a dash for none."""
  if value is None or not math.isfinite(value):
    return "–"
  if value == 0:
    return "0"
  size = abs(value)
  if size >= 10_000 or (size >= 100 and float(value).is_integer()):
    return f"{value:,.0f}".replace(",", "\u202f")
  if size < 1e-3:
    mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")
  decimals = max(0, digits - 1 - math.floor(math.log10(size)))
  text = f"{value:.{decimals}f}"
  return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def percent(value: float | None) -> str:
  return "–" if value is None else f"{100 * value:.1f}\u2009%"


def interval(low: float | None, high: float | None) -> str:
  """"36.9–53.9", in percent."""
  return "" if low is None or high is None else f"{100 * low:.1f}–{100 * high:.1f}"


def pretty(name: str) -> str:
  words = name.replace("_", " ").replace("/", " · ")
  return {"kl": "KL"}.get(name, words[:1].upper() + words[1:])


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
  """About `count` round numbers that cover [low, high]; the first and last may lie outside it."""
  if not high > low:
    high = low + (abs(low) or 1.0)
  raw = (high - low) / count
  power = 10.0 ** math.floor(math.log10(raw))
  step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
  first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
  return [i * step for i in range(first, last + 1)]


# --- learning curves ---


def smooth(values: np.ndarray, width: int) -> np.ndarray:
  """Centred moving mean over `width` points that ignores NaN; NaN stays NaN."""
  known = np.isfinite(values)
  kernel = np.ones(width)
  total = np.convolve(np.where(known, values, 0.0), kernel, "same")
  weight = np.convolve(known.astype(float), kernel, "same")
  return np.where(known, total / np.maximum(weight, 1e-9), np.nan)


def thin(x: np.ndarray, values: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
  """Means of at most MAX_POINTS runs of neighbours, so that a long run still makes a small page."""
  if len(x) <= MAX_POINTS:
    return x, list(values)
  edges = np.linspace(0, len(x), MAX_POINTS + 1).astype(int)
  def mean(v: np.ndarray) -> np.ndarray:
    known = np.isfinite(v)
    total = np.add.reduceat(np.where(known, v, 0.0), edges[:-1])
    count = np.add.reduceat(known.astype(float), edges[:-1])
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
  return mean(x), [mean(v) for v in values]


def path(x: np.ndarray, y: np.ndarray) -> str:
  """SVG path data through the finite points; a gap breaks the line."""
  out, pen_down = [], False
  for a, b in zip(x, y, strict=True):
    if not (math.isfinite(a) and math.isfinite(b)):
      pen_down = False
      continue
    # "h0" draws nothing more, but gives a point that stands alone a round cap to be seen by.
    out.append(f"L{a:.1f} {b:.1f}" if pen_down else f"M{a:.1f} {b:.1f}h0")
    pen_down = True
  return "".join(out)


def curve(
  title: str,
  x: np.ndarray,
  series: Mapping[str, tuple[np.ndarray, str]],
  *,
  x_name: str = "step",
  rate: bool = False,
  full: bool = True,
  wide: bool = False,
  note: str = "",
  bands: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
) -> str:
  """One small multiple.

  Args:
    x: float[n], ascending.
    series: name -> (float[n] with NaN where nothing was logged, CSS colour).
    rate: values are proportions, shown in percent; with `full` the axis is 0 to 100 %.
    wide: take two columns where there are some.
    note: a short explanation under the title.
    bands: name of a series -> (low, high), float[n] each, drawn behind it; lines are then shown as they are.
  """
  names, colours = list(series), [colour for _, colour in series.values()]
  series_x = x
  x, values = thin(x, [np.asarray(v, float) for v, _ in series.values()])
  window = 0 if bands else len(x) // 15
  lines = [smooth(v, window) if window >= 3 else v for v in values]
  shown = np.concatenate([v[np.isfinite(v)] for v in values])
  low, high = _range(shown)
  ticks = [0, 0.25, 0.5, 0.75, 1] if rate and full else nice_ticks(low, min(high, 1.0) if rate else high)
  low, high = ticks[0], ticks[-1]
  to_x = lambda v: (v - x[0]) / max(x[-1] - x[0], 1e-12) * WIDTH
  to_y = lambda v: HEIGHT - (np.clip(v, low, high) - low) / (high - low) * HEIGHT

  svg = [f'<path class="grid" d="M0 {to_y(t):.1f}H{WIDTH:.0f}"/>' for t in ticks]
  for name, limits in (bands or {}).items():
    below, above = (to_y(np.asarray(side, float)) for side in thin(series_x, limits)[1])
    known = np.isfinite(below) & np.isfinite(above)
    outline = path(np.r_[to_x(x)[known], to_x(x)[known][::-1]], np.r_[below[known], above[known][::-1]])
    svg.append(f'<path style="fill:{series[name][1]};fill-opacity:.15;stroke:none" d="{outline}"/>')
  for v, line, colour in zip(values, lines, colours, strict=True):
    if window >= 3:
      svg.append(f'<path class="raw" style="stroke:{colour}" d="{path(to_x(x), to_y(v))}"/>')
    svg.append(f'<path class="line" style="stroke:{colour}" d="{path(to_x(x), to_y(line))}"/>')
  text = (lambda v: f"{100 * v:.0f}\u2009%") if rate else number
  y_labels = "".join(f'<span style="top:{to_y(t) / HEIGHT:.2%}">{text(t)}</span>' for t in ticks)
  x_ticks = [t for t in nice_ticks(x[0], x[-1], 4) if x[0] <= t <= x[-1]] if len(x) > 1 else [x[0]]
  x_labels = "".join(
    f'<span style="left:{to_x(t) / WIDTH:.2%}"{_edge(to_x(t) / WIDTH)}>{number(t)}</span>' for t in x_ticks
  )
  last = [next((u for u in line[::-1] if math.isfinite(u)), None) for line in lines]
  legend = _legend(names, colours, [percent(v) if rate else number(v) for v in last])
  data = json.dumps({
    "x": [_short(v) for v in x], "xn": x_name, "rate": rate, "n": names, "c": colours,
    "y": [[_short(u) for u in v] for v in values],
  }, separators=(",", ":"))
  return (
    f'<figure class="chart{" wide" if wide else ""}" data-chart="{esc(data)}">'
    f'<figcaption><h4>{esc(title)}</h4>{legend}</figcaption>'
    + (f'<p class="note">{esc(note)}</p>' if note else "")
    + f'<div class="plot"><div class="y" aria-hidden="true">{y_labels}</div>'
    f'<div class="area"><svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" preserveAspectRatio="none" role="img" '
    f'aria-label="{esc(_spoken(title, names, values, last, text))}">{"".join(svg)}</svg></div>'
    f'<div class="x" aria-hidden="true">{x_labels}<em>{esc(x_name)}</em></div></div></figure>'
  )


def _range(shown: np.ndarray) -> tuple[float, float]:
  """The span of the axis: the bulk of the values, so that one spike does not flatten the curve."""
  low, high = np.percentile(shown, [1, 99]) if len(shown) > 50 else (shown.min(), shown.max())
  return float(low), float(high)


def _short(value: float) -> float | None:
  return float(f"{value:.4g}") if math.isfinite(value) else None


def _edge(fraction: float) -> str:
  return ' class="first"' if fraction < 0.06 else ' class="last"' if fraction > 0.94 else ""


def _legend(names: Sequence[str], colours: Sequence[str], last: Sequence[str]) -> str:
  if len(names) == 1:
    return f'<span class="final">{last[0]}</span>'
  items = (f'<li><i style="background:{c}"></i>{esc(n)} <b>{v}</b></li>'
           for n, c, v in zip(names, colours, last, strict=True))
  return f'<ul class="legend">{"".join(items)}</ul>'


def _spoken(title, names, values, last, text) -> str:
  firsts = [next((u for u in v if math.isfinite(u)), None) for v in values]
  return f"{title}: " + "; ".join(
    f"{n} from {text(a)} to {text(b)}" for n, a, b in zip(names, firsts, last, strict=True) if a is not None
  )


# --- bars ---


def whisker_bar(result: Mapping, colour: str, *, mark: float | None = None) -> str:
  """A bar of a rate on a 0 to 100 % track, its interval as a whisker, and an optional second rate as a diamond."""
  if result.get("rate") is None:
    return '<div class="track none" role="img" aria-label="not observed"></div>'
  p, low, high = (100 * result[k] for k in ("rate", "low", "high"))
  spoken = f"{p:.1f} percent, 95 percent interval {low:.1f} to {high:.1f}"
  diamond = "" if mark is None else f'<b class="diamond" style="left:{100 * mark:.2f}%"></b>'
  return (
    f'<div class="track" role="img" aria-label="{spoken}"><i style="width:{p:.2f}%;background:{colour}"></i>'
    f'<s style="left:{low:.2f}%;width:{high - low:.2f}%"></s>{diamond}</div>'
  )


def interval_mark(result: Mapping, colour: str) -> str:
  """A rate as a mark on a 0 to 100 % line, its interval as a band behind it."""
  if result.get("rate") is None:
    return '<div class="marks none" role="img" aria-label="not observed"></div>'
  p, low, high = (100 * result[k] for k in ("rate", "low", "high"))
  return (
    f'<div class="marks" aria-hidden="true" style="color:{colour}">'
    f'<s style="left:{low:.2f}%;width:{high - low:.2f}%"></s><b style="left:{p:.2f}%"></b></div>'
  )


def stacked_bar(parts: Sequence[tuple[str, float, str, str]]) -> str:
  """Parts of a whole, (name, fraction, colour, text inside); an empty part is left out."""
  spans = "".join(
    f'<i style="width:{100 * share:.3f}%;background:{colour}" title="{esc(name)}: {esc(text)}">'
    f"<span>{esc(text)}</span></i>"
    for name, share, colour, text in parts if share > 0
  )
  spoken = ", ".join(f"{name} {text}" for name, share, _, text in parts if share > 0)
  return f'<div class="stack" role="img" aria-label="{esc(spoken)}">{spans}</div>'


# --- episode timelines ---


def runs(ids: Sequence[int]) -> list[tuple[int, int, int]]:
  """(stage, first step, end step) of every unbroken run of one stage."""
  out: list[tuple[int, int, int]] = []
  for t, stage in enumerate(ids):
    if out and out[-1][0] == stage:
      out[-1] = (stage, out[-1][1], t + 1)
    else:
      out.append((stage, t, t + 1))
  return out


def timeline(stages: Sequence[str], stage_id: Sequence[int], potential: Sequence[float]) -> str:
  """The stage of every step as a coloured band, with the potential Phi(s_t, g(t)) under it.

  The x axis is time in steps, 0 to T. The cursor and the readout are moved by report.js along with the video.
  """
  steps = len(stage_id)
  parts = runs(stage_id)
  band = "".join(
    f'<i style="left:{a / steps:.3%};width:{(b - a) / steps:.3%};background:var(--stage-{s + 1})">'
    f"<span>{esc(stages[s])}</span></i>"
    for s, a, b in parts
  )
  phi = np.array([np.nan if p is None else p for p in potential], float)
  top = max(1.0, math.ceil(np.nanmax(phi)))
  bottom = min(0.0, math.floor(np.nanmin(phi)))
  x = np.arange(steps + 1) / steps * WIDTH
  y = HEIGHT - (phi - bottom) / (top - bottom) * HEIGHT
  levels = np.arange(bottom, top + 1)
  grid = "".join(f'<path class="grid" d="M0 {HEIGHT - (v - bottom) / (top - bottom) * HEIGHT:.1f}H{WIDTH:.0f}"/>'
                 for v in levels)
  lines = "".join(f'<path class="line" style="stroke:var(--stage-{s + 1})" d="{path(x[a:b + 1], y[a:b + 1])}"/>'
                  for s, a, b in parts)
  labels = "".join(f'<span style="top:{1 - (v - bottom) / (top - bottom):.2%}">{v:.0f}</span>' for v in levels)
  ticks = [t for t in nice_ticks(0, steps, 4) if 0 <= t <= steps and float(t).is_integer()]
  axis = "".join(f'<span style="left:{t / steps:.2%}"{_edge(t / steps)}>{t:.0f}</span>' for t in ticks)
  return (
    f'<div class="timeline" role="slider" tabindex="0" aria-label="step of the episode" aria-valuemin="0" '
    f'aria-valuemax="{steps}" aria-valuenow="0"><div class="y" aria-hidden="true"><em>Φ</em>{labels}</div>'
    f'<div class="band">{band}</div><div class="area"><svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" '
    f'preserveAspectRatio="none" aria-hidden="true">{grid}{lines}</svg></div><div class="cursor"></div>'
    f'<div class="x" aria-hidden="true">{axis}<em>step</em></div></div>'
  )
