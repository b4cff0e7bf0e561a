"""Textures and noise for evaluation suites: patterns made here, so that nothing needs downloading. numpy only.

A texture is one of a few tileable grey patterns between two colours. Patterns are made once per process, an episode's
texture is a look-up in them, and noise is a larger picture of which every step shows another part.
"""

from __future__ import annotations

import functools

import numpy as np

SIZE = 256  # pixels of a pattern
KINDS = ("wood", "marble", "granite", "checks", "stripes", "dots", "weave", "bricks")
_SHIFTS = 32  # places at which a step cuts its noise out, along each axis


def _smooth(rng: np.random.Generator, across: float, along: float) -> np.ndarray:
  """float32[SIZE, SIZE] in [0, 1], tileable: white noise of which only waves longer than `across`, `along` are left."""
  fy, fx = np.fft.fftfreq(SIZE)[:, None], np.fft.fftfreq(SIZE)[None]
  keep = np.exp(-0.5 * ((fy * across) ** 2 + (fx * along) ** 2) * np.pi**2)
  field = np.fft.ifft2(np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * keep).real
  low, high = np.quantile(field, [0.01, 0.99])
  return np.clip((field - low) / (high - low), 0, 1).astype(np.float32)


@functools.cache
def pattern(kind: str) -> np.ndarray:
  """float32[SIZE, SIZE] in [0, 1], tileable."""
  rng = np.random.default_rng(list(kind.encode()))
  y, x = np.mgrid[:SIZE, :SIZE] / SIZE
  wave = lambda phase: 0.5 + 0.5 * np.sin(2 * np.pi * phase)
  if kind == "wood":
    grey = 0.7 * wave(6 * y + 1.5 * _smooth(rng, 40, 160)) + 0.3 * _smooth(rng, 2, 60)
  elif kind == "marble":
    grey = wave(2 * x + 2 * y + 2.5 * _smooth(rng, 30, 30)) ** 2
  elif kind == "granite":
    grey = 0.5 * _smooth(rng, 4, 4) + 0.5 * (_smooth(rng, 10, 10) > 0.55)
  elif kind == "checks":
    grey = ((8 * x).astype(int) + (8 * y).astype(int)) % 2
  elif kind == "stripes":
    grey = (8 * (x + y)).astype(int) % 2
  elif kind == "dots":
    grey = (np.hypot((8 * x) % 1 - 0.5, (8 * y) % 1 - 0.5) < 0.3) * 1.0
  elif kind == "weave":
    grey = np.where((16 * x).astype(int) % 2 == (16 * y).astype(int) % 2, wave(16 * x), wave(16 * y))
  elif kind == "bricks":
    row = (8 * y).astype(int)
    grey = (((8 * y) % 1 > 0.12) & ((4 * x + 0.5 * row) % 1 > 0.06)) * (0.7 + 0.3 * _smooth(rng, 20, 20))
  else:
    raise ValueError(f"unknown pattern {kind!r}: known are {', '.join(KINDS)}")
  return np.ascontiguousarray(grey, np.float32)


def texture(rng: np.random.Generator) -> np.ndarray:
  """uint8[SIZE, SIZE, 3]: a pattern between two colours that can be told apart, shifted."""
  kind = KINDS[rng.integers(len(KINDS))]
  shift = rng.integers(SIZE, size=2)
  dark = rng.uniform(40, 130)
  light = dark + rng.uniform(60, 120)
  first, second = (np.clip(level + rng.uniform(-45, 45, 3), 0, 255) for level in (dark, light))
  levels = np.linspace(first, second, 256).astype(np.uint8)  # [256, 3]
  grey = np.roll(pattern(kind), shift, axis=(0, 1))
  return levels[(grey * 255).astype(np.uint8)]


def noise(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
  """int16[size + margin, size + margin, 3], Gaussian of `sigma` of 255; `cut` takes a step's part of it."""
  side = size + _SHIFTS
  return (sigma * rng.standard_normal((side, side, 3), np.float32)).astype(np.int16)


def cut(field: np.ndarray, size: int, step: int) -> np.ndarray:
  """int16[size, size, 3]: what control step `step` of an episode shows of its noise; another part for 1024 steps."""
  down, right = divmod(step * 389 % _SHIFTS**2, _SHIFTS)  # 389 is prime: neighbouring steps lie far apart
  return field[down : down + size, right : right + size]
