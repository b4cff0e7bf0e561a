"""Small random checkpoints in the public OpenVLA format, written from its description and not from our table of names
(no tests here): config.json, preprocessor_config.json, safetensors by the library, a Llama-like tokenizer.json.
"""

from __future__ import annotations

import json
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers
from safetensors import numpy as library
from tokenizers import decoders, models, normalizers

LLM = dict(width=32, depth=2, heads=2, mlp=48, vocabulary=384, padding=64)
DINO = dict(family="dino", width=16, depth=3, head_size=8, mlp=32, patch_size=4, prefix_tokens=5, layer_scale=1.0)
SIGLIP = dict(family="siglip", width=24, depth=3, head_size=8, mlp=40, patch_size=4, prefix_tokens=0, layer_scale=None)
SIDE = 8
ROUNDED = ([0.484375, 0.455078125, 0.40625], [0.228515625, 0.2236328125, 0.224609375])
BRIDGE = {
  "mask": [True] * 6 + [False],
  "q01": [-0.02872725307941437, -0.04170349963009357, -0.026093858778476715, -0.08092105075716972,
          -0.09288699507713317, -0.20718276381492615, 0.0],
  "q99": [0.028309678435325586, 0.040855254605412394, 0.040161586627364146, 0.08192047759890528,
          0.07792850524187081, 0.20382574498653397, 1.0],
}  # fmt: skip


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
  return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def linear(name: str, out: int, size: int) -> dict[str, tuple[int, ...]]:
  return {f"{name}.weight": (out, size), f"{name}.bias": (out,)}


def tower(name: str, v: dict[str, Any], patches: int) -> dict[str, tuple[int, ...]]:
  w, p = v["width"], v["patch_size"]
  out = {f"{name}.cls_token": (1, 1, w)} if v["prefix_tokens"] else {}
  out |= {f"{name}.reg_token": (1, v["prefix_tokens"] - 1, w)} if v["prefix_tokens"] > 1 else {}
  out |= {f"{name}.pos_embed": (1, patches, w), f"{name}.patch_embed.proj.weight": (w, 3, p, p)}
  out |= {f"{name}.patch_embed.proj.bias": (w,)} | norm(f"{name}.norm", w)
  for i in range(v["depth"]):
    b = f"{name}.blocks.{i}"
    out |= norm(f"{b}.norm1", w) | norm(f"{b}.norm2", w) | linear(f"{b}.attn.qkv", 3 * w, w)
    out |= linear(f"{b}.attn.proj", w, w) | linear(f"{b}.mlp.fc1", v["mlp"], w) | linear(f"{b}.mlp.fc2", w, v["mlp"])
    if v["layer_scale"] is not None:
      out |= {f"{b}.ls1.scale_factor": (w,), f"{b}.ls2.scale_factor": (w,)}
  if v["family"] == "siglip":
    a = f"{name}.attn_pool"
    out |= {f"{a}.latent": (1, 1, w)} | linear(f"{a}.q", w, w) | linear(f"{a}.kv", 2 * w, w) | norm(f"{a}.norm", w)
    out |= linear(f"{a}.proj", w, w) | linear(f"{a}.mlp.fc1", v["mlp"], w) | linear(f"{a}.mlp.fc2", w, v["mlp"])
  return out


