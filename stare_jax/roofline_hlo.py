"""Reads a compiled program's text: its collectives and its memory traffic, loops times their trips.

XLA's own cost analysis counts the body of a loop once, and so sees one of a model's layers. Here every computation
counts as often as it runs: `known_trip_count` of its loop, or the number that the caller gives for loops whose length
only the device knows.
"""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
ITEM = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8,
        "u64": 8, "f64": 8, "s4": 0.5, "u4": 0.5, "c64": 8}  # fmt: skip
# Instructions that move nothing by themselves: names, tuples, and those whose computations are counted on their own.
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
        "partition-id", "replica-id", "opt-barrier", "iota", "async-start", "async-done", "async-update")  # fmt: skip


class Instruction(NamedTuple):
  """One line. type: shapes with layouts. inside: what stands in the parentheses. rest: what follows them."""

  name: str
  type: str
  opcode: str
  inside: str
  rest: str
  root: bool

  @property
  def operands(self) -> list[str]:
    """Names."""
    return re.findall(r"%([\w.\-]+)", self.inside)


class Collective(NamedTuple):
  """kind, how often it runs, bytes of the whole array, devices that take part."""

  kind: str
  times: int
  size: float
  group: int


Computations = dict[str, list[Instruction]]


def parse(text: str) -> tuple[Computations, str]:
  """({name: instructions}, name of the entry) of an HLO module."""
  found: Computations = {}
  entry, current = "", None
  for line in text.splitlines():
    if (head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)) and " = " not in line.split("->")[0]:
      current = found.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (item := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
      if split := re.search(r"(?:^| )([a-z][a-z0-9\-]*)\(", item[3]):
        inside = item[3][split.end() :]
        end = _closing(inside)
        type_, root = item[3][: split.start()], item[1] is not None
        current.append(Instruction(item[2], type_, split[1], inside[:end], inside[end:], root))
  if not entry:
    raise ValueError("this text has no ENTRY computation: expected a compiled module's as_text()")
  return found, entry


def _closing(text: str) -> int:
  depth = 1
  for i, character in enumerate(text):
    depth += {"(": 1, ")": -1}.get(character, 0)
    if depth == 0:
      return i
  return len(text)


def size(type_: str, *, hbm: bool = False) -> float:
  """Bytes of a type, or of its parts that lie in HBM (memory space 0)."""
  total = 0.0
  for item, dims, layout in re.findall(r"\b([a-z]+\d*)\[([\d,]*)\](\{[^}]*\})?", type_):
    if item in ITEM and not (hbm and re.search(r"S\([1-9]", layout)):
      total += ITEM[item] * math.prod(int(n) for n in dims.split(",") if n)
  return total


def _callees(instruction: Instruction) -> Iterator[tuple[str, str]]:
  """(role, computation) of what an instruction calls."""
  for role, name in re.findall(r"(calls|to_apply|body|condition)=%?([\w.\-]+)", instruction.rest):
    yield role, name
  for names in re.findall(r"branch_computations=\{([^}]*)\}", instruction.rest):
    for name in re.findall(r"%?([\w.\-]+)", names):
      yield "branch", name


def trip_count(loop: Instruction, computations: Computations) -> int | None:
  """How often a loop's body runs: as the compiler wrote it down, or from a counter below a constant; else None.

  The counter of a scan starts at 0 and grows by 1; only such loops have a constant in their condition.
  """
  if known := re.search(r'known_trip_count[^\d]*?"?n"?:"?(\d+)', loop.rest):
    return int(known[1])
  condition = computations.get(next(name for role, name in _callees(loop) if role == "condition"), [])
  constants = {i.name: int(i.inside) for i in condition if i.opcode == "constant" and i.inside.isdigit()}
  root = next((i for i in condition if i.root), None)
  if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
    return None
  return next((constants[name] for name in root.operands if name in constants), None)


def runs(computations: Computations, entry: str, trips: int) -> dict[str, int]:
  """How often each computation runs. trips: of loops whose length is not known to the compiler."""
  times: dict[str, int] = collections.defaultdict(int)

  def walk(name: str, count: int) -> None:
    times[name] += count
    for instruction in computations.get(name, ()):
      length = trip_count(instruction, computations) if instruction.opcode == "while" else 1
      for _, callee in _callees(instruction):
        walk(callee, count * (trips if length is None else length))

  walk(entry, 1)
  return times


def collectives(computations: Computations, times: dict[str, int], devices: int) -> list[Collective]:
  """Every collective that runs. What is started at one place and ended at another counts once.

  A TPU fuses a collective with the work that it runs behind, and writes it into every link of that chain: same channel,
  same shape. An all-reduce that keeps one piece ("all-reduce-scatter") is a reduce-scatter.
  """
  found: dict[tuple[str, ...], Collective] = {}
  for name, body in computations.items():
    types = {i.name: i.type for i in body}
    for i in body:
      kind = i.opcode.removesuffix("-start")
      if kind not in COLLECTIVES or not times.get(name):
        continue
      group = _group(i.rest, devices)
      whole = size(i.type)
      if i.opcode.endswith("-start") and kind == "all-gather":
        whole *= group / (group + 1)  # its type holds what goes in as well
      elif i.opcode.endswith("-start") and kind == "collective-permute":
        whole /= 2
      elif kind == "reduce-scatter":
        whole = sum(size(types.get(o, "")) for o in i.operands) or whole * group
      elif kind == "all-to-all":
        whole *= group
      kind = "reduce-scatter" if kind == "all-reduce" and name.startswith("all-reduce-scatter") else kind
      channel = re.search(r"channel_id=(\d+)", i.rest)
      chained = channel and channel[1] != "1"  # 1: no channel of its own
      key = (kind, channel[1], re.sub(r"\{[^}]*\}", "", i.type)) if chained else (name, i.name)
      if key not in found or found[key].times < times[name]:
        found[key] = Collective(kind, times[name], whole, group)
  return list(found.values())


def _group(rest: str, devices: int) -> int:
  """Devices of one replica group. "[16,8]<=[128]" is 16 groups of 8, "{{0,1},{2,3}}" two of 2, and
  "mesh['a'=2,'b'=4] {'b'}" two of 4, where an axis may be a part of one: "'b':(1)2" is 2 devices.
  """
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", rest):
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", named[1])}
    parts = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", named[2])
    return math.prod(int(part) if part else sizes[name] for name, part in parts)
  if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", rest):
    return int(iota[2])
  if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
    return len(listed[1].split(","))
  return devices


def traffic(computations: Computations, times: dict[str, int]) -> tuple[float, float]:
  """HBM bytes of (instructions with matrix products, all others), collectives left out."""
  inside = {callee for body in computations.values() for i in body if i.opcode != "while" for _, callee in _callees(i)
            if i.opcode not in ("call", "conditional")}  # fmt: skip
  products = others = 0.0
  for name, body in computations.items():
    if name in inside or not times.get(name):
      continue
    types = {i.name: i.type for i in body}
    for i in body:
      if i.opcode in FREE or i.opcode.removesuffix("-start").removesuffix("-done") in COLLECTIVES:
        continue
      if i.opcode.endswith(("-start", "-done")):  # a copy counts where it ends
        moved = 2 * size(i.type, hbm=True) if i.opcode == "copy-done" else 0.0
      else:
        moved = _moved(i, types, computations)
      if _multiplies(i, computations):
        products += times[name] * moved
      else:
        others += times[name] * moved
  return products, others


def _multiplies(i: Instruction, computations: Computations) -> bool:
  """Whether an instruction, or the computation fused into it, is a matrix product."""
  if i.opcode in ("convolution", "dot") or _is_cublas(i):
    return True
  return any(_multiplies(inner, computations) for _, name in _callees(i) for inner in computations.get(name, ()))


def _is_cublas(i: Instruction) -> bool:
  """Whether an instruction is a product that a GPU's library makes."""
  return i.opcode == "custom-call" and 'custom_call_target="__cublas' in i.rest


def _moved(i: Instruction, types: dict[str, str], computations: Computations) -> float:
  """HBM bytes read and written by one instruction: of a slice or an in-place update, only what it touches."""
  if i.opcode in ("dynamic-slice", "slice", "gather"):
    return 2 * size(i.type, hbm=True)
  if i.opcode == "dynamic-update-slice":
    return 2 * size(types.get(i.operands[1], ""), hbm=True)
  fused = _fused(i, computations)
  if fused is None:
    written = i.type.split(", s8[")[0] if _is_cublas(i) else i.type  # beside its result it has room to work in
    return size(written, hbm=True) + sum(size(types.get(o, ""), hbm=True) for o in i.operands)
  whole = [size(types.get(operand, ""), hbm=True) for operand in i.operands]
  return _written(i, fused) + sum(_read(fused, number, n, computations) for number, n in enumerate(whole))


def _fused(i: Instruction, computations: Computations) -> list[Instruction] | None:
  """The instructions of a fusion."""
  return next((computations[name] for role, name in _callees(i) if role == "calls" and name in computations), None)


def _written(i: Instruction, fused: list[Instruction]) -> float:
  """What a fusion writes: its result, or the pieces that it updates in place."""
  inner = {x.name: x for x in fused}
  root = next(x for x in fused if x.root)
  ends = [inner[o] for o in root.operands if o in inner] if root.opcode == "tuple" else [root]
  updates = [x for x in ends if x.opcode == "dynamic-update-slice"]
  saved = sum(size(x.type) - size(inner[x.operands[1]].type) for x in updates if x.operands[1] in inner)
  return max(size(i.type, hbm=True) - saved, 0.0)


def _read(fused: list[Instruction], number: int, whole: float, computations: Computations) -> float:
  """What a fusion reads of one operand of `whole` bytes: only the slices that it takes, also in fusions inside it, and
  nothing of what it updates in place.
  """
  parameter = next((x for x in fused if x.opcode == "parameter" and int(x.inside) == number), None)
  if parameter is None or not whole:
    return whole
  total = 0.0
  for x in (x for x in fused if parameter.name in x.operands):
    if x.opcode in ("dynamic-slice", "slice", "gather") and x.operands[0] == parameter.name:
      total += size(x.type)
    elif inner := _fused(x, computations):
      total += sum(_read(inner, i, whole, computations) for i, o in enumerate(x.operands) if o == parameter.name)
    elif x.opcode != "dynamic-update-slice" or x.operands[0] != parameter.name:
      return whole
  return min(whole, total)
