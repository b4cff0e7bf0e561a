"""The PyTorch half of torch_comparison: OpenVLA with transformers' Llama and peft's LoRA, as its users run it.

Scaled-dot-product attention, a key-value cache in decoding, bfloat16 weights under autocast on a GPU, float32 on a CPU,
fused AdamW on a GPU, gradient checkpointing of the decoder where the batch does not fit without. lm_head runs at the
action positions only, which the public training codes do not do; nothing else is tuned by hand.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F
from transformers import LogitsProcessor

from tests import torch_openvla


class ActionIds(LogitsProcessor):
  """-inf for every id that is no action."""

  def __init__(self, config: Any):
    self.first, self.end = config.first_action, config.action_end

  def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    out = torch.full_like(scores, -torch.inf)
    out[:, self.first : self.end] = scores[:, self.first : self.end]
    return out


class Torch:
  """The model on its device, and one method for each thing that is timed."""

  def __init__(self, config: Any, *, device: str, seed: int = 0):
    self.config, self.device = config, torch.device(device)
    self.half = self.device.type == "cuda"
    torch.manual_seed(seed)
    if self.half:
      torch.set_default_dtype(torch.bfloat16)
    try:
      with self.device:
        self.model = torch_openvla.OpenVLA(config)
    finally:
      torch.set_default_dtype(torch.float32)
    if not self.half:
      torch_openvla.randomise(self.model, seed)
    self.model.eval()  # no dropout anywhere; the training codes stay in this mode too
    self.optimizer: torch.optim.Optimizer | None = None

  def autocast(self) -> contextlib.AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if self.half else contextlib.nullcontext()

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """A batch on the device: the pixels normalised, ids as int64."""
    out = {"pixels": self.model.pixels(batch["image"])}
    for name, x in batch.items():
      if name != "image":
        x = torch.from_numpy(np.asarray(x))
        out[name] = x.long() if not x.is_floating_point() and x.dtype != torch.bool else x
    out = {name: x.to(self.device) for name, x in out.items()}
    return out | {"pixels": out["pixels"].bfloat16() if self.half else out["pixels"]}

  def synchronise(self) -> None:
    if self.half:
      torch.cuda.synchronize()

  def measure_peak(self, function: Callable[[], Any]) -> int | None:
    """Bytes of device memory while it runs; None on a CPU."""
    if self.half:
      torch.cuda.empty_cache()
      torch.cuda.reset_peak_memory_stats()
    function()
    self.synchronise()
    return torch.cuda.max_memory_allocated() if self.half else None

  # Acting ---------------------------------------------------------------------------------------------------

  @torch.no_grad()
  def generate(self, batch: dict[str, torch.Tensor]):
    """transformers' `generate`: tokens, their log-probabilities, the value of the last layer at the first position."""
    inputs = self.model.prefix(batch["pixels"], batch["prompt"], batch["mask"])
    del inputs["position_ids"]  # `generate` makes them from the mask
    out = self.model.language_model.generate(
      **inputs, max_new_tokens=self.config.action_size, do_sample=True, top_k=0, temperature=1.0,
      logits_processor=[ActionIds(self.config)], output_scores=True, output_hidden_states=True,
      return_dict_in_generate=True, use_cache=True,
    )  # fmt: skip
    scores = torch.stack(out.scores, dim=1).float().log_softmax(dim=-1)
    score = scores.gather(2, out.sequences[..., None])[..., 0]
    return out.sequences - self.config.first_action, score, self.model.value(out.hidden_states[0][-1][:, -1])

  @torch.no_grad()
  def cached_loop(self, batch: dict[str, torch.Tensor]):
    """The same by hand: the decoder against its cache, without `generate`'s book-keeping."""
    config, llm = self.config, self.model.language_model
    inputs = self.model.prefix(batch["pixels"], batch["prompt"], batch["mask"])
    mask, position = inputs["attention_mask"], inputs["position_ids"][:, -1:]
    out = llm.model(**inputs, use_cache=True)
    hidden, cache = out.last_hidden_state[:, -1], out.past_key_values
    head = llm.lm_head.weight[config.first_action : config.action_end]
    value, tokens, scores = self.model.value(hidden), [], []
    for dim in range(config.action_size):
      logits = F.linear(hidden, head).float().log_softmax(dim=-1)
      token = torch.multinomial(logits.exp(), 1)
      tokens.append(token)
      scores.append(logits.gather(1, token))
      if dim == config.action_size - 1:
        break
      mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
      position = position + 1
      out = llm.model(
        input_ids=token + config.first_action, attention_mask=mask, position_ids=position, past_key_values=cache,
        use_cache=True,
      )  # fmt: skip
      hidden, cache = out.last_hidden_state[:, -1], out.past_key_values
    return torch.cat(tokens, dim=1), torch.cat(scores, dim=1), value

  # Updates --------------------------------------------------------------------------------------------------

  def adapt(self, rank: int, alpha: float, modules: list[str]) -> None:
    """peft's adapters on the named modules in float32, everything else but the value head frozen; rank 0 trains all."""
    if rank:
      inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules), self.model)
      for name, p in self.model.named_parameters():
        p.requires_grad_("lora_" in name or name.startswith("value_head."))
        if p.requires_grad:
          p.data = p.data.float()
    trained = [p for p in self.model.parameters() if p.requires_grad]
    self.trained = trained
    self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=self.half)

  def checkpoint(self, on: bool) -> None:
    """Recompute the decoder's layers in the backward pass, or keep what they made."""
    llm = self.model.language_model
    if on:
      llm.gradient_checkpointing_enable({"use_reentrant": False})
    else:
      llm.gradient_checkpointing_disable()
    llm.train(on)  # transformers checkpoints in this mode only; Llama has no dropout

  def _step(self, loss: Callable[[], torch.Tensor]) -> torch.Tensor:
    self.optimizer.zero_grad(set_to_none=True)
    with self.autocast():
      value = loss()
    value.backward()
    torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
    self.optimizer.step()
    return value.detach()

  def _forward(self, batch: dict[str, torch.Tensor]):
    """Log-probabilities of all action ids [N, A, V], those of the tokens [N, A], value [N]."""
    config = self.config
    logits, value = self.model.teacher_forced(batch["pixels"], batch["prompt"], batch["tokens"], batch["mask"])
    scores = logits[..., config.first_action : config.action_end].float().log_softmax(dim=-1)
    return scores, scores.gather(2, batch["tokens"][..., None])[..., 0], value

  def sft(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return self._step(lambda: -self._forward(batch)[1].mean())

  def ppo(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    def loss() -> torch.Tensor:
      scores, log_prob, value = self._forward(batch)
      ratio = (log_prob.sum(-1) - batch["log_prob"].sum(-1)).exp()
      advantage = batch["advantage"]
      surrogate = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage).mean()
      entropy = -(scores.exp() * scores).sum((-1, -2)).mean()
      return -surrogate + 0.5 * 0.5 * (value - batch["returns"]).square().mean() - 0.01 * entropy

    return self._step(loss)

  def preference(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """StA-TPO, all steps of all pairs in one graph (rows b and B + b are a pair); reference log-probs are data."""
    stage, cost, sign = batch["stage_id"], batch["cost"], batch["sign"]

    def loss() -> torch.Tensor:
      log_prob = self._forward(batch)[1].sum(-1).view(stage.shape)
      member = F.one_hot(stage, cost.shape[1]).to(log_prob.dtype)
      q = torch.einsum("et,etk->ek", log_prob - batch["ref_log_prob"], member) / member.sum(1).clamp(min=1)
      q = q - 0.5 * cost
      pairs = len(q) // 2
      return -F.logsigmoid(4.0 * sign * (q[:pairs] - q[pairs:])).mean()

    return self._step(loss)
