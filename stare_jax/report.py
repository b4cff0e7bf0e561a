"""What a run writes for people: metrics.jsonl, TensorBoard, videos, summary.json and report.html.

  metrics.jsonl          one row per logged step: {"phase", "step", "env_steps", "time", <metric>: float, ...}
  tensorboard/<phase>/   the same numbers, one TensorBoard run per phase
  videos/<label>_<i>     .mp4 and .json of a sample episode: its frames, and its stages beside them
  summary.json           final figures, configuration, versions
  report.html            all of it on one self-contained page (the page itself: report_html.py)
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import pathlib
import signal
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from stare_jax.report_data import PHASES, RESERVED

logger = logging.getLogger(__name__)

EVENTS_SECONDS = 30.0  # until TensorBoard sees a row

PathLike = str | os.PathLike


# --- JSON on disk ---


def plain(value: Any) -> Any:
  """`value` as JSON can hold it: arrays as lists, paths as strings, NaN and infinity as None."""
  if isinstance(value, Mapping) or hasattr(value, "items"):
    return {str(k): plain(v) for k, v in value.items()}
  if isinstance(value, (str, bool, int)) or value is None:
    return value
  if isinstance(value, float):
    return value if math.isfinite(value) else None
  if isinstance(value, (list, tuple, set, frozenset)):
    return [plain(v) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  if hasattr(value, "tolist"):  # numpy and jax arrays and scalars, without importing jax
    return plain(value.tolist())
  raise TypeError(
    f"cannot write {type(value).__name__} {value!r} to JSON; pass numbers, strings, lists or dicts"
  )


def write_json(path: PathLike, value: Any) -> pathlib.Path:
  """Write atomically: a reader, or a resumed run, sees the old file or the new one, never half of one."""
  text = json.dumps(plain(value), indent=2, allow_nan=False) + "\n"
  return write_atomically(pathlib.Path(path), text.encode())


def read_json(path: PathLike) -> Any:
  """What `write_json` wrote. Raises: ValueError, with the path, where that is no longer in it."""
  try:
    return json.loads(pathlib.Path(path).read_text())
  except ValueError as error:
    raise ValueError(f"{path} is no JSON file any more ({error}): restore it; if it is deleted, what it said is "
                     f"lost, and the same command goes on without") from error


def write_atomically(path: pathlib.Path, data: bytes) -> pathlib.Path:
  """A file that is whole or not there, whoever reads or kills; its folder is made."""
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as f:
      f.write(data)
      f.flush()
      os.fsync(f.fileno())
    os.chmod(temporary, 0o644)  # mkstemp makes it private
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise
  return path


def write_summary(workdir: PathLike, summary: Mapping[str, Any]) -> pathlib.Path:
  """workdir/summary.json, replaced atomically."""
  return write_json(pathlib.Path(workdir) / "summary.json", summary)


def write_evaluation(workdir: PathLike, evaluation: Mapping[str, Any]) -> pathlib.Path:
  """workdir/evaluations/<label>.json from `evaluate.summarise`."""
  return write_json(pathlib.Path(workdir) / "evaluations" / f"{evaluation['label']}.json", evaluation)


# --- metrics ---


def read_metrics(path: PathLike) -> list[dict]:
  """The rows of a metrics.jsonl. A half-written last line (the process died in the write) is left out."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  lines = path.read_bytes().split(b"\n")
  last = max((i for i, line in enumerate(lines) if line.strip()), default=-1)
  rows = []
  for i, line in enumerate(lines[: last + 1]):
    if not line.strip():
      continue
    try:
      row = json.loads(line)
      if not isinstance(row, dict) or "phase" not in row or "step" not in row:
        raise ValueError("not a row with a phase and a step")
    except ValueError as error:
      if i == last:
        break
      raise ValueError(f"{path}: line {i + 1} of {last + 1} is damaged ({error}); "
                       f"remove that line, or move the file away to start a new one") from error
    rows.append(row)
  return rows


