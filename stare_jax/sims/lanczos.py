"""Frames resized to what a policy sees: Lanczos over three lobes with antialiasing, ignoring the aspect ratio."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

Part = tuple[slice, slice]  # rows and columns of a frame
EVERYWHERE: Part = (slice(None), slice(None))
_LOBES = 3  # of the filter, to either side


def resized(frame: np.ndarray, size: int) -> np.ndarray:
  """uint8[size, size, 3] of uint8[H, W, 3].

  Every row by itself first, then every column: Pillow 13 chooses by the shape, and a part has another than the whole.
  """
  return Background(frame, size).whole


class Background:
  """A frame that stays, resized, and what of it has to be resized again where others differ from it."""

  def __init__(self, frame: np.ndarray, size: int):
    """Of uint8[H, W, 3]; `whole` is uint8[size, size, 3], all of it resized."""
    self.frame, self._size = frame, size
    self._narrow = _lanczos(frame, (size, len(frame)), (0, 0, frame.shape[1], len(frame)))
    self.whole = _lanczos(self._narrow, (size, size), (0, 0, size, len(frame)))

  def resized(self, cut: Callable[[Part], np.ndarray], parts: Sequence[Part]) -> np.ndarray:
    """As `resized` makes it of a frame that differs from the background in no other than these parts, to the byte.

    Args:
      cut: a part of that frame, uint8[h, w, 3].
      parts: none of them empty; they may touch or overlap. The smaller they are together, the less there is to do.
    """
    size, (height, width) = self._size, self.frame.shape[:2]
    narrow, whole = self._narrow.copy(), self.whole.copy()
    columns = [seen_from(part[1].start, part[1].stop, width, size) for part in parts]
    for (rows, _), across in zip(parts, columns, strict=True):
      read, (left, right) = _read(across, width, size)
      box = (left, 0, right, rows.stop - rows.start)
      narrow[rows, across] = _lanczos(cut((rows, read)), (across.stop - across.start, box[3]), box)
    for (rows, _), across in zip(parts, columns, strict=True):
      down = seen_from(rows.start, rows.stop, height, size)
      read, (top, bottom) = _read(down, height, size)
      box = (0, top, across.stop - across.start, bottom)
      whole[down, across] = _lanczos(narrow[read, across], (box[2], down.stop - down.start), box)
    return whole


def seen_from(first: int, last: int, length: int, size: int) -> slice:
  """Where pixels `first` to `last` of `length` are seen when these are resized to `size`.

  It begins and ends between two pixels of both: a part is then the same sum of the same pixels as in the whole.
  """
  common = math.gcd(length, size)
  whole, ratio = size // common, length // common  # so many pixels of the result are so many of the frame
  reach = -(-_LOBES * max(whole, ratio) // ratio) + 1
  start = (first * whole - reach * ratio) // (ratio * whole)
  stop = -((-last * whole - reach * ratio) // (ratio * whole))
  return slice(max(start * whole, 0), min(stop * whole, size))


def _read(seen: slice, length: int, size: int) -> tuple[slice, tuple[int, int]]:
  """The pixels of which those in `seen` (see `seen_from`) are sums, and where among them `seen` begins and ends."""
  reach = -(-_LOBES * max(length, size) // size) + 1
  start, stop = seen.start * length // size, seen.stop * length // size
  first = max(start - reach, 0)
  return slice(first, min(stop + reach, length)), (start - first, stop - first)


def _lanczos(frame: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
  from PIL import Image

  return np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS, box))
