"""Bars and lines that say how far long work is."""

from __future__ import annotations

import io

import pytest

from stare_jax import report_progress


def test_progress_in_a_log_file_is_a_line_now_and_then():
  now, out = [0.0], io.StringIO()
  with report_progress.Progress("imitation", 100, unit="step", stream=out, interval=10, clock=lambda: now[0]) as bar:
    for i in range(100):
      now[0] += 30.0 if i == 0 else 1.0  # the first step compiles
      bar.update(loss=1.0 / (i + 1))
  lines = out.getvalue().splitlines()
  assert lines[0] == "imitation 1/100 (1%), loss 1"
  assert lines[1] == "imitation 11/100 (11%), 1 step/s, 1m29s left, loss 0.09091"
  assert lines[-1] == "imitation 100/100 (100%), 1 step/s, loss 0.01"
  assert len(lines) == 11 and "\r" not in out.getvalue()


def test_the_rate_of_what_ends_together_counts_from_the_start():
  now, out = [0.0], io.StringIO()
  with report_progress.Progress("x", 20, unit="episode", together=True, stream=out, clock=lambda: now[0]) as bar:
    now[0] += 10.0
    bar.update()  # one that was short; starting the simulators is no speed to go by
    now[0] += 30.0
    for _ in range(19):  # environments side by side, episodes of the same length
      bar.update()
  lines = out.getvalue().splitlines()
  assert lines == ["x 1/20 (5%)", "x 2/20 (10%), 0.05 episode/s, 6m00s left", "x 20/20 (100%), 0.5 episode/s"]
  now[0], out = 0.0, io.StringIO()
  with report_progress.Progress("x", 20, unit="episode", together=True, stream=out, clock=lambda: now[0]) as bar:
    bar.skip(10)  # they are on the disk already
    now[0] += 20.0
    bar.update(5)
  assert out.getvalue() == "x 15/20 (75%), 0.25 episode/s, 20s left\n"


def test_progress_counts_only_this_launch_and_can_be_silent():
  now, out = [0.0], io.StringIO()
  bar = report_progress.Progress("x", 100, initial=90, stream=out, clock=lambda: now[0])
  assert bar.rate is None
  for _ in range(3):
    now[0] += 0.5
    bar.update()
  assert bar.done == 93 and bar.rate == pytest.approx(2.0)
  silent = io.StringIO()
  with report_progress.Progress("x", 3, stream=silent, quiet=True) as bar:
    bar.update(3)
    bar.write("hidden")
  assert silent.getvalue() == ""


def test_what_is_read_is_shown_in_megabytes_if_there_is_much_of_it():
  out = io.StringIO()
  show = report_progress.reading("weights", stream=out)
  for done in (0.5e9, 1.9e9, 2.5e9):
    show(int(done), int(2.5e9))
  assert out.getvalue().startswith("weights 2500/2500 (100%)") and out.getvalue().count("\n") == 1
  little = io.StringIO()
  report_progress.reading("weights", stream=little)(10**6, 10**6)
  assert little.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar():
  class Terminal(io.StringIO):
    def isatty(self):
      return True

  out = Terminal()
  with report_progress.Progress("imitation", 12, stream=out) as bar:
    bar.skip(10)
    bar.update(loss=0.25)
    bar.write("a line")
    bar.update(loss=0.125)
  assert "\r" in out.getvalue() and "a line\n" in out.getvalue() and "12/12" in out.getvalue()


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0s"), (59.6, "1m00s"), (125, "2m05s"), (3780, "1h03m")])
def test_duration(seconds, text):
  assert report_progress.duration(seconds) == text
