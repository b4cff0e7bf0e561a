"""Which policy a run trains, and where its parameters come from: a public folder, another run, or the seed.

A frozen base is read once and shared by all phases, by the state and by whatever it is compared with. Where it comes
from `policy.checkpoint`, a run's checkpoints hold what is trained, the optimiser and a digest of that folder, and the
base is read from there again.

The checkpoints of a policy that came from a public folder carry its sizes (in their meta, as "policy") and, beside
them, its tokenizer.json: another run may start from them alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from stare_jax import checkpoint, policies, processes, report_progress, sharding, train
from stare_jax.config import OF_A_CHECKPOINT, ConfigError
from stare_jax.policies import action_stats, lora, openvla, openvla_config, openvla_files, openvla_names, tensor_files
from stare_jax.policies import layers as nn
from stare_jax.policies import sizes as openvla_sizes

SAMPLE = 4096  # bytes of each tensor that go into the digest of a folder
TOKENIZER = "tokenizer.json"


def make_policy(config: Any, stats: policies.ActionStats) -> policies.Policy:
  """The policy of a run's configuration; with adapters where it asks for them."""
  c = config.policy
  options = c.options.to_dict()  # a ConfigDict is no Mapping
  if c.checkpoint:
    policy = openvla_files.make_policy(c.checkpoint, stats=stats, **options)
  elif carried := described(config):
    policy = _of_checkpoints(carried, stats, options)
  else:
    options["image_size"] = config.sim.image_size
    if c.name == "openvla" and not openvla_sizes.configure(c.size, options).word_tokenizer:
      start = f"{config.init_from} carries none: " if config.init_from else ""
      raise ConfigError(
        f'policy.size = "{c.size}" needs the tokenizer of a public checkpoint. {start}name its folder with '
        f"--config.policy.checkpoint=FOLDER, or start with --config.init_from from what `python -m stare_jax.convert "
        f"--to-orbax FOLDER` wrote"
      )
    policy = policies.make(c.name, size=c.size, stats=stats, **options)
  return lora.wrap(policy, adapters(config, policy)) if c.lora.rank else policy


def described(config: Any) -> pathlib.Path | None:
  """The folder that says what the policy is: a public one, or checkpoints that carry it; None where the config does."""
  start = pathlib.Path(config.init_from)
  if config.policy.checkpoint:
    return pathlib.Path(config.policy.checkpoint)
  carries = config.init_from and (start / TOKENIZER).exists() and "policy" in checkpoint.read_meta(start)
  return start if carries else None


def _of_checkpoints(folder: pathlib.Path, stats: policies.ActionStats, options: dict[str, Any]) -> policies.Policy:
  """The policy that checkpoints carry. Raises: ConfigError where the options contradict them."""
  if known := [name for name in OF_A_CHECKPOINT if name in options]:
    raise ConfigError(f'policy.options.{known[0]} = {options[known[0]]} and init_from = "{folder}": sizes and '
                      f"vocabulary come from the checkpoint; choose a preset without policy.options.{', '.join(known)}")
  sizes = openvla_sizes.override(openvla_sizes.SEVEN_B, checkpoint.read_meta(folder)["policy"])
  dtype = options.get("param_dtype", sizes.param_dtype)
  if dtype != sizes.param_dtype:
    raise ConfigError(f'policy.options.param_dtype = {dtype}, and init_from = "{folder}" holds {sizes.param_dtype}: '
                      f"convert the public folder again with --dtype {dtype}, or choose {sizes.param_dtype} here")
  sizes = openvla_sizes.override(sizes, options)
  return openvla.make(size=sizes, stats=stats, tokenizer=openvla_config.read_tokenizer(folder, sizes))


def carry(source: pathlib.Path | None, folder: pathlib.Path, policy: openvla_sizes.Config) -> dict[str, Any]:
  """What the meta of checkpoints in `folder` has to hold of a policy from `source`; its tokenizer goes beside them.

  Nothing of a policy that the configuration describes.
  """
  if source is None or not (source / TOKENIZER).exists():
    return {}
  if processes.first() and not (folder / TOKENIZER).exists():
    folder.mkdir(parents=True, exist_ok=True)
    half = folder / f"{checkpoint.TMP}{TOKENIZER}"
    shutil.copyfile(source / TOKENIZER, half)
    half.rename(folder / TOKENIZER)
  return {"policy": dataclasses.asdict(dataclasses.replace(policy, faithful=False))}  # how to decode is the run's own


def adapters(config: Any, policy: policies.Policy) -> lora.Lora:
  c = config.policy.lora
  return lora.make(policy.config, rank=c.rank, alpha=c.alpha, targets=c.targets)


