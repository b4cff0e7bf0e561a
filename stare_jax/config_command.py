"""The command line of every program that takes --config: a mistake in it is one message, and no traceback."""

from __future__ import annotations

import contextlib
import difflib
import pathlib
import sys
from typing import Any, NoReturn

from absl import flags


def fail(message: str) -> NoReturn:
  """Prints the message to standard error and exits with status 2, a mistake in the input."""
  with contextlib.suppress(OSError):
    print(message, file=sys.stderr, flush=True)
  sys.exit(2)


def parse(argv: list[str]) -> list[str]:
  """For `absl.app.run`: sets all flags and returns the arguments that are none; ends the program where it cannot."""
  if mistake := wrong_file(argv) or wrong_fields(argv):
    fail(mistake)
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
    # ml_collections puts the whole traceback of a config file into its message; what was raised is the last line.
    text = str(error).strip()
    text = text.splitlines()[-1] if "Traceback" in text else text
    program = sys.modules["__main__"].__spec__
    command = f"python -m {program.name}" if program else f"python {argv[0]}"
    fail(unknown_field(argv) or f"{text}\nFor the flags: {command} --help")


def config_argument(argv: list[str]) -> str:
  """What --config is given, FILE or FILE:PRESET, wherever a blank or = stands; empty without it."""
  path = ""
  for item, following in zip(argv, [*argv[1:], ""]):
    if item.lstrip("-").startswith("config="):
      path = item.partition("=")[2]
    elif item in ("-config", "--config"):
      path = following
  return path


def wrong_file(argv: list[str]) -> str:
  """That --config names no Python file, if so: reading one that is missing is put off until it would be a traceback."""
  path = pathlib.Path(config_argument(argv).partition(":")[0])
  if path == pathlib.Path() or (path.suffix == ".py" and path.is_file()):
    return ""
  there = sorted(str(file) for file in path.parent.glob("*.py"))
  near = difflib.get_close_matches(str(path), there, n=1, cutoff=0.0) or ["configs/ipi.py"]
  return f"--config={path} is not a Python file that is there; did you mean --config={near[0]}?"


def wrong_fields(argv: list[str]) -> str:
  """Fields that a flag would set without what belongs to them, or twice; empty if there are none."""
  named = [item.lstrip("-").partition("=")[0] for item in argv[1:] if item.startswith("-")]
  fields = [name for name in named if name.startswith("config.")]
  for field in ("preset", "method"):
    if f"config.{field}" in fields and {"preset", "method"} <= set(known_fields(argv)):  # a study's preset is a setting
      return (f"--config.{field} would change the name alone, and not what the {field} sets: write it behind the "
              f"config file, as in --config=configs/ipi.py:smoke,method=sta_ppo")
  for name in fields:
    if fields.count(name) > 1:
      return f"--{name} is given {fields.count(name)} times: give it once"
  return ""


def known_fields(argv: list[str]) -> list[str]:
  """The dotted fields of the configuration that --config names; none where it cannot be read."""
  known: list[str] = []

  def walk(prefix: str, node: Any) -> None:
    for key, value in node.items():
      known.append(f"{prefix}{key}")
      if hasattr(value, "items"):
        walk(f"{prefix}{key}.", value)

  if path := config_argument(argv):
    with contextlib.suppress(Exception):  # a file that cannot be read is another mistake than the one looked for
      walk("", flags.FLAGS["config"].parser.parse(path))
  return known


def unknown_field(argv: list[str]) -> str:
  """What to write instead of a --config.<field> that the configuration does not have; empty if all of them exist."""
  known = known_fields(argv)
  for item in argv if known else ():
    field = item.lstrip("-").partition("=")[0].removeprefix("config.")
    if item.lstrip("-").startswith("config.") and field.partition("[")[0] not in known:
      near = difflib.get_close_matches(field, known, n=1, cutoff=0.0)[0]
      return f"unknown field --config.{field}; did you mean --config.{near}? The config file lists all of them"
  return ""
