"""Parity with public OpenVLA, at a small size: the same weights in PyTorch (`torch_openvla`) and here.

Float32 agrees to `ATOL` with the highest matmul precision; every rule of the architecture, broken in the reference,
differs by several times that.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from stare_jax import policies
from stare_jax.losses import imitation
from stare_jax.policies import openvla, openvla_names
from tests import torch_openvla

torch.set_num_threads(1)  # tiny products; threads would wait for each other
ATOL = 1e-4
SMALL = dict(
  image_size=56,
  dino=dict(width=32, depth=3, head_size=16, mlp=64),
  siglip=dict(width=36, depth=3, head_size=12, mlp=134),
  projector=272,
  llm_width=48,
  llm_head_size=16,
  llm_depth=2,
  llm_mlp=96,
  vocabulary=384,  # 320 and padding to a multiple of 64, as 32000 becomes 32064
  action_end=320,
  start=60,
  pad=320,
  template="{instruction}",
  prompt_length=12,
  value_hidden=(24, 12),
  compute_dtype="float32",
  param_dtype="float32",
  remat="none",
)
INSTRUCTIONS = ["put the spoon on the towel", "stack the green block", "put eggplant in the yellow basket now please"]
BRIDGE = policies.ActionStats(
  np.array([-0.02872725, -0.0417035, -0.02609386, -0.08092105, -0.092887, -0.20718276, 0.0], np.float32),
  np.array([0.02830968, 0.04085525, 0.04016159, 0.08192048, 0.07792851, 0.20382575, 1.0], np.float32),
  np.arange(7) < 6,
)

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # compiles cheaply


@pytest.fixture(autouse=True)
def full_precision():
  with jax.default_matmul_precision("highest"):
    yield


def tokenize(text: str) -> list[int]:
  return [3 + (7 * ord(word[0]) + 11 * len(word)) % 57 for word in text.split()]


def build(seed: int = 0, **options):
  """The policy, and the reference with weights of its own."""
  policy = policies.make(size="7b", stats=BRIDGE, tokenizer=tokenize, **{**SMALL, **options})
  model = torch_openvla.OpenVLA(policy.config)
  torch_openvla.randomise(model, seed)
  return policy, model


def ported(policy, model, dtype="float32"):
  params = openvla_names.to_params(policy.config, model.public_state())
  return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


class Pair:
  """Both models on the same three rows, whose prompts differ in length."""

  def __init__(self):
    self.policy, self.model = build()
    self.params = ported(self.policy, self.model)
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    self.obs = self.policy.encode(images, INSTRUCTIONS)
    self.bins = rng.integers(0, 256, (3, 7)).astype(np.int32)
    self.pixels = self.model.pixels(images)
    self.everything = jit(self._everything)(self.params, self.obs, self.bins)
    with torch.no_grad():
      self.expected = self.unpadded(self.model)

  def _everything(self, params, obs, bins):
    config = self.policy.config
    patches = openvla.patchify(obs.image, config.patch_size).astype(jnp.float32) / 255
    views = {k: openvla.encode_vision(params["vision"][k], patches, v, config) for k, v in config.views.items()}
    return {**views, "projection": openvla.encode_image(params, obs.image, config)}, self.policy.apply(
      params, obs, bins
    )

  def ids(self, row: int) -> torch.Tensor:
    """The prompt as a tokenizer gives it: no padding. int64[1, S]."""
    return torch.from_numpy(self.obs.prompt[row][self.obs.prompt_mask[row]]).long()[None]

  def rows(self, function):
    """`function(pixels, ids, row)` of each row alone, its outputs stacked."""
    outputs = [function(self.pixels[i : i + 1], self.ids(i), i) for i in range(3)]
    return [torch.cat(parts) for parts in zip(*outputs)]

  def unpadded(self, model):
    pixels = model.pixels(self.obs.image)
    bins = torch.from_numpy(self.bins).long()
    return self.rows(lambda _, ids, i: model.teacher_forced(pixels[i : i + 1], ids, bins[i : i + 1]))

  def actions(self, logits: torch.Tensor) -> torch.Tensor:
    return logits[..., self.policy.config.first_action : self.policy.config.action_end]


@functools.cache
def pair() -> Pair:
  return Pair()


def gap(a, b) -> float:
  return float(np.abs(np.asarray(a, np.float64) - np.asarray(b.detach() if torch.is_tensor(b) else b)).max())


def test_features_projection_logits_and_value():
  p = pair()
  (found, out), model = p.everything, p.model
  with torch.no_grad():
    backbone = model.vision_backbone
    np.testing.assert_allclose(found["dino"], backbone["featurizer"](p.pixels[:, :3]), atol=ATOL)
    np.testing.assert_allclose(found["siglip"], backbone["fused_featurizer"](p.pixels[:, 3:]), atol=ATOL)
    np.testing.assert_allclose(found["projection"], model.projector(model.features(p.pixels)), atol=ATOL)
  logits, value = p.expected
  assert p.actions(logits).std() > 0.5 and value.std() > 0.01  # something to agree on
  np.testing.assert_allclose(out.logits, p.actions(logits), atol=ATOL)
  np.testing.assert_allclose(out.value, value, atol=ATOL)


@pytest.mark.parametrize("side", ["behind the begin token", "right"])
def test_padded_rows_equal_their_unpadded_runs(side):
  """The reference too, padded as here and as the public collator does; and here with more padding than needed."""
  p, model = pair(), pair().model
  lengths = p.obs.prompt_mask.sum(1)
  assert len(set(lengths.tolist())) == 3
  bins = torch.from_numpy(p.bins).long()
  with torch.no_grad():
    if side == "right":
      width = int(lengths.max()) + 6
      ids, mask = torch.full((3, width), p.policy.config.pad), torch.zeros((3, width), dtype=torch.bool)
      for i, length in enumerate(lengths):
        ids[i, : length + 6] = torch.cat([p.ids(i)[0], bins[i, :6] + p.policy.config.first_action])
        mask[i, : length + 6] = True
      out = model(p.pixels, ids, mask)
      first = torch.from_numpy(lengths) - 1 + p.policy.config.patches
      at = first[:, None] + torch.arange(7)
      logits = out.logits[torch.arange(3)[:, None], at]
      value = model.value(out.hidden[torch.arange(3), first])
    else:
      ids, mask = torch.from_numpy(p.obs.prompt).long(), torch.from_numpy(p.obs.prompt_mask)
      logits, value = model.teacher_forced(p.pixels, ids, bins, mask)
  np.testing.assert_allclose(logits, p.expected[0], atol=ATOL)
  np.testing.assert_allclose(value, p.expected[1], atol=ATOL)
  np.testing.assert_allclose(p.everything[1].logits, p.actions(logits), atol=ATOL)


def test_loss_and_every_gradient():
  """Cross-entropy of the action tokens and a squared value; the gradients go through the map of the weights."""
  p, model = pair(), pair().model
  target = np.array([0.5, -1.0, 2.0], np.float32)

  def loss(params):
    out = p.policy.apply(params, p.obs, p.bins)
    nll, _ = imitation.cross_entropy(out.logits, jnp.asarray(p.bins), jnp.ones(p.bins.shape, bool))
    return nll + jnp.mean(jnp.square(out.value - target)), nll

  (_, nll), grads = jit(jax.value_and_grad(loss, has_aux=True))(p.params)
  model.zero_grad()
  logits, value = p.unpadded(model)
  expected = F.cross_entropy(p.actions(logits).flatten(0, 1), torch.from_numpy(p.bins).long().flatten())
  (expected + (value - torch.from_numpy(target)).square().mean()).backward()
  assert gap(nll, expected) < ATOL
  tensors = {name: x.grad for name, x in model.named_parameters()}
  dead = {name for name, x in tensors.items() if x is None}
  assert all(".blocks.2." in name or "r.norm." in name or ".attn_pool." in name for name in dead) and len(dead) > 40
  shapes = {name: x.shape for name, x in model.named_parameters()}
  tensors = {name: np.zeros(shapes[name], np.float32) if x is None else x.numpy() for name, x in tensors.items()}
  expected = openvla_names.to_params(p.policy.config, tensors)
  for (path, found), reference in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(expected)):
    scale = np.abs(reference).max()
    assert scale > 0, path
    np.testing.assert_allclose(found / scale, reference / scale, atol=ATOL, err_msg=jax.tree_util.keystr(path))
  model.zero_grad()


@functools.cache
def compiled_act():
  return jit(pair().policy.act)


def test_greedy_and_sampled_actions():
  """The same tokens under the same noise, their log-probabilities, the value, the action in the robot's units."""
  p, model = pair(), pair().model
  keys = jax.random.split(jax.random.key(4), 3)
  noise = torch.from_numpy(np.array(jax.vmap(lambda key: jax.random.gumbel(key, (1, 7, 256)))(keys)))
  for temperature in (0.0, 1.0, 0.6):
    out = compiled_act()(p.params, p.obs, keys, jnp.float32(temperature))
    rolls = noise if temperature else [None] * 3
    bins, log_prob = p.rows(lambda x, ids, i, t=temperature, r=rolls: model.sample(x, ids, r[i], t))
    np.testing.assert_array_equal(out.tokens, bins)
    np.testing.assert_allclose(out.log_prob, log_prob if temperature else 0 * log_prob, atol=ATOL)
    np.testing.assert_allclose(out.value, p.expected[1], atol=ATOL)
    centers = (np.linspace(-1, 1, 256)[1:] + np.linspace(-1, 1, 256)[:-1]) / 2
    centred = centers[np.clip(320 - (bins.numpy() + 64) - 1, 0, 254)]  # of ids, as the public codec has it
    motion = 0.5 * (centred + 1) * (BRIDGE.q99 - BRIDGE.q01) + BRIDGE.q01
    np.testing.assert_allclose(p.policy.decode(out.tokens), np.where(BRIDGE.mask, motion, centred), atol=1e-6)


