"""stare_jax beside PyTorch with transformers and peft: acting, and the updates. JSON lines on standard output.

  python benchmarks/torch_comparison.py --size small                 # a CPU: act, SFT, PPO, StA-TPO at a small size
  python benchmarks/torch_comparison.py --size 7b                    # a GPU: OpenVLA-7B, random weights, LoRA
  python benchmarks/torch_comparison.py --size 7b --sides jax        # alone on the device: how much memory it takes
  python benchmarks/torch_comparison.py --cases act --act 1 16 --rank 0
  python benchmarks/torch_comparison.py --size 7b --sides jax --cases ppo --lock FILE &  # compiles beside the next one
  python benchmarks/torch_comparison.py --size 7b --sides jax --cases act --lock FILE    # and is timed in turn

Both sides run in one process, on the same device, sizes, dtype and data; repetitions alternate. A ratio is PyTorch's
time over ours of one such pair, so above 1 is faster here; on a CPU also of processor time, which bears a busy machine
better (with --threads 1, as threads that wait count too). At the small size both have the same weights, and the
log-probabilities are compared before anything is timed. docs/performance.md says what is measured and how.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import gc
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

SMALL = dict(
  image_size=112,
  dino=dict(width=192, depth=6, head_size=64, mlp=768),
  siglip=dict(width=216, depth=6, head_size=72, mlp=806),
  projector=4 * 408,
  llm_width=256,
  llm_depth=6,
  llm_head_size=64,
  llm_mlp=688,
  vocabulary=2112,
  action_end=2048,
  start=1000,
  pad=2048,
  compute_dtype="float32",
  param_dtype="float32",
  remat="none",
  unroll=True,
)
STEPS, STAGES = 4, 2  # of each episode in the preference batch
PEAK_TFLOPS = {"H200": 989, "H100": 989, "A100": 312}  # dense bfloat16, from the vendor's data sheets
OUT_OF_MEMORY = ("out of memory", "RESOURCE_EXHAUSTED", "OOM")


def arguments() -> argparse.Namespace:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--size", default="small", choices=("small", "7b"))
  parser.add_argument("--cases", default=["act", "sft", "ppo", "preference"], nargs="*")
  parser.add_argument("--act", default=[1, 16, 64, 256], type=int, nargs="*", help="rows")
  parser.add_argument("--update", default=[16], type=int, nargs="*", help="rows; steps of all episodes for preference")
  parser.add_argument("--rank", default=32, type=int, help="of the adapters; 0 trains every parameter")
  parser.add_argument("--micro", default=0, type=int, help="rows of our micro-batches; 0: all of them at once")
  parser.add_argument("--sides", default=["torch", "jax"], nargs="*", choices=("torch", "jax"))
  parser.add_argument("--repeats", default=9, type=int)
  parser.add_argument("--threads", default=0, type=int, help="processor cores for either side; 0: all there are")
  parser.add_argument("--lock", default="", help="a file: timing waits for all that name it, also while they compile")
  parser.add_argument("--options", default="{}", type=json.loads, help="JSON of configuration fields, for our side too")
  return parser.parse_args()


def share(threads: int, alone: bool) -> int:
  """Both sides get the same cores, before either is imported: XLA sizes its pool by the affinity. And the GPU's memory:
  JAX takes nearly all of it at once where it is alone, and else as it needs it.
  """
  cores = sorted(os.sched_getaffinity(0))[: threads or None]
  os.sched_setaffinity(0, cores)
  os.environ["OMP_NUM_THREADS"] = str(len(cores))
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "true" if alone else "false")
  if "XLA_CLIENT_MEM_FRACTION" not in os.environ:  # its other name: JAX takes one of the two
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  return len(cores)


# What both sides see ------------------------------------------------------------------------------------------


def forward_flops(config: Any, rows: int, tokens: int) -> float:
  """Multiply-adds times two of one forward pass with `tokens` text and action tokens behind the patches.

  Matrices and attention scores; lm_head's action rows at the action positions; no norms, no softmax.
  """

  def vit(v: Any) -> float:
    length = config.patches + v.prefix_tokens
    return (v.depth - 1) * length * (4 * v.width**2 + 2 * v.width * v.mlp + 2 * length * v.width)

  total = sum(vit(v) for v in (config.dino, config.siglip))
  total += config.patches * 3 * config.patch_size**2 * (config.dino.width + config.siglip.width)
  width, length = config.llm_width, config.patches + tokens
  features = config.dino.width + config.siglip.width
  total += config.patches * (features * config.projector + config.projector * width + width**2)
  layer = length * (4 * width**2 + 3 * width * config.llm_mlp) + length**2 * width  # causal: half of the scores
  total += config.llm_depth * layer + config.action_size * config.bins * width
  return 2.0 * rows * total


def batch_of(config: Any, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
  """Random frames and prompts of two lengths, tokens, and what the losses need beside."""
  rng = np.random.default_rng(seed)
  size, length = config.image_size, config.prompt_length
  mask = np.ones((rows, length), bool)
  mask[::2, 1:5] = False
  prompt = rng.integers(3, 900, (rows, length))
  prompt[:, 0], prompt[:, -1] = config.bos, config.start
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  return {
    "image": rng.integers(0, 256, (rows, size, size, 3), dtype=np.uint8),
    "prompt": np.where(mask, prompt, config.pad).astype(np.int32),
    "mask": mask,
    "tokens": rng.integers(0, config.bins, (rows, config.action_size)).astype(np.int32),
    "log_prob": normal(rows, config.action_size) * 0.1 - 5.5,
    "advantage": normal(rows),
    "returns": normal(rows),
  }


def pairs_of(config: Any, rows: int) -> dict[str, np.ndarray]:
  """`rows` steps as pairs of episodes of STEPS steps in STAGES stages."""
  episodes = rows // STEPS
  if rows % (2 * STEPS):
    raise SystemExit(f"--update {rows}: preference needs a multiple of {2 * STEPS} steps, two episodes of {STEPS} each")
  batch, rng = batch_of(config, rows), np.random.default_rng(1)
  stage = np.broadcast_to(np.arange(STEPS) * STAGES // STEPS, (episodes, STEPS))
  return batch | {
    "stage_id": stage.astype(np.int32),
    "cost": rng.random((episodes, STAGES)).astype(np.float32),
    "sign": (2 * rng.integers(0, 2, (episodes // 2, STAGES)) - 1).astype(np.int8),
    "ref_log_prob": batch["log_prob"].sum(-1).reshape(episodes, STEPS),
  }


# Our side -----------------------------------------------------------------------------------------------------


class Jax:
  """One method for each thing that is timed; every program is compiled before, its memory read from the compiler.

  Weights come with the first call, so that nothing of the device's memory is taken by one that waits for its turn.
  """

  def __init__(self, policy: Any, weights: Callable[[], Any], shapes: Any, rank: int, micro: int):
    import jax

    from stare_jax import train
    from stare_jax.policies import lora

    self.policy, self.weights, self.shapes, self.micro, self.state = policy, weights, shapes, micro, None
    self.rank, self.tx = rank, train.make_optimizer(learning_rate=1e-5, weight_decay=0.0)
    self.lora = lora.make(policy.config, rank=rank) if rank else None
    self.trained_policy = lora.wrap(policy, self.lora) if rank else policy
    self.key = jax.random.key(0)

  def put(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    import jax

    from stare_jax.policies import Obs

    return jax.device_put({**batch, "obs": Obs(batch["image"], batch["prompt"], batch["mask"])})

  def act(self, batch: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    """(call, bytes of device memory)."""
    import jax

    from stare_jax import sharding

    keys = jax.random.split(self.key, len(batch["prompt"]))
    inputs = (batch["obs"], keys, np.float32(1.0))
    program = jax.jit(self.policy.act, compiler_options=sharding.compiler_options(None, acting=True))
    compiled = program.lower(self.shapes, *inputs).compile()
    return lambda: jax.block_until_ready(compiled(self.params, *inputs)), needs(compiled)

  @functools.cached_property
  def params(self) -> Any:
    return self.weights()

  def start(self, params: Any) -> Any:
    """The state of training: adapters and moments in float32 beside the frozen weights."""
    import jax

    from stare_jax import train
    from stare_jax.policies import lora

    if not self.rank:
      return train.new_state(params, self.tx)
    fresh = jax.jit(functools.partial(lora.init, self.lora))(jax.random.key(1, impl="rbg"))  # which compiles sooner
    value = jax.tree.map(lambda x: x.astype(np.float32), params["value"])
    params = {"base": {k: x for k, x in params.items() if k != "value"}, "lora": fresh, "value": value}
    own, _ = train.split(params, lora.trainable)
    opt = jax.jit(self.tx.init)(own)
    return train.TrainState(step=jax.numpy.zeros((), jax.numpy.int32), params=params, opt=opt)

  def update(self, what: str, batch: dict[str, Any]) -> tuple[Callable[[], Any], int]:
    import jax

    from stare_jax import train

    trainable, rows = self.trained_policy.trainable, len(batch["prompt"])
    micro = self.micro or rows
    if what == "preference":
      update = train.make_preference_update(
        self.token_log_prob, stage_kernel, self.tx, micro_batch=micro, trainable=trainable
      )
      batch = preference_batch(batch)
    else:
      if rows % micro:
        raise SystemExit(f"--micro {micro} does not divide --update {rows}")
      update = train.make_update(getattr(self, what), self.tx, trainable=trainable, micro_batches=rows // micro)
    compiled = update.lower(jax.eval_shape(self.start, self.shapes), batch).compile()

    def call() -> dict[str, float]:
      own, frozen = train.split_state(self.state or self.start(self.params), trainable)
      own, metrics = compiled(own, frozen, batch)
      self.state = train.join_state(own, frozen)
      return train.fetch(metrics, self.state.params, trainable)

    return call, needs(compiled)

  def token_log_prob(self, params: Any, obs: Any, tokens: Any) -> Any:
    from stare_jax.losses import ops

    return ops.token_log_prob(self.trained_policy.apply(params, obs, tokens).logits, tokens)

  def sft(self, params: Any, batch: dict[str, Any]) -> Any:
    from stare_jax.losses import imitation

    logits = self.trained_policy.apply(params, batch["obs"], batch["tokens"]).logits
    return imitation.cross_entropy(logits, batch["tokens"], np.ones(batch["tokens"].shape, bool))

  def ppo(self, params: Any, batch: dict[str, Any]) -> Any:
    from stare_jax.losses import ops, ppo

    out = self.trained_policy.apply(params, batch["obs"], batch["tokens"])
    return ppo.objective(
      ops.token_log_prob(out.logits, batch["tokens"]), batch["log_prob"], batch["advantage"], out.value, out.value,
      batch["returns"], ops.entropy(out.logits).sum(-1), np.ones(len(batch["tokens"]), bool), clip=0.2,
      entropy_weight=0.01,
    )  # fmt: skip


def stage_kernel(log_ratio: Any, batch: Any) -> Any:
  from stare_jax.losses import preference

  return preference.stage_tpo(log_ratio, **batch.pairs, beta=4.0, cost_weight=0.5)


def preference_batch(batch: dict[str, Any]) -> Any:
  import jax

  from stare_jax import train

  shape = batch["stage_id"].shape
  split = lambda x: x.reshape(*shape, *x.shape[1:])
  return train.PreferenceBatch(
    obs=jax.tree.map(split, batch["obs"]),
    tokens=split(batch["tokens"]),
    valid=jax.numpy.ones(shape, bool),
    ref_log_prob=batch["ref_log_prob"],
    pairs={name: batch[name] for name in ("stage_id", "cost", "sign")},
  )


def needs(compiled: Any) -> int:
  """Bytes of a compiled program: arguments, results that are not written over them, and what lies between."""
  m = compiled.memory_analysis()
  return m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes + m.temp_size_in_bytes


# Side by side -------------------------------------------------------------------------------------------------


def attempt(function: Callable[[], Any]) -> tuple[Any, bool]:
  """(its result, True), or (None, False) where the device has too little memory."""
  try:
    return function(), True
  except Exception as error:  # torch's and XLA's own classes, told by their text
    if not any(word in str(error) for word in OUT_OF_MEMORY):
      raise
  gc.collect()
  return None, False


def alternate(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, np.ndarray]:
  """Seconds [repeats, 2] of each, on the clock and of the process, in turns; which goes first alternates too."""
  seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
  for call in calls.values():
    call()
  for i in range(repeats):
    for name in list(calls)[:: 1 if i % 2 else -1]:
      begin = time.perf_counter(), time.process_time()
      calls[name]()
      seconds[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
  return {name: np.array(x) for name, x in seconds.items()}


def quartiles(x: np.ndarray, digits: int) -> dict[str, float]:
  return dict(zip(("q1", "median", "q3"), (round(float(q), digits) for q in np.quantile(x, (0.25, 0.5, 0.75)))))


def check_torch(platform: str) -> None:
  """Ends the program where JAX has a device that torch was not built for, before hours are spent on one side."""
  import torch

  if platform != "cpu" and not torch.cuda.is_available():
    raise SystemExit(
      f"JAX runs on a {platform}, and torch {torch.__version__} finds no CUDA device: set-up takes torch's CPU build "
      f"where STARE_TORCH_INDEX names one, which is enough for the simulators. Install torch's CUDA build of this "
      f"version in an environment of its own (PyTorch's install page names its index), or time our side alone with "
      f"--sides jax, or both on the CPU with JAX_PLATFORMS=cpu --size small"
    )


class Turn(contextlib.AbstractContextManager):
  """Shared with all that have the file open until it is entered, as they compile; inside, nobody else runs anything."""

  def __init__(self, path: str):
    self.file = open(path, "a") if path else None
    self.take(fcntl.LOCK_SH)

  def take(self, how: int) -> None:
    if self.file is not None:
      fcntl.flock(self.file, how)

  def __enter__(self) -> None:
    self.take(fcntl.LOCK_EX)

  def __exit__(self, *_: object) -> None:
    self.take(fcntl.LOCK_SH)


class Comparison:
  """Both sides, and the line that each case prints."""

  def __init__(self, args: argparse.Namespace, cores: int):
    import jax

    from stare_jax import policies

    self.args, self.cores, self.device, self.turn = args, cores, jax.devices()[0], Turn(args.lock)
    if "torch" in args.sides:
      check_torch(self.device.platform)
    stats = policies.ActionStats(-np.ones(7), np.ones(7), np.arange(7) < 6)
    options = {**(SMALL if args.size == "small" else {}), **args.options}
    self.policy = policies.make(size="7b", stats=stats, tokenizer=lambda text: [5], **options)
    self.config = self.policy.config
    self.torch = self.jax = None
    if "torch" in args.sides:
      import torch

      from benchmarks.torch_side import Torch

      torch.set_num_threads(cores)
      self.torch = Torch(self.config, device="cpu" if self.device.platform == "cpu" else "cuda")
    if "jax" in args.sides:
      self.jax = self.our_side()
    if args.size == "small" and self.torch and self.jax:
      self.agree()

  def our_side(self) -> Jax:
    """With the other side's weights where they are small, random ones otherwise; they lie as in a run."""
    import jax

    from stare_jax import sharding
    from stare_jax.policies import layers, openvla, openvla_names

    if self.args.size == "small" and self.torch:
      params = jax.device_put(openvla_names.to_params(self.config, self.torch.model.public_state()))
      shapes = jax.eval_shape(lambda: params)
      return Jax(self.policy, lambda: params, shapes, self.args.rank, self.args.micro)
    key = jax.random.key(0, impl="rbg")  # which compiles sooner
    draw = jax.jit(self.policy.init).lower(key).compile()
    shapes, weights = jax.eval_shape(self.policy.init, key), functools.partial(draw, key)
    if self.args.rank and sharding.one_gpu():
      cut = lambda x: [jax.ShapeDtypeStruct(x.shape[1:], x.dtype)] * len(x)
      shapes = openvla.layers_apart(shapes, cut)
      weights = lambda: openvla.layers_apart(draw(key), layers.unstack_and_delete)
    return Jax(self.policy, weights, shapes, self.args.rank, self.args.micro)

  def agree(self) -> None:
    """The two are one network, or nothing is timed."""
    import jax
    import torch

    batch = batch_of(self.config, 2)
    with torch.no_grad():
      _, expected, value = self.torch._forward(self.torch.put(batch))
    ours = self.jax.put(batch)
    out = jax.jit(self.policy.apply)(self.jax.params, ours["obs"], ours["tokens"])
    found = np.take_along_axis(np.asarray(jax.nn.log_softmax(out.logits)), batch["tokens"][..., None], axis=-1)[..., 0]
    gap = max(np.abs(found - expected.numpy()).max(), np.abs(np.asarray(out.value) - value.numpy()).max())
    if not gap < 1e-2:
      raise SystemExit(f"the two sides differ by {gap}: they are not the same network, so their speed means nothing")

  def report(self, what: str, rows: int, flops: float, prepared: dict[str, Any], lost: list[str], more: Any) -> None:
    """One JSON line: seconds, rows per second, ratio, MFU and memory."""
    peak = next((x for name, x in PEAK_TFLOPS.items() if name in self.device.device_kind), None)
    line = {"benchmark": f"torch_comparison/{what}", "size": self.args.size, "rows": rows, **more}
    calls = {name: call for name, (call, _) in prepared.items()}
    with self.turn:
      measured, lost_now = attempt(lambda: alternate(calls, self.args.repeats))
    if not lost_now:
      measured, lost = {}, [*lost, "both at once"]
    for name, seconds in measured.items():
      middle = float(np.median(seconds[:, 0]))
      line[name] = {"seconds": quartiles(seconds[:, 0], 5), "rows_per_s": round(rows / middle, 2)}
      if peak:
        line[name]["mfu"] = round(flops / middle / (1e12 * peak), 3)
      if prepared[name][1]:
        line[name]["peak_gb"] = round(prepared[name][1] / 1e9, 2)
    for i, kind in enumerate(("ratio", "ratio_cpu_time") if self.device.platform == "cpu" else ("ratio",)):
      others = {name: x for name, x in measured.items() if name != "jax" and "jax" in measured}
      line[kind] = {name: quartiles(x[:, i] / measured["jax"][:, i], 2) for name, x in others.items()}
    line |= {"out_of_memory": lost} if lost else {}
    line |= {"device": self.device.device_kind, "cores": self.cores, "repeats": self.args.repeats}
    print(json.dumps(line | {"dtype": self.config.compute_dtype, "load": os.getloadavg()[0]}), flush=True)

  def act(self, rows: int) -> None:
    batch, prepared, lost = batch_of(self.config, rows), {}, []
    sides = {}
    if self.torch:
      theirs = self.torch.put(batch)
      sides |= {f"torch_{name}": functools.partial(getattr(self.torch, name), theirs)
                for name in ("generate", "cached_loop")}  # fmt: skip
    for name, call in sides.items():
      done, fits = attempt(functools.partial(self.torch.measure_peak, call))
      prepared |= {name: (synchronised(self.torch, call), done)} if fits else {}
      lost += [] if fits else [name]
    if self.jax:
      ours, fits = attempt(lambda: self.jax.act(self.jax.put(batch)))
      prepared |= {"jax": ours} if fits else {}
      lost += [] if fits else ["jax"]
    flops = forward_flops(self.config, rows, self.config.prompt_length + self.config.action_size - 1)
    self.report("act", rows, flops, prepared, lost, {})

  def update(self, what: str, rows: int) -> None:
    batch = (pairs_of if what == "preference" else batch_of)(self.config, rows)
    prepared, lost, recomputed = {}, [], False
    if self.torch:
      if self.torch.optimizer is None:
        from stare_jax.policies import lora

        modules = [m.name for m in lora.make(self.config, rank=self.args.rank).modules] if self.args.rank else []
        self.torch.adapt(self.args.rank, min(self.args.rank, 16), modules)
      self.torch.checkpoint(False)  # the case before may have needed it
      call = functools.partial(getattr(self.torch, what), self.torch.put(batch))
      done, fits = attempt(functools.partial(self.torch.measure_peak, call))
      if not fits:
        self.torch.checkpoint(True)
        recomputed = True
        done, fits = attempt(functools.partial(self.torch.measure_peak, call))
      prepared |= {"torch": (synchronised(self.torch, call), done)} if fits else {}
      lost += [] if fits else ["torch"]
    if self.jax:
      ours, fits = attempt(lambda: self.jax.update(what, self.jax.put(batch)))
      prepared |= {"jax": ours} if fits else {}
      lost += [] if fits else ["jax"]
    # Backward: activations once more than forward, and weights too where all of them are trained.
    flops = forward_flops(self.config, rows, self.config.prompt_length + self.config.action_size - 1)
    flops *= 2 if self.args.rank else 3
    more = {"rank": self.args.rank, "torch_recomputes": recomputed, "jax_recomputes": self.config.remat}
    more |= {"jax_micro": self.args.micro} if self.args.micro else {}
    self.report(what, rows, flops, prepared, lost, more)


def synchronised(side: Any, call: Callable[[], Any]) -> Callable[[], None]:
  def run() -> None:
    call()
    side.synchronise()

  return run


def main() -> None:
  args = arguments()
  cores = share(args.threads, alone=args.sides == ["jax"] and not args.lock)
  from stare_jax import processes  # which imports JAX

  processes.keep_memory()  # as a run does; for both sides
  comparison = Comparison(args, cores)
  for rows in args.act if "act" in args.cases else ():  # before adapters lie beside the weights
    comparison.act(rows)
  for what in args.cases:
    for rows in args.update if what != "act" else ():
      comparison.update(what, rows)


if __name__ == "__main__":
  main()
