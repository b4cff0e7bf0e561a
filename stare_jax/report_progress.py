"""How far long work is: a bar on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Self, TextIO


def duration(seconds: float) -> str:
  """"8s", "2m05s", "1h03m"."""
  seconds = max(0, round(seconds))
  if seconds < 60:
    return f"{seconds}s"
  if seconds < 3600:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Progress:
  """A bar on a terminal; elsewhere (a log file, CI) one line every `interval` seconds.

  Where nobody reads any more (a terminal that was closed, a full disk under the log) the run goes on unseen.

  Args:
    phase: shown in front.
    total: steps in all, `initial` of them already done (a resumed run).
    unit: what a step is, for "12.3 <unit>/s".
    stream: defaults to stderr.
    interval: seconds between lines where the stream is not a terminal.
    quiet: print nothing at all.
    together: steps end in waves, as episodes of parallel environments do: the rate counts from the start, and is shown
      once a tenth is done. Otherwise it counts from the end of the first step, as compilation is no speed.
  """

  def __init__(
    self,
    phase: str,
    total: int,
    *,
    together: bool = False,
    initial: int = 0,
    unit: str = "step",
    stream: TextIO | None = None,
    interval: float = 10.0,
    quiet: bool = False,
    clock: Callable[[], float] = time.monotonic,
  ):
    self.phase, self.total, self.done, self.unit = phase, int(total), int(initial), unit
    self._stream = sys.stderr if stream is None else stream
    self._interval, self._quiet, self._clock, self._together = interval, quiet, clock, together
    self._printed, self._printed_at = clock(), None
    self._from: tuple[float, int] | None = (clock(), self.done) if together else None  # (time, done)
    self._shown: dict[str, float] = {}
    self._closed = False
    self._bar = None
    if not quiet and getattr(self._stream, "isatty", lambda: False)():
      import tqdm

      self._bar = tqdm.tqdm(total=self.total, initial=self.done, desc=phase, unit=unit, file=self._stream,
                            dynamic_ncols=True, smoothing=0.1, mininterval=0.2)

  @property
  def rate(self) -> float | None:
    """Steps per second, see `together`; None until there is one."""
    if self._from is None or self.done <= self._from[1] or self._early():
      return None
    return (self.done - self._from[1]) / max(self._clock() - self._from[0], 1e-9)

  def update(self, n: int = 1, **shown: float) -> None:
    """n more steps are done; `shown` are the figures that matter now, e.g. loss=0.41."""
    self.done += n
    self._shown.update({name: float(value) for name, value in shown.items()})
    now = self._clock()
    if self._from is None:
      self._from = (now, self.done)
    if self._bar is not None:
      with contextlib.suppress(OSError):
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in self._shown.items()}, refresh=False)
        self._bar.update(n)
    elif now - self._printed >= self._interval:
      self._print(now)

  def skip(self, n: int) -> None:
    """n more steps are done, and were before: no time is theirs."""
    self.done += n
    if self._from is not None:
      self._from = (self._from[0], self._from[1] + n)
    if self._bar is not None:
      with contextlib.suppress(OSError):
        self._bar.initial += n
        self._bar.update(n)

  def _early(self) -> bool:
    """Whether less than a tenth is done of what was left at the start."""
    begun = self._from[1]
    return self._together and self.done - begun < (self.total - begun) / 10

  def line(self) -> str:
    """e.g. "imitation 120/800 (15%), 4.1 step/s, 2m45s left, loss 0.91"."""
    parts = [f"{self.phase} {self.done}/{self.total} ({self.done / max(self.total, 1):.0%})"]
    if (rate := self.rate) is not None:
      parts.append(f"{rate:.3g} {self.unit}/s")
      if self.done < self.total:
        parts.append(f"{duration((self.total - self.done) / rate)} left")
    return ", ".join(parts + [f"{name} {value:.4g}" for name, value in self._shown.items()])

  def write(self, message: str) -> None:
    """A line of its own, which does not tear the bar."""
    with contextlib.suppress(OSError):
      if self._bar is not None:
        self._bar.write(message, file=self._stream)
      elif not self._quiet:
        print(message, file=self._stream, flush=True)

  def _print(self, now: float) -> None:
    self._printed, self._printed_at = now, self.done
    if not self._quiet:
      with contextlib.suppress(OSError):
        print(self.line(), file=self._stream, flush=True)

  def close(self) -> None:
    if self._closed:
      return
    self._closed = True
    if self._bar is not None:
      with contextlib.suppress(OSError):
        self._bar.close()
    elif self.done != self._printed_at:
      self._print(self._clock())

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def reading(phase: str, *, quiet: bool = False, stream: TextIO | None = None) -> Callable[[int, int], None]:
  """A bar in MB for who calls it with (bytes read so far, bytes in all); none below a GB, which takes no time.

  Args: as of `Progress`.
  """
  bars: list[Progress] = []

  def show(done: int, total: int) -> None:
    if not bars:
      bars.append(Progress(phase, total // 10**6, unit="MB", stream=stream, quiet=quiet or total < 10**9))
    bars[0].update(done // 10**6 - bars[0].done)
    if done == total:
      bars[0].close()

  return show
