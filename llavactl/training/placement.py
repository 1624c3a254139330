"""Where the weights, gradients and optimizer state of a training stage are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llavactl.core.errors import RecipeError
from llavactl.recipe.stages import STAGES

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import StageNumber


@dataclass(frozen=True)
class Placement:
    """``sharded``: each process keeps a share of weights, gradients and optimizer state, instead of all of them.

    ``optimizer_state``: whether master weights, accumulated gradients and moments are on the device or in host memory.
    """

    sharded: bool = False
    optimizer_state: Literal["device", "host"] = "device"


def requested_placement(recipe: Recipe, stage: StageNumber, processes: int) -> Placement:
    """The placement that the recipe requests; ``auto``: a replica per process, optimizer state on the device.

    Raises:
        RecipeError: the method of the stage can't be sharded.
    """
    settings = recipe.stage(stage).settings
    for key, value in (("method", settings.method), ("optimizer", settings.optimizer)):
        if recipe.sharding == "full" and value in ("qlora", "muon"):
            raise RecipeError(
                f"{STAGES[stage]}.{key}: {value} can't be sharded, and the recipe has `sharding: full`",
                hint="`-o sharding=none` trains with a replica per process",
            )
    host = recipe.optimizer_state == "host"
    return Placement(recipe.sharding == "full" and processes > 1, "host" if host else "device")
