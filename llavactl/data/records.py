"""The samples of a recipe's sources."""

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
    """Every sample of every source, in the recipe's order, each once whatever its weight.

    Raises:
        DataError: a source's file or record can't be used.
        PluginError: a source yields something else.
    """
    for spec in specs:
        for sample in registry().create("sources", spec.spec()):
            if not isinstance(sample, Sample):
                raise PluginError(
                    f"source {spec.name!r} of plugin {registry().get('sources', spec.name).plugin} yielded "
                    f"{type(sample).__name__}, expected Sample",
                    hint="`llavactl.testing.check_source` tests a source by itself",
                )
            if spec.split_turns:
                yield from apart(sample)
            else:
                yield sample


def distinct_images(specs: Sequence[SourceSpec]) -> list[ImageRef]:
    """The distinct images of all samples, in order of first use. Raises as ``samples``."""
    return list(dict.fromkeys(image for sample in samples(specs) for image in sample.images))


def apart(sample: Sample) -> Iterator[Sample]:
    """Each question of ``sample`` with its answer as a sample of its own, ``ID#1`` and so on.

    A system message stays with each. Images of earlier questions come before the question, as LLaVA puts them.
    """
    system = tuple(turn for turn in sample.turns[:1] if turn.role == "system")
    seen: list[ImageRef] = []
    asked: Turn | None = None
    number = 0
    for turn in sample.turns[len(system) :]:
        if turn.role == "user":
            front: tuple[Content, ...] = tuple(part for image in seen for part in (image, "\n"))
            asked = Turn("user", (*front, *turn.content))
            seen += turn.images
        elif asked is not None:
            number += 1
            yield replace(sample, id=f"{sample.id}#{number}", turns=(*system, asked, turn))
