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
        PluginError: a source yields something other than samples, or turns that don't alternate.
    """
    for spec in specs:
        for sample in registry().create("sources", spec.spec()):
            if why := _fault(sample):
                raise PluginError(
                    f"source {spec.name} of plugin {registry().get('sources', spec.name).plugin}: {why}",
                    hint="`llavactl.testing.check_source` tests a source",
                )
            if spec.split_turns:
                yield from split_turns(sample)
            else:
                yield sample


def _fault(sample: object) -> str:
    """Why ``sample`` isn't a sample whose turns alternate from the user's on, after a system turn; "" if it is.

    A source of images or captions may yield samples without turns.
    """
    if not isinstance(sample, Sample):
        return f"yielded {type(sample).__name__}, expected Sample"
    roles = [turn.role for turn in sample.turns]
    first = roles[:1] == ["system"]
    if roles[first::2].count("user") + roles[first + 1 :: 2].count("assistant") == len(roles) - first:
        return ""
    where = f"{sample.where}: " if sample.where else ""
    return f"{where}sample {sample.id!r}: expected turns user, assistant, …, got {', '.join(roles)}"


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
