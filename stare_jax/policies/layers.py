"""Transformer layers as functions of nested dicts: one ViT block, one Llama block, the loop over stacked layers.

Axes: N rows, Q query positions, S key positions, H heads, E features per head, W width. Parameters of a stack of
blocks carry a leading layer axis. Matrix products run in the dtype of their input; norms, softmax and rotations in
float32.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from stare_jax import sharding

Params = dict[str, Any]
NEGATIVE = -1e30  # the score of what may not be seen; finite, so that a fully masked row stays finite
REMAT: dict[str, tuple[str, ...] | None] = {  # what a block keeps from its forward pass for its backward pass
  "none": None,  # everything
  "block": (),  # its input; the rest is computed again
  "attention": ("qkv", "attention"),  # and queries and keys (rotated), values, and what attention makes of them
  "products": ("qkv", "attention", "sum", "mlp"),  # and all matrix products with kernels
}
FUSED = "dot_product_attention_fwd_wrapper"  # cuDNN's kernel, which keeps a number for each query beside what it makes


@functools.partial(jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale", "groups"])
@dataclasses.dataclass(frozen=True)
class Adapter:
  """A low-rank addition to a linear layer, (x @ (scale * a)) @ b, that never becomes a matrix (policies.lora).

    a: [I, r], b: [r, *O]; where several modules share one kernel [I, G, O], a: [I, g, r], b: [g, r, O].
    groups: which g of the G modules are adapted; None where the kernel is one module.
  """

  a: jax.Array
  b: jax.Array
  scale: float
  groups: tuple[int, ...] | None = None

  def __call__(self, x: jax.Array, out: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """[M, I] -> [M, *out] in `dtype`; both products run in the dtype of x."""
    a, b = (self.scale * self.a).astype(x.dtype), self.b.astype(x.dtype)  # scaled as it is cast: no pass of its own
    low = x @ a.reshape(len(a), -1)
    if self.groups is not None and sharding.one_gpu():  # one product: a factor meets its own outputs, and zeros
      own = np.eye(out[0], dtype=b.dtype)[list(self.groups)]
      b = b[:, :, None] * own[:, None, :, None]
    elif self.groups is not None:
      low = jnp.unstack(low.reshape(-1, *a.shape[1:]), axis=1)
      y = {g: jnp.matmul(x, b, preferred_element_type=dtype) for g, x, b in zip(self.groups, low, b)}
      none = jnp.zeros_like(y[self.groups[0]])
      return jnp.stack([y.get(g, none) for g in range(out[0])], axis=1)
    return jnp.matmul(low, b.reshape(low.shape[1], -1), preferred_element_type=dtype).reshape(-1, *out)


def dense(params: Params, x: jax.Array) -> jax.Array:
  """[..., I] @ kernel [I, *O] (+ bias [*O]) -> [..., *O].

  On one device one matrix product over flattened rows and outputs, the fastest form on CPU. On several all axes stay as
  they are: [3, W] with W in pieces has no flattened form in pieces, so the compiler would gather the kernel; and
  rows of 310 positions, no multiple of a TPU's tile, would be copied to be flattened.
  """
  kernel, bias = params["kernel"].astype(x.dtype), params.get("bias")
  lead, out, flat = x.shape[:-1], kernel.shape[1:], x.reshape(-1, x.shape[-1])
  if sharding.spread():
    y = jnp.tensordot(x, kernel, 1)
  else:
    y = flat @ kernel.reshape(kernel.shape[0], -1)
    bias = None if bias is None else bias.reshape(-1)
  if "lora" in params:
    y = y + params["lora"](flat, out).reshape(y.shape)
  if bias is not None:
    y = y + bias.astype(x.dtype)
  return y.reshape(*lead, *out)


def rows(params: Params, x: jax.Array, first: int, end: int) -> jax.Array:
  """[..., W] -> float32[..., end - first]: the product with some rows of a table [vocabulary, W], and no others."""
  table = params["table"][first:end].astype(x.dtype)
  y = jnp.einsum("...w,vw->...v", x, table, preferred_element_type=jnp.float32)
  if "lora" in params:
    adapter = dataclasses.replace(params["lora"], b=params["lora"].b[:, first:end])
    y = y + adapter(x.reshape(-1, x.shape[-1]), (end - first,), jnp.float32).reshape(y.shape)
  return y


def gelu(x: jax.Array) -> jax.Array:
  """The exact form x Phi(x) with erf; the tanh approximation breaks parity with OpenVLA.

  In float32 and rounded once, as PyTorch does it: in bfloat16 the sum 1 + erf has no digits left where it is near 0.
  """
  y = x.astype(jnp.float32)
  return (y * (0.5 + 0.5 * jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def layer_norm(params: Params, x: jax.Array, eps: float) -> jax.Array:
  y = x.astype(jnp.float32)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return (y * params["scale"] + params["bias"]).astype(x.dtype)


def rms_norm(params: Params, x: jax.Array, eps: float) -> jax.Array:
  """Llama's order: float32 statistics, cast back, then times the weight."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
  return y.astype(x.dtype) * params["scale"].astype(x.dtype)


