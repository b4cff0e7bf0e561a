"""What the phases do otherwise when the run is several processes (`processes`); with one, nothing is added.

Every process has its own simulators, an equal share of `sim.num_envs`, and plays a fixed share of the episodes with a
copy of the parameters on its own devices, in its own time. An episode depends on its start alone, so the episodes are
those of one process. All of them are then put before all processes in the order that one process would have had: what
follows (stages, advantages, pairs, shuffling, early stops) is computed by each from the same numbers, and comes out the
same. For an update, a process puts its own rows of the batch on its devices (`Run.mine`).
"""

from __future__ import annotations

import dataclasses
import pathlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from stare_jax import checkpoint, dataset, processes, report, report_progress, sharding
from stare_jax.config import PHASES, ConfigError
from stare_jax.episode import Episode
from stare_jax.rollout import Collector, Start, Stop

SHARED = (
  "start all of them with one command and one --workdir, a folder that all processes share under the same name (NFS or "
  "Lustre, say)"
)
PART = 64  # episodes per file that a process writes for itself


def check(config: Any, workdir: pathlib.Path) -> None:
  """Raises, in every process, where they are not of one run.

  Raises: ConfigError, ProcessError.
  """
  n, c = processes.count(), config.sim
  if n == 1:
    return
  if c.num_envs % (n * c.groups):
    raise ConfigError(f"sim.num_envs = {c.num_envs} does not divide over {n} processes x sim.groups = {c.groups}: "
                      f"choose a multiple of {n * c.groups}")  # fmt: skip
  processes.same(checkpoint.config_digest(config), "their configuration (here its digest)", SHARED)
  standing = {phase: checkpoint.latest(workdir / "checkpoints" / phase) for phase in PHASES}
  processes.same(standing, "the last checkpoint of each phase", SHARED)
  sign = workdir / f".process-0-was-here-{processes.agreed(time.time_ns())}"
  if processes.first():
    sign.touch()
  processes.barrier("the run folder")
  processes.appear(sign)
  processes.barrier("the run folder is shared")
  sign.unlink(missing_ok=True)


def share_of_simulators(c: Any) -> dict[str, int]:
  """The environments of this process, and its workers: `sim.num_workers` is what one process starts."""
  envs = c.num_envs // processes.count()
  return {"num_envs": envs, "num_workers": min(c.num_workers, envs)}


def events(here: Sequence[str]) -> list[str]:
  """What happened to the simulators of all processes."""
  if processes.count() == 1:
    return list(here)
  return [f"process {i}: {event}" for i, there in enumerate(processes.everyone(list(here))) for event in there]


# Episodes ---------------------------------------------------------------------------------------------------


def _everyones(collect: Callable[[], Any], check: Callable[[], None]) -> list[Any]:
  """What `collect` gives in each process. Where one is asked to stop, all do."""
  try:
    part = collect()
  except Stop:
    part = None
  processes.meet(lambda: _asks(check))
  if processes.any_of(part is None):
    raise Stop
  return processes.everyone(part)


def _asks(check: Callable[[], None]) -> bool:
  """Whether a `Collector.check` raises `Stop`."""
  try:
    check()
  except Stop:
    return True
  return False


def share(starts: Sequence[Start]) -> Sequence[Start]:
  """Those that this process plays: every n-th, so that no process has much more than another."""
  return starts[processes.index() :: processes.count()]


