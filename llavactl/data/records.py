"""Reads the samples of a recipe's sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llavactl.core.errors import PluginError
from llavactl.core.registry import registry
from llavactl.core.schema import Sample, Turn

if TYPE_CHECKING:
    from llavactl.core.schema import Content, ImageRef
    from llavactl.recipe.specs import SourceSpec


def samples(specs: Sequence[SourceSpec]) -> Iterator[Sample]:
    """All samples of all sources in the recipe's order; each once, regardless of the source's weight.

    Raises:
        DataError: a source's file or record can't be used.
        PluginError: a source yields something other than samples.
    """
    for spec in specs:
        for sample in registry().create("sources", spec.spec()):
            if not isinstance(sample, Sample):
                raise PluginError(
                    f"source {spec.name!r} of plugin {registry().get('sources', spec.name).plugin} yielded "
                    f"{type(sample).__name__}, expected Sample",
                    hint="`llavactl.testing.check_source` tests a source",
                )
            if spec.split_turns:
                yield from split_turns(sample)
            else:
                yield sample


def split_turns(sample: Sample) -> Iterator[Sample]:
    """Each question of ``sample`` with its answer as a separate sample ``ID#1``, ``ID#2``, …

    Each keeps the system message. Images of earlier questions are inserted before the question, as in LLaVA.
    """
    system = tuple(turn for turn in sample.turns[:1] if turn.role == "system")
    earlier_images: list[ImageRef] = []
    question: Turn | None = None
    count = 0
    for turn in sample.turns[len(system) :]:
        if turn.role == "user":
            images: tuple[Content, ...] = tuple(part for image in earlier_images for part in (image, "\n"))
            question = Turn("user", (*images, *turn.content))
            earlier_images += turn.images
        elif question is not None:
            count += 1
            yield replace(sample, id=f"{sample.id}#{count}", turns=(*system, question, turn))