def rotation(positions: jax.Array, length: int, head_size: int, theta: float) -> tuple[jax.Array, jax.Array]:
  """cos and sin float32[N, 1, Q, E/2] of rotary position embeddings at int positions [N, Q], all below `length`.

  Rows of a table: a compiler that fuses them into every layer repeats a look-up there, and not a sine.
  """
  frequency = theta ** (-np.arange(0, head_size, 2, dtype=np.float32) / head_size)
  angle = np.arange(length, dtype=np.float32)[:, None] * frequency
  cos, sin = (jnp.asarray(table, jnp.float32)[positions][:, None] for table in (np.cos(angle), np.sin(angle)))
  return cos, sin


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Half-split (not interleaved) rotation of [N, H, Q, E].

  On NVIDIA GPUs the halves change places by a reversal: to join them, as on other devices, costs each element a branch,
  and the gradient four times the reads where it is joined with that of another array.
  """
  cos, sin = rope
  if sharding.on_nvidia():
    y = x.astype(jnp.float32).reshape(*x.shape[:-1], 2, -1)
    turned = jnp.flip(y, axis=-2) * np.array([[-1], [1]], np.float32)
    return (y * cos[..., None, :] + turned * sin[..., None, :]).reshape(x.shape).astype(x.dtype)
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(
  q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array]], seen: jax.Array | None, fused: bool = False,
  causal: bool = False,
) -> jax.Array:  # fmt: skip
  """softmax(q k^T / sqrt(E) where seen) v -> [N, Q, H*E].

    q: [N, H, Q, E].
    parts: keys and values [N, H, S_i, E]; attended to as if concatenated, without copying a cache to do so.
    seen: bool[N, 1, Q, sum of S_i], which keys a query may look at; None is all.
    fused: in one kernel that keeps no scores (`fuses`), where there is one part, several queries and one device: what
      a mesh makes of that kernel has not been seen.
    causal: `seen` hides all that comes after a query, so the kernel need not look there.
  """
  q, *kv = checkpoint_name([q, *itertools.chain(*parts)], "qkv")  # as attention needs them, rotated
  parts = list(zip(kv[::2], kv[1::2]))
  if fused and len(parts) == 1 and q.shape[2] > 1 and q.shape[-1] % 8 == 0 and not sharding.spread():
    out = fused_attention(q, *parts[0], seen, causal)  # is kept by its own name: `FUSED`
  else:
    out = checkpoint_name(plain_attention(q, parts, seen), "attention")
  n, heads, count, size = q.shape
  return out.reshape(n, count, heads * size)


def plain_attention(
  q: jax.Array, parts: Sequence[tuple[jax.Array, jax.Array]], seen: jax.Array | None
) -> jax.Array:
  """`attention` as two batched products -> [N, Q, H, E].

  Divides by the softmax's denominator last, where the array is smallest: a quarter of the time on CPU.
  """
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  score = jnp.concatenate([product("nhqe,nhse->nhqs", q, k) for k, _ in parts], axis=-1) * q.shape[-1] ** -0.5
  score = score if seen is None else jnp.where(seen, score, NEGATIVE)
  weight = jnp.exp(score - jax.lax.stop_gradient(score.max(axis=-1, keepdims=True)))
  edges = list(itertools.accumulate(k.shape[2] for k, _ in parts))[:-1]
  weights = jnp.split(weight.astype(q.dtype), edges, axis=-1)
  out = sum(product("nhqs,nhse->nhqe", w, v) for w, (_, v) in zip(weights, parts))
  return (out / weight.sum(axis=-1, keepdims=True)).astype(q.dtype).transpose(0, 2, 1, 3)


def fused_attention(
  q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None, causal: bool = False, kernel: str = "cudnn"
) -> jax.Array:
  """`attention` by cuDNN's flash kernel -> [N, Q, H, E]: scores never reach memory, forward or backward.

  JAX 0.11 differentiates it for even lengths only, so an odd one gets a position more that nobody sees.

    causal: as in `attention`; as many queries as keys.
    kernel: "xla" computes the same without cuDNN, for tests.
  """
  count, keys, size = q.shape[2], k.shape[2], q.shape[-1]
  if seen is None and keys % 2:
    seen = jnp.ones((1, 1, count, keys), bool)
  q, k, v = (_even(x, 2).transpose(0, 2, 1, 3) for x in (q, k, v))
  mask = None if seen is None else _even(_even(seen, 2), 3)
  how = dict(scale=size**-0.5, is_causal=causal, implementation=kernel)
  return jax.nn.dot_product_attention(q, k, v, mask=mask, **how)[:, :count]


def _even(x: jax.Array, axis: int) -> jax.Array:
  """Zeros (False) behind the last place of an axis of odd length."""
  return jnp.pad(x, [(0, x.shape[i] % 2 if i == axis else 0) for i in range(x.ndim)])


def fuses(how: str, dtype: Any) -> bool:
  """Whether `attention` may run in cuDNN's kernel.

  how: "auto" where there is one (bfloat16 on an NVIDIA GPU from Ampere on), "plain" never.
  """
  return how == "auto" and jnp.dtype(dtype) == jnp.bfloat16 and sharding.on_nvidia() and _capability() >= 8.0


def _capability() -> float:
  """Of the GPU: 8.0 is Ampere, 9.0 Hopper."""
  return float(getattr(jax.devices()[0], "compute_capability", 0.0))


def split_heads(qkv: jax.Array, head_size: int) -> list[jax.Array]:
  """[N, Q, 3, W] -> queries, keys and values [N, H, Q, E]."""
  qkv = sharding.constrain(qkv, "batch", None, None, "heads")
  n, count, _, width = qkv.shape
  heads = lambda x: x.reshape(n, count, width // head_size, head_size).transpose(0, 2, 1, 3)
  return [heads(x) for x in apart_in_kernel(qkv)]


def apart_in_kernel(x: jax.Array) -> Sequence[jax.Array]:
  """[..., G, W] -> G arrays [..., W]: what each of the modules that share a kernel made.

  On one GPU cut along the last axis, so that the gradients are joined in pieces of W: XLA then writes four elements at
  a time. Joined along the axis of G, where each is a piece of 1, it writes one at a time.
  """
  if not sharding.one_gpu():
    return jnp.unstack(x, axis=-2)
  return jnp.split(x.reshape(*x.shape[:-2], -1), x.shape[-2], axis=-1)


def vit_block(params: Params, x: jax.Array, *, head_size: int, eps: float = 1e-6, fused: bool = False) -> jax.Array:
  """Pre-norm block of a timm vision transformer, with LayerScale where the parameters have it. [N, P, W]."""
  q, k, v = split_heads(dense(params["attn"]["qkv"], layer_norm(params["norm1"], x, eps)), head_size)
  y = dense(params["attn"]["out"], attention(q, [(k, v)], None, fused))
  x = checkpoint_name(x + (y * params["scale1"].astype(y.dtype) if "scale1" in params else y), "sum")
  up = checkpoint_name(dense(params["mlp"]["up"], layer_norm(params["norm2"], x, eps)), "mlp")
  y = dense(params["mlp"]["down"], gelu(sharding.constrain(up, "batch", None, "mlp")))
  return x + (y * params["scale2"].astype(y.dtype) if "scale2" in params else y)


def llama_block(
  params: Params,
  x: jax.Array,
  *,
  rope: tuple[jax.Array, jax.Array],
  seen: jax.Array,
  head_size: int,
  eps: float,
  past: Sequence[tuple[jax.Array, jax.Array]] = (),
  queries: int | None = None,
  fused: bool = False,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  """One decoder layer on [N, Q, W].

    rope: rotations of the Q positions.
    seen: bool[N, 1, Q, S + Q], which positions may be looked at: none that comes later.
    past: keys and values [N, H, S_i, E] that precede x, already rotated.
    queries: compute only the last so many positions; all Q still serve as keys.
    fused: as in `attention`.
  Returns: [N, queries, W] and the keys and values [N, H, Q, E] of x.
  """
  q, k, v = split_heads(dense(params["attn"]["qkv"], rms_norm(params["norm1"], x, eps)), head_size)
  k = rotate(k, rope)
  if queries is not None:
    x, q, seen, *rope = x[:, -queries:], *(a[:, :, -queries:] for a in (q, seen, *rope))
  causal = not past and queries is None
  y = dense(params["attn"]["out"], attention(rotate(q, rope), [*past, (k, v)], seen, fused, causal))
  x = checkpoint_name(x + y, "sum")
  gate_up = checkpoint_name(dense(params["mlp"]["gate_up"], rms_norm(params["norm2"], x, eps)), "mlp")
  gate_up = sharding.constrain(gate_up, "batch", None, None, "mlp")
  gate, up = apart_in_kernel(gate_up)
  x = x + dense(params["mlp"]["down"], jax.nn.silu(gate) * up)
  return x, (k, v)


def stack(
  body: Callable, x: jax.Array, inputs: Any, *, unroll: bool, remat: str, last: Callable | None = None
) -> tuple[jax.Array, Any]:
  """x [N, Q, W] through all layers: body(x, layer inputs) -> (x, layer output); outputs stacked. Scanned, or unrolled.

    inputs: trees with a leading layer axis; or a list with a tree for each layer (`apart`), which is never scanned,
      and whose outputs are a list as well.
    remat: a key of `REMAT`.

  A scan compiles one layer whatever the depth. Copies run faster on CPU at small depth and with a gradient on
  one GPU, and can end in the cheaper `last` layer.
  """
  rows = lambda x: sharding.constrain(x, "batch", None, None)
  scanned = not (unroll or isinstance(inputs, list))

  def wrap(body: Callable) -> Callable:
    block = lambda x, layer: (lambda x, output: (rows(x), output))(*body(rows(x), layer))
    return rematerialised(block, remat, scanned)

  if scanned:
    return jax.lax.scan(wrap(body), rows(x), inputs)
  layers, outputs = inputs if isinstance(inputs, list) else apart(inputs), []
  for i, layer in enumerate(layers):
    x, output = wrap(last if last and i == len(layers) - 1 else body)(x, layer)
    outputs.append(output)
  return x, outputs if isinstance(inputs, list) else jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)


def rematerialised(block: Callable, remat: str, scanned: bool) -> Callable:
  """A block (x, layer) -> (x, output) that keeps what `REMAT` says.

  Outside a scan the compiler would find that what is computed again was computed before, and keep it: it must not look
  through x and what is kept. It may look through the weights, or would copy them.
  """
  if REMAT[remat] is None:
    return block
  names = jax.checkpoint_policies.save_only_these_names(*REMAT[remat])
  fused = lambda primitive, *_, **__: "attention" in REMAT[remat] and primitive.name == FUSED
  policy = jax.checkpoint_policies.save_from_both_policies(names, fused)
  return jax.checkpoint(block, prevent_cse=False if scanned else (True, False), policy=policy)


def apart(stacked: Any, unstack: Callable[[Any], Sequence[Any]] = jnp.unstack) -> list[Any]:
  """Trees with a leading layer axis as a list with a tree for each layer, whose gradient is stacked once.

  A list is apart already.
  """
  if isinstance(stacked, list):
    return stacked
  leaves, tree = jax.tree.flatten(stacked)
  return [jax.tree.unflatten(tree, layer) for layer in zip(*map(unstack, leaves), strict=True)]


def unstack_and_delete(x: jax.Array) -> Sequence[jax.Array]:
  """For `apart` outside of a program: the stack is deleted, so no more than one of them is in memory twice."""
  layers = jax.block_until_ready(jax.jit(jnp.unstack)(x))
  x.delete()
  return layers
