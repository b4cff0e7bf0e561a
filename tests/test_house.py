"""The house rules, read from the source: who imports whom, what stays unloaded, what may not be written down."""

from __future__ import annotations

import ast
import importlib
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = "stare_jax"

# Imports point down: room -> the rooms of ours that it may import. A room is a module or a folder of the package,
# without the package's name. What a room is split into may import each other: `losses/ppo.py` and `losses/ops.py`,
# or `report.py` and `report_html.py`.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
  "main": ("config", "pipeline", "processes"),
  "study": ("config", "evaluate", "pipeline", "report", "tasks"),
  "convert": ("checkpoint", "policies", "pipeline", "report"),
  "pipeline": (
    "losses", "policies", "tasks", "sims", "rollout", "stages", "batching", "dataset", "train", "sharding",
    "checkpoint", "evaluate", "report", "config", "episode", "processes", "suites",
  ),
  "compile": ("config", "pipeline", "policies", "rollout", "roofline", "sharding", "train"),
  "roofline": ("sharding",),
  "evaluate": ("rollout", "episode"),
  "rollout": ("episode", "sharding"),
  "stages": ("episode",),
  "batching": ("episode",),
  "dataset": ("episode",),
  "train": ("sharding",),
  "losses": (),
  "policies": ("episode", "checkpoint", "sharding"),
  "tasks": ("episode",),
  "sims": ("episode", "suites"),
  "suites": (),
  "processes": (),
  "sharding": (),
  "checkpoint": (),
  "report": (),
  "config": (),
  "episode": (),
  "configs": ("config",),
}

HEAVY = (  # the simulator's side, and anything as slow
  "torch", "mani_skill", "transformers", "sapien", "gymnasium", "simpler_env", "mani_skill2_real2sim",
)  # fmt: skip
LIGHT_ROOMS = ("losses", "stages", "tasks", "policies", "episode", "batching", "dataset", "config", "evaluate", "sims",
               "suites")  # fmt: skip
# Worker processes only.
SIMULATOR_SIDE = tuple(
  f"stare_jax/sims/{name}.py" for name in ("maniskill", "arm", "bridge", "lite", "perturbed", "simpler")
)

# Put together from pieces, so that this file does not contain what it looks for.
MACHINE_PATHS = re.compile("|".join((
  "/wo" + "rk/", "/ro" + "ot/", "/ho" + r"me/\w", "/opt/" + "(wheels|pypi)", "/Us" + "ers/",
)))
REGISTRY_HOSTS = re.compile("|".join((
  "py" + r"pi\.org", "python" + r"hosted\.org", "download" + r"\.pytorch\.org", "deb" + r"\.debian\.org",
  "archive" + r"\.ubuntu\.com", "snapshot" + r"\.debian\.org", "conda" + r"\.anaconda\.org",
  "registry" + r"\.npmjs\.org",
)))
MARKS = re.compile(r"\b(TO" + "DO|FIX" + "ME|XX" + r"X)\b")
TEXT = (".py", ".md", ".toml", ".txt", ".sh", ".yaml", ".yml", ".cfg", ".html", ".json", ".css", ".js")


def repository_files() -> list[pathlib.Path]:
  """Tracked files, and new ones that git would track."""
  command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard", "-z"]
  listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
  paths = (ROOT / name for name in listed.stdout.decode().split("\0") if name)
  return sorted({path for path in paths if path.is_file()})


FILES = repository_files()
SOURCES = [path for path in FILES if path.suffix == ".py"]
OURS = [path for path in SOURCES if path.is_relative_to(ROOT / PACKAGE) or path.is_relative_to(ROOT / "configs")]
relative = lambda path: path.relative_to(ROOT).as_posix()


def room_of(module: str) -> str:
  """`stare_jax.losses.ppo` -> losses; `report_html` -> report; `configs.ipi` -> configs; the package itself -> ''."""
  parts = module.split(".")
  if parts[0] != PACKAGE:
    return parts[0]
  name = parts[1] if len(parts) > 1 else ""
  family = name.split("_")[0]
  return family if name not in MAY_IMPORT and family in MAY_IMPORT else name


def module_of(path: pathlib.Path) -> str:
  parts = list(path.relative_to(ROOT).with_suffix("").parts)
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


class Imports(ast.NodeVisitor):
  """The modules a file imports at run time, wherever in the file; what only a type checker sees does not count."""

  def __init__(self, path: pathlib.Path):
    self.modules: list[str] = []
    self.package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    self.visit(ast.parse(path.read_text()))

  def visit_If(self, node: ast.If) -> None:
    if "TYPE_CHECKING" not in ast.unparse(node.test):
      self.generic_visit(node)
    for child in node.orelse if "TYPE_CHECKING" in ast.unparse(node.test) else ():
      self.visit(child)

  def visit_Import(self, node: ast.Import) -> None:
    self.modules += [alias.name for alias in node.names]

  def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
    base = node.module or ""
    if node.level:
      parents = self.package.split(".")
      base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
    self.modules += [f"{base}.{alias.name}" for alias in node.names]


