"""Whoever started a run may be gone: a print that nobody reads ends nothing, and hides no error from the others."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import pytest

from stare_jax import processes, report_progress


@pytest.fixture
def broken():
  """A text stream whose other end is closed."""
  reader, writer = os.pipe()
  os.close(reader)
  stream = os.fdopen(writer, "w", buffering=1)
  with pytest.raises(BrokenPipeError):
    print("nobody reads", file=stream, flush=True)
  yield stream
  with contextlib.suppress(OSError):
    stream.close()


def test_progress_goes_on(broken):
  with report_progress.Progress("imitation", 3, stream=broken, interval=0.0) as bar:
    for _ in range(3):
      bar.update(1, loss=0.5)
    bar.write("a line")
  assert bar.done == 3


def test_a_bar_goes_on(broken):
  """Of a terminal that is still there as the bar is made, and closed while it runs."""
  open_still = [True]

  class Terminal:
    encoding = "utf-8"
    isatty = lambda self: True
    fileno = lambda self: broken.fileno()
    write = lambda self, text: len(text) if open_still[0] else broken.write(text)
    flush = lambda self: None if open_still[0] else broken.flush()

  with report_progress.Progress("imitation", 3, stream=Terminal()) as bar:
    bar.update(1)
    open_still[0] = False
    bar._bar.mininterval = 0.0
    for _ in range(2):
      bar.update(1)
    bar.write("a line")
  assert bar.done == 3


class Ended(BaseException):
  """In the place of an end here and now."""


def end(status: int):
  raise Ended(status)


@pytest.fixture
def two_processes(monkeypatch):
  """This one is process 1 of 2."""
  monkeypatch.setattr(processes, "count", lambda: 2)
  monkeypatch.setattr(processes, "index", lambda: 1)
  monkeypatch.setattr(processes, "time", types.SimpleNamespace(sleep=lambda seconds: None))
  monkeypatch.setattr(processes, "os", types.SimpleNamespace(_exit=end))


def test_the_others_learn_of_an_error(monkeypatch, broken, two_processes):
  monkeypatch.setattr(sys, "stderr", broken)  # not in a fixture: pytest sets it again before the test is called
  watch = processes.Watch()
  here, there = socket.socketpair()
  watch._peers[0] = here
  monkeypatch.setattr(processes, "_watch", watch)
  with pytest.raises(Ended, match="2"):
    processes.leave(2, "the disk is full")
  assert json.loads(there.recv(1000)) == {"gone": 1, "error": "the disk is full"}


def test_an_error_of_the_others_ends_this_one(monkeypatch, broken, two_processes):
  monkeypatch.setattr(sys, "stderr", broken)
  here, there = socket.socketpair()
  there.sendall(json.dumps({"gone": 0, "error": "the disk is full"}).encode() + b"\n")
  with pytest.raises(Ended, match=str(processes.GONE)):
    processes.Watch()._listen(0, here, here.makefile("rb"))


def test_news_that_comes_with_the_greeting_is_heard(monkeypatch, broken, two_processes):
  """One read may take both off the connection."""
  monkeypatch.setattr(sys, "stderr", broken)
  monkeypatch.setattr(processes, "index", lambda: 0)
  here, there = socket.socketpair()
  there.sendall(b"token 1\n" + json.dumps({"gone": 1, "error": "the disk is full"}).encode() + b"\n")
  heard = []
  watch = processes.Watch()
  monkeypatch.setattr(watch, "_tell", lambda news, but=-1: heard.append(news))
  with pytest.raises(Ended, match=str(processes.GONE)):
    watch._greet(here, "token")
  assert heard == [{"gone": 1, "error": "the disk is full"}]  # and passed on


@pytest.mark.parametrize("flags, status", [([], 2), (["--config=tests/toy_run.py", "--distributed=nowhere"], 2)])
def test_the_status_stays_what_it_is(flags, status, user_environment, root):
  reader, writer = os.pipe()
  os.close(reader)
  done = subprocess.run([sys.executable, "-m", "stare_jax.main", *flags], cwd=root, env=user_environment,
                        stdout=writer, stderr=writer)  # fmt: skip
  os.close(writer)
  assert done.returncode == status


def test_what_a_process_is_told_of_its_folder_agrees_with_the_manual(monkeypatch):
  """An object store mounted as a folder renames nothing atomically (docs/launching.md)."""
  monkeypatch.setattr(processes, "PATIENCE", 0.0)
  with pytest.raises(processes.ProcessError, match="a folder that all processes share") as found:
    processes.appear(pathlib.Path("nowhere"))
  assert "bucket" not in str(found.value)
