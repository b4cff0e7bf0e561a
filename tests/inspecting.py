"""What did we really trace and compile? Helpers for tests of jitted functions (no tests here)."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxprs_in_params
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def equations(jaxpr: Jaxpr | ClosedJaxpr) -> Iterator[JaxprEqn]:
  """Every equation, those of inner jaxprs (scan, cond, jit, custom derivatives) included."""
  for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
    yield eqn
    for inner in jaxprs_in_params(eqn.params):
      yield from equations(inner)


def primitives(fn: Callable, *args: Any) -> collections.Counter[str]:
  """How often each primitive occurs in the trace of `fn(*args)`."""
  return collections.Counter(eqn.primitive.name for eqn in equations(jax.make_jaxpr(fn)(*args)))


def dtypes(fn: Callable, *args: Any) -> set[str]:
  """The dtypes of all values computed in the trace of `fn(*args)`."""
  outputs = (v.aval for eqn in equations(jax.make_jaxpr(fn)(*args)) for v in eqn.outvars)
  return {np.dtype(aval.dtype).name for aval in outputs if not jax.dtypes.issubdtype(aval.dtype, jax.dtypes.extended)}


def assert_pure(fn: Callable, *args: Any) -> None:
  """No call to the host, no random bits, and no double precision even where the process allows it."""
  seen = primitives(fn, *args)
  assert not [name for name in seen if "callback" in name or "random" in name or name in ("infeed", "outfeed")], seen
  with jax.enable_x64(True):  # otherwise a float64 constant is rounded silently and the check sees nothing
    assert not {"float64", "complex128"} & dtypes(fn, *args)


class Traced:
  """`jax.jit(fn)` that counts how often it was traced."""

  def __init__(self, fn: Callable):
    self.count = 0

    def counted(*args: Any) -> Any:
      self.count += 1
      return fn(*args)

    self._jitted = jax.jit(counted)

  def __call__(self, *args: Any) -> Any:
    return self._jitted(*args)


def hlo(fn: Callable, *args: Any) -> str:
  """The optimised HLO of `jax.jit(fn)` for arguments of these shapes and shardings."""
  return jax.jit(fn).lower(*args).compile().as_text()


def collectives(text: str) -> dict[str, int]:
  """{collective: the elements of the largest array that it moves} in an HLO text."""
  largest: dict[str, int] = {}
  pattern = r"= (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
  for shapes, name in re.findall(pattern, text):
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
    largest[name] = max(largest.get(name, 0), *sizes)
  return largest


def data_mesh(size: int = 2) -> Mesh:
  """A mesh of `size` CPU devices over "data"."""
  if jax.device_count() < size:
    raise RuntimeError(
      f"{jax.device_count()} devices, expected {size}: set XLA_FLAGS="
      f"--xla_force_host_platform_device_count={size} before jax starts, as tests/conftest.py does"
    )
  return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:size])


def shard(mesh: Mesh, tree: Any) -> Any:
  """Cuts every leaf's leading axis over "data"."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))