@pytest.mark.parametrize("rule", torch_openvla.WRONG)
def test_a_broken_rule_would_show(rule):
  """Each by at least five tolerances, at the weights at which the right reference agrees."""
  p = pair()
  wrong = torch_openvla.OpenVLA(p.policy.config, wrong=rule)
  wrong.load_state_dict(p.model.state_dict())
  found, out = p.everything
  with torch.no_grad():
    logits, _ = p.unpadded(wrong)
    features = wrong.features(wrong.pixels(p.obs.image))
  ours = np.concatenate([found["dino"], found["siglip"]], axis=-1)
  assert max(gap(out.logits, p.actions(logits)), gap(ours, features)) > 5 * ATOL, torch_openvla.WRONG[rule]


def test_bfloat16():
  """Weights and products in bfloat16, against PyTorch in bfloat16 and both against float32 on the same rounded weights.

  Measured: logits of standard deviation 1.1 differ from float32 by up to 0.058 here and 0.050 in PyTorch, and by 0.063
  from each other, as two roundings of one sum may; the value by 0.012 and 0.009. So 0.1, and twice PyTorch's own error.
  """
  p = pair()
  policy, model = build(compute_dtype="bfloat16", param_dtype="bfloat16")
  model = model.bfloat16()
  params = ported(policy, model, "bfloat16")
  out = jit(policy.apply)(params, p.obs, p.bins)
  bins = torch.from_numpy(p.bins).long()
  with torch.no_grad():
    half = p.rows(lambda pixels, ids, i: model.teacher_forced(pixels.bfloat16(), ids, bins[i : i + 1]))
    exact = p.rows(lambda pixels, ids, i: model.float().teacher_forced(pixels, ids, bins[i : i + 1]))
  error = [gap(x, p.actions(exact[0])) for x in (out.logits, p.actions(half[0]))]
  assert 0 < error[0] < min(2 * error[1], 0.1)
  assert gap(out.logits, p.actions(half[0])) < 0.1
  assert gap(out.value, exact[1]) < 0.03


