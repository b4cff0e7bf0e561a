"""OpenVLA in PyTorch, written for comparison: transformers' Llama, plain vision transformers, the public tensor names.

`OpenVLA(config).public_state()` is a public checkpoint, dead tensors included. `wrong` breaks one rule of the
architecture at a time, so that a test can show it would notice (no tests here).

Axes: B rows, S tokens of text, P patches, A action tokens, V action bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
DINO = ((0.484375, 0.455078125, 0.40625), (0.228515625, 0.2236328125, 0.224609375))  # ImageNet's in bfloat16
SIGLIP = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# What a port gets wrong without noticing.
WRONG = {
  "gelu": "the tanh approximation everywhere",
  "gelu_siglip": "the tanh approximation in the second vision transformer only",
  "gelu_projector": "the tanh approximation in the projector only",
  "layer_norm_eps": "1e-5 in the vision transformers",
  "rms_norm_eps": "1e-5 in the decoder",
  "last_block": "features of the last block, not of the one before",
  "final_norm": "the final norm on the features",
  "prefix": "class and register tokens dropped at the wrong end",
  "concat": "features of the two vision transformers swapped",
  "patch_order": "patches column by column",
  "layer_scale": "LayerScale left out",
  "patches_first": "patches before the begin token",
  "positions": "text positions that do not count the patches",
  "channels": "the two normalised images swapped",
  "constants": "ImageNet's constants unrounded",
}


class Block(nn.Module):
  """Pre-norm block of a vision transformer: timm's parameter names, `scale_factor` for LayerScale."""

  def __init__(self, width: int, heads: int, mlp: int, scaled: bool, eps: float, gelu: str):
    super().__init__()
    self.heads, self.gelu = heads, gelu
    self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
    self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
    self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})
    if scaled:
      self.ls1 = nn.ParameterDict({"scale_factor": nn.Parameter(torch.ones(width))})
      self.ls2 = nn.ParameterDict({"scale_factor": nn.Parameter(torch.ones(width))})
    self.scaled = scaled

  def attention(self, x: torch.Tensor) -> torch.Tensor:
    rows, count, width = x.shape
    qkv = self.attn["qkv"](x).view(rows, count, 3, self.heads, width // self.heads)
    out = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    return self.attn["proj"](out.transpose(1, 2).reshape(rows, count, width))

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    y = self.attention(self.norm1(x))
    x = x + (y * self.ls1["scale_factor"] if self.scaled else y)
    y = self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)), approximate=self.gelu))
    return x + (y * self.ls2["scale_factor"] if self.scaled else y)


class AttentionPool(nn.Module):
  """SigLIP's pooling head: in the public file, never run."""

  def __init__(self, width: int, mlp: int):
    super().__init__()
    self.latent = nn.Parameter(torch.zeros(1, 1, width))
    self.q, self.kv, self.proj = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(width, width)
    self.norm = nn.LayerNorm(width)
    self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, mlp), "fc2": nn.Linear(mlp, width)})


class VisionTransformer(nn.Module):
  """[B, 3, H, W] -> [B, P, width], of the second-to-last block."""

  def __init__(self, vision, image_size: int, patch: int, wrong: frozenset, pool: bool):
    super().__init__()
    width, self.prefix, self.wrong = vision.width, vision.prefix_tokens, wrong
    tanh = "gelu" in wrong or ("gelu_siglip" in wrong and pool)
    eps = 1e-5 if "layer_norm_eps" in wrong else 1e-6
    scaled = vision.layer_scale is not None
    block = lambda: Block(width, width // vision.head_size, vision.mlp, scaled, eps, "tanh" if tanh else "none")
    self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, stride=patch)})
    self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch) ** 2, width))
    if self.prefix:
      self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
    if self.prefix > 1:
      self.reg_token = nn.Parameter(torch.zeros(1, self.prefix - 1, width))
    self.blocks = nn.ModuleList([block() for _ in range(vision.depth)])
    self.norm = nn.LayerNorm(width, eps=1e-6)
    if pool:
      self.attn_pool = AttentionPool(width, vision.mlp)
    if "layer_scale" in wrong:
      for each in self.blocks:
        each.scaled = False

  def forward(self, image: torch.Tensor) -> torch.Tensor:
    x = self.patch_embed["proj"](image)
    x = x.transpose(2, 3) if "patch_order" in self.wrong else x
    x = x.flatten(2).transpose(1, 2) + self.pos_embed
    tokens = [self.cls_token] if self.prefix else []
    tokens += [self.reg_token] if self.prefix > 1 else []
    x = torch.cat([*(token.expand(len(x), -1, -1) for token in tokens), x], dim=1)
    for block in self.blocks if "last_block" in self.wrong else self.blocks[:-1]:
      x = block(x)
    x = self.norm(x) if "final_norm" in self.wrong else x
    return x[:, : -self.prefix] if "prefix" in self.wrong and self.prefix else x[:, self.prefix :]


