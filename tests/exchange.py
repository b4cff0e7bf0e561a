"""What tests/test_multiprocess.py runs in each of two processes: every exchange of stare_jax.processes (no tests here).

  python -m tests.exchange HOST:PORT COUNT INDEX FOLDER          all of them, and to an end
  python -m tests.exchange HOST:PORT COUNT INDEX FOLDER WHO      an exchange to which process WHO does not come
"""

from __future__ import annotations

import pathlib
import sys
import time

import jax
import numpy as np

from stare_jax import processes, sharding


def wait(folder: pathlib.Path, sleeper: int) -> None:
  """All but `sleeper` wait for it in an exchange; it would come in five minutes. They end as a run does."""
  processes.barrier("all here")
  while not processes._watch._peers:  # or its end could come before it is watched
    time.sleep(0.01)
  (folder / f"waiting-{processes.index()}").touch()
  if processes.index() == sleeper:
    time.sleep(300)
  try:
    processes.any_of(False)
  except Exception as error:
    processes.leave(1, str(error))


def main(address: str, count: int, index: int, folder: pathlib.Path) -> None:
  processes.initialize(address, count, index)
  if len(sys.argv) > 5:
    return wait(folder, int(sys.argv[5]))
  assert (processes.count(), processes.index(), processes.first()) == (count, index, index == 0)
  processes.GATHERED_BYTES = 3000  # several pieces, of which the last is shorter for one process than for the other

  values = [{"who": i, "data": np.arange(700 * (i + 1))} for i in range(count)]
  for came, wanted in zip(processes.everyone(values[index]), values, strict=True):
    assert came["who"] == wanted["who"] and np.array_equal(came["data"], wanted["data"])
  assert processes.agreed(f"from {index}") == "from 0"
  assert [processes.any_of(flag) for flag in (index == 1, False, True)] == [True, False, True]

  processes.same({"a": 1}, "nothing", "no advice")
  try:
    processes.same(index, "their number", "be one")
  except processes.ProcessError as error:
    assert "differ in their number: process 0 has 0, process 1 has 1; be one" in str(error)
  else:
    raise AssertionError("a difference went unnoticed")

  late = folder / "late"
  if processes.first():
    late.touch()
  processes.barrier("late")
  processes.appear(late)
  processes.PATIENCE = 0.1
  try:
    processes.appear(folder / "never")
  except processes.ProcessError as error:
    assert "--workdir has to be a folder that all processes share" in str(error)
  else:
    raise AssertionError("an absent file appeared")
  arrays(count)
  processes.leave()


def arrays(count: int) -> None:
  """Rows of the batch from each process, and parameters that no process holds whole, back in each."""
  mesh = sharding.make_mesh({"fsdp": -1})
  batch = np.arange(8 * mesh.size * 3, dtype=np.float32).reshape(-1, 3)
  mine = batch[sharding.local_rows(len(batch), mesh)]
  assert len(mine) == len(batch) // count
  whole = jax.jit(lambda x: x * 2, out_shardings=sharding.replicated(mesh))(sharding.put(mine, mesh))
  np.testing.assert_array_equal(np.asarray(whole), batch * 2)

  rules = ((r"cut", ("embed", "heads")), (r"layers|odd", ("embed", "mlp")), (r"whole", (None,)))
  layers = np.arange(3 * 4 * 8, dtype=np.float32).reshape(3, 4, 8)
  values = {"cut": batch.reshape(-1, 6), "odd": batch, "layers": layers, "whole": batch[0]}
  params = sharding.place(values, sharding.shardings(values, rules, mesh))
  assert not params["cut"].is_fully_addressable and not params["cut"].is_fully_replicated
  copy = sharding.local_copy(params, rules, mesh)
  for name, x in copy.items():
    assert x.is_fully_addressable
    np.testing.assert_array_equal(np.asarray(x), values[name])
  own = sharding.local_copy({"whole": jax.numpy.asarray(values["whole"])}, rules, mesh)["whole"]
  assert own.sharding.device_set == set(jax.local_devices())
  several = jax.local_device_count() > 1  # heads and hidden units over them, where they divide
  whole = {name for name, x in copy.items() if x.is_fully_replicated}
  assert whole == ({"odd", "whole"} if several else set(values))
  half = sharding.local_copy(params, rules, mesh, lambda path, x: "bfloat16" if path == "layers" else x.dtype)
  assert [half[name].dtype for name in ("layers", "odd")] == ["bfloat16", "float32"]
  np.testing.assert_array_equal(np.asarray(half["layers"], np.float32), values["layers"])  # integers below 256


if __name__ == "__main__":
  main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]))