def folder_statistics(config: Any) -> policies.ActionStats | None:
  """The action statistics of `policy.checkpoint` under `policy.unnorm_key`; None where a run takes its own.

  A gripper in [0, 1] becomes the simulator's, without a change of tokens (`action_stats`).
  """
  c = config.policy
  if not (c.checkpoint and c.unnorm_key):
    return None
  return action_stats.in_environment(openvla_config.read_statistics(c.checkpoint, c.unnorm_key)[1])


def digest(folder: str) -> str:
  """SHA-256 of a public folder's configuration and of every tensor's name, type, shape and first bytes.

  Another model, or the same one trained further, has another digest; its 15 GB are not read for it.
  """
  found = hashlib.sha256((pathlib.Path(folder) / "config.json").read_bytes())
  for name, entry in sorted(tensor_files.read_folder(folder).items()):
    found.update(f"{name} {entry.dtype} {list(entry.shape)}\n".encode())
    with entry.file.open("rb") as file:
      file.seek(entry.offset)
      found.update(file.read(min(SAMPLE, entry.nbytes)))
  return found.hexdigest()


def check_digest(folder: Any, found: str, where: str, step: int | None = None) -> None:
  """Refuses a run's checkpoint whose adapters were trained on another base than `where`, of digest `found`."""
  came = checkpoint.read_meta(folder, step).get("base", "")
  if came != found:
    raise checkpoint.CheckpointError(
      f"checkpoint {folder} holds {'adapters of a base' if came else 'parameters'} with digest {came or 'none'}, and "
      f"{where} has {found or 'none'}: name the public folder that it was trained on, or another checkpoint"
    )


def check_adapters(folder: Any, config: Any, policy: policies.Policy) -> None:
  """Refuses a checkpoint of adapters that this run would scale otherwise, or put onto other modules of equal shapes."""
  saved, now = checkpoint.read_config(folder) or {}, config.policy.lora
  modules = lambda targets: [module.name for module in lora.select(policy.config, targets)]
  for name, kind in (("alpha", float), ("targets", modules)):
    came = saved.get(f"policy.lora.{name}", now[name])
    if kind(came) != kind(now[name]):
      raise ConfigError(f"the adapters of {folder} were trained with policy.lora.{name} = {came!r}, and this run has "
                        f"{now[name]!r}, with which they would be another policy: leave it as it was there")