class Projector(nn.Module):
  def __init__(self, features: int, hidden: int, width: int, gelu: str):
    super().__init__()
    self.fc1, self.fc2, self.fc3 = nn.Linear(features, hidden), nn.Linear(hidden, width), nn.Linear(width, width)
    self.gelu = gelu

  def forward(self, x: torch.Tensor) -> torch.Tensor:
    x = F.gelu(self.fc1(x), approximate=self.gelu)
    return self.fc3(F.gelu(self.fc2(x), approximate=self.gelu))


class Output(NamedTuple):
  """hidden [B, 1 + P + S - 1, W] after the final norm; logits float32 of its last `keep` positions, all of lm_head."""

  hidden: torch.Tensor
  logits: torch.Tensor


class OpenVLA(nn.Module):
  """The whole network, of any `Config`'s sizes, with a value head beside the public parameters."""

  def __init__(self, config, *, wrong: str = "", attention: str = "sdpa"):
    super().__init__()
    self.config, self.wrong = config, frozenset({wrong} - {""})
    if unknown := self.wrong - set(WRONG):
      raise ValueError(f"unknown rule {unknown}; known: {', '.join(WRONG)}")
    vit = lambda vision, pool: VisionTransformer(vision, config.image_size, config.patch_size, self.wrong, pool)
    views = {"featurizer": vit(config.dino, False), "fused_featurizer": vit(config.siglip, True)}
    self.vision_backbone = nn.ModuleDict(views)
    tanh = "tanh" if self.wrong & {"gelu", "gelu_projector"} else "none"
    self.projector = Projector(config.dino.width + config.siglip.width, config.projector, config.llm_width, tanh)
    llama = LlamaConfig(
      vocab_size=config.vocabulary,
      hidden_size=config.llm_width,
      intermediate_size=config.llm_mlp,
      num_hidden_layers=config.llm_depth,
      num_attention_heads=config.llm_width // config.llm_head_size,
      rms_norm_eps=1e-5 if "rms_norm_eps" in self.wrong else 1e-6,
      max_position_embeddings=2048,
      pad_token_id=config.pad,
      bos_token_id=config.bos,
      eos_token_id=config.eos,
      tie_word_embeddings=False,
      attn_implementation=attention,
    )
    self.language_model = LlamaForCausalLM(llama)
    sizes = (config.llm_width, *config.value_hidden, 1)
    heads = {f"fc{i}": nn.Linear(a, b, bias=b > 1) for i, (a, b) in enumerate(zip(sizes, sizes[1:]), 1)}
    self.value_head = nn.ModuleDict(heads)

  # As public models have them, so that peft knows what is a table of words.
  def get_input_embeddings(self) -> nn.Module:
    return self.language_model.get_input_embeddings()

  def get_output_embeddings(self) -> nn.Module:
    return self.language_model.get_output_embeddings()

  def public_state(self) -> dict[str, np.ndarray]:
    """The public checkpoint's tensors, and beside them "value_head.*"."""
    return {name: x.detach().float().cpu().numpy() for name, x in self.state_dict().items()}

  def pixels(self, images: np.ndarray) -> torch.Tensor:
    """uint8[B, H, W, 3] -> float32[B, 6, H, W], normalised for the first and for the second vision transformer."""
    x = torch.from_numpy(np.asarray(images)).permute(0, 3, 1, 2).float() / 255
    pair = [IMAGENET if "constants" in self.wrong else DINO, SIGLIP]
    pair = pair[::-1] if "channels" in self.wrong else pair
    normalised = [(x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None] for mean, std in pair]
    return torch.cat(normalised, dim=1)

  def features(self, pixels: torch.Tensor) -> torch.Tensor:
    views = [self.vision_backbone["featurizer"](pixels[:, :3]), self.vision_backbone["fused_featurizer"](pixels[:, 3:])]
    return torch.cat(views[::-1] if "concat" in self.wrong else views, dim=-1)

  def prefix(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None):
    """Embeddings, mask and positions of [BOS, patches, the rest of ids], as arguments of the decoder."""
    mask = torch.ones_like(ids) if mask is None else mask.long()
    patches = self.projector(self.features(pixels))
    text = self.language_model.get_input_embeddings()(ids).to(patches.dtype)
    seen = mask.new_ones(patches.shape[:2])
    if "patches_first" in self.wrong:
      x, mask = torch.cat([patches, text], dim=1), torch.cat([seen, mask], dim=1)
    else:
      x = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
      mask = torch.cat([mask[:, :1], seen, mask[:, 1:]], dim=1)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    if "positions" in self.wrong:
      positions[:, 1 + seen.shape[1] :] -= seen.shape[1]
    return dict(inputs_embeds=x, attention_mask=mask, position_ids=positions)

  def forward(self, pixels: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None = None, keep: int = 0) -> Output:
    """ids int64[B, S] with BOS first; mask bool[B, S], False in padding; keep: 0 for the logits of every position."""
    hidden = self.language_model.model(**self.prefix(pixels, ids, mask), use_cache=False).last_hidden_state
    return Output(hidden, self.language_model.lm_head(hidden[:, -keep:]).float())

  def teacher_forced(self, pixels, ids: torch.Tensor, bins: torch.Tensor, mask: torch.Tensor | None = None):
    """(logits [B, A, vocabulary], value [B]) of the action tokens behind the prompt ids, which ends in START."""
    count = bins.shape[1]
    both = torch.cat([ids, bins[:, :-1] + self.config.first_action], dim=1)
    mask = None if mask is None else torch.cat([mask, torch.ones_like(bins[:, :-1], dtype=mask.dtype)], dim=1)
    out = self(pixels, both, mask, keep=count)
    return out.logits, self.value(out.hidden[:, -count])

  def value(self, hidden: torch.Tensor) -> torch.Tensor:
    """[B, W] of the position that predicts the first action token -> float32[B]."""
    *inner, last = self.value_head.values()
    x = hidden.to(last.weight.dtype)
    for layer in inner:
      x = F.gelu(layer(x))
    return last(x)[:, 0].float()

  @torch.no_grad()
  def sample(self, pixels: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor | None, temperature: float):
    """(bins, log-probs) [B, A] of the action ids alone, the whole sequence again for each token.

    noise: standard Gumbel [B, A, V], or None for the likeliest.
    """
    config, bins, scores = self.config, [], []
    for dim in range(config.action_size):
      logits = self(pixels, ids, keep=1).logits[:, -1, config.first_action : config.action_end]
      token = logits.argmax(-1) if noise is None else (logits / temperature + noise[:, dim]).argmax(-1)
      score = F.log_softmax(logits / (temperature or 1.0), dim=-1).gather(1, token[:, None])[:, 0]
      ids = torch.cat([ids, token[:, None] + config.first_action], dim=1)
      bins.append(token)
      scores.append(score)
    return torch.stack(bins, dim=1), torch.stack(scores, dim=1)


def randomise(model: nn.Module, seed: int, *, scale: float = 1.0) -> None:
  """Every parameter drawn anew, none left at a neutral 0 or 1; vision and embeddings small, so that an eps shows."""
  generator = torch.Generator().manual_seed(seed)
  for name, p in model.named_parameters():
    draw = torch.randn(p.shape, generator=generator)
    if "norm" in name and name.endswith("weight") or "scale_factor" in name:
      new = 1 + 0.2 * draw
    elif p.ndim > 1 and not name.endswith(("pos_embed", "token", "latent", "embed_tokens.weight")):
      new = scale * draw * p[0].numel() ** -0.5
    else:
      new = 0.05 * draw
    with torch.no_grad():
      p.copy_(new)
