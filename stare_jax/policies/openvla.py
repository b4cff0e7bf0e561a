"""OpenVLA: two fused vision transformers, a projector, a Llama decoder, 256 action bins, and a value head. Any size.

  image -> DINOv2-like ViT  \\
                             concat -> MLP projector -> P patch embeddings
  image -> SigLIP-like ViT  /
  [BOS, patches, prompt, START, a_1 .. a_7] -> causal Llama -> logits of a_1 .. a_7 over the action ids, value

`TINY` and `SEVEN_B` are two configurations of the same code. Parameters are nested dicts (`specs` is their table);
the parts of OpenVLA that its forward never uses (last block and final norm of both ViTs, SigLIP's pooling) do not
exist here.

Axes: N rows, P patches, L prompt tokens, A action tokens, V action bins.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax import sharding
from stare_jax.policies import Act, ActionStats, Obs, Output, Policy
from stare_jax.policies import images as frames
from stare_jax.policies import layers as nn
from stare_jax.policies import tokenizer as tok
from stare_jax.policies.sizes import Config, Vision, configure

Params = dict[str, Any]


# Sharding words of the last axes; the first pattern that matches the whole path of a parameter wins.
PARAM_AXES = (
  (r".*/lora/[ab]", (None,)),  # an adapter where a layer uses it; policies.lora says where it is kept
  (r".*/table", ("vocab", "embed")),
  (r".*/attn/qkv/kernel", ("embed", None, "heads")),
  (r".*/attn/qkv/bias", (None, "heads")),
  (r".*/attn/out/kernel", ("heads", "embed")),
  (r".*/mlp/gate_up/kernel", ("embed", None, "mlp")),
  (r".*/mlp/up/kernel", ("embed", "mlp")),
  (r".*/mlp/up/bias", ("mlp",)),
  (r".*/mlp/down/kernel", ("mlp", "embed")),
  (r"projector/fc[13]/kernel", ("embed", "mlp")),
  (r"projector/fc[13]/bias", ("mlp",)),
  (r"projector/fc2/kernel", ("mlp", "embed")),
  (r"value/fc1/kernel", ("embed", None)),
  (r"value/fc\d+/kernel", (None, None)),
  (r".*/patch/kernel", (None, "embed")),
  (r".*/(position|prefix)", (None, None)),
  (r".*/(bias|scale\d?)", (None,)),
)


class Spec(NamedTuple):
  """A parameter: its shape, and how it starts (a standard deviation, or a constant)."""

  shape: tuple[int, ...]
  std: float | None = None
  fill: float = 0.0


def specs(config: Config) -> dict[str, Any]:
  """The table of all parameters, nested as they are. Kernels are [in, *out]; stacked blocks lead with the layer."""

  def linear(size, *out, bias=True, lead=(), gain=1.0):
    kernel = {"kernel": Spec((*lead, size, *out), std=gain * size**-0.5)}
    return {**kernel, "bias": Spec((*lead, *out))} if bias else kernel

  def vit(v: Vision):
    lead = (v.depth - 1,)
    inner = functools.partial(linear, lead=lead)
    residual = functools.partial(inner, gain=(2 * v.depth) ** -0.5)  # branches add up to the scale of one
    norm = lambda: {"scale": Spec((*lead, v.width), fill=1.0), "bias": Spec((*lead, v.width))}
    blocks = {
      "norm1": norm(),
      "attn": {"qkv": inner(v.width, 3, v.width), "out": residual(v.width, v.width)},
      "norm2": norm(),
      "mlp": {"up": inner(v.width, v.mlp), "down": residual(v.mlp, v.width)},
    }
    if v.layer_scale is not None:
      blocks |= {name: Spec((*lead, v.width), fill=v.layer_scale) for name in ("scale1", "scale2")}
    out = {
      "patch": linear(3 * config.patch_size**2, v.width),
      "position": Spec((config.patches, v.width), std=config.position_std),
      "layers": blocks,
    }
    return out | ({"prefix": Spec((v.prefix_tokens, v.width), std=0.02)} if v.prefix_tokens else {})

  width, lead = config.llm_width, (config.llm_depth,)
  inner = functools.partial(linear, bias=False, lead=lead)
  residual = functools.partial(inner, gain=(2 * config.llm_depth) ** -0.5)
  llm = {
    "embed": {"table": Spec((config.vocabulary, width), std=config.embedding_std)},
    "layers": {
      "norm1": {"scale": Spec((*lead, width), fill=1.0)},
      "attn": {"qkv": inner(width, 3, width), "out": residual(width, width)},
      "norm2": {"scale": Spec((*lead, width), fill=1.0)},
      "mlp": {"gate_up": inner(width, 2, config.llm_mlp), "down": residual(config.llm_mlp, width)},
    },
    "norm": {"scale": Spec((width,), fill=1.0)},
    "head": {"table": Spec((config.vocabulary, width), std=0.02)},
  }
  features = sum(v.width for v in config.views.values())
  hidden = (config.projector, width) if config.projector else (width,)
  widths = (features, *hidden, width)
  projector = {f"fc{i + 1}": linear(a, b) for i, (a, b) in enumerate(zip(widths[:-1], widths[1:]))}
  sizes = (width, *config.value_hidden, 1)
  value = {
    f"fc{i + 1}": linear(a, b, bias=b != 1, gain=0.0 if b == 1 else 1.0)  # the value starts at 0
    for i, (a, b) in enumerate(zip(sizes[:-1], sizes[1:]))
  }
  return {
    "vision": {name: vit(v) for name, v in config.views.items()},
    "projector": projector,
    "llm": llm,
    "value": value,
  }


def init(config: Config, key: jax.Array, part: str = "") -> Params:
  """Parameters for learning from scratch: truncated normals scaled by fan-in, residual branches by depth.

  part: only this one of the tree, such as "value".
  """
  wanted = specs(config)[part] if part else specs(config)
  table, tree = jax.tree.flatten(wanted, is_leaf=lambda x: isinstance(x, Spec))
  dtype = jnp.dtype(config.param_dtype)

  def draw(spec: Spec, key):
    if spec.std is None:
      return jnp.full(spec.shape, spec.fill, dtype)
    # 0.8796 is the standard deviation of a normal cut at two sigma.
    return (jax.random.truncated_normal(key, -2, 2, spec.shape) * (spec.std / 0.87962566)).astype(dtype)

  return jax.tree.unflatten(tree, [draw(s, k) for s, k in zip(table, jax.random.split(key, len(table)))])


def acts_in(config: Config, path: str, x: Any) -> Any:
  """Kernels and tables meet activations in `compute_dtype`, if that is smaller; the rest stays as it is."""
  rounded = re.fullmatch(r"(.+/)?(vision|projector|llm)/.*/(kernel|table)", path)
  return min(jnp.dtype(config.compute_dtype), x.dtype, key=lambda d: d.itemsize) if rounded else x.dtype


def one_layer(params: Params) -> Params:
  """A layer out of its stack: on a mesh its weights stay in pieces until they are used, and so does their gradient."""
  return sharding.constrain_params(params, PARAM_AXES, "layers/")


def layers_apart(params: Params, unstack: Callable[[Any], Sequence[Any]] = jnp.unstack) -> Params:
  """The parameters with the layers of the decoder and of both vision transformers as lists (`nn.apart`)."""
  vision = {name: _apart(view, unstack) for name, view in params["vision"].items()}
  return {**params, "vision": vision, "llm": _apart(params["llm"], unstack)}


def _apart(part: Params, unstack: Callable[[Any], Sequence[Any]] = jnp.unstack) -> Params:
  return {**part, "layers": nn.apart(part["layers"], unstack)}


def patchify(image: jax.Array, size: int) -> jax.Array:
  """[N, H, W, 3] -> [N, P, size * size * 3], patches row-major, pixels (row, column, channel) inside."""
  n, h, w, c = image.shape
  x = image.reshape(n, h // size, size, w // size, size, c).transpose(0, 1, 3, 2, 4, 5)
  return x.reshape(n, (h // size) * (w // size), size * size * c)


def encode_vision(params: Params, patches: jax.Array, vision: Vision, config: Config) -> jax.Array:
  """[N, P, pixels] in [0, 1], as `patchify` makes it -> features [N, P, width] of the second-to-last block; no norm."""
  dtype = jnp.dtype(config.compute_dtype)
  pixels = (patches.reshape(*patches.shape[:2], -1, 3) - jnp.array(vision.mean)) / jnp.array(vision.std)
  x = nn.dense(params["patch"], pixels.astype(dtype).reshape(patches.shape))
  x = x + params["position"].astype(dtype)
  if vision.prefix_tokens:
    prefix = jnp.broadcast_to(params["prefix"].astype(dtype), (len(x), vision.prefix_tokens, vision.width))
    x = jnp.concatenate([prefix, x], axis=1)
  fused = nn.fuses(config.attention, dtype)
  block = lambda x, layer: (nn.vit_block(one_layer(layer), x, head_size=vision.head_size, fused=fused), None)
  x, _ = nn.stack(block, x, params["layers"], unroll=config.unroll, remat=config.remat)
  return x[:, vision.prefix_tokens :]


def encode_image(params: Params, image: jax.Array, config: Config) -> jax.Array:
  """uint8[N, H, W, 3] -> patch embeddings [N, P, llm_width]."""
  if image.dtype != jnp.uint8 or image.shape[1:] != (config.image_size, config.image_size, 3):
    raise ValueError(
      f"image: got {image.dtype}{image.shape}, expected uint8[N, {config.image_size}, {config.image_size}, 3]; "
      "Policy.encode resizes"
    )
  patches = patchify(image, config.patch_size).astype(jnp.float32) / 255  # moves bytes, and once for both
  views = [encode_vision(params["vision"][name], patches, v, config) for name, v in config.views.items()]
  x = jnp.concatenate(views, axis=-1)
  first, *rest = (params["projector"][f"fc{i + 1}"] for i in range(len(params["projector"])))
  x = nn.dense(first, x)
  for layer in rest:
    x = nn.dense(layer, nn.gelu(x))
  return x


def embed(params: Params, ids: jax.Array, config: Config) -> jax.Array:
  return params["llm"]["embed"]["table"][ids].astype(config.compute_dtype)


def sequence(params: Params, obs: Obs, actions: jax.Array, config: Config) -> tuple[jax.Array, jax.Array]:
  """[BOS, patches, prompt, START, actions] as embeddings [N, S, W], and the mask bool[N, S] of what is not padding.

  actions: int32[N, M], the bins of the first M action tokens.
  """
  n, patches = len(obs.prompt), config.patches
  text = embed(params, jnp.concatenate([obs.prompt, actions + config.first_action], axis=1), config)
  image = encode_image(params, obs.image, config)
  x = jnp.concatenate([text[:, :1], image, text[:, 1:]], axis=1)
  seen = lambda length: jnp.ones((n, length), bool)
  mask = [obs.prompt_mask[:, :1], seen(patches), obs.prompt_mask[:, 1:], seen(actions.shape[1])]
  return x, jnp.concatenate(mask, axis=1)


def cached(kv: Any) -> Any:
  """Keys and values [..., N, H, S, E] by the rule of a mesh: rows over its rows, heads over its heads."""
  words = ("batch", "heads", None, None)
  return jax.tree.map(lambda x: sharding.constrain(x, *(None,) * (x.ndim - len(words)), *words), kv)


def decoder(params: Params, x: jax.Array, mask: jax.Array, config: Config, *, tail: int, cache: bool = False):
  """The Llama layers over a whole sequence, before the final norm.

    mask: bool[N, S]; positions count what is not padding, and padding is never attended to.
    tail: how many of the last positions are wanted.
    cache: also return keys and values.
  Returns: [N, tail, W] and, if `cache`, the stacked (keys, values) [layers, N, H, S, E], or a list of (keys, values)
    [N, H, S, E] where the layers are one.
  """
  rope = nn.rotation(jnp.cumsum(mask, axis=1) - 1, x.shape[1], config.llm_head_size, config.rope_theta)
  causal = jnp.tril(jnp.ones((x.shape[1],) * 2, bool))
  seen = causal & mask[:, None, None, :]
  block = functools.partial(
    nn.llama_block, rope=rope, seen=seen, head_size=config.llm_head_size, eps=config.rms_eps,
    fused=nn.fuses(config.attention, x.dtype),
  )  # fmt: skip

  def body(x, layer, queries=None):
    x, kv = block(one_layer(layer), x, queries=queries)
    return x, cached(kv) if cache else None

  last = functools.partial(body, queries=tail)
  x, kv = nn.stack(body, x, params["llm"]["layers"], unroll=config.unroll, remat=config.remat, last=last)
  return x[:, -tail:], kv


def final_norm(params: Params, x: jax.Array, config: Config) -> jax.Array:
  return nn.rms_norm(params["llm"]["norm"], x, config.rms_eps)


def action_logits(params: Params, hidden: jax.Array, config: Config) -> jax.Array:
  """[..., W] after the final norm -> float32[..., V], lm_head's rows of the action ids only."""
  return nn.rows(params["llm"]["head"], hidden, config.first_action, config.action_end)


