"""The JSON files beside a public OpenVLA checkpoint: its sizes, image normalisation, action statistics, tokenizer.

  config.json                 the network; `text_config` lists what differs from transformers' LlamaConfig
  preprocessor_config.json    pixel means and deviations: `tvf_normalize_params`, as the public processor applies them
  dataset_statistics.json     of fine-tuned checkpoints; replaces config.json's `norm_stats`
  tokenizer.json              Llama's, for the `tokenizers` library

Vision transformers are known by their timm name. One that is not in `TIMM` (a small one for a test, say) is described
by a list of our own in config.json, one entry per transformer:
  "vision_sizes": [{"family": "dino", "width": .., "depth": .., "head_size": .., "mlp": .., "patch_size": ..,
                    "prefix_tokens": .., "layer_scale": ..}]
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import ActionStats
from stare_jax.policies.sizes import SEVEN_B, Config, Vision, override
from stare_jax.policies.tensor_files import read_json

# transformers 4.40's LlamaConfig, as far as it matters: what text_config does not say. Not Llama-2's own config.json,
# whose rms_norm_eps is 1e-5.
LLAMA = {
  "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
  "num_attention_heads": 32, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ONLY = {  # what the network here can do of what LlamaConfig allows
  "model_type": "llama", "hidden_act": "silu", "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
  "tie_word_embeddings": False, "pretraining_tp": 1,
}  # fmt: skip
BASE = Vision(width=768, depth=12, head_size=64, mlp=3072, prefix_tokens=0, layer_scale=None)
TIMM: dict[str, tuple[str, int, Vision]] = {  # timm name -> family, patch size, sizes
  "vit_large_patch14_reg4_dinov2.lvd142m": ("dino", 14, SEVEN_B.dino),
  "vit_so400m_patch14_siglip_224": ("siglip", 14, SEVEN_B.siglip),
  "vit_base_patch16_siglip_224": ("siglip", 16, BASE),
  "vit_base_patch16_siglip_256": ("siglip", 16, BASE),
  "vit_base_patch16_siglip_384": ("siglip", 16, BASE),
}
RESIZE = {"resize-naive": "bicubic", "letterbox": "letterbox", "resize-crop": "resize-crop"}  # public: ours
VICUNA = (
  "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
  "polite answers to the user's questions. USER: What action should the robot take to {instruction}? ASSISTANT:"
)  # the prompt of v0.1


def read_config(folder: str | os.PathLike, options: Mapping[str, Any] | None = None) -> Config:
  """The network that a folder describes. options: fields of `Config` that replace what the files say.

  Raises: CheckpointError where the files do not describe a network of this kind; ValueError for an unknown option.
  """
  folder, options = pathlib.Path(folder), dict(options or {})
  c = read_json(folder / "config.json")
  try:
    fields = _fields(c, read_json(folder / "preprocessor_config.json"))
  except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
    raise CheckpointError(
      f"{folder}: config.json or preprocessor_config.json lacks or garbles a field ({type(error).__name__}: {error}); "
      f"fetch them again"
    ) from error
  try:
    config = dataclasses.replace(SEVEN_B, **fields)
  except ValueError as error:
    raise CheckpointError(f"{folder}: config.json describes a network that cannot be built: {error}") from error
  return override(config, options)


def _fields(c: dict[str, Any], processor: dict[str, Any]) -> dict[str, Any]:
  """Fields of `Config`."""
  if c["model_type"] != "openvla":
    raise CheckpointError(f'config.json is of model_type "{c["model_type"]}", expected "openvla"')
  text = {**LLAMA, **c["text_config"]}
  rope = {"rope_type": "default", **(text.get("rope_parameters") or {})}  # how transformers 5 writes it
  text["rope_theta"] = rope.get("rope_theta", text["rope_theta"])
  wrong = {k: text[k] for k, only in ONLY.items() if k in text and text[k] != only}
  wrong |= {} if rope["rope_type"] == "default" else {"rope_type": rope["rope_type"]}
  heads = text["num_attention_heads"]
  wrong |= {k: text[k] for k in ("num_key_value_heads",) if text.get(k) not in (None, heads)}
  if text.get("head_dim") not in (None, text["hidden_size"] // heads):
    wrong["head_dim"] = text["head_dim"]
  if any(c.get("timm_override_act_layers") or ()):
    wrong["timm_override_act_layers"] = c["timm_override_act_layers"]
  if wrong:
    raise CheckpointError(f"config.json asks for {wrong}, which this network does not have; it is Llama 2's, with "
                          f"all heads their own keys, and exact GELU in the vision transformers")
  views, patch = _views(c, processor)
  sides = {*c["image_sizes"]}
  if len(sides) != 1:
    raise CheckpointError(f"config.json has image_sizes {c['image_sizes']}, expected one size for all")
  if (strategy := c.get("image_resize_strategy", "resize-naive")) not in RESIZE:
    raise CheckpointError(f'image_resize_strategy "{strategy}" is unknown; expected one of {", ".join(RESIZE)}')
  return {
    **views, "image_size": int(sides.pop()), "patch_size": patch,
    "projector": 4 * sum(v.width for v in views.values() if v) if all(views.values()) else 0,
    "llm_width": text["hidden_size"], "llm_depth": text["num_hidden_layers"], "llm_mlp": text["intermediate_size"],
    "llm_head_size": text["hidden_size"] // heads, "vocabulary": text["vocab_size"],
    "rms_eps": float(text["rms_norm_eps"]), "rope_theta": float(text["rope_theta"]), "bos": text["bos_token_id"],
    "eos": text["eos_token_id"], "pad": c["pad_token_id"], "bins": c["n_action_bins"],
    "action_end": text["vocab_size"] - c["pad_to_multiple_of"],
    "template": c.get("prompt_template") or (
      VICUNA if str(c.get("llm_backbone_id", "")).startswith("vicuna") else SEVEN_B.template),
    "resize": RESIZE[strategy],
  }  # fmt: skip


def _views(c: dict[str, Any], processor: dict[str, Any]) -> tuple[dict[str, Vision | None], int]:
  """The vision transformers by family, None for one that is not there, and their patch size."""
  ids, own = c["timm_model_ids"], c.get("vision_sizes") or []
  fused = c.get("use_fused_vision_backbone")
  fused = len(ids) == 2 if fused is None else fused
  if len(ids) != (2 if fused else 1):
    raise CheckpointError(f"config.json has timm_model_ids {ids}, expected {2 if fused else 1}, as "
                          f"use_fused_vision_backbone is {fused}")
  if len(processor["tvf_normalize_params"]) != len(ids):
    raise CheckpointError(f"preprocessor_config.json normalises for {len(processor['tvf_normalize_params'])} vision "
                          f"transformers, config.json has {len(ids)}")
  found, patches = {}, []
  for i, name in enumerate(ids):
    if own:
      sizes = dict(own[i])
      family, patch = sizes.pop("family"), sizes.pop("patch_size")
      v = Vision(**sizes)
    elif name in TIMM:
      family, patch, v = TIMM[name]
    else:
      raise CheckpointError(f'vision transformer "{name}" is unknown; known are {", ".join(TIMM)}. Describe it in '
                            f'config.json, under "vision_sizes" (see stare_jax.policies.openvla_config)')
    scale = processor["tvf_normalize_params"][i]
    mean, std = (tuple(float(x) for x in scale[k]) for k in ("mean", "std"))
    if len(mean) != 3 or len(std) != 3 or not np.isfinite([mean, std]).all() or min(std) <= 0:
      raise CheckpointError(f"preprocessor_config.json has mean {scale['mean']} and std {scale['std']}, expected three "
                            f"finite numbers each, and std above 0")
    found[family] = dataclasses.replace(v, mean=mean, std=std)
    patches.append(patch)
  if list(found) not in (["dino"], ["siglip"], ["dino", "siglip"]) or len(found) != len(ids) or len({*patches}) != 1:
    raise CheckpointError(f"vision transformers {ids} are {list(found)} with patches of {patches}, expected one of "
                          f"dino or siglip, or both in this order, with one patch size")
  return {"dino": None, "siglip": None, **found}, patches[0]


# Action statistics ---------------------------------------------------------------------------------------


def read_norm_stats(folder: str | os.PathLike) -> dict[str, Any]:
  """{dataset: {"action": {"q01", "q99", "mask", ...}, ...}}; dataset_statistics.json replaces config.json's."""
  folder = pathlib.Path(folder)
  replaced = folder / "dataset_statistics.json"
  return read_json(replaced) if replaced.exists() else read_json(folder / "config.json").get("norm_stats") or {}


