"""Public OpenVLA folders to checkpoints of a run, and back.

  python -m stare_jax.convert --to-orbax FOLDER OUT [--unnorm-key bridge_orig]
      OUT is then a starting point: --config.init_from=OUT. It carries sizes and tokenizer; FOLDER is not needed then
  python -m stare_jax.convert --to-public RUN/checkpoints/imitation OUT --source FOLDER [--dataset my_task]
      OUT is a folder like FOLDER, with the weights and action statistics of the run; its adapters are merged
  python -m stare_jax.convert --to-peft RUN/checkpoints/imitation OUT --source FOLDER
      OUT holds the run's adapters alone, for peft.PeftModel.from_pretrained on FOLDER

All parameters must fit into the memory of the default device (the host's on CPU). What each of them checks
and refuses: docs/checkpoints.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
import numpy as np

from stare_jax import checkpoint, pipeline_policy, pipeline_run, report_progress
from stare_jax.checkpoint import CheckpointError
from stare_jax.policies import action_stats, lora, lora_files, openvla_config, openvla_files, openvla_names
from stare_jax.policies.sizes import Config


def to_orbax(
  folder: str | os.PathLike,
  out: str | os.PathLike,
  *,
  unnorm_key: str | None = None,
  dtype: str | None = None,
) -> pathlib.Path:
  """Writes checkpoint 0 of the folder's parameters and action statistics into `out`, which must not hold any yet.

  The folder's sizes and tokenizer.json, if it has one, go with it (`pipeline_policy`). A value head that the folder
  does not have starts anew. dtype: None keeps the files'. Returns the checkpoint's folder.
  """
  if checkpoint.steps(out):
    raise CheckpointError(f"{out} holds checkpoints already; name a new folder")
  dataset, stats = openvla_config.read_statistics(folder, unnorm_key)
  options = {} if dtype is None else {"param_dtype": dtype}
  config = openvla_files.folder_config(folder, {"action_size": len(stats.q01), **options})
  if (pathlib.Path(folder) / pipeline_policy.TOKENIZER).exists():
    config = dataclasses.replace(config, start=openvla_config.read_tokenizer(folder, config).start)
  params = openvla_files.read_params(folder, config, progress=report_progress.reading("weights"))
  params["value"] = jax.tree.map(lambda x: x.astype(config.param_dtype), params["value"])  # as Policy.init has it
  meta = {
    "phase": "public", "iteration": 0, "env_steps": 0, "seconds": 0.0, "starts_from": "", "dataset": dataset,
    "action_stats": {name: np.asarray(x).tolist() for name, x in stats._asdict().items()},
    **pipeline_policy.carry(pathlib.Path(folder), pathlib.Path(out), config),
  }  # fmt: skip
  return checkpoint.save(out, 0, {"params": params}, meta)


def to_public(
  run: str | os.PathLike,
  out: str | os.PathLike,
  *,
  source: str | os.PathLike,
  step: int | None = None,
  dataset: str = "stare_jax",
  dtype: str | None = None,
) -> pathlib.Path:
  """Writes the parameters of a run's checkpoint (None: the newest) as a folder in the form of `source`.

  The action statistics are the run's, under the name `dataset`; a gripper that came in a data set's [0, 1] goes back to
  it (`action_stats`). Adapters are merged into their base: the checkpoint's own, or where it holds none, `source`.
  dtype: of the tensors; None keeps the run's.
  """
  stats = pipeline_run.read_statistics(pathlib.Path(run))
  leaves, config = _leaves(run, source, step, len(stats.q01))
  spec = _adapters(run, config, step)
  if spec is None:
    wanted = {path: jax.ShapeDtypeStruct(shape, leaves[path].dtype if path in leaves else config.param_dtype)
              for path, shape in openvla_names.shapes(config).items()}  # fmt: skip
    params = _restore(run, wanted, step)
  else:
    params = _restore(run, leaves, step)
    if "base" not in params:
      _check_base(run, source, step)
      params["base"] = openvla_files.read_params(source, config, progress=report_progress.reading("weights"))
      del params["base"]["value"]
    params = lora.merge(spec, params, donate=True)
  public = action_stats.in_data_set(stats)
  return openvla_files.save(out, config, params, source, stats=public, dataset=dataset, dtype=dtype)


def to_peft(
  run: str | os.PathLike, out: str | os.PathLike, *, source: str | os.PathLike, step: int | None = None
) -> pathlib.Path:
  """Writes the adapters of a run's checkpoint as a PEFT folder; `source` is the public folder that they go with.

  Raises: CheckpointError where they were trained on another one. A checkpoint with a base of its own does not say.
  """
  stats = pipeline_run.read_statistics(pathlib.Path(run))
  leaves, config = _leaves(run, source, step, len(stats.q01))
  spec = _adapters(run, config, step)
  if spec is None:
    raise CheckpointError(f"{run} was trained without adapters (policy.lora.rank = 0); write it with --to-public")
  if not any(path.startswith("base/") for path in leaves):
    _check_base(run, source, step)
  trained = {path: x for path, x in leaves.items() if path.startswith(("lora/", "value/"))}
  return lora_files.save(out, config, spec, _restore(run, trained, step), base=os.fspath(source))


def _leaves(run: Any, source: Any, step: int | None, actions: int) -> tuple[dict[str, jax.ShapeDtypeStruct], Config]:
  """A checkpoint's parameters by path, and the configuration of its public folder with the value head that it has."""
  leaves = {path.removeprefix("params/"): x for path, x in checkpoint.read_leaves(run, step).items()
            if path.startswith("params/")}  # fmt: skip
  hidden = [x.shape[-1] for path, x in sorted(leaves.items()) if path.startswith("value/") and path.endswith("/kernel")]
  return leaves, openvla_files.folder_config(source, {"action_size": actions, "value_hidden": tuple(hidden[:-1])})


