"""SimplerEnv's four WidowX tasks in its own package: ManiSkill2 on SAPIEN 2.2. The stages and experts are `bridge`'s.

They have names of their own because their success tests are not those of ManiSkill3's port (docs/simpler_env.md):
whatever a run writes carries its task's name, so that no table can put figures of the two simulators in one column.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from stare_jax.tasks import Task, bridge


def _here(task: Task, env_id: str, starts: int, **changes: Any) -> Task:
  """A scene of `bridge` as the task `env_id` of SimplerEnv's package, which has `starts` episode ids."""
  options = {key: value for key, value in task.env_options.items() if key != "scene"}
  return dataclasses.replace(
    task, name=f"simpler_{task.name}", simulator="simpler", env_id=env_id, starts=starts, env_options=options, **changes
  )


# Held 6 mm higher than in the port: here fingers that press on the table stick to it and do not close.
SPOON = bridge.scripted(bridge.pick_and_place(lower=-0.006, along=0.01, above=0.018))

PUT_CARROT_ON_PLATE = _here(bridge.PUT_CARROT_ON_PLATE, "widowx_carrot_on_plate", starts=24)
PUT_SPOON_ON_TOWEL = _here(bridge.PUT_SPOON_ON_TOWEL, "widowx_spoon_on_towel", starts=24, expert=SPOON)
STACK_GREEN_ON_YELLOW = _here(bridge.STACK_GREEN_ON_YELLOW, "widowx_stack_cube", starts=24)
PUT_EGGPLANT_IN_BASKET = _here(bridge.PUT_EGGPLANT_IN_BASKET, "widowx_put_eggplant_in_basket", starts=24)