class MetricsLogger:
  """Appends rows to workdir/metrics.jsonl and to TensorBoard.

  Every row reaches the operating system at once, so that killing the process loses none, and the disk once
  a second; call `flush` before a checkpoint is written, so that no checkpoint is ahead of its metrics.

  Args:
    workdir: the run folder.
    resume: (phase, step) of the checkpoint that the run continues from: rows after it are removed, because
      the run is about to write them again. (phases[0], -1) starts over. None: a new run, where rows that are
      there already are an error.
    phases: the run's phases in order; rows of the phases after `resume`'s are removed as well, but of those in `keep`,
      which have checkpoints of their own and will not write them again.
    tensorboard: also write event files.
    sync_seconds: the longest time between two fsyncs.
  """

  def __init__(
    self,
    workdir: PathLike,
    *,
    resume: tuple[str, int] | None = None,
    phases: Sequence[str] = PHASES,
    keep: Sequence[str] = (),
    tensorboard: bool = True,
    sync_seconds: float = 1.0,
  ):
    self.workdir = pathlib.Path(workdir)
    self.path = self.workdir / "metrics.jsonl"
    self._phases, self._keep = tuple(phases), tuple(keep)
    self._resume = resume
    self._tensorboard = tensorboard
    self._writers: dict[str, Any] = {}
    self._sync_seconds = sync_seconds
    self._synced = self._shown = 0.0
    self.workdir.mkdir(parents=True, exist_ok=True)
    self._prepare()
    self._file = open(self.path, "a", encoding="utf-8")

  def _prepare(self) -> None:
    rows = read_metrics(self.path)
    if self._resume is None:
      if rows:
        raise FileExistsError(
          f"{self.path} already has {len(rows)} rows; resume that run, or choose another --workdir"
        )
      kept = []
    else:
      phase, step = self._resume
      if phase not in self._phases:
        raise ValueError(f"resume from phase {phase!r}; this run's phases are {list(self._phases)}")
      kept = [row for row in rows if not self._is_after(row)]
      if len(kept) < len(rows):
        logger.info("%s: %d rows after %s step %d removed; the run writes them again",
                    self.path, len(rows) - len(kept), phase, step)
    write_atomically(self.path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept).encode())

  def _is_after(self, row: Mapping[str, Any]) -> bool:
    phase, step = self._resume
    if row["phase"] == phase:
      return row["step"] > step
    later = self._phases[self._phases.index(phase) + 1 :]
    return row["phase"] in later and row["phase"] not in self._keep

  def _writer(self, phase: str):
    if phase not in self._writers:
      from tensorboardX.event_file_writer import EventsWriter  # slow to import, not wanted by those who only read
      from tensorboardX.proto.event_pb2 import Event, SessionLog

      purge = None
      if self._resume is not None:
        # One run directory per phase: a purge hides every later step of its directory, whatever the tag.
        at, step = self._resume
        purge = step + 1 if phase == at else 0
        if phase in self._phases and self._phases.index(phase) < self._phases.index(at):
          purge = None
      directory = self.workdir / "tensorboard" / phase
      directory.mkdir(parents=True, exist_ok=True)
      # Not its SummaryWriter, whose thread ends in silence on a full disk, and who then waits for that thread for ever.
      # Files are named by the second: without a suffix one would write over that of a run that died in this one.
      writer = self._writers[phase] = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
      if purge is not None:
        writer.write_event(Event(step=purge, session_log=SessionLog(status=SessionLog.START)))
    return self._writers[phase]

  def log(self, phase: str, step: int, metrics: Mapping[str, Any], *, env_steps: int = 0) -> dict:
    """Write one row and return it. Values are Python, numpy or jax scalars; NaN and infinity become null."""
    if clash := [name for name in metrics if name in RESERVED]:
      raise ValueError(f"metrics may not be called {clash}: the row has {list(RESERVED)} of its own")
    values = {}
    for name, value in metrics.items():
      if np.size(value) != 1:
        raise ValueError(f"metric {name!r} of {phase} has shape {np.shape(value)}, expected a scalar")
      values[name] = plain(float(np.asarray(value).reshape(())))
    row = {"phase": phase, "step": int(step), "env_steps": int(env_steps), "time": round(time.time(), 3)}
    row.update(values)
    self._file.write(json.dumps(row, allow_nan=False) + "\n")
    self._file.flush()
    if time.monotonic() - self._synced > self._sync_seconds:
      self._sync()
    if self._tensorboard:
      from tensorboardX.proto.event_pb2 import Event
      from tensorboardX.summary import scalar

      writer = self._writer(phase)
      for name, value in values.items():
        if value is not None:
          writer.write_event(Event(wall_time=row["time"], step=int(step), summary=scalar(name, value)))
      if time.monotonic() - self._shown > EVENTS_SECONDS:
        writer.flush()
        self._shown = time.monotonic()
    return row

  def _sync(self) -> None:
    os.fsync(self._file.fileno())
    self._synced = time.monotonic()

  def flush(self) -> None:
    """Everything logged so far is on the disk when this returns."""
    self._file.flush()
    self._sync()
    for writer in self._writers.values():
      writer.flush()

  def close(self) -> None:
    if not self._file.closed:
      self.flush()
      self._file.close()
    for writer in self._writers.values():
      writer.close()
    self._writers.clear()

  def __enter__(self) -> Self:
    return self

  def __exit__(self, *_) -> None:
    self.close()


# --- video ---


def enlarge(frames: np.ndarray, size: int = 256) -> np.ndarray:
  """uint8[T, H, W, 3] enlarged by a whole factor, without smoothing, to a longer side of about `size` pixels."""
  factor = max(1, round(size / max(frames.shape[1:3])))
  return frames.repeat(factor, axis=1).repeat(factor, axis=2)