def public_shapes(towers: list[dict[str, Any]], side: int = SIDE, llm: dict[str, int] = LLM) -> dict[str, tuple]:
  """{name: shape} of every tensor of a public checkpoint."""
  w, mlp, vocabulary = llm["width"], llm["mlp"], llm["vocabulary"]
  features = sum(v["width"] for v in towers)
  out: dict[str, tuple] = {}
  for name, v in zip(("featurizer", "fused_featurizer"), towers):
    out |= tower(f"vision_backbone.{name}", v, (side // v["patch_size"]) ** 2)
  if len(towers) == 2:
    out |= linear("projector.fc1", 4 * features, features) | linear("projector.fc2", w, 4 * features)
    out |= linear("projector.fc3", w, w)
  else:
    out |= linear("projector.fc1", w, features) | linear("projector.fc2", w, w)
  out |= {f"language_model.{name}": (vocabulary, w) for name in ("model.embed_tokens.weight", "lm_head.weight")}
  for i in range(llm["depth"]):
    b = f"language_model.model.layers.{i}"
    out |= {f"{b}.self_attn.{x}_proj.weight": (w, w) for x in "qkvo"}
    out |= {f"{b}.mlp.gate_proj.weight": (mlp, w), f"{b}.mlp.up_proj.weight": (mlp, w)}
    out |= {f"{b}.mlp.down_proj.weight": (w, mlp), f"{b}.input_layernorm.weight": (w,)}
    out |= {f"{b}.post_attention_layernorm.weight": (w,)}
  return out | {"language_model.model.norm.weight": (w,)}


def draw(shapes: dict[str, tuple], seed: int = 0, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(seed)
  return {name: (0.1 * rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def config_json(towers: list[dict[str, Any]], side: int = SIDE, llm: dict[str, int] = LLM) -> dict[str, Any]:
  """As the public one, but for `vision_sizes`: timm has no transformers this small."""
  text = {"model_type": "llama", "vocab_size": llm["vocabulary"], "pad_token_id": 320, "torch_dtype": "bfloat16"}
  text |= {"hidden_size": llm["width"], "intermediate_size": llm["mlp"], "num_hidden_layers": llm["depth"]}
  return {
    "model_type": "openvla", "arch_specifier": "no-align+fused-gelu-mlp", "use_fused_vision_backbone": len(towers) == 2,
    "timm_model_ids": [f"vit_test_{v['family']}" for v in towers], "timm_override_act_layers": [None] * len(towers),
    "image_sizes": [side] * len(towers), "image_resize_strategy": "resize-naive", "llm_backbone_id": "llama2-7b-pure",
    "pad_token_id": 320, "pad_to_multiple_of": llm["padding"], "n_action_bins": 256, "torch_dtype": "bfloat16",
    "text_config": text | {"num_attention_heads": llm["heads"]}, "vision_sizes": towers,
    "norm_stats": {"bridge_orig": {"action": BRIDGE, "num_transitions": 1}},
  }  # fmt: skip


def processor_json(towers: list[dict[str, Any]]) -> dict[str, Any]:
  scales = [ROUNDED if v["family"] == "dino" else ([0.5] * 3, [0.5] * 3) for v in towers]
  return {"tvf_normalize_params": [{"inplace": False, "mean": mean, "std": std} for mean, std in scales]}


def tokenizer() -> tokenizers.Tokenizer:
  """Byte pairs in Llama's way: a blank is "▁", one is put before the text, and single characters have ids."""
  words = ["▁In", "▁to", "▁robot", "▁spoon", "▁What", "▁action", "Out"]
  vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3}
  vocab |= {c: len(vocab) + i for i, c in enumerate("abcdefghijklmnopqrstuvwxyzIWO:?\n.")}
  merges = []
  for word in words:
    for end in range(2, len(word) + 1):
      if word[:end] not in vocab:
        vocab[word[:end]] = len(vocab)
        merges.append((word[: end - 1], word[end - 1]))
  made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
  made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
  made.decoder = decoders.Replace("▁", " ")
  made.add_special_tokens(["<s>", "</s>", "<unk>"])
  return made


def write(
  folder: pathlib.Path, towers: list[dict[str, Any]], tensors: dict[str, np.ndarray], *, files: int = 1
) -> pathlib.Path:
  """A checkpoint folder, of one file or of several with their index."""
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config_json(towers)))
  (folder / "preprocessor_config.json").write_text(json.dumps(processor_json(towers)))
  (folder / "README.md").write_text("A model card.")
  tokenizer().save(str(folder / "tokenizer.json"))
  if files == 1:
    library.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
  names = list(tensors)
  each = math.ceil(len(names) / files)
  weight_map = {}
  for i in range(files):
    file = f"model-{i + 1:05d}-of-{files:05d}.safetensors"
    part = names[i * each : (i + 1) * each]
    library.save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(part, file)
  total = sum(x.nbytes for x in tensors.values())
  (folder / "model.safetensors.index.json").write_text(
    json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
  )
  return folder


def read(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """Every tensor of a folder's model files, by the library."""
  out: dict[str, np.ndarray] = {}
  for path in sorted(folder.glob("model*.safetensors")):
    out |= library.load_file(path)
  return out


def bits(x: Any) -> bytes:
  """Type, shape and every bit of an array."""
  x = np.ascontiguousarray(np.asarray(x))
  return f"{x.dtype}{x.shape}".encode() + x.tobytes()