def value_head(params: Params, hidden: jax.Array) -> jax.Array:
  """[N, W] after the final norm, at the position that predicts the first action token -> float32[N]."""
  heads = [params["value"][f"fc{i + 1}"] for i in range(len(params["value"]))]
  x = hidden.astype(jnp.float32)
  for head in heads[:-1]:
    x = nn.gelu(nn.dense(head, x))
  return nn.dense(heads[-1], x)[..., 0]


def no_tokens(prefix: Any, count: int) -> Any:
  """The other half of `past` in `extend`, before any of `count` action tokens: zeros."""
  return cached(jax.tree.map(lambda kv: jnp.zeros((*kv.shape[:-2], count, kv.shape[-1]), kv.dtype), prefix))


def extend(params: Params, bins: jax.Array, dim: jax.Array, mask: jax.Array, past: Any, config: Config):
  """One more action token through the decoder, against the cache.

    bins: int32[N], action token number `dim`.
    mask: bool[N, S] of the prefix.
    past: ((keys, values) of the prefix [layers, N, H, S, E], (keys, values) of the action tokens so far, padded to
      [layers, N, H, M, E]); lists by layer where the layers are one.
  Returns: [N, W] after the final norm, and the second half of `past` with this token in.
  """
  layers, suffix = params["llm"]["layers"], past[1]
  count = jax.tree.leaves(suffix)[0].shape[-2]
  x = embed(params, bins[:, None] + config.first_action, config)
  length = mask.shape[1] + count
  rope = nn.rotation(mask.sum(axis=1, keepdims=True) + dim, length, config.llm_head_size, config.rope_theta)
  written = jnp.broadcast_to(jnp.arange(count) < dim, (len(x), count))
  seen = jnp.concatenate([mask, written, jnp.ones((len(x), 1), bool)], axis=1)
  seen = seen[:, None, None, :]

  def body(x, inputs):
    layer, *past = inputs
    return nn.llama_block(
      one_layer(layer), x, rope=rope, seen=seen, head_size=config.llm_head_size, eps=config.rms_eps, past=past
    )

  inputs = (layers, *past) if not isinstance(layers, list) else list(zip(layers, *past, strict=True))
  x, new = nn.stack(body, x, inputs, unroll=config.unroll, remat="none")
  write = lambda old, add: jax.lax.dynamic_update_slice_in_dim(old, add, dim, axis=old.ndim - 2)
  suffix = cached(jax.tree.map(write, suffix, new))
  return final_norm(params, x[:, 0], config), suffix


