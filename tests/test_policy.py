"""The policy: against an independent numpy forward, itself (rollout against update), and the codec's edge cases."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stare_jax import policies
from stare_jax.policies import layers, openvla, sizes, tokenizer

NANO = dict(
  image_size=8,
  patch_size=4,
  dino=dict(width=8, head_size=4, mlp=12, prefix_tokens=3),
  siglip=dict(width=12, head_size=6, mlp=20),
  projector=20,
  llm_width=16,
  llm_head_size=8,
  llm_depth=2,
  llm_mlp=24,
  prompt_length=9,
  value_hidden=(8, 6),
)
INSTRUCTIONS = ["pull the cube to the goal", "push", "lift the peg upright"]
ALL_FREE = (True,) * 7
SOME_FREE = (True, True, False, False, True, False, False)  # between choices, and behind the last one


def stats(free=ALL_FREE) -> policies.ActionStats:
  q01 = np.linspace(-0.9, -0.3, 7).astype(np.float32)
  return policies.ActionStats(q01, np.where(free, q01 + 1.1, q01).astype(np.float32), np.arange(7) < 6)


# The cheapest compilation: these tests compile much and compute little.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def counted(function):
  """`function`, counting in `.traces` how often it was traced."""

  @functools.wraps(function)
  def wrapper(*args):
    wrapper.traces += 1
    return function(*args)

  wrapper.traces = 0
  return wrapper


def nano(free=ALL_FREE, unroll=False, **options):
  """A policy smaller than tiny, with parameters that have no zeros and ones to hide behind; jitted apply and act."""
  return build(free, unroll=unroll, **options)


@functools.cache
def build(free, **options):
  policy = policies.make(stats=stats(free), **{**NANO, **options})
  rng = np.random.default_rng(0)
  draw = lambda spec: spec.fill + rng.normal(0, (spec.std or 0) + 0.2, spec.shape)
  table = openvla.specs(policy.config)
  params = jax.tree.map(draw, table, is_leaf=lambda x: isinstance(x, openvla.Spec))
  params = jax.tree.map(lambda x: jnp.asarray(x, policy.config.param_dtype), params)
  return policy, params, jit(counted(policy.apply)), jit(counted(policy.act))


def some_obs(policy, n=3, seed=0):
  size = policy.config.image_size
  image = np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)
  return policy.encode(image, [INSTRUCTIONS[i % 3] for i in range(n)])


def some_tokens(n=3, seed=1):
  return np.random.default_rng(seed).integers(0, 256, (n, 7)).astype(np.int32)


def log_softmax(logits):
  x = np.asarray(logits, np.float64)
  x = x - x.max(-1, keepdims=True)
  return x - np.log(np.exp(x).sum(-1, keepdims=True))


def log_prob(logits, tokens, temperature=1.0):
  logp = log_softmax(np.asarray(logits) / temperature)
  return np.take_along_axis(logp, np.asarray(tokens)[..., None], axis=-1)[..., 0]


def test_gelu_in_half_the_bits_is_rounded_once():
  """Its negative tail is 0 if 1 + erf is rounded before the product."""
  x = jnp.linspace(-5, 5, 1001).astype(jnp.bfloat16)
  exact = gelu(np.asarray(x, np.float64))
  np.testing.assert_allclose(np.asarray(layers.gelu(x), np.float64), exact, rtol=2**-8, atol=1e-6)


# The whole network again, in float64 numpy: loops over rows, heads and layers, no padding, no cache.


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def gelu(x):
  return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def linear(p, x):
  out = x @ p["kernel"].reshape(p["kernel"].shape[0], -1)
  return out + p["bias"].reshape(-1) if "bias" in p else out


def heads(q, k, v, size, causal):
  out = []
  for h in range(q.shape[-1] // size):
    part = slice(h * size, (h + 1) * size)
    score = q[:, part] @ k[:, part].T / math.sqrt(size)
    if causal:
      score = np.where(np.tril(np.ones_like(score)) > 0, score, -np.inf)
    out.append(softmax(score) @ v[:, part])
  return np.concatenate(out, axis=-1)


def layer(p, i):
  return jax.tree.map(lambda leaf: leaf[i], p)


def vit(p, image, vision, patch):
  grid = image.shape[0] // patch
  x = (image - np.array(vision.mean)) / np.array(vision.std)
  rows = [
    x[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(-1)
    for r in range(grid)
    for c in range(grid)
  ]
  x = linear(p["patch"], np.stack(rows)) + p["position"]
  if vision.prefix_tokens:
    x = np.concatenate([p["prefix"], x])
  scaled = lambda y: (y - y.mean(-1, keepdims=True)) / np.sqrt(y.var(-1, keepdims=True) + 1e-6)
  norm = lambda q, y: scaled(y) * q["scale"] + q["bias"]
  for i in range(vision.depth - 1):
    b = layer(p["layers"], i)
    qkv = np.split(linear(b["attn"]["qkv"], norm(b["norm1"], x)), 3, axis=-1)
    x = x + b.get("scale1", 1.0) * linear(b["attn"]["out"], heads(*qkv, vision.head_size, causal=False))
    x = x + b.get("scale2", 1.0) * linear(b["mlp"]["down"], gelu(linear(b["mlp"]["up"], norm(b["norm2"], x))))
  return x[vision.prefix_tokens :]


def rope(x, size):
  out = x.copy()
  for t in range(len(x)):
    for h in range(x.shape[1] // size):
      for j in range(size // 2):
        angle = t * 1e4 ** (-2 * j / size)
        a, b = x[t, h * size + j], x[t, h * size + j + size // 2]
        out[t, h * size + j] = a * math.cos(angle) - b * math.sin(angle)
        out[t, h * size + j + size // 2] = b * math.cos(angle) + a * math.sin(angle)
  return out


def reference(params, config, image, ids, tokens):
  """One row: image uint8[H, W, 3], unpadded prompt ids, action bins [A] -> (logits [A, V], value)."""
  p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
  image = image / 255.0
  views = [vit(p["vision"][k], image, getattr(config, k), config.patch_size) for k in ("dino", "siglip")]
  x = np.concatenate(views, axis=-1)
  x = linear(p["projector"]["fc3"], gelu(linear(p["projector"]["fc2"], gelu(linear(p["projector"]["fc1"], x)))))
  text = p["llm"]["embed"]["table"][np.concatenate([ids, tokens[:-1] + config.first_action])]
  x = np.concatenate([text[:1], x, text[1:]])
  norm = lambda q, y: y / np.sqrt((y * y).mean(-1, keepdims=True) + 1e-6) * q["scale"]
  for i in range(config.llm_depth):
    b = layer(p["llm"]["layers"], i)
    q, k, v = np.split(linear(b["attn"]["qkv"], norm(b["norm1"], x)), 3, axis=-1)
    size = config.llm_head_size
    x = x + linear(b["attn"]["out"], heads(rope(q, size), rope(k, size), v, size, causal=True))
    gate, up = np.split(linear(b["mlp"]["gate_up"], norm(b["norm2"], x)), 2, axis=-1)
    x = x + linear(b["mlp"]["down"], gate / (1 + np.exp(-gate)) * up)
  hidden = norm(p["llm"]["norm"], x)[-config.action_size :]
  head = p["llm"]["head"]["table"][config.first_action : config.action_end]
  value = linear(p["value"]["fc3"], gelu(linear(p["value"]["fc2"], gelu(linear(p["value"]["fc1"], hidden[0])))))
  return hidden @ head.T, value[0]


@pytest.mark.parametrize("unroll", [False, True], ids=["scan", "unrolled"])
def test_network_equals_an_independent_numpy_forward_without_padding(unroll):
  free = np.array(SOME_FREE if unroll else ALL_FREE)
  policy, params, apply, _ = nano(tuple(free.tolist()), unroll)
  obs, tokens = some_obs(policy), some_tokens()
  assert obs.prompt_mask.sum(1).tolist() == [8, 3, 6]  # rows of different length, all shorter than 9
  out = apply(params, obs, tokens)
  for i in range(3):
    logits, value = reference(params, policy.config, obs.image[i], obs.prompt[i][obs.prompt_mask[i]], tokens[i])
    np.testing.assert_allclose(out.logits[i][free], logits[free], atol=1e-4)
    np.testing.assert_allclose(out.value[i], value, atol=1e-4)
  if not unroll:
    np.testing.assert_allclose(jit(policy.value)(params, obs), out.value, atol=1e-5)


@pytest.mark.parametrize("unroll, free", [(False, ALL_FREE), (True, SOME_FREE)], ids=["scan", "unrolled"])
def test_act_and_apply_agree(unroll, free):
  """The rollout's log-prob and value are the update's; greedy takes the argmax; constant dimensions are certain."""
  policy, params, apply, act = nano(free, unroll)
  keys = jax.random.split(jax.random.key(3), 3)
  for seed, temperature in enumerate((1.0, 0.6, 0.0)):
    obs = some_obs(policy, seed=seed)
    out = act(params, obs, keys, jnp.float32(temperature))
    again = apply(params, obs, out.tokens)
    np.testing.assert_allclose(out.value, again.value, atol=1e-5)
    if temperature:
      np.testing.assert_allclose(out.log_prob, log_prob(again.logits, out.tokens, temperature), atol=1e-5)
    else:
      np.testing.assert_array_equal(out.tokens, again.logits.argmax(-1))
      assert not np.any(out.log_prob)
    fixed = ~np.array(free)
    assert not np.any(np.asarray(out.log_prob)[:, fixed])
    assert np.all(np.asarray(out.tokens)[:, fixed] == policy.tokenize(stats(free).q01)[fixed])
    assert policy.free == free
  assert act.__wrapped__.traces == apply.__wrapped__.traces == 1  # whatever the data and the temperature


def test_a_row_depends_on_its_own_key_and_observation_only():
  policy, params, apply, act = nano()
  obs, keys = some_obs(policy), jax.random.split(jax.random.key(3), 3)
  first = act(params, obs, keys, jnp.float32(1.0))
  order = np.array([2, 1, 0])
  moved = act(params, jax.tree.map(lambda x: x[order], obs), keys[order], jnp.float32(1.0))
  np.testing.assert_array_equal(first.tokens[order], moved.tokens)
  np.testing.assert_allclose(first.log_prob[order], moved.log_prob, atol=1e-6)
  others = act(params, some_obs(policy, seed=9)._replace(image=obs.image), keys.at[1:].set(keys[0]), jnp.float32(1.0))
  np.testing.assert_array_equal(first.tokens[0], others.tokens[0])
  assert np.any(np.asarray(first.tokens[1:]) != np.asarray(others.tokens[1:]))
  raw = act(params, obs, jax.random.key_data(keys), jnp.float32(1.0))
  np.testing.assert_array_equal(first.tokens, raw.tokens)


def test_padding_is_inert():
  """What stands in the padding changes nothing (that its length does not either, the numpy forward shows)."""
  policy, params, apply, act = nano()
  obs, tokens = some_obs(policy), some_tokens()
  garbage = np.where(obs.prompt_mask, obs.prompt, 77)
  out = apply(params, obs, tokens)
  np.testing.assert_array_equal(out.logits, apply(params, obs._replace(prompt=garbage), tokens).logits)
  keys = jax.random.split(jax.random.key(0), 3)
  sampled = act(params, obs, keys, jnp.float32(1.0))
  again = act(params, obs._replace(prompt=garbage), keys, jnp.float32(1.0))
  jax.tree.map(np.testing.assert_array_equal, sampled, again)


def test_samples_follow_the_stated_probabilities():
  """Mean of log p over samples is minus the entropy, at the temperature that sampled them."""
  policy, params, apply, act = nano()
  obs = jax.tree.map(lambda x: np.repeat(x[:1], 3, axis=0), some_obs(policy))
  for temperature in (1.0, 0.5):
    keys = jax.random.split(jax.random.key(5), (200, 3))
    out = [act(params, obs, key, jnp.float32(temperature)) for key in keys]
    tokens, logps = (np.concatenate([getattr(o, name)[:, 0] for o in out]) for name in ("tokens", "log_prob"))
    logits = np.asarray(apply(params, obs, out[0].tokens).logits)[0, 0]
    logp = log_softmax(logits / temperature)
    p = np.exp(logp)
    entropy, spread = -(p * logp).sum(), np.sqrt((p * logp**2).sum() - (p * logp).sum() ** 2)
    assert abs(logps.mean() + entropy) < 4 * spread / np.sqrt(len(logps))
    assert entropy < np.log(256) - 0.05  # the distribution is not simply flat
    top = np.argsort(-p)[:32]
    assert abs(np.isin(tokens, top).mean() - p[top].sum()) < 4 * np.sqrt(0.25 / len(tokens))


def test_gradients_reach_every_parameter_and_no_constant_dimension():
  policy, params, _, _ = nano(free=SOME_FREE)
  obs = some_obs(policy)
  tokens = np.where(SOME_FREE, some_tokens(), policy.tokenize(stats(SOME_FREE).q01)).astype(np.int32)

  def loss(params, dims):
    out = policy.apply(params, obs, tokens)
    logp = jnp.take_along_axis(jax.nn.log_softmax(out.logits), tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(logp, where=dims) + jnp.sum(out.value) * jnp.any(dims & np.array(SOME_FREE))

  gradient = jit(jax.grad(loss))
  everything = gradient(params, np.array(SOME_FREE))
  for path, leaf in jax.tree_util.tree_leaves_with_path(everything):
    assert np.isfinite(leaf).all() and np.any(leaf), jax.tree_util.keystr(path)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient(params, ~np.array(SOME_FREE))))


@pytest.mark.slow
def test_remat_and_unrolling_change_no_gradient():
  obs, tokens = some_obs(nano()[0]), some_tokens()
  gradients = []
  for options in ({}, {"remat": "block"}, {"unroll": True, "remat": "attention"}, {"remat": "products"}):
    policy, params, *_ = nano(**options)
    loss = lambda p, policy=policy: jnp.sum(jax.nn.log_softmax(policy.apply(p, obs, tokens).logits)[..., 3])
    gradients.append(jit(jax.grad(loss))(params))
  for other in gradients[1:]:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), gradients[0], other)


def test_bfloat16_runs_and_answers_in_float32():
  policy, params, apply, act = nano(compute_dtype="bfloat16", param_dtype="bfloat16")
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  obs = some_obs(policy)
  out = act(params, obs, jax.random.split(jax.random.key(0), 3), jnp.float32(1.0))
  forced = jax.eval_shape(apply, params, obs, out.tokens)
  assert {x.dtype for x in (forced.logits, forced.value, out.log_prob, out.value)} == {jnp.dtype("float32")}
  exact = nano()[2](jax.tree.map(lambda x: x.astype(jnp.float32), params), obs, out.tokens)
  np.testing.assert_allclose(out.log_prob, log_prob(exact.logits, out.tokens), atol=0.3)
  np.testing.assert_allclose(out.value, exact.value, atol=0.1 * np.abs(exact.value).max() + 0.02)


def shapes(size: str):
  policy = policies.make(size=size, stats=stats(), tokenizer=lambda text: [])
  return policy, jax.eval_shape(policy.init, jax.random.key(0))


def count(tree) -> int:
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_7b_has_the_public_parameter_count():
  """7,541,237,184 in the public file, less what its forward never reads; the value head comes on top."""
  _, params = shapes("7b")
  affine = lambda i, o: i * o + o
  block = lambda w, mlp: 4 * w + affine(w, 3 * w) + affine(w, w) + affine(w, mlp) + affine(mlp, w)
  dino = block(1024, 4096) + 2 * 1024 + 2 * 1024  # last block with LayerScale, final norm
  pool = 1152 + affine(1152, 1152) + affine(1152, 2 * 1152) + affine(1152, 1152) + 2 * 1152
  pool += affine(1152, 4304) + affine(4304, 1152)
  siglip = block(1152, 4304) + 2 * 1152 + pool
  assert count({k: v for k, v in params.items() if k != "value"}) == 7_541_237_184 - dino - siglip
  assert count(params["value"]) == affine(4096, 512) + affine(512, 128) + 128
  assert count(params["vision"]["dino"]) == 303_230_976 - dino
  assert count(params["vision"]["siglip"]) == 427_680_704 - siglip
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("size", ["tiny", "7b"])
def test_every_parameter_has_a_sharding_rule(size):
  policy, params = shapes(size)
  cut = 0
  for path, leaf in jax.tree_util.tree_leaves_with_path(params):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    words = next((words for pattern, words in policy.param_axes if re.fullmatch(pattern, name)), None)
    assert words is not None, f"{name} {leaf.shape} has no rule"
    assert len(words) == len(leaf.shape) - ("/layers/" in name), f"{name} {leaf.shape}: {words}"
    cut += count(leaf) if any(words) else 0
  assert cut > 0.95 * count(params)


def test_tiny_is_small_and_starts_calm():
  policy, _, apply, _ = nano()
  params = jit(policy.init)(jax.random.key(1))
  out = apply(params, some_obs(policy), some_tokens())
  assert not np.any(out.value)
  assert np.abs(log_prob(out.logits, some_tokens()) + np.log(256)).max() < 0.7
  assert 0.5e6 < count(shapes("tiny")[1]) < 3e6


@pytest.mark.parametrize("dim", [0, 6])
def test_one_choice_is_enough(dim):
  policy, params, *_ = build(tuple(d == dim for d in range(7)), unroll=False)
  keys = jax.random.split(jax.random.key(0), 3)
  out = jax.eval_shape(policy.act, params, some_obs(policy), keys, jnp.float32(1.0))
  assert out.tokens.shape == out.log_prob.shape == (3, 7)
  assert jax.eval_shape(policy.apply, params, some_obs(policy), some_tokens()).logits.shape == (3, 7, 256)


# Codec and prompt.


def test_codec_edge_cases():
  codec = tokenizer.ActionCodec(-np.ones(1), np.ones(1), np.zeros(1, bool))
  ids = lambda action: int(codec.tokenize(np.array([action]))[0]) + 31744
  assert [ids(x) for x in (-1.0, -5.0, 0.0, 1.0, 5.0, 0.9999)] == [31999, 31999, 31872, 31744, 31744, 31745]
  value = lambda token: float(codec.decode(np.array([token - 31744]))[0])
  top = 1 - 1 / 255
  for token, expected in ((31744, top), (31745, top), (31872, 0.0), (31999, -top), (2, top), (32063, -top)):
    assert value(token) == pytest.approx(expected, abs=1e-6)
  bins = np.arange(256)[:, None]
  assert (np.diff(codec.decode(bins)[:, 0]) <= 0).all()  # a higher id is more negative
  np.testing.assert_array_equal(codec.tokenize(codec.decode(bins))[1:], bins[1:])  # bin 0 decodes to bin 1's centre


def test_actions_come_back_within_half_a_bin(rng):
  free = SOME_FREE
  s, policy = stats(free), policies.make(stats=stats(free), **NANO)
  actions = rng.uniform(s.q01, s.q99, (500, 7)).astype(np.float32)
  actions[:, 6] = s.q01[6]
  back = policy.decode(policy.tokenize(actions))
  assert back.dtype == np.float32 and policy.tokenize(actions).dtype == np.int32
  assert (np.abs(back - actions) <= (s.q99 - s.q01) / 255 * 0.51 + 1e-6).all()
  np.testing.assert_array_equal(back[:, ~np.array(free)], actions[:, ~np.array(free)])
  strays = actions + np.where(free, 0, 0.3).astype(np.float32)  # a constant dimension has one bin only
  np.testing.assert_array_equal(policy.tokenize(strays), policy.tokenize(actions))


def test_statistics_from_actions(rng):
  actions = rng.normal(size=(2000, 7)).astype(np.float32)
  actions[:, 3:6] = [0.0, 0.2, -0.1]
  actions[:, 6] = -1.0
  s = policies.ActionStats.from_actions(actions)
  assert s.free == (True, True, True, False, False, False, False)
  np.testing.assert_allclose(s.q01[:3], np.quantile(actions[:, :3], 0.01, axis=0), rtol=1e-6)
  np.testing.assert_allclose(s.q99[3:], [0.0, 0.2, -0.1, -1.0])
  actions[5, 6] = 1.0  # a gripper that closes once in 2000 steps is still a choice
  s = policies.ActionStats.from_actions(actions)
  assert s.free[6] and (s.q01[6], s.q99[6]) == (-1.0, 1.0) and not s.mask[6] and s.mask[:6].all()


def test_words_have_ids_and_strange_words_are_spelled():
  encode = tokenizer.WordTokenizer()
  assert len(encode("pull the cube to the goal")) == 6
  assert encode("Pull  THE cube") == encode("pull the cube")
  texts = ["pull", "p ull", "pul l", "a", "xa", "x a", "cube.", "cube", "cu be", "xy zzy", "xyzzy"]
  assert len({tuple(encode(t)) for t in texts}) == len(texts)
  assert all(3 < i < encode.size for t in texts for i in encode(t))
  with pytest.raises(ValueError, match="ASCII"):
    encode("pousser le blé")


def test_7b_prompt_ids():
  """The published ids of one instruction; START is appended once, padding follows BOS."""
  golden = [512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304]  # In: What action should the robot take to
  golden += [1925, 805, 6150, 373, 304, 20466, 29973, 13, 3744, 29901]
  seen = []
  for tail in ([], [29871]):
    tokenize = lambda text, tail=tail: seen.append(text) or golden + tail
    ids, mask = openvla.encode_prompt(sizes.SEVEN_B, tokenize, "Put spoon on towel")
    assert ids[mask].tolist() == [1, *golden, 29871] and len(ids) == 48
    assert mask[0] and not mask[1:-20].any() and (ids[1:-20] == 32000).all()
  assert seen[0] == "In: What action should the robot take to put spoon on towel?\nOut:"


def test_encode_resizes_and_keeps_uint8(rng):
  policy, *_ = nano()
  images = rng.integers(0, 256, (2, 16, 24, 3), dtype=np.uint8)
  obs = policy.encode(images, INSTRUCTIONS[:2])
  assert obs.image.shape == (2, 8, 8, 3) and obs.image.dtype == np.uint8
  assert obs.prompt.dtype == np.int32 and obs.prompt_mask.dtype == bool


@pytest.mark.parametrize(
  "options, message",
  [
    (dict(size="tny"), "'tiny'"),
    (dict(name="openvl"), "'openvla'"),
    (dict(llm_widht=8), "'llm_width'"),
    (dict(dino={"widht": 8}), "'dino.width'"),
    (dict(llm_width=100), "head size"),
    (dict(image_size=65), "multiple of patch_size"),
    (dict(size="7b"), "tokenizer="),
    (dict(stats=stats((False,) * 7)), "nothing to learn"),
    (dict(stats=policies.ActionStats(np.ones(2), np.ones(3), np.ones(3, bool))), "expected \\[D\\] each"),
  ],
)
def test_bad_options_say_what_to_write(options, message):
  with pytest.raises(ValueError, match=message):
    policies.make(**{"stats": stats(), **options})


def test_bad_input_is_refused_before_it_runs():
  policy, params, _, _ = nano()
  obs = some_obs(policy)
  with pytest.raises(ValueError, match="prompt_length"):
    policy.encode(obs.image[:1], ["pull the cube to the goal and then push the cube"])
  with pytest.raises(ValueError, match="uint8"):
    policy.encode(obs.image.astype(np.float32), INSTRUCTIONS)
  with pytest.raises(ValueError, match="instructions"):
    policy.encode(obs.image, INSTRUCTIONS[:1])
  with pytest.raises(ValueError, match="uint8"):
    jax.eval_shape(policy.apply, params, obs._replace(image=obs.image[:, :4]), some_tokens())
  with pytest.raises(ValueError, match="tokens"):
    jax.eval_shape(policy.apply, params, obs, some_tokens()[:, :6])
  with pytest.raises(ValueError, match="prompt"):
    jax.eval_shape(policy.value, params, obs._replace(prompt=obs.prompt[:, 1:]))
  with pytest.raises(ValueError, match="NaN"):
    policy.tokenize(np.full((1, 7), np.nan))