def _png(image: np.ndarray) -> bytes:
  from PIL import Image

  out = io.BytesIO()
  Image.fromarray(image).save(out, "PNG", optimize=True)
  return out.getvalue()


def write_video(
  path: PathLike, frames: np.ndarray, *, fps: float = 10.0, size: int = 256, crf: int = 26
) -> pathlib.Path:
  """uint8[T, H, W, 3] as an H.264 yuv420p mp4 that every browser plays.

  Small frames are enlarged (`enlarge`), so that what the policy saw stays visible as it saw it.
  crf: quality, from 0 (lossless) to 51.
  """
  import imageio_ffmpeg

  frames = np.asarray(frames)
  if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) == 0:
    raise ValueError(
      f"write_video: frames are {frames.dtype}{list(frames.shape)}, expected uint8[T, H, W, 3] with T >= 1"
    )
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  frames = enlarge(frames, size)
  odd_h, odd_w = frames.shape[1] % 2, frames.shape[2] % 2  # yuv420p needs even sides
  if odd_h or odd_w:
    frames = np.pad(frames, ((0, 0), (0, odd_h), (0, odd_w), (0, 0)), mode="edge")
  temporary = path.with_name(f".{path.stem}.{os.getpid()}.mp4")  # the suffix tells ffmpeg the container
  # Its own way of keeping Ctrl-C from ffmpeg forks, which can hang beside JAX's threads. A blocked signal is inherited;
  # SIGTERM and SIGHUP reach it too where they are sent to all processes of a job.
  os.environ["IMAGEIO_FFMPEG_NO_PREVENT_SIGINT"] = "1"
  writer = imageio_ffmpeg.write_frames(
    str(temporary), (frames.shape[2], frames.shape[1]), fps=fps, codec="libx264", pix_fmt_out="yuv420p",
    quality=None, macro_block_size=1, ffmpeg_log_level="error",
    output_params=["-crf", str(crf), "-preset", "medium", "-movflags", "+faststart", "-threads", "1"],
  )
  blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
  try:
    writer.send(None)  # starts it
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
  try:
    for frame in frames:
      writer.send(np.ascontiguousarray(frame))
    writer.close()
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)
  return path


def clear_samples(workdir: PathLike, label: str) -> None:
  """Remove the samples of an evaluation that is made again: there may be fewer of them this time."""
  for path in (pathlib.Path(workdir) / "videos").glob(f"{label}_*"):
    if path.suffix in (".mp4", ".json") and path.stem[len(label) + 1 :].isdigit():
      path.unlink()


def write_sample(
  workdir: PathLike,
  *,
  label: str,
  index: int,
  frames: np.ndarray,
  fps: float,
  task: str,
  seed: int,
  success: bool,
  stages: Sequence[str],
  stage_id: np.ndarray,
  completed_at: np.ndarray,
  potential: np.ndarray,
  instruction: str = "",
) -> pathlib.Path:
  """videos/<label>_<index>.mp4 and .json: a sample episode and its stages, for the report's timelines.

  frames uint8[T, H, W, 3] and stage_id int[T] are per step; potential float[T+1] is per state; completed_at
  int[K] is the state at which each stage ended, -1 if it never did.
  """
  steps = len(frames)
  if len(stage_id) != steps or len(potential) != steps + 1 or len(completed_at) != len(stages):
    raise ValueError(
      f"sample {label}_{index}: {steps} frames, {len(stage_id)} stage ids, {len(potential)} potentials, "
      f"{len(completed_at)} completion times, {len(stages)} stages; expected T, T, T + 1, K, K"
    )
  base = pathlib.Path(workdir) / "videos" / f"{label}_{index}"
  path = write_video(base.with_suffix(".mp4"), frames, fps=fps)
  write_json(base.with_suffix(".json"), {
    "task": task, "instruction": instruction, "seed": int(seed), "label": label, "success": bool(success),
    "fps": float(fps), "stages": list(stages), "stage_id": np.asarray(stage_id, int),
    "completed_at": np.asarray(completed_at, int), "potential": np.round(np.asarray(potential, float), 4),
    "poster": base64.b64encode(_png(enlarge(np.asarray(frames)[:1])[0])).decode(),
  })
  return path


# --- the page ---


def build_report(
  workdir: PathLike, *, path: PathLike | None = None, max_bytes: int | None = None
) -> pathlib.Path:
  """Write workdir/report.html (or `path`) from whatever the run folder holds by now; returns its path.

  max_bytes: leave out sample videos, the longest files first within each evaluation, until the page fits.
  """
  from stare_jax import report_html

  page = report_html.render(workdir, max_bytes=max_bytes)
  target = pathlib.Path(workdir) / "report.html" if path is None else pathlib.Path(path)
  return write_atomically(target, page.encode())