def read_statistics(folder: str | os.PathLike, unnorm_key: str | None = None) -> tuple[str, ActionStats]:
  """(dataset, its statistics). unnorm_key: the dataset; may be left out where there is only one.

  A name is also found with the ending "_no_noops", which some fine-tuned checkpoints add.
  """
  known = read_norm_stats(folder)
  if not known:
    raise CheckpointError(f"{folder} carries no action statistics: give them with stats=")
  if unnorm_key is None:
    if len(known) != 1:
      raise CheckpointError(f"{folder} has the action statistics of {len(known)} data sets; choose one with "
                            f"unnorm_key=: {', '.join(sorted(known))}")
    unnorm_key = next(iter(known))
  if unnorm_key not in known and f"{unnorm_key}_no_noops" in known:
    unnorm_key = f"{unnorm_key}_no_noops"
  if unnorm_key not in known:
    near = difflib.get_close_matches(unnorm_key, known, n=1, cutoff=0.0)[0]
    raise CheckpointError(f"{folder} has no action statistics of {unnorm_key!r}; did you mean {near!r}? There are "
                          f"{', '.join(sorted(known))}")
  try:
    action = known[unnorm_key]["action"]
    q01, q99 = (np.asarray(action[k], np.float32) for k in ("q01", "q99"))
    mask = np.asarray(action.get("mask", [True] * len(q01)), bool)
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise CheckpointError(f"{folder}: the action statistics of {unnorm_key!r} are malformed ({error!r})") from error
  if q01.ndim != 1 or not q01.shape == q99.shape == mask.shape:
    raise CheckpointError(f"{folder}: the action statistics of {unnorm_key!r} have q01 {q01.shape}, q99 {q99.shape}, "
                          f"mask {mask.shape}; expected one number per action dimension in each")
  return unnorm_key, ActionStats(q01=q01, q99=q99, mask=mask)


