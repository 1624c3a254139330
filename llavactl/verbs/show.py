"""``llavactl data show``: training samples token by token, without the models' weights or the feature store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError, RecipeError
from llavactl.core.paths import write_atomic
from llavactl.core.registry import format_spec, registry
from llavactl.curation.lengths import image_tokens
from llavactl.data.encode import Encoding
from llavactl.data.records import samples
from llavactl.data.token_info import TokenInfo, token_info
from llavactl.data.training_set import arranged, refusal, untrainable
from llavactl.features.keys import error_reason
from llavactl.images.decode import ImageError, decode
from llavactl.report.thumbnails import thumbnail
from llavactl.report.tokens import tokens_page

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef, Sample
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import Stage, StageNumber


@dataclass(frozen=True)
class ShownImage:
    """An image of a sample; ``problem``: why it can't be read, or ""."""

    name: str
    problem: str


@dataclass(frozen=True)
class ShownSample:
    """One sample, ``number`` of its stage (from 0), as it is in an epoch.

    ``tokens`` and ``trained`` are what is left within ``max_length``, ``cut`` and ``cut_trained`` what is beyond
    it. ``left_out``: why training leaves the sample out, or "".
    """

    number: int
    id: str
    where: str
    tokens: int
    trained: int
    cut: int
    cut_trained: int
    images: tuple[ShownImage, ...]
    left_out: str
    pieces: tuple[TokenInfo, ...]


@dataclass(frozen=True)
class ShowReport:
    """Some of the ``samples`` of a stage. ``image_tokens``: of one image; None where none of them has one."""

    stage: int
    template: str
    image_order: str
    epoch: int
    max_length: int
    image_tokens: int | None
    samples: int
    shown: tuple[ShownSample, ...]
    html: str | None = None


def show(
    recipe: Recipe,
    stage: StageNumber | None = None,
    *,
    sample: str | None = None,
    count: int = 1,
    epoch: int = 1,
    html: Path | None = None,
) -> ShowReport:
    """``count`` samples of ``stage`` (default: the last that has data), the first being ``sample``, an id or a number.

    They are as ``epoch`` (from 1) has them; with ``html`` they are written to that file, too.

    Raises:
        DataError: a record can't be used, there is no such sample, or ``html`` can't be written.
    """
    number = stage or max(recipe.stages_with_data(), default=1)
    chosen_stage = recipe.stage(number)
    settings, template = chosen_stage.settings, chosen_stage.template
    if not chosen_stage.sources:
        raise RecipeError(f"data.stage{number} names no source", hint="there is nothing to show")
    every = list(samples(chosen_stage.sources))
    first = _find(every, sample, f"data.stage{number}")
    chosen = every[first : first + count]
    has_image = any(each.images for each in chosen)
    encoding = Encoding(
        registry().create("templates", template),
        registry().create("languages", recipe.language.spec()).tokenizer(),
        image_tokens(recipe, number) if has_image else 0,
        settings.max_length,
    )
    report = ShowReport(
        stage=number,
        template=format_spec(template),
        image_order=settings.image_order,
        epoch=epoch,
        max_length=settings.max_length,
        image_tokens=encoding.image_tokens if has_image else None,
        samples=len(every),
        shown=tuple(
            _shown(at, each, encoding, settings, (recipe.seed, epoch - 1)) for at, each in enumerate(chosen, first)
        ),
    )
    return report if html is None else _written(report, html, chosen)


def _find(every: Sequence[Sample], wanted: str | None, where: str) -> int:
    """The place of the sample with the id ``wanted``, else of that number."""
    if not every:
        raise DataError(f"{where} has no sample", hint="its sources are empty")
    if wanted is None:
        return 0
    found = next((at for at, each in enumerate(every) if each.id == wanted), None)
    if found is None and wanted.isdecimal() and int(wanted) < len(every):
        found = int(wanted)
    if found is None:
        raise DataError(
            f"{where} has no sample {wanted!r}",
            hint=f"say a number from 0 to {len(every) - 1}, or an id such as {every[0].id!r}",
        )
    return found


def _shown(number: int, sample: Sample, encoding: Encoding, settings: Stage, drawn: tuple[int, int]) -> ShownSample:
    refused = refusal(sample, encoding, settings.image_order)
    found = [] if refused else token_info(encoding, arranged(sample, settings.image_order, *drawn))
    images = tuple(ShownImage(image.name, _problem(image)) for image in sample.images)
    broken = next((f"{image.name}: {image.problem}" for image in images if image.problem), "")
    return ShownSample(
        number=number,
        id=sample.id,
        where=sample.where,
        tokens=sum(each.tokens for each in found if not each.cut),
        trained=sum(each.trained for each in found if not each.cut),
        cut=sum(each.tokens for each in found if each.cut),
        cut_trained=sum(each.trained for each in found if each.cut),
        images=images,
        left_out=broken or untrainable(sample, encoding, settings.image_order),
        pieces=tuple(found),
    )


def _problem(image: ImageRef) -> str:
    try:
        decode(image.read())
    except DataError as error:
        return error.reason if isinstance(error, ImageError) else error.message
    except OSError as error:
        return error_reason(error)
    return ""


def _written(report: ShowReport, file: Path, chosen: Sequence[Sample]) -> ShowReport:
    readable = {image.name for each in report.shown for image in each.images if not image.problem}
    pictures = {
        image.name: thumbnail(image.read(), side=336)
        for sample in chosen
        for image in sample.images
        if image.name in readable
    }
    report = replace(report, html=str(file))
    try:
        write_atomic(file, tokens_page(report, pictures))
    except OSError as error:
        raise DataError(f"{file} can't be written: {error.strerror or error}", hint="name another file") from error
    return report