class Actions(NamedTuple):
  """What is known about the action before looking: host constants.

    free: bool[A], the dimensions with a choice.
    constant: int32[A], the only bin of the others.
  """

  free: np.ndarray
  constant: np.ndarray

  @property
  def last(self) -> int:
    """The last dimension with a choice; it and what follows never enter the network."""
    return int(np.flatnonzero(self.free)[-1])

  def forced(self, bins: int) -> np.ndarray:
    """float32[A, V], the logits of a dimension without choice: log-probability and entropy exactly 0."""
    return np.where(np.arange(bins) == self.constant[:, None], 0.0, -1e9).astype(np.float32)

  def constrain(self, logits: jax.Array) -> jax.Array:
    """float32[N, A', V] -> [N, A, V]: a dimension without choice puts all probability on its bin, without gradient."""
    logits = jnp.pad(logits, ((0, 0), (0, len(self.free) - logits.shape[1]), (0, 0)))
    return jnp.where(self.free[:, None], logits, self.forced(logits.shape[-1]))


def apply(config: Config, actions: Actions, params: Params, obs: Obs, tokens: jax.Array) -> Output:
  """Teacher-forced logits of all action tokens, and the value."""
  check(config, obs, tokens)
  config = dataclasses.replace(config, unroll=config.unroll or sharding.one_gpu())  # where a scan copies what it keeps
  count = actions.last + 1
  x, mask = sequence(params, obs, tokens[:, : count - 1], config)
  hidden = final_norm(params, decoder(params, x, mask, config, tail=count)[0], config)
  logits = actions.constrain(action_logits(params, hidden, config))
  return Output(logits=logits, value=value_head(params, hidden[:, 0]))


