"""Where the weights, gradients and optimizer state of a training stage are kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llavactl.core.errors import RecipeError
from llavactl.core.registry import component_name
from llavactl.recipe.stages import STAGES
from llavactl.training.update_rules import optimizer_of

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import AnyStage, StageNumber


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
    if recipe.sharding == "full" and (blocker := sharding_blocker(settings)):
        raise RecipeError(
            f"{STAGES[stage]}.{blocker} can't be sharded, and the recipe has `sharding: full`",
            hint="`-o sharding=none` trains with a replica per process",
        )
    host = recipe.optimizer_state == "host"
    return Placement(recipe.sharding == "full" and processes > 1, "host" if host else "device")


def sharding_blocker(settings: AnyStage) -> str:
    """The setting, ``key: value``, because of which a stage can't be sharded; "" if it can."""
    if settings.method == "qlora":
        return "method: qlora"
    return (
        "" if optimizer_of(settings).scope == "element" else f"optimizer: {component_name(settings.optimizer_spec())}"
    )