def wrong_imports(path: pathlib.Path) -> list[str]:
  """What `path` imports against the table; unknown rooms are wrong too, so that the table stays whole."""
  room = room_of(module_of(path))
  if not room:  # the package's own __init__ imports nothing of ours
    allowed: tuple[str, ...] = ()
  else:
    if room not in MAY_IMPORT:
      return [f"{relative(path)}: room {room!r} has no row in MAY_IMPORT; add one"]
    allowed = MAY_IMPORT[room]
  found = [name for name in Imports(path).modules if name.split(".")[0] in (PACKAGE, "configs")]
  used = {room_of(name): name for name in found}
  return [f"{relative(path)}: imports {name}; {room or PACKAGE} may import {allowed or 'nothing of ours'}"
          for target, name in used.items() if target not in ("", room, *allowed)]


@pytest.mark.parametrize("path", OURS, ids=relative)
def test_imports_point_down(path):
  assert wrong_imports(path) == []


def test_the_import_check_can_see(tmp_path, monkeypatch):
  monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
  bad = tmp_path / PACKAGE / "losses" / "bad.py"
  bad.parent.mkdir(parents=True)
  bad.write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from stare_jax import pipeline\n"
                 "from stare_jax.losses import ops\nfrom . import imitation\ndef f():\n  from stare_jax import sims\n")
  assert [line.split(";")[0] for line in wrong_imports(bad)] == [f"{PACKAGE}/losses/bad.py: imports stare_jax.sims"]
  odd = bad.parent.parent / "helpers.py"
  odd.write_text("")
  assert "no row" in wrong_imports(odd)[0]


def test_only_the_worker_side_imports_the_simulator():
  users = {relative(path) for path in OURS for name in Imports(path).modules if name.split(".")[0] in HEAVY}
  assert users <= set(SIMULATOR_SIDE), f"{sorted(users - set(SIMULATOR_SIDE))} import one of {HEAVY}"


def test_light_rooms_load_nothing_heavy():
  rooms = [f"{PACKAGE}.{room}" for room in LIGHT_ROOMS]
  rooms += [module_of(path) for path in OURS
            if path.parent.name in ("losses", "tasks", "policies") and path.name != "__init__.py"]
  code = (f"import importlib, sys\nfor name in {rooms!r}: importlib.import_module(name)\n"
          f"print(sorted(set({HEAVY!r}) & set(sys.modules)))")
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  assert done.stdout.strip() == "[]", "loaded by importing the learner's rooms"


def registry_entries() -> list:
  """Every line of every registry; what belongs to the simulator's side is marked, as loading it loads torch."""
  entries = []
  for room in ("losses", "policies", "tasks", "sims"):
    for name, target in importlib.import_module(f"{PACKAGE}.{room}").REGISTRY.items():
      heavy = target.split(":")[0].replace(".", "/") + ".py" in SIMULATOR_SIDE
      entries.append(pytest.param(target, id=f"{room}-{name}", marks=[pytest.mark.sim] if heavy else []))
  return entries


@pytest.mark.parametrize("target", registry_entries())
def test_registry_entry_loads(target):
  module, _, attribute = target.partition(":")
  assert attribute, f"{target!r} is not 'module:attribute'"
  assert getattr(importlib.import_module(module), attribute) is not None


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in TEXT or not path.suffix], ids=relative)
def test_no_machine_in_the_repository(path):
  """No folder of one machine, no package host, no mark of unfinished work."""
  for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
    for what, pattern in (("a machine's path", MACHINE_PATHS), ("a package host", REGISTRY_HOSTS)):
      assert not pattern.search(line), f"{relative(path)}:{number} names {what}: {line.strip()[:120]}"
    if path.suffix == ".py":
      assert not MARKS.search(line), f"{relative(path)}:{number} leaves work undone: {line.strip()[:120]}"


def test_files_hold_one_idea():
  long = {relative(p): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 500}
  assert not long, f"over 500 lines: {long}; two ideas live there"


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
  """Lines of a function without its docstring."""
  doc = node.body[0]
  described = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
  return node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if described else 0)


def test_functions_fit_a_screen():
  long = [f"{relative(path)}:{node.lineno} {node.name} ({code_lines(node)} lines)" for path in OURS
          for node in ast.walk(ast.parse(path.read_text()))
          if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > 60]
  assert not long, f"over 60 lines: {long}"


def test_large_files_stay_out():
  large = {relative(path): path.stat().st_size for path in FILES if path.stat().st_size > 1_500_000}
  assert not large, f"over 1.5 MB: {large}"


def test_requirements_are_exact():
  lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
  loose = [line for line in lines if line and not re.match(r"^[\w.-]+==[\w.]+(;.*)?$", line)]
  assert not loose, f"not pinned exactly: {loose}"