def value(config: Config, params: Params, obs: Obs) -> jax.Array:
  """float32[N]."""
  check(config, obs)
  config = dataclasses.replace(config, unroll=False)  # as in `act`
  x, mask = sequence(params, obs, jnp.zeros((len(obs.prompt), 0), jnp.int32), config)
  return value_head(params, final_norm(params, decoder(params, x, mask, config, tail=1)[0], config)[:, 0])


def log_prob(logits: jax.Array, token: jax.Array, temperature: jax.Array) -> jax.Array:
  """log softmax(logits / temperature) at the token, float32[N]; 0 in the greedy limit, temperature 0."""
  greedy = temperature <= 0
  scaled = jax.nn.log_softmax(logits / jnp.where(greedy, 1.0, temperature))
  return jnp.where(greedy, 0.0, jnp.take_along_axis(scaled, token[:, None], axis=-1)[:, 0])


def act(
  config: Config, actions: Actions, params: Params, obs: Obs, keys: jax.Array, temperature: jax.Array
) -> Act:
  """Sample an action token by token: the prefix once, then each token against the cached keys and values."""
  check(config, obs)
  config = dataclasses.replace(config, unroll=False)  # without a gradient a scan is as fast, and compiles in half
  n, last = len(obs.prompt), actions.last
  if sharding.on_nvidia():  # where a scan copies a layer's weights before it reads them: half of the time with one row
    params = {**params, "llm": _apart(params["llm"])}
  if jnp.issubdtype(keys.dtype, jnp.uint32):
    keys = jax.random.wrap_key_data(keys)
  x, mask = sequence(params, obs, jnp.zeros((n, 0), jnp.int32), config)
  x, prefix = decoder(params, x, mask, config, tail=1, cache=True)
  hidden = final_norm(params, x[:, 0], config)
  draw = lambda key: jax.random.gumbel(key, (config.action_size, config.bins))
  known = (jax.vmap(draw, out_axes=1)(keys), actions.free, actions.forced(config.bins))  # by dimension

  def choose(hidden, noise, free, forced):
    logits = jnp.where(free, action_logits(params, hidden, config), forced)
    token = jnp.argmax(logits + temperature * noise, axis=-1).astype(jnp.int32)  # Gumbel-max; greedy at 0
    return token, log_prob(logits, token, temperature)

  def step(carry, inputs):
    hidden, suffix = carry
    dim, *at = inputs
    token, logp = choose(hidden, *at)
    return extend(params, token, dim, mask, (prefix, suffix), config), (token, logp)

  suffix = no_tokens(prefix, max(last, 1))
  (end, _), chosen = jax.lax.scan(step, (hidden, suffix), (np.arange(last), *(leaf[:last] for leaf in known)))
  final = choose(end, *(leaf[last] for leaf in known))  # nothing follows it, so it needs no step
  tokens, logp = (jnp.concatenate([a, b[None]]).T for a, b in zip(chosen, final))
  rest = jnp.broadcast_to(actions.constant[last + 1 :], (n, config.action_size - last - 1))
  return Act(
    tokens=jnp.concatenate([tokens, rest], axis=1),
    log_prob=jnp.pad(logp, ((0, 0), (0, rest.shape[1]))),
    value=value_head(params, hidden),
  )


