"""Frames to the size of the network: against PIL, scipy and jax.image where those define the same, and by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import ndimage

from stare_jax import policies
from stare_jax.policies import images


def frame(height: int, width: int, seed: int = 0) -> np.ndarray:
  """Smooth shapes, an edge, and noise; uint8[H, W, 3], away from 0 and 255, where PIL also clips between its passes."""
  rng = np.random.default_rng(seed)
  y, x = np.mgrid[0:height, 0:width]
  color = np.array([7.0, 11.0, 5.0])
  smooth = 127 + 50 * np.sin(x / 9)[..., None] * np.cos(y[..., None] / color) + 20 * (x > width // 3)[..., None]
  return np.clip(smooth + rng.normal(0, 8, smooth.shape), 30, 225).astype(np.uint8)


def levels(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  assert a.shape == b.shape
  return np.abs(a.astype(int) - b.astype(int))


SHAPES = [(120, 160, 56), (60, 45, 56), (30, 40, 56)]  # smaller, mixed, larger


@pytest.mark.parametrize("height, width, size", SHAPES)
def test_bicubic_is_the_public_processors(height, width, size):
  """PIL to exactly the size; Keys' kernel with a = -1/2, antialiased, as jax computes it in float32."""
  x = frame(height, width)
  out = images.prepare(x[None], size)[0]
  np.testing.assert_array_equal(out, np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.BICUBIC)))
  exact = jax.image.resize(jnp.asarray(x, jnp.float32), (size, size, 3), "cubic", antialias=True)
  assert levels(out, np.clip(np.rint(exact), 0, 255)).max() <= 1


@pytest.mark.parametrize("height, width, size", SHAPES)
def test_lanczos3_is_the_evaluation_wrappers(height, width, size):
  x = frame(height, width)
  out = images.prepare(x[None], size, resize="lanczos3")[0]
  exact = jax.image.resize(jnp.asarray(x, jnp.float32), (size, size, 3), "lanczos3", antialias=True)
  gap = levels(out, np.clip(np.rint(exact), 0, 255))
  assert gap.max() <= 1 and gap.mean() < 1e-3  # a half that rounds the other way
  pil = levels(out, np.asarray(Image.fromarray(x).resize((size, size), Image.Resampling.LANCZOS)))
  assert pil.max() <= 1 < levels(out, images.prepare(x[None], size)[0]).max()  # and bicubic is another thing


def test_lanczos3_by_its_definition():
  """One output pixel, summed by hand."""
  x, size = frame(31, 47), 12
  out = images.lanczos3(x, size)
  sinc = lambda t: 1.0 if t == 0 else np.sin(np.pi * t) / (np.pi * t)

  def taps(i, source):
    scale = source / size
    at = [(j + 0.5 - (i + 0.5) * scale) / scale for j in range(source)]
    weights = np.array([sinc(t) * sinc(t / 3) if abs(t) < 3 else 0.0 for t in at])
    return weights / weights.sum()

  for row, column in ((0, 0), (5, 7), (11, 11)):
    value = np.einsum("h,w,hwc->c", taps(row, 31), taps(column, 47), x)
    assert np.abs(out[row, column] - np.clip(value, 0, 255)).max() <= 0.5 + 1e-3


def test_frames_of_the_right_size_are_left_alone():
  x = np.stack([frame(28, 28, seed) for seed in range(2)])
  for resize in images.STRATEGIES:
    np.testing.assert_array_equal(images.prepare(x, 28, resize=resize), x)


@pytest.mark.parametrize("height, width", [(48, 80), (80, 48), (48, 81), (81, 48)])
def test_resize_crop_keeps_the_aspect_and_the_middle(height, width):
  """The shorter side becomes the size; of the longer one the middle stays (public: torchvision's resize and crop)."""
  x, size = frame(height, width), 24
  out = images.prepare(x[None], size, resize="resize-crop")[0]
  longer = int(size * max(height, width) / min(height, width))
  whole = Image.fromarray(x).resize((longer, size) if width > height else (size, longer), Image.Resampling.BICUBIC)
  start = int(round((longer - size) / 2))
  box = (start, 0, start + size, size) if width > height else (0, start, size, start + size)
  np.testing.assert_array_equal(out, np.asarray(whole.crop(box)))


@pytest.mark.parametrize("height, width", [(48, 80), (80, 48), (47, 80), (80, 47)])
def test_letterbox_pads_to_a_square_with_the_means_grey(height, width):
  x, size, mean = frame(height, width), 40, (0.484375, 0.455078125, 0.40625)
  out = images.prepare(x[None], size, resize="letterbox", mean=mean)[0]
  border = (max(0, (height - width) // 2), max(0, (width - height) // 2))
  padded = ImageOps.expand(Image.fromarray(x), border, fill=(123, 116, 103))  # 79 by 80 where the difference is odd
  whole = padded.resize((size, size), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(out, np.asarray(whole))
  edges = out[[0, -1]] if width > height else out[:, [0, -1]].transpose(1, 0, 2)
  np.testing.assert_array_equal(edges, np.broadcast_to([123, 116, 103], (2, size, 3)))


def test_centre_crop_is_bilinear_and_corner_aligned():
  x = frame(56, 56)
  out = images.prepare(x[None], 56, center_crop=True)[0]
  side = np.sqrt(0.9)
  at = (1 - side) / 2 * 55 + np.arange(56) * side
  grid = np.meshgrid(at, at, indexing="ij")
  exact = np.stack([ndimage.map_coordinates(x[..., c] / 255.0, grid, order=1) for c in range(3)], axis=-1)
  gap = levels(out, np.floor(255.5 * exact))
  assert gap.max() <= 1 and gap.mean() < 1e-3
  assert np.abs(at[[0, -1]] - np.array([1.41, 53.59])).max() < 0.01  # the box of nine tenths of the area, in pixels
  np.testing.assert_array_equal(images.crop_centre(x, side=1.0), x)  # every level survives the way through [0, 1]
  ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
  np.testing.assert_array_equal(images.crop_centre(ramp, side=1.0), ramp)


def test_encode_uses_what_the_configuration_says():
  stats = policies.ActionStats(-np.ones(7), np.ones(7), np.arange(7) < 6)
  x = np.stack([frame(48, 80, seed) for seed in range(2)])
  seen = {}
  for options in ({}, *({"resize": name} for name in images.STRATEGIES), {"center_crop": True}):
    policy = policies.make(stats=stats, image_size=32, **options)
    seen[tuple(options.items())] = policy.encode(x, ["push"] * 2).image
    np.testing.assert_array_equal(seen[tuple(options.items())], images.prepare(x, 32, **options))
  np.testing.assert_array_equal(seen[()], seen[("resize", "bicubic"),])
  assert len({image.tobytes() for image in seen.values()}) == 5
  with pytest.raises(ValueError, match="letterbox"):
    policies.make(stats=stats, resize="lanczos")