# The peers' decoding, `faithful=True`.


def end_early(model, params, row: int, step: int):
  """A head in which the end token beats what `row` would greedily say at `step` (or whenever it says it before)."""
  p = pair()
  free = dict(max_new_tokens=7, do_sample=False, eos_token_id=383)
  said = model.language_model.generate(**prompt(model, row), **free)[0, step]
  with torch.no_grad():
    head = model.language_model.lm_head.weight
    head[p.policy.config.eos] = 1.1 * head[said]
  table = params["llm"]["head"]["table"].at[p.policy.config.eos].set(1.1 * params["llm"]["head"]["table"][int(said)])
  return {**params, "llm": {**params["llm"], "head": {"table": table}}}


def prompt(model, row: int):
  p = pair()
  inputs = model.prefix(p.pixels[row : row + 1], p.ids(row))
  return {name: inputs[name] for name in ("inputs_embeds", "attention_mask")}


@functools.cache
def faithful():
  """(policy, its compiled act, model, params): weights with which one of the three rows ends early."""
  policy, model = build(faithful=True)
  return policy, jit(policy.act), model, end_early(model, pair().params, 0, 3)


def test_faithful_greedy_is_generate_over_the_whole_vocabulary():
  """transformers' `generate`, and the last seven ids of prompt and answer, whatever they are."""
  p, (policy, act, model, params) = pair(), faithful()
  out = act(params, p.obs, jax.random.split(jax.random.key(0), 3), jnp.float32(0.0))
  lengths, ids = [], []
  for i in range(3):
    answer = model.language_model.generate(**prompt(model, i), max_new_tokens=7, do_sample=False)[0]
    lengths.append(len(answer))
    ids.append(torch.cat([p.ids(i)[0], answer])[-7:].tolist())
  np.testing.assert_array_equal(np.asarray(out.tokens) + policy.config.first_action, ids)
  assert min(lengths) < 7 == max(lengths)  # one row ended early, another did not
  assert np.any(np.array(ids)[np.argmax(lengths)] < 64)  # and even that one says what is no action
  motion = policy.decode(out.tokens)
  assert np.all(np.abs(motion - policy.decode(np.clip(out.tokens, 0, 255))) < 1e-6)  # outside: the nearest bin
  assert np.all(motion[0, :6] <= BRIDGE.q99[:6]) and np.isfinite(motion).all()
  assert not np.any(out.log_prob)


