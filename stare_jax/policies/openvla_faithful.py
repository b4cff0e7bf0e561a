"""What public OpenVLA code does at decoding and this project does not, for comparison with its published figures.

Off unless `Config.faithful`. Greedy (temperature 0) is `predict_action` of the OpenVLA release on one row at a time:

  full vocabulary   the argmax is over all of lm_head, not over the action ids; what is no action id still decodes: ids
                    below count as +0.996, ids above as -0.996
  early end         `generate` stops behind the end token, and the last seven ids of prompt and answer together are
                    taken as the action: the prompt's tail, and the end token itself, become motions

Sampled (temperature > 0) is the rollout of RL4VLA:

  top-k             only the 50 likeliest action tokens are drawn, the default of `generate` that nobody turned off
  two policies      what is drawn has the temperature and the cut; what is scored, log_prob, has neither

so the policy that acts is not the one that an update improves. In the tokens, ids that are no actions lie outside
[0, V): `decode` takes them, `apply` and an update must not. The default `act` draws from exactly what it scores.

Axes: N rows, L prompt tokens, A action tokens, V action bins.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stare_jax.policies import Act, Obs, openvla
from stare_jax.policies import layers as nn
from stare_jax.policies.sizes import Config

TOP_K = 50  # transformers' GenerationConfig


def all_logits(params: Any, hidden: jax.Array) -> jax.Array:
  """[N, W] after the final norm -> float32[N, vocabulary]."""
  head = params["llm"]["head"]
  return nn.rows(head, hidden, 0, len(head["table"]))


def top(logits: jax.Array, count: int = TOP_K) -> jax.Array:
  """The `count` largest of the last axis, and their equals; -inf elsewhere."""
  least = jax.lax.top_k(logits, min(count, logits.shape[-1]))[0][..., -1:]
  return jnp.where(logits < least, -jnp.inf, logits)


def tail(obs: Obs, answer: jax.Array, eos: int, bos: int) -> jax.Array:
  """int32[N, A]: the last A of [prompt, answer up to its first end token], ids as they are."""
  count = answer.shape[1]
  ended = answer == eos
  missing = jnp.where(ended.any(axis=1), count - 1 - jnp.argmax(ended, axis=1), 0)  # ids that were never generated
  last = obs.prompt[:, -count:]  # right-aligned by `encode_prompt`; what lies before the text is BOS
  last = jnp.where(obs.prompt_mask[:, -count:], last, bos)
  both = jnp.concatenate([last, answer], axis=1)
  return jnp.take_along_axis(both, np.arange(count, 2 * count) - missing[:, None], axis=1)


def act(config: Config, params: Any, obs: Obs, keys: jax.Array, temperature: jax.Array) -> Act:
  """As `openvla.act`, with the habits above; log_prob is 0 where greedy."""
  openvla.check(config, obs)
  config = dataclasses.replace(config, unroll=False)
  if jnp.issubdtype(keys.dtype, jnp.uint32):
    keys = jax.random.wrap_key_data(keys)
  x, mask = openvla.sequence(params, obs, jnp.zeros((len(obs.prompt), 0), jnp.int32), config)
  x, prefix = openvla.decoder(params, x, mask, config, tail=1, cache=True)
  first = openvla.final_norm(params, x[:, 0], config)
  draw = lambda key: jax.random.gumbel(key, (config.action_size, config.bins))
  greedy = temperature <= 0

  def step(carry, inputs):
    hidden, suffix = carry
    dim, noise = inputs
    logits = all_logits(params, hidden)
    scores = logits[:, config.first_action : config.action_end]
    drawn = jnp.argmax(top(scores) + temperature * noise, axis=-1)
    token = jnp.where(greedy, jnp.argmax(logits, axis=-1) - config.first_action, drawn).astype(jnp.int32)
    score = openvla.log_prob(scores, jnp.clip(token, 0, config.bins - 1), jnp.where(greedy, 0.0, 1.0))
    return openvla.extend(params, token, dim, mask, (prefix, suffix), config), (token, score)

  suffix = openvla.no_tokens(prefix, config.action_size)
  steps = (np.arange(config.action_size), jax.vmap(draw, out_axes=1)(keys))
  _, (tokens, log_prob) = jax.lax.scan(step, (first, suffix), steps)
  public = tail(obs, tokens.T + config.first_action, config.eos, config.bos) - config.first_action
  return Act(
    tokens=jnp.where(greedy, public, tokens.T), log_prob=log_prob.T, value=openvla.value_head(params, first)
  )
