"""Reads the samples of a recipe's sources."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llavactl.core.component_calls import samples_of
from llavactl.core.registry import component_name, registry
from llavactl.core.schema import Turn

if TYPE_CHECKING:
    from llavactl.core.registry import Spec
    from llavactl.core.schema import Content, ImageRef, Sample
    from llavactl.recipe.specs import SourceSpec


def samples(specs: Sequence[SourceSpec]) -> Iterator[Sample]:
    """All samples of all sources in the recipe's order; each once, regardless of the source's weight.

    Raises:
        DataError: a source's file or record can't be used.
        PluginError: a source yields something other than samples, or turns that don't alternate.
    """
    for spec in specs:
        for sample in source_samples(spec.spec()):
            if spec.split_turns:
                yield from split_turns(sample)
            else:
                yield sample


def source_samples(spec: Spec) -> Iterator[Sample]:
    """The samples of the source ``spec``. Raises the same errors as ``samples``."""
    return samples_of(registry().create("sources", spec), registry().get("sources", component_name(spec)))


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