def statistics_json(dataset: str, stats: ActionStats) -> dict[str, Any]:
  """What dataset_statistics.json holds of one data set."""
  return {dataset: {"action": {name: np.asarray(x).tolist() for name, x in stats._asdict().items()}}}


# Tokenizer -----------------------------------------------------------------------------------------------


class Tokenizer(NamedTuple):
  """tokenizer.json as a function from text to ids, without the begin token.

  start: the id of a lone "▁", which precedes the first action token: 29871 in Llama's vocabulary.
  """

  library: Any
  start: int

  def __call__(self, text: str) -> list[int]:
    return self.library.encode(text, add_special_tokens=False).ids


def read_tokenizer(folder: str | os.PathLike, config: Config) -> Tokenizer:
  """The folder's tokenizer, if it fits the configuration; raises CheckpointError otherwise."""
  import tokenizers  # only here: the built-in vocabulary of `tiny` needs no library

  path = pathlib.Path(folder) / "tokenizer.json"
  if not path.exists():
    raise CheckpointError(f"{folder} has no tokenizer.json; save it there with transformers "
                          f"(AutoTokenizer.from_pretrained(..).save_pretrained(..)), or give tokenizer=")
  try:
    library = tokenizers.Tokenizer.from_file(str(path))
  except Exception as error:  # the library raises nothing more specific
    raise CheckpointError(f"{path} is no tokenizer ({error}); fetch the file again") from error
  library.no_truncation()
  library.no_padding()
  ids = {"▁": library.token_to_id("▁"), "<s>": library.token_to_id("<s>")}
  size = library.get_vocab_size(with_added_tokens=True)
  if ids["<s>"] != config.bos or ids["▁"] is None or size > config.vocabulary:
    raise CheckpointError(f"{path} is another model's: {size} tokens with <s> {ids['<s>']} and ▁ {ids['▁']}, expected "
                          f"at most {config.vocabulary} with <s> {config.bos} and a ▁")
  return Tokenizer(library, ids["▁"])


