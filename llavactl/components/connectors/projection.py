"""LLaVA's connectors: one linear layer, or two with a GELU in between; optionally after pixel shuffle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from llavactl.core.errors import RecipeError
from llavactl.core.registry import Options
from llavactl.core.schema import FeatureShape

if TYPE_CHECKING:
    from torch import nn


class ProjectionOptions(Options):
    """``pixel_shuffle: 2`` merges 2x2 neighboring patches into one token: a quarter of the tokens, four times as wide.

    ``norm: true`` first normalizes every patch to mean 0 and variance 1, for hidden states on a much smaller or larger
    scale than the language model's embeddings; it has no weights.
    """

    pixel_shuffle: Annotated[int, Field(ge=1, description="n: merge n×n patches into one token")] = 1
    norm: Annotated[
        bool, Field(strict=True, description="first normalize each patch to mean 0 and variance 1, without weights")
    ] = False


@dataclass(frozen=True)
class Projection:
    """A connector of ``layers`` linear layers (1 or 2)."""

    factor: int
    layers: int
    norm: bool = False

    def tokens(self, shape: FeatureShape) -> int:
        return shape.patches // self.factor**2

    def grid(self, shape: FeatureShape) -> tuple[int, int]:
        h, w = shape.grid
        return h // self.factor, w // self.factor

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl]; state dict keys as in LLaVA's mm_projector.

        Raises:
            RecipeError: the pixel shuffle factor doesn't divide the patch grid.
        """
        from torch import nn

        from llavactl.components.connectors.pixel_shuffle import NormalizedPatches, PixelShuffle

        if self.factor > 1 and (shape.prefix or any(side % self.factor for side in shape.grid)):
            grid = "x".join(map(str, shape.grid)) + (f" after {shape.prefix} other tokens" if shape.prefix else "")
            divisors = [n for n in range(1, min(shape.grid) + 1) if not any(side % n for side in shape.grid)]
            raise RecipeError(
                f"connector.pixel_shuffle {self.factor} does not divide the patch grid {grid}",
                hint="set `vision.select: patch`" if shape.prefix else f"available: {', '.join(map(str, divisors))}",
            )
        width = shape.width * self.factor**2
        if self.layers == 1:
            projection: nn.Module = nn.Linear(width, language_width)
        else:
            projection = nn.Sequential(
                nn.Linear(width, language_width), nn.GELU(), nn.Linear(language_width, language_width)
            )
        connector = projection if self.factor == 1 else PixelShuffle(shape.grid, self.factor, projection)
        return NormalizedPatches(shape.width, connector) if self.norm else connector


def linear(options: ProjectionOptions) -> Projection:
    """LLaVA v1's ``W``."""
    return Projection(options.pixel_shuffle, 1, options.norm)


def mlp2x_gelu(options: ProjectionOptions) -> Projection:
    """LLaVA v1.5's ``mlp2x_gelu``."""
    return Projection(options.pixel_shuffle, 2, options.norm)
