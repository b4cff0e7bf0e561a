"""Tokens on the host: instructions to ids, and actions to bins. numpy only.

`WordTokenizer` is the small vocabulary of the `tiny` policy: whole words for what the tasks say, single characters for
everything else, so that any ASCII instruction has its own ids. `ActionCodec` is OpenVLA's: 256 edges over [-1, 1],
255 centres.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

PAD, BOS, EOS, START = 0, 1, 2, 3  # of the word tokenizer; START is what 29871 is to Llama, see `openvla.Config`

CHARACTERS = tuple(chr(c) for c in range(32, 127) if not chr(c).isupper())
WORDS = tuple(
  "a above against ahead and at away ball banana basket beside big block blue bottle bowl box brown button by can "
  "carrot charger close cloth cube cup cylinder door down drawer edge eggplant forward from goal grasp green grey "
  "gripper handle hold hole hook in insert into it left lift lower move mug near next object of off on onto open "
  "orange out over peg pick place plate plug point poke pour press pull purple push put red region release reach "
  "right ring robot roll rotate round side slide small sphere spoon stack stand stick tall target tee the then to "
  "top tower toward towards towel turn under until up upright upward white with yellow".split()
)


class WordTokenizer:
  """Lower-case words; a word outside `WORDS` is a blank followed by its characters. Deterministic, without files.

  Ids: 0 pad, 1 begin, 2 end, 3 start of the action, then the characters, then the words.
  """

  def __init__(self):
    self._character = {c: i + START + 1 for i, c in enumerate(CHARACTERS)}
    self._word = {word: i + START + 1 + len(CHARACTERS) for i, word in enumerate(WORDS)}
    self.size = START + 1 + len(CHARACTERS) + len(WORDS)

  def __call__(self, text: str) -> list[int]:
    """Ids of `text`, without begin and start tokens; letters are lowered and whitespace is collapsed."""
    ids: list[int] = []
    for word in re.findall(r"[a-z0-9]+|[^a-z0-9\s]", text.lower()):
      if word in self._word:
        ids.append(self._word[word])
        continue
      if bad := [c for c in word if c not in self._character]:
        raise ValueError(f"instruction {text!r}: no token for {bad[0]!r}; write it in ASCII")
      ids.extend(self._character[c] for c in " " + word)
    return ids


@dataclasses.dataclass(frozen=True)
class ActionCodec:
  """Actions float32[..., D] <-> bins int32[..., D] (reference: OpenVLA's ActionTokenizer with BOUNDS_Q99 statistics).

  A bin is its token id minus the first action id: bin 255 is action -1, bin 0 is +1 (higher id = more negative).
  There are 256 edges and so 255 centres; the two uppermost bins, 0 and 1, share the centre +0.996.

  Attributes:
    q01, q99: float32[D], the range that maps to [-1, 1].
    mask: bool[D], False where actions are kept as they are.
    bins: number of bins, V.
  """

  q01: np.ndarray
  q99: np.ndarray
  mask: np.ndarray
  bins: int = 256

  def __post_init__(self):
    q01, q99 = np.asarray(self.q01, np.float32), np.asarray(self.q99, np.float32)
    mask = np.asarray(self.mask, bool)
    if not (q01.ndim == 1 and q01.shape == q99.shape == mask.shape):
      raise ValueError(f"action statistics: q01 {q01.shape}, q99 {q99.shape}, mask {mask.shape}; expected [D] each")
    if not (np.isfinite(q01).all() and np.isfinite(q99).all() and (q99 >= q01).all()):
      raise ValueError(f"action statistics: expected finite q01 <= q99, got q01={q01.tolist()}, q99={q99.tolist()}")
    for name, array in (("q01", q01), ("q99", q99), ("mask", mask)):
      object.__setattr__(self, name, array)

  @property
  def free(self) -> np.ndarray:
    """bool[D], the dimensions that vary."""
    return self.q99 > self.q01

  @property
  def constant_tokens(self) -> np.ndarray:
    """int32[D], the only bin of a dimension that does not vary (meaningless where it does)."""
    return self.tokenize(self.q01)

  def normalise(self, actions: np.ndarray) -> np.ndarray:
    """float32[..., D] to [-1, 1]; masked dimensions that never vary become 0."""
    scaled = np.clip(2 * (actions - self.q01) / (self.q99 - self.q01 + 1e-8) - 1, -1, 1)
    scaled = np.where(self.free, scaled, 0.0)
    return np.where(self.mask, scaled, np.clip(actions, -1, 1)).astype(np.float32)

  def tokenize(self, actions: np.ndarray) -> np.ndarray:
    """float32[..., D] actions to int32[..., D] bins in [0, V)."""
    actions = np.asarray(actions, np.float32)
    if actions.shape[-1] != len(self.q01):
      raise ValueError(f"tokenize: the last axis is {actions.shape[-1]}, expected {len(self.q01)} action dimensions")
    if not np.isfinite(actions).all():
      raise ValueError("tokenize: the actions contain NaN or infinity")
    # The range is put back where an action of a constant dimension strays: it has one bin.
    actions = np.where(self.free, actions, self.q01)
    digit = np.digitize(self.normalise(actions), np.linspace(-1.0, 1.0, self.bins))
    return (self.bins - digit).astype(np.int32)

  def decode(self, tokens: np.ndarray) -> np.ndarray:
    """int32[..., D] bins to float32[..., D] actions; a dimension that never varies keeps its exact constant."""
    tokens = np.asarray(tokens)
    edges = np.linspace(-1.0, 1.0, self.bins)
    centers = (edges[:-1] + edges[1:]) / 2
    action = centers[np.clip(self.bins - tokens - 1, 0, self.bins - 2)]
    action = np.where(self.mask, 0.5 * (action + 1) * (self.q99 - self.q01) + self.q01, action)
    return np.where(self.free, action, self.q01).astype(np.float32)