def test_faithful_sampling_draws_from_the_top_and_scores_the_whole():
  """Temperature and top-k 50 in what is drawn, neither in what is scored; the default has the first in both."""
  p, (policy, act, model, params) = pair(), faithful()
  config, temperature = policy.config, 2.0
  draws = [act(params, p.obs, jax.random.split(jax.random.key(i), 3), jnp.float32(temperature)) for i in range(40)]
  rank, free = [], []
  with torch.no_grad():
    logits = p.rows(lambda pixels, ids, _: (model(pixels, ids, keep=1).logits[:, -1],))[0]
  scores = F.log_softmax(logits[:, config.first_action : config.action_end], dim=-1).numpy()
  for out in draws:
    token = np.asarray(out.tokens)[:, 0]
    rank += (scores > np.take_along_axis(scores, token[:, None], axis=1)).sum(1).tolist()
    np.testing.assert_allclose(out.log_prob[:, 0], scores[range(3), token], atol=ATOL)
  assert 25 < max(rank) < 50 and len(set(rank)) > 20
  default = compiled_act()
  for i in range(40):
    token = np.asarray(default(params, p.obs, jax.random.split(jax.random.key(i), 3), jnp.float32(temperature)).tokens)
    free += (scores > np.take_along_axis(scores, token[:, :1], axis=1)).sum(1).tolist()
  assert max(free) > 50
  bins = torch.from_numpy(np.array(draws[0].tokens)).long()
  with torch.no_grad():
    forced = p.rows(lambda pixels, ids, i: model.teacher_forced(pixels, ids, bins[i : i + 1]))[0]
  expected = F.log_softmax(forced[..., config.first_action : config.action_end], dim=-1).gather(2, bins[..., None])
  np.testing.assert_allclose(draws[0].log_prob, expected[..., 0], atol=ATOL)
  ours = default(params, p.obs, jax.random.split(jax.random.key(0), 3), jnp.float32(temperature))
  assert gap(ours.log_prob, draws[0].log_prob) > 0.05


def test_faithful_needs_actions_that_vary():
  still = policies.ActionStats(BRIDGE.q01, np.where(np.arange(7) == 4, BRIDGE.q01, BRIDGE.q99), BRIDGE.mask)
  with pytest.raises(ValueError, match=r"dimensions \[4\] never vary"):
    policies.make(stats=still, faithful=True)
