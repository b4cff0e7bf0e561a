"""The sizes of the OpenVLA architecture: every width, resolution and vocabulary, from `tiny` to `7b`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from stare_jax.policies import images
from stare_jax.policies import tokenizer as tok
from stare_jax.policies.layers import REMAT


@dataclasses.dataclass(frozen=True)
class Vision:
  """A vision transformer.

  Attributes:
    width, head_size, mlp: sizes. Heads = width / head_size.
    depth: blocks in the public model. The features are those of the second-to-last block, so depth - 1 exist here.
    prefix_tokens: class and register tokens, without positions, dropped at the end.
    layer_scale: initial LayerScale, None for a transformer without.
    mean, std: pixel normalisation on [0, 1], RGB.
  """

  width: int
  depth: int
  head_size: int
  mlp: int
  prefix_tokens: int
  layer_scale: float | None
  mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
  std: tuple[float, float, float] = (0.5, 0.5, 0.5)


DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Config:
  """Every size of the network, its vocabulary and its prompt.

  Attributes:
    image_size, patch_size: pixels; square images.
    dino, siglip: the two vision transformers, features concatenated in this order; one of them may be None.
    projector: width of the first of the projector's two hidden layers; 0 for one hidden layer, of llm_width.
    llm_width, llm_depth, llm_head_size, llm_mlp: the decoder's.
    vocabulary: rows of the embedding table and of lm_head.
    action_end: action ids are [action_end - bins, action_end).
    bins, action_size: V and A.
    bos, eos, start, pad: token ids; `start` precedes the first action token (29871 in Llama).
    template: the prompt around "{instruction}"; the instruction is lowered.
    prompt_length: L with bos and start; shorter prompts are padded, longer ones refused.
    word_tokenizer: use the built-in tokenizer; otherwise `make` needs one.
    value_hidden: hidden widths of the value head.
    embedding_std, position_std: initial scales.
    compute_dtype, param_dtype: of matrix products and of parameters.
    remat: what a block keeps for its backward pass, the rest being computed again: "none" keeps everything, "block" its
      input alone; "attention" and "products" lie between (`layers.REMAT`).
    attention: "auto" runs it in cuDNN's fused kernel where that exists (bfloat16 on one NVIDIA GPU), "plain" never.
    unroll: layers of `apply` as copies instead of a scan: a faster gradient on CPU, slower to compile. On one NVIDIA
      GPU they always are.
    resize, center_crop: how frames get to image_size, see `images`; bicubic is what the public processor does.
    faithful: decode as the public codes do, early ends and all; see `openvla_faithful`.
  """

  image_size: int
  patch_size: int
  dino: Vision | None
  siglip: Vision | None
  projector: int
  llm_width: int
  llm_depth: int
  llm_head_size: int
  llm_mlp: int
  vocabulary: int
  action_end: int
  bos: int
  start: int
  pad: int
  template: str
  prompt_length: int
  word_tokenizer: bool
  value_hidden: tuple[int, ...]
  bins: int = 256
  action_size: int = 7
  eos: int = 2
  rope_theta: float = 1e4
  rms_eps: float = 1e-6
  embedding_std: float = 0.02
  position_std: float = 0.02
  compute_dtype: str = "float32"
  param_dtype: str = "float32"
  remat: str = "none"
  attention: str = "auto"
  unroll: bool = False
  resize: str = "bicubic"
  center_crop: bool = False
  faithful: bool = False

  def __post_init__(self):
    if self.image_size % self.patch_size:
      raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
    if self.remat not in REMAT:
      raise ValueError(f"remat is {self.remat!r}: expected one of {', '.join(REMAT)}, see policies/layers.py")
    for name in ("compute_dtype", "param_dtype"):
      if getattr(self, name) not in DTYPES:
        raise ValueError(f"{name} is {getattr(self, name)!r}: expected one of {', '.join(DTYPES)}")
    if self.attention not in ("auto", "plain"):
      raise ValueError(f'attention is "{self.attention}": expected "auto" or "plain"')
    if not self.views:
      raise ValueError("dino and siglip are both None; the policy needs a vision transformer")
    widths = {name: (v.width, v.head_size) for name, v in self.views.items()}
    for name, (width, head) in {**widths, "llm": (self.llm_width, self.llm_head_size)}.items():
      if width % head:
        raise ValueError(f"{name}: width {width} is not a multiple of its head size {head}; change one of them")
    if min(v.depth for v in self.views.values()) < 2:
      raise ValueError("a vision transformer needs depth >= 2: the features are those of the second-to-last block")
    if self.resize not in images.STRATEGIES:
      raise ValueError(f"resize is {self.resize!r}; expected one of {', '.join(images.STRATEGIES)}")
    if self.bins < 2 or not self.bins <= self.action_end <= self.vocabulary:
      raise ValueError(f"{self.bins} bins whose action ids end at {self.action_end}, in a vocabulary of "
                       f"{self.vocabulary}: expected at least 2, and all of their ids in it")
    for name in ("bos", "eos", "pad"):
      if not isinstance(token := getattr(self, name), int) or not 0 <= token < self.vocabulary:
        raise ValueError(f"{name} is {token!r}, expected a token id below {self.vocabulary}")

  @property
  def views(self) -> dict[str, Vision]:
    """The vision transformers that there are, in the order of their features."""
    return {name: v for name, v in (("dino", self.dino), ("siglip", self.siglip)) if v is not None}

  @property
  def patches(self) -> int:
    return (self.image_size // self.patch_size) ** 2

  @property
  def first_action(self) -> int:
    """The token id of bin 0."""
    return self.action_end - self.bins


SEVEN_B = Config(
  image_size=224,
  patch_size=14,
  dino=Vision(
    width=1024,
    depth=24,
    head_size=64,
    mlp=4096,
    prefix_tokens=5,
    layer_scale=1e-5,
    mean=(0.484375, 0.455078125, 0.40625),  # ImageNet's, as rounded to bfloat16 by the public processor
    std=(0.228515625, 0.2236328125, 0.224609375),
  ),
  siglip=Vision(width=1152, depth=27, head_size=72, mlp=4304, prefix_tokens=0, layer_scale=None),
  projector=4 * (1024 + 1152),
  llm_width=4096,
  llm_depth=32,
  llm_head_size=128,
  llm_mlp=11008,
  vocabulary=32064,
  action_end=32000,
  bos=1,
  start=29871,
  pad=32000,
  template="In: What action should the robot take to {instruction}?\nOut:",
  prompt_length=48,
  word_tokenizer=False,
  value_hidden=(512, 128),
  compute_dtype="bfloat16",
  param_dtype="bfloat16",
  remat="block",
)

_WORDS = tok.WordTokenizer().size
TINY = Config(
  image_size=64,
  patch_size=16,
  dino=dataclasses.replace(
    SEVEN_B.dino, width=64, depth=3, head_size=32, mlp=256, prefix_tokens=1, layer_scale=1.0
  ),
  siglip=Vision(width=64, depth=3, head_size=32, mlp=256, prefix_tokens=0, layer_scale=None),
  projector=256,
  llm_width=128,
  llm_depth=3,
  llm_head_size=32,
  llm_mlp=344,
  vocabulary=_WORDS + 256,
  action_end=_WORDS + 256,
  bos=tok.BOS,
  start=tok.START,
  pad=tok.PAD,
  template="{instruction}",
  prompt_length=12,
  word_tokenizer=True,
  value_hidden=(128, 64),
  # Learnt from scratch in a thousand updates: where a patch lies must be heard from the first one on.
  embedding_std=0.5,
  position_std=0.5,
  unroll=True,
)
SIZES = {"tiny": TINY, "7b": SEVEN_B}


def override(config: Any, options: Mapping[str, Any], where: str = "") -> Any:
  """`dataclasses.replace` that takes nested mappings (dino={"width": 64}) and names the nearest key at a typo."""
  known = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
  changes = {}
  for key, new in options.items():
    if key not in known:
      near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
      raise ValueError(f"policy option {where + key!r} is unknown; did you mean {where + near!r}? {', '.join(known)}")
    if isinstance(new, Mapping):
      new = override(known[key], new, f"{where}{key}.")
    changes[key] = tuple(new) if isinstance(new, list) else new
  return dataclasses.replace(config, **changes)


def configure(size: str | Config, options: Mapping[str, Any]) -> Config:
  """A configuration (by its name in `SIZES`) with some fields changed, nested ones as mappings: dino={"width": 64}."""
  if isinstance(size, Config):
    return override(size, options)
  if size not in SIZES:
    near = difflib.get_close_matches(size, SIZES, n=1, cutoff=0.0)
    raise ValueError(f"unknown policy size {size!r}; did you mean {near[0]!r}? known: {', '.join(SIZES)}")
  return override(SIZES[size], options)