# Writing -------------------------------------------------------------------------------------------------


def config_json(config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
  """config.json and preprocessor_config.json of a configuration that came from no folder.

  Raises: CheckpointError if the format has no words for it.
  """
  features = sum(v.width for v in config.views.values())
  fused = len(config.views) == 2
  if config.projector != (4 * features if fused else 0):
    raise CheckpointError(f"projector {config.projector}: the public format has {4 * features if fused else 0} with "
                          f"{len(config.views)} vision transformers")
  strategies = {ours: public for public, ours in RESIZE.items()}
  if config.resize not in strategies:
    raise CheckpointError(f'resize "{config.resize}": the public format has words for {", ".join(strategies)}; save '
                          f"with source=, whose own stays, or choose one of these")
  bare = lambda v: dataclasses.replace(v, mean=BASE.mean, std=BASE.std)
  ids, own = [], []
  for family, v in config.views.items():
    mine = (family, config.patch_size, bare(v))
    ids.append(next((k for k, (f, patch, known) in TIMM.items() if (f, patch, bare(known)) == mine), f"vit_{family}"))
    sizes = {k: x for k, x in dataclasses.asdict(v).items() if k not in ("mean", "std")}
    own.append({"family": family, "patch_size": config.patch_size, **sizes})
  c = {
    "architectures": ["OpenVLAForActionPrediction"], "model_type": "openvla",
    "arch_specifier": f"no-align+{'fused-' if fused else ''}gelu-mlp", "use_fused_vision_backbone": fused,
    "timm_model_ids": ids, "timm_override_act_layers": [None] * len(ids), "image_sizes": [config.image_size] * len(ids),
    "image_resize_strategy": strategies[config.resize], "llm_max_length": 2048, "pad_token_id": config.pad,
    "llm_backbone_id": "vicuna-v15-7b" if config.template == VICUNA else "llama2-7b-pure",
    "pad_to_multiple_of": config.vocabulary - config.action_end, "n_action_bins": config.bins,
    "output_projector_states": False, "norm_stats": {}, "torch_dtype": config.param_dtype,
    "text_config": {
      "model_type": "llama", "pad_token_id": config.pad, "torch_dtype": config.param_dtype,
      "vocab_size": config.vocabulary, "hidden_size": config.llm_width, "intermediate_size": config.llm_mlp,
      "num_hidden_layers": config.llm_depth, "num_attention_heads": config.llm_width // config.llm_head_size,
      "rms_norm_eps": config.rms_eps, "rope_theta": config.rope_theta, "bos_token_id": config.bos,
      "eos_token_id": config.eos,
    },
  }  # fmt: skip
  if any(name not in TIMM for name in ids):
    c["vision_sizes"] = own
  if config.template not in (VICUNA, SEVEN_B.template):
    c["prompt_template"] = config.template
  scales = [{"inplace": False, "mean": list(v.mean), "std": list(v.std)} for v in config.views.values()]
  side = config.image_size
  return c, {
    "image_processor_type": "PrismaticImageProcessor", "image_resize_strategy": strategies[config.resize],
    "input_sizes": [[3, side, side]] * len(ids), "use_fused_vision_backbone": fused, "tvf_normalize_params": scales,
  }  # fmt: skip
