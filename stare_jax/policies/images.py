"""Frames to the size of the network, as public checkpoints saw theirs. Host side: numpy, and PIL where it defined them.

  bicubic      the public processor ("resize-naive"): PIL bicubic to exactly the size, whatever the aspect
  lanczos3     the evaluation wrappers and the training data: TensorFlow's antialiased lanczos3, computed in float32
  letterbox    v0.1 checkpoints: padded to a square with the mean's grey, then as resize-crop
  resize-crop  PIL bicubic of the shorter side, and the square in the middle

`center_crop` is what checkpoints trained with image augmentation expect. The wrappers' JPEG round trip is not repeated
here. Normalisation is the device's (`openvla.encode_vision`).

Axes: N frames, H, W pixels, S pixels of the network's side.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

CROP_SIDE = float(np.sqrt(0.9))  # of the side; nine tenths of the area


def prepare(
  frames: np.ndarray,
  size: int,
  *,
  resize: str = "bicubic",
  center_crop: bool = False,
  mean: Sequence[float] = (0.5, 0.5, 0.5),
) -> np.ndarray:
  """uint8[N, H, W, 3] -> uint8[N, S, S, 3].

    resize: a key of `STRATEGIES`; nothing is resampled where the frames have the size already.
    mean: RGB in [0, 1], the letterbox's grey.
  """
  if frames.shape[1:3] != (size, size):
    fill = tuple(int(255 * x) for x in mean)
    frames = np.stack([STRATEGIES[resize](frame, size, fill) for frame in frames])
  return np.stack([crop_centre(frame) for frame in frames]) if center_crop else frames


def bicubic(frame: np.ndarray, height: int, width: int) -> np.ndarray:
  """PIL's bicubic: a = -1/2, antialiased, each of the two passes rounded to uint8."""
  from PIL import Image  # only where frames have another size

  return np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))


def resize_crop(frame: np.ndarray, size: int) -> np.ndarray:
  """The shorter side to `size` pixels, then the square in the middle (torchvision's roundings)."""
  height, width = frame.shape[:2]
  longer = int(size * max(height, width) / min(height, width))
  frame = bicubic(frame, *((longer, size) if height > width else (size, longer)))
  top, left = (round((side - size) / 2) for side in frame.shape[:2])
  return frame[top : top + size, left : left + size]


def letterbox(frame: np.ndarray, size: int, fill: tuple[int, ...]) -> np.ndarray:
  """Padded by the same number of pixels on both sides, so that an odd difference leaves one pixel to the crop."""
  height, width = frame.shape[:2]
  down, across = ((max(height, width) - side) // 2 for side in (height, width))
  square = np.empty((height + 2 * down, width + 2 * across, 3), np.uint8)
  square[:] = fill
  square[down : down + height, across : across + width] = frame
  return resize_crop(square, size)


@functools.cache
def lanczos_weights(source: int, target: int, radius: float = 3.0) -> np.ndarray:
  """float32[target, source], the rows of an antialiased lanczos resampling; each sums to 1.

      w[i, j] = L((j + 1/2 - c_i) / s),  c_i = (i + 1/2) source / target,  s = max(source / target, 1)
      L(x)    = sinc(x) sinc(x / radius) for |x| < radius, else 0
  """
  ratio = source / target
  center = (np.arange(target) + 0.5) * ratio
  x = (np.arange(source) + 0.5 - center[:, None]) / max(ratio, 1.0)
  weights = np.where(np.abs(x) < radius, np.sinc(x) * np.sinc(x / radius), 0.0)
  weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
  weights.flags.writeable = False  # shared by the cache
  return weights


def lanczos3(frame: np.ndarray, size: int) -> np.ndarray:
  """To exactly the size in float32, rounded once (PIL's LANCZOS rounds twice and differs by up to one level)."""
  rows, columns = (lanczos_weights(side, size) for side in frame.shape[:2])
  out = np.einsum("ih,hwc->iwc", rows, frame.astype(np.float32), optimize=True)
  out = np.einsum("jw,iwc->ijc", columns, out, optimize=True)
  return np.clip(np.rint(out), 0, 255).astype(np.uint8)


def crop_centre(frame: np.ndarray, side: float = CROP_SIDE) -> np.ndarray:
  """The middle of a frame at its own size: bilinear, corner-aligned, not antialiased (TensorFlow's crop_and_resize).

      source_i = (1 - side) / 2 * (S - 1) + i * side,   i = 0 .. S - 1

  Back to uint8 as TensorFlow's convert_image_dtype does: floor(255.5 x) of x in [0, 1], which is not rounding.
  """
  x = frame.astype(np.float32) / 255
  for axis in (0, 1):
    last = x.shape[axis] - 1
    source = (0.5 * (1 - side) * last + np.arange(last + 1) * side).astype(np.float32)
    low = np.floor(source).astype(int)
    shape = [-1 if i == axis else 1 for i in range(3)]
    weight = (source - low).astype(np.float32).reshape(shape)
    x = x.take(low, axis) * (1 - weight) + x.take(np.minimum(low + 1, last), axis) * weight
  return np.floor(255.5 * np.clip(x, 0, 1)).clip(0, 255).astype(np.uint8)


STRATEGIES = {
  "bicubic": lambda frame, size, fill: bicubic(frame, size, size),
  "lanczos3": lambda frame, size, fill: lanczos3(frame, size),
  "letterbox": letterbox,
  "resize-crop": lambda frame, size, fill: resize_crop(frame, size),
}
