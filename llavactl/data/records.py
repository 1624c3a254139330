"""The samples of a recipe's sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from llavactl.core.registry import registry

if TYPE_CHECKING:
    from llavactl.core.schema import Sample
    from llavactl.recipe.frame import SourceSpec


def samples(specs: Sequence[SourceSpec]) -> Iterator[Sample]:
    """Every sample of every source, in the recipe's order, each once whatever its weight.

    Raises:
        DataError: a source's file or record can't be used.
    """
    for spec in specs:
        yield from registry().create("sources", spec.spec())