def check(config: Config, obs: Obs, tokens: jax.Array | None = None) -> None:
  """Shapes and dtypes, at trace time."""
  n = len(obs.image)
  if obs.prompt.shape != (n, config.prompt_length) or obs.prompt_mask.shape != obs.prompt.shape:
    raise ValueError(
      f"prompt {obs.prompt.shape}, prompt_mask {obs.prompt_mask.shape}: expected ({n}, {config.prompt_length}), "
      "as Policy.encode makes them"
    )
  if tokens is not None and (tokens.shape != (n, config.action_size) or not jnp.issubdtype(tokens.dtype, jnp.integer)):
    raise ValueError(f"tokens: got {tokens.dtype}{tokens.shape}, expected int32[{n}, {config.action_size}]")


def encode_prompt(config: Config, tokenize: Callable[[str], list[int]], instruction: str):
  """(ids int32[L], mask bool[L]) of [BOS, padding, text, START].

  Padding follows BOS, because the patches are inserted behind BOS and the last token must be START: the action tokens
  then sit at the same place in every row. Positions count only what is not padding, so a row equals its unpadded run.
  """
  text = list(tokenize(config.template.format(instruction=instruction.lower())))
  text = text if text and text[-1] == config.start else [*text, config.start]
  padding = config.prompt_length - 1 - len(text)
  if padding < 0:
    raise ValueError(
      f"instruction {instruction!r} takes {len(text) + 1} tokens; prompt_length is {config.prompt_length}: "
      "shorten it or raise prompt_length"
    )
  ids = [config.bos, *[config.pad] * padding, *text]
  return np.array(ids, np.int32), np.array([True, *[False] * padding, *[True] * len(text)])