def _merged(parts: Sequence[Sequence[Any]]) -> list[Any]:
  """The inverse of `share`: one list, in the order of the starts."""
  return [parts[k % len(parts)][k // len(parts)] for k in range(sum(map(len, parts)))]


def rows(collector: Collector, start_of: Callable[[int, int], Start], steps: int) -> list[list[Episode]]:
  """`collector.rows` over the environments of all processes, numbered through."""
  if processes.count() == 1:
    return collector.rows(start_of, steps)
  first = processes.index() * collector.sim.num_envs
  parts = _everyones(lambda: collector.rows(lambda env, j: start_of(first + env, j), steps), collector.check)
  return [row for part in parts for row in part]


def episodes(
  collector: Collector, starts: Sequence[Start]
) -> tuple[list[Episode], Callable[[Sequence[int]], dict[int, np.ndarray]]]:
  """`collector.episodes`, without images where there are several processes, and what fetches the images of some.

  The second takes indices of episodes, the same in every process, and returns {index: uint8[T, H, W, 3]}.
  """
  if processes.count() == 1:
    found = collector.episodes(starts)
    return found, lambda wanted: {i: found[i].images for i in wanted}
  mine: list[Episode] = []

  def collect() -> list[Episode]:
    mine.extend(collector.episodes(share(starts)))
    return [dataclasses.replace(episode, images=episode.images[:0]) for episode in mine]

  found = _merged(_everyones(collect, collector.check))

  def images(wanted: Sequence[int]) -> dict[int, np.ndarray]:
    n, me = processes.count(), processes.index()
    parts = processes.everyone({i: mine[i // n].images for i in wanted if i % n == me})
    return {i: frames for part in parts for i, frames in part.items()}

  return found, images


def collect(
  folder: pathlib.Path, chunks: Sequence[Sequence[Start]], make_collector: Callable[[Any], Collector], fields: Any,
  check: Callable[[], None],
) -> None:  # fmt: skip
  """Makes the chunks of a data set that are not there yet, the same files that one process would write.

  Each process plays its share of all of them and keeps it in files of its own, so that a run that is killed on the way
  finds them again (with the same number of processes, and unless it was killed while the first one, in the end, put
  them together).
  """
  if processes.count() == 1:
    return
  path = lambda i: folder / f"{i:05d}.episodes"
  missing = processes.agreed([i for i in range(len(chunks)) if not path(i).exists()])
  if missing:
    _collect_missing(folder, {path(i): chunks[i] for i in missing}, make_collector, fields, check)
  for i in range(len(chunks)):
    processes.appear(path(i))


def _collect_missing(
  folder: pathlib.Path, missing: Mapping[pathlib.Path, Sequence[Start]], make_collector: Callable, fields: Any,
  check: Callable[[], None],
) -> None:  # fmt: skip
  n = processes.count()
  own = {"digest": checkpoint.config_digest(fields), "processes": n, "chunks": [path.stem for path in missing]}
  parts = folder / f".parts-of-{n}"
  mine = share([start for chunk in missing.values() for start in chunk])
  _everyones(lambda: _collect_parts(parts, mine, make_collector, own), check)
  if processes.first():
    _assemble(parts, [(path, len(chunk)) for path, chunk in missing.items()], fields)
    for stale in folder.glob(".parts-of-*"):  # these, and what a launch of other processes left
      shutil.rmtree(stale)
  processes.barrier("a data set")


def _part(parts: pathlib.Path, process: int, number: int) -> pathlib.Path:
  return parts / f"{process:05d}-{number:05d}.episodes"


def _collect_parts(
  parts: pathlib.Path, starts: Sequence[Start], make_collector: Callable[[Any], Collector], own: Mapping[str, Any]
) -> bool:
  label = f"{parts.parent.name} rollouts (a share of {own['processes']})"
  with episodes_bar(label, len(starts)) as bar:
    collector = make_collector(bar)  # by all of them or by none: parameters may be gathered from the others
    for number, at in enumerate(range(0, len(starts), PART)):
      path, piece = _part(parts, processes.index(), number), starts[at : at + PART]
      if path.exists() and all(dataset.open(path)[1].get(name) == value for name, value in own.items()):
        bar.skip(len(piece))
        continue
      began = time.monotonic()
      found = collector.episodes(piece)
      dataset.write(path, found, dict(own) | {"seconds": time.monotonic() - began})
  return True


def _assemble(parts: pathlib.Path, wanted: Sequence[tuple[pathlib.Path, int]], fields: Any) -> None:
  """The files of all processes become the chunks of the data set."""
  n, total = processes.count(), sum(size for _, size in wanted)
  found: list[list[Episode]] = []
  seconds = 0.0
  for process in range(n):
    found.append([])
    for number in range(-(-len(range(process, total, n)) // PART)):
      path = _part(parts, process, number)
      processes.appear(path, writer=process)
      more, meta = dataset.open(path)
      found[-1] += more
      seconds += meta["seconds"] / n
  every, at = _merged(found), 0
  digest, flat = checkpoint.config_digest(fields), checkpoint.flatten_config(fields)
  for path, size in wanted:
    dataset.write(path, every[at : at + size], {"digest": digest, "fields": flat, "seconds": seconds * size / total})
    at += size


# Devices and files ------------------------------------------------------------------------------------------


def compiled(run: Any, function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
  """Jitted (params, *batch) -> array; `batch` is whole in every process, and so is what comes back."""
  options = sharding.compiler_options(run.mesh)
  if run.mesh.size == 1:
    return jax.jit(function, compiler_options=options)

  def constrained(*arguments: Any) -> jax.Array:
    with sharding.activations(run.mesh):
      return function(*arguments)

  jitted = jax.jit(constrained, out_shardings=sharding.replicated(run.mesh), compiler_options=options)
  return lambda params, *batch: jitted(params, *sharding.put(jax.tree.map(run.mine, batch), run.mesh))


class Silent:
  """In the place of `report.MetricsLogger` where another process writes."""

  def log(self, *_: Any, **__: Any) -> None: ...

  def flush(self) -> None: ...

  def close(self) -> None: ...


def episodes_bar(label: str, episodes: int) -> report_progress.Progress:
  return report_progress.Progress(label, episodes, unit="episode", together=True, quiet=not processes.first())


def logger(workdir: pathlib.Path, *, resume: tuple[str, int], keep: Sequence[str]) -> Any:
  return report.MetricsLogger(workdir, resume=resume, keep=keep) if processes.first() else Silent()


def evaluated(path: pathlib.Path, digest: str) -> dict | None:
  """The evaluation at `path`, if it is of this digest; what the first process finds counts for all."""
  found = report.read_json(path) if processes.first() and path.exists() else {}
  found = processes.agreed(found)
  return found if found.get("digest") == digest else None
