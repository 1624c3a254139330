"""The connector ``cell-words``: a few tokens for each cell of a coarse grid, one for each word of an object.

A projection makes one token of each patch. A token that stands for a "red circle" is then the sum of two words, and
the language model first has to learn to read it. Here, box alignment fits one token to each word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from llavactl.core.errors import RecipeError
from llavactl.core.registry import Options
from llavactl.core.schema import FeatureShape

if TYPE_CHECKING:
    from torch import nn


class CellWordsOptions(Options):
    """``cell: 4, words: 2`` replaces 4x4 patches by two tokens."""

    cell: Annotated[int, Field(ge=1, description="n: a cell has n×n patches")] = 4
    words: Annotated[int, Field(ge=1, le=16, description="tokens per cell")] = 2
    hidden: Annotated[int, Field(ge=1, description="width of the hidden layer")] = 768


@dataclass(frozen=True)
class CellWords:
    """``words`` tokens for each cell of ``cell`` x ``cell`` patches."""

    cell: int
    words: int
    hidden: int

    def tokens(self, shape: FeatureShape) -> int:
        h, w = self.grid(shape)
        return h * w * self.words

    def grid(self, shape: FeatureShape) -> tuple[int, int]:
        h, w = shape.grid
        if shape.prefix:
            raise RecipeError(
                f"connector cell-words needs features of patches only, but there are {shape.prefix} other tokens",
                hint="set `vision.select: patch`",
            )
        if h % self.cell or w % self.cell:
            raise RecipeError(
                f"connector.cell {self.cell} does not divide the patch grid {h}x{w}",
                hint="set `connector.cell` to a divisor of both sides",
            )
        return h // self.cell, w // self.cell

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl].

        Raises:
            RecipeError: the cells don't divide the patch grid.
        """
        from llavactl.components.connectors.cell_pooling import CellPooling

        self.grid(shape)
        return CellPooling(shape.grid, self.cell, self.words, shape.width, self.hidden, language_width)


def cell_words(options: CellWordsOptions) -> CellWords:
    """Attention pooling of the patches of each cell."""
    return CellWords(options.cell, options.words, options.hidden)