def _adapters(run: Any, config: Config, step: int | None) -> lora.Lora | None:
  """The adapters that a run's configuration asks for."""
  flat = checkpoint.read_config(run, step) or {}
  asked = {name: flat.get(f"policy.lora.{name}") for name in ("rank", "alpha", "targets")}
  return lora.make(config, **asked) if asked["rank"] else None


def _check_base(run: Any, source: Any, step: int | None) -> None:
  pipeline_policy.check_digest(run, pipeline_policy.digest(source), f"--source {source}", step)


def _restore(run: Any, leaves: dict[str, jax.ShapeDtypeStruct], step: int | None) -> dict[str, Any]:
  return checkpoint.restore(run, {"params": openvla_names.nest(leaves)}, step, partial=True)[0]["params"]


OF_WAYS = {  # each flag's commands
  "unnorm_key": ("to_orbax",), "source": ("to_public", "to_peft"), "step": ("to_public", "to_peft"),
  "dataset": ("to_public",), "dtype": ("to_orbax", "to_public"),
}  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="python -m stare_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--to-orbax", nargs=2, metavar=("FOLDER", "OUT"), help="a public folder to a run's checkpoint")
  which.add_argument("--to-public", nargs=2, metavar=("CHECKPOINTS", "OUT"), help="a run's checkpoint to a folder")
  which.add_argument("--to-peft", nargs=2, metavar=("CHECKPOINTS", "OUT"), help="a run's adapters to a PEFT folder")
  parser.add_argument("--unnorm-key", help="to-orbax: the data set whose action statistics apply")
  parser.add_argument("--source", help="to-public, to-peft: the folder that the run came from")
  parser.add_argument("--step", type=int, help="to-public, to-peft: which checkpoint; by default the newest")
  parser.add_argument("--dataset", help="to-public: the name of the run's action statistics (stare_jax)")
  parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"),
                      help="to-orbax, to-public: cast; by default as it is")  # fmt: skip
  flags = parser.parse_args(argv)
  way = next(way for way in ("to_orbax", "to_public", "to_peft") if getattr(flags, way))
  for name, ways in OF_WAYS.items():
    if getattr(flags, name) is not None and way not in ways:
      word = lambda name: f"--{name.replace('_', '-')}"
      parser.error(f"{word(name)} does nothing with {word(way)}; it belongs to {' and '.join(map(word, ways))}")
  flags.dataset = flags.dataset or "stare_jax"
  if not flags.to_orbax and not flags.source:
    parser.error(f"--to-{'peft' if flags.to_peft else 'public'} needs --source: the public folder that the run came "
                 "from, for its configuration, its tokenizer and the tensors that the policy does without")
  return flags


def main(argv: Sequence[str] | None = None) -> int:
  flags = parse(argv)
  try:
    if flags.to_orbax:
      folder, out = flags.to_orbax
      written = to_orbax(folder, out, unnorm_key=flags.unnorm_key, dtype=flags.dtype)
      print(f"written: {written}\nStart a run from it with --config.init_from={out}")
    elif flags.to_peft:
      run, out = flags.to_peft
      print(f"written: {to_peft(run, out, source=flags.source, step=flags.step)}")
    else:
      run, out = flags.to_public
      written = to_public(
        run, out, source=flags.source, step=flags.step, dataset=flags.dataset, dtype=flags.dtype
      )  # fmt: skip
      print(f"written: {written}\nIts action statistics are called {flags.dataset}")
  except (CheckpointError, ValueError, OSError) as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    return 2
  return 0


if __name__ == "__main__":
  sys.exit(main())
