"""Meshes of eight devices that tests compare with one, and a fixture that compiles quickly (no tests here)."""

import jax
import numpy as np
import pytest

from stare_jax import sharding

MESHES = {
  "one": dict(data=1),
  "data": dict(data=8),
  "fsdp": dict(data=1, fsdp=4),
  "tensor": dict(data=1, tensor=2),
  "mixed": dict(data=2, fsdp=2, tensor=2),
}


@pytest.fixture(autouse=True, scope="module")
def quick_compile():
  """Halves the time of these tests, most of which is compilation."""
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", False)


def mesh_of(name):
  sizes = MESHES[name]
  return sharding.make_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