class Base:
  """The frozen part of a run's parameters, once it is known; and what of a state a checkpoint holds."""

  def __init__(self, config: Any):
    self._config = config
    self._frozen: Any = None
    folder = config.policy.checkpoint
    found = digest(folder) if folder and (self.elsewhere or processes.count() > 1) else ""
    processes.same(found, f"policy.checkpoint {folder} (here its digest)", "give all of them the same folder")
    self.digest = found if self.elsewhere else ""

  @property
  def elsewhere(self) -> bool:
    """Whether the frozen part can be read again from `policy.checkpoint`, so that no checkpoint needs to hold it."""
    return bool(self._config.policy.checkpoint and self._config.policy.lora.rank)

  @property
  def _where(self) -> str:
    return f"policy.checkpoint {self._config.policy.checkpoint}" if self.elsewhere else "no policy.checkpoint"

  def saved(self, policy: policies.Policy, state: train.TrainState) -> train.TrainState:
    """What of a state a checkpoint holds."""
    return train.split_state(state, policy.trainable)[0] if self.elsewhere else state

  def restore(self, policy: policies.Policy, folder: Any, state: train.TrainState) -> tuple[Any, Any]:
    """(state, meta) of the newest checkpoint; frozen parameters that it does not hold stay those of `state`.

    The rest of `state` is given up before anything is read: a device need not hold two.
    """
    own, frozen = train.split_state(state, policy.trainable)
    if self.elsewhere:
      check_digest(folder, self.digest, self._where)
      own, meta = checkpoint.restore(folder, _given_up(own), partial=True)
      return train.join_state(own, frozen), meta
    state, meta = checkpoint.restore(folder, train.join_state(_given_up(own), frozen))
    self._shared(policy, state.params)
    return state, meta

  def sha256(self, policy: policies.Policy, params: Any) -> str:
    """One digest of the parameters, without fetching a base that is on disk."""
    if not self.elsewhere:
      return checkpoint.params_sha256(params)
    trained = checkpoint.params_sha256(train.split(params, policy.trainable)[0])
    return hashlib.sha256(f"{trained} {self.digest}".encode()).hexdigest()

  def initial(self, policy: policies.Policy, key: jax.Array, mesh: Mesh) -> Any:
    """Parameters that no phase has trained: of `policy.checkpoint`, or drawn from the seed."""
    c = self._config.policy
    if not c.checkpoint:
      return self._shared(policy, policy.init(key))
    progress = report_progress.reading("weights", quiet=not processes.first())
    params = openvla_files.read_params(c.checkpoint, policy.config, mesh=mesh, key=key, progress=progress)
    if c.lora.rank:
      if sharding.one_gpu(mesh):  # whose programs would copy the layers apart
        params = openvla.layers_apart(params, nn.unstack_and_delete)
      return self._shared(policy, self._adapted(policy, params, key))
    value = jax.tree.map(lambda x: x.astype(policy.config.param_dtype), params["value"])  # as Policy.init has it
    return {**params, "value": value}

  def from_checkpoint(self, policy: policies.Policy, folder: Any, key: jax.Array, mesh: Mesh) -> Any:
    """The parameters that another phase (of this run or another) ended with; adapters start on those that had none."""
    abstract, saved = jax.eval_shape(policy.init, key), checkpoint.read_leaves(folder)
    axes = policy.param_axes if mesh.size > 1 else None

    def read(shapes: Any, axes: Any) -> Any:
      return checkpoint.restore(folder, {"params": _placed(shapes, axes, mesh)}, partial=True)[0]["params"]

    if not policy.trainable:
      return read(abstract, axes)
    if not self.elsewhere and not any(path.startswith("params/lora/") for path in saved):
      value = {path.removeprefix("params/"): x for path, x in saved.items() if path.startswith("params/value/")}
      plain = {**abstract["base"], **openvla_names.nest(value)}
      return self._shared(policy, self._adapted(policy, read(plain, openvla.PARAM_AXES if axes else None), key))
    check_digest(folder, self.digest, self._where)
    check_adapters(folder, self._config, policy)
    if self.elsewhere and self._frozen is None:
      self.initial(policy, key, mesh)
    if self._frozen is None:
      return self._shared(policy, read(abstract, axes))
    own = read(train.split(abstract, policy.trainable)[0], axes)
    return {**own, "base": self._frozen["base"]}  # whose layers may lie apart: another tree than `abstract`

  def _adapted(self, policy: policies.Policy, params: Any, key: jax.Array) -> Any:
    return lora.start(adapters(self._config, policy), params, jax.random.fold_in(key, 1))

  def _shared(self, policy: policies.Policy, params: Any) -> Any:
    """Remembers the frozen part; a later phase takes it from here."""
    if policy.trainable:
      self._frozen = train.split(params, policy.trainable)[1]
    return params


def for_acting_alone(policy: policies.Policy, params: Any, mesh: Mesh) -> Any:
  """Parameters that nothing but `act` will see: on one GPU with the layers apart, as else every call copies.

  The stacks that they lay in are deleted. `faithful` decoding keeps its stacks.
  """
  if not sharding.one_gpu(mesh) or policy.config.faithful:
    return params
  if "base" in params:
    return {**params, "base": openvla.layers_apart(params["base"], nn.unstack_and_delete)}
  return openvla.layers_apart(params, nn.unstack_and_delete)


def _given_up(tree: Any) -> Any:
  """Shapes, types and places of arrays, whose memory is free from here on."""
  kept = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
  jax.tree.map(lambda x: x.delete(), tree)
  return kept


def _placed(abstract: Any, axes: Any, mesh: Mesh) -> Any:
  """Shapes with the place on the mesh that each parameter is read into."""
  places = sharding.shardings(abstract, axes, mesh)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, places)


def table(policy: policies.Policy, params: Any, mesh: Mesh, tx: Any, critic: Any = None) -> str:
  """What start-up prints of a run's state: see sharding.table; and how many parameters are trained.

    params: shapes, or arrays. tx: the optimiser, whose moments every phase has.
    critic: shapes of the state's own (`train_critic`), with its moments, if a phase trains one.
  """
  state = train.abstract_state(
    params, tx, mesh=mesh, param_axes=policy.param_axes, critic=critic, trainable=policy.trainable
  )  # fmt: skip
  trained = train.split(state.params, policy.trainable)[0]
  more = {"  value head": trained["value"]} if "value" in trained else {}
  more["moments"] = [x for x in jax.tree.leaves(state.opt) if x.ndim]  # but not the counters
  if critic is not None:
    more["critic"] = [x for x in jax.tree.leaves(state.critic) if x.ndim]
  places = jax.tree.map(lambda x: x.sharding, state.params)
  text = sharding.table(params, places, mesh, more=more)
  if policy.trainable is None:
    return text
  count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(trained))
  return f"{text}\ntrained      {count:,}; the rest is frozen"