def encode(config: Config, prompt: Callable[[str], Any], images: np.ndarray, instructions: Sequence[str]) -> Obs:
  """Host: frames uint8[N, H, W, 3] to the network's size, instructions to padded ids."""
  images = np.asarray(images)
  if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"encode: got {images.dtype}{images.shape}, expected images uint8[N, H, W, 3]")
  if len(images) != len(instructions):
    raise ValueError(f"encode: {len(images)} images but {len(instructions)} instructions; give one for each image")
  *_, last = config.views.values()  # whose grey the public processor pads with
  how = dict(resize=config.resize, center_crop=config.center_crop, mean=last.mean)
  images = frames.prepare(images, config.image_size, **how)
  ids, masks = zip(*map(prompt, instructions))
  return Obs(image=images, prompt=np.stack(ids), prompt_mask=np.stack(masks))


def faithful_act(config: Config, codec: tok.ActionCodec) -> Callable[..., Act]:
  from stare_jax.policies import openvla_faithful  # which imports this module

  if not codec.free.all():
    still = np.flatnonzero(~codec.free).tolist()
    raise ValueError(f"faithful: action dimensions {still} never vary (q99 == q01), which public decoding cannot know")
  return functools.partial(openvla_faithful.act, config)


def make(
  *,
  size: str | Config = "tiny",
  stats: ActionStats,
  tokenizer: Callable[[str], list[int]] | None = None,
  **options: Any,
) -> Policy:
  """A policy of `SIZES`, changed by any field of `Config`.

    stats: of the actions; a dimension with q99 == q01 has no choice.
    tokenizer: text to ids without begin token; needed where the configuration has no built-in one.
  """
  config = configure(size, options)
  codec = tok.ActionCodec(*stats, bins=config.bins)
  if len(codec.q01) != config.action_size:
    raise ValueError(f"action statistics have {len(codec.q01)} dimensions, the policy {config.action_size}")
  if not codec.free.any():
    raise ValueError("action statistics: q99 == q01 in every dimension, so there is nothing to learn")
  tokenizer = tok.WordTokenizer() if config.word_tokenizer and tokenizer is None else tokenizer
  if tokenizer is None:
    raise ValueError(f"policy size {size!r} needs tokenizer=: a function from text to its vocabulary's ids")
  actions = Actions(free=codec.free, constant=codec.constant_tokens)
  prompt = functools.cache(functools.partial(encode_prompt, config, tokenizer))
  return Policy(
    init=functools.partial(init, config),
    apply=functools.partial(apply, config, actions),
    act=faithful_act(config, codec) if config.faithful else functools.partial(act, config, actions),
    value=functools.partial(value, config),
    encode=functools.partial(encode, config, prompt),
    decode=codec.decode,
    tokenize=codec.tokenize,
    param_axes=PARAM_AXES,
    config=config,
    free=tuple(bool(x) for x in codec.free),
    acts_in=functools.partial(acts_in, config),
  )
