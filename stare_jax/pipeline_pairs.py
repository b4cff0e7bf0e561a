"""Preference data: rollouts of the starting policy from common starts, and the pairs between them (METHOD: Preference).

Every start gets `preference.samples` rollouts. With `samples_max`, a start that has no pair yet (nothing better and
worse in any stage) gets one more at a time, until it has one or the cap is reached. Who goes on follows from the
episodes so far, and an episode from its start, so a collection that was killed goes on where it was and ends the same.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np

from stare_jax import batching, processes, report, stages
from stare_jax.config import ConfigError
from stare_jax.episode import StagedEpisode
from stare_jax.pipeline_check import ROLLOUTS
from stare_jax.pipeline_run import Run, gather, predecessor
from stare_jax.rollout import Start

log = logging.getLogger("stare_jax")


def collect(run: Run, params: Any) -> tuple[list[StagedEpisode], list[batching.Pair]]:
  """The rollouts, staged, and their pairs; data/preference/pairs.json says what they are made of.

  Raises: ConfigError where there is no pair at all.
  """
  c = run.config.preference
  rules = {"margin": c.margin, "both_failed": c.both_failed, "by": c.pairs, "gating": c.hp.gating}
  rng = np.random.default_rng([run.config.seed, *b"parts"])
  parts = dict(zip(run.seeds("preference", c.starts), rng.integers(0, c.parts_before + 1, c.starts)))
  fields = {k: v for k, v in run.identity("preference").items() if not k.startswith("preference.")}
  fields |= {name: c[name] for name in ROLLOUTS}
  fields |= {"starts_from": predecessor(run, "preference"), "base": run.base.digest}
  actor = functools.partial(run.actor, params, "preference", c.temperature)

  def roll_out(name: str, starts: list[Start], fields: dict[str, Any]) -> list[StagedEpisode]:
    return stages.annotate(run.task, gather(run, name, starts, actor, fields, tail=c.tail or None))

  starts = [Start(seed, sample, int(part)) for seed, part in parts.items() for sample in range(c.samples)]
  whole = roll_out("preference", starts, fields)
  for sample in range(c.samples, c.samples_max):
    staged = parted(whole, starts)
    done = {staged[pair.first].episode.seed for pair in batching.pair(staged, **rules)}
    if not (more := [Start(seed, sample, int(part)) for seed, part in parts.items() if seed not in done]):
      break
    name = f"preference/more_{sample - c.samples + 1:02d}"
    whole += roll_out(name, more, fields | rules)
    starts += more
    for sums in (run.seconds, run.env_steps):
      sums["preference rollouts"] += sums.pop(f"{name} rollouts")
  staged = parted(whole, starts)
  rng = np.random.default_rng([run.config.seed, *b"pairs"])
  pairs = batching.pair(staged, **rules, cap=c.pairs_per_start, rng=rng)
  found = batching.pair_statistics(staged, pairs)
  log.info(
    "preference: %d pairs at %d of %d starts, by stage %s; starts by their number of rollouts %s", found["pairs"],
    found["starts_paired"], found["starts"], found["stage_pairs"], found["starts_by_rollouts"],
  )  # fmt: skip
  if processes.first():
    report.write_json(run.workdir / "data" / "preference" / "pairs.json", found)
  if not pairs:
    what = "differ in any stage" if c.pairs == "stage" else "of one start are a success and a failure"
    more = max(4 * c.samples, 2 * c.samples_max)
    raise ConfigError(f"no two of the {len(staged)} rollouts {what}, so there is nothing to prefer. With "
                      f"--config.preference.samples_max={more} this run goes on and rolls out more; or take more "
                      f"preference.starts ({c.starts}) or a higher preference.temperature in a new --workdir")
  return staged, pairs


def parted(whole: list[StagedEpisode], starts: list[Start]) -> list[StagedEpisode]:
  """What is left of each episode where its sample parts from the others of the start; nothing of one that ended before.

  On some devices a token may turn with the place of a row in its batch. A sample that did not reach the state of the
  start's first one is left out: it is no pair's other half.
  """
  state: dict[int, np.ndarray] = {}
  kept, lost = [], 0
  for item, start in zip(whole, starts, strict=True):
    if len(item.episode) > start.parts_at:
      item = stages.after(item, start.parts_at) if start.parts_at else item
      here = item.episode.signals[0]
      same = start.parts_at == 0 or np.array_equal(state.setdefault(start.seed, here), here)
      kept, lost = kept + [item] * same, lost + (not same)
  if lost:
    log.warning("preference: %d of %d samples left the common path before they should part; left out", lost, len(whole))
  return kept
