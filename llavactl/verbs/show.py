"""``llavactl data show``: training samples token by token; asks the feature store about absent images only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError, RecipeError
from llavactl.core.paths import write_atomic
from llavactl.core.registry import format_spec, registry
from llavactl.curation.inputs import stored_features
from llavactl.curation.lengths import image_tokens
from llavactl.data.encode import Encoding
from llavactl.data.records import samples
from llavactl.data.sample_set import arranged, refusal, untrainable
from llavactl.data.token_info import TokenInfo, token_info
from llavactl.features.keys import error_reason
from llavactl.images.decode import ImageError, decode
from llavactl.images.known import known_key
from llavactl.report.thumbnails import thumbnail
from llavactl.report.tokens import tokens_page

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef, Sample
    from llavactl.recipe.frame import Recipe
    from llavactl.recipe.stages import Stage, StageNumber


@dataclass(frozen=True)
class ShownImage:
    """An image of a sample; ``problem`` is the reason why it can't be read, or ""."""

    name: str
    problem: str


@dataclass(frozen=True)
class ShownSample:
    """The sample with index ``index`` (from 0) of its stage, as in one epoch.

    ``tokens`` and ``target_tokens`` are within ``max_length``, ``truncated_tokens`` and ``truncated_target_tokens``
    beyond it. ``left_out`` is the reason why training leaves the sample out, or "".
    """

    index: int
    id: str
    where: str
    tokens: int
    target_tokens: int
    truncated_tokens: int
    truncated_target_tokens: int
    images: tuple[ShownImage, ...]
    left_out: str
    pieces: tuple[TokenInfo, ...]


@dataclass(frozen=True)
class ShowReport:
    """Some of the ``samples`` of a stage; ``image_tokens`` is the number per image, None if no shown sample has one."""

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
    """``count`` samples of ``stage`` (default: the last with data), beginning with ``sample``, an id or an index.

    They are as in ``epoch`` (from 1); also written to the page ``html``, if given.

    Raises:
        DataError: a record can't be used, the sample doesn't exist, or ``html`` can't be written.
    """
    number = stage or max(recipe.stages_with_data(), default=1)
    chosen_stage = recipe.stage(number)
    settings, template = chosen_stage.settings, chosen_stage.template
    if not chosen_stage.sources:
        raise RecipeError(f"data.stage{number} has no source", hint="add one, or choose another --stage")
    all_samples = list(samples(chosen_stage.sources))
    first = _index(all_samples, sample, f"data.stage{number}")
    selected = all_samples[first : first + count]
    has_image = any(each.images for each in selected)
    encoding = Encoding(
        registry().create("templates", template),
        registry().create("languages", recipe.language.spec()).tokenizer(),
        image_tokens(recipe, number) if has_image else 0,
        settings.max_length,
    )
    seed = (recipe.seed, epoch - 1)
    has_features = stored_features(recipe, [number])
    report = ShowReport(
        stage=number,
        template=format_spec(template),
        image_order=settings.image_order,
        epoch=epoch,
        max_length=settings.max_length,
        image_tokens=encoding.image_tokens if has_image else None,
        samples=len(all_samples),
        shown=tuple(
            _shown(index, each, encoding, settings, seed, has_features) for index, each in enumerate(selected, first)
        ),
    )
    return report if html is None else _with_page(report, html, selected)


def _index(all_samples: Sequence[Sample], name: str | None, where: str) -> int:
    """The index of the sample with the id ``name``, or with the index ``name``."""
    if not all_samples:
        raise DataError(f"{where} has no samples", hint="its sources are empty")
    if name is None:
        return 0
    index = next((i for i, sample in enumerate(all_samples) if sample.id == name), None)
    if index is None and name.isdecimal() and int(name) < len(all_samples):
        index = int(name)
    if index is None:
        raise DataError(
            f"{where} has no sample {name!r}",
            hint=f"available: 0 to {len(all_samples) - 1}, or an id such as {all_samples[0].id!r}",
        )
    return index


def _shown(
    index: int,
    sample: Sample,
    encoding: Encoding,
    settings: Stage,
    seed: tuple[int, int],
    has_features: Callable[[str], bool],
) -> ShownSample:
    refused = refusal(sample, encoding, settings.image_order)
    pieces = [] if refused else token_info(encoding, arranged(sample, settings.image_order, *seed))
    images = tuple(ShownImage(image.name, _problem(image)) for image in sample.images)
    unreadable = next(
        (
            f"{shown.name}: {shown.problem}"
            for shown, image in zip(images, sample.images, strict=True)
            if shown.problem and not ((key := known_key(image)) and has_features(key))
        ),
        "",
    )
    kept = [piece for piece in pieces if not piece.truncated]
    truncated = [piece for piece in pieces if piece.truncated]
    return ShownSample(
        index=index,
        id=sample.id,
        where=sample.where,
        tokens=sum(piece.tokens for piece in kept),
        target_tokens=sum(piece.target for piece in kept),
        truncated_tokens=sum(piece.tokens for piece in truncated),
        truncated_target_tokens=sum(piece.target for piece in truncated),
        images=images,
        left_out=unreadable or untrainable(sample, encoding, settings.image_order),
        pieces=tuple(pieces),
    )


def _problem(image: ImageRef) -> str:
    try:
        decode(image.read())
    except DataError as error:
        return error.reason if isinstance(error, ImageError) else error.message
    except OSError as error:
        return error_reason(error)
    return ""


def _with_page(report: ShowReport, file: Path, selected: Sequence[Sample]) -> ShowReport:
    readable = {image.name for sample in report.shown for image in sample.images if not image.problem}
    thumbnails = {
        image.name: thumbnail(image.read(), side=336)
        for sample in selected
        for image in sample.images
        if image.name in readable
    }
    report = replace(report, html=str(file))
    try:
        write_atomic(file, tokens_page(report, thumbnails))
    except OSError as error:
        raise DataError(f"{file} can't be written: {error.strerror or error}", hint="choose another file") from error
    return report
