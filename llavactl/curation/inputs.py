"""What the data commands go over: a file of records, or the sources of a recipe; with a bar of how far they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.components.sources.llava_json import LlavaJsonOptions
from llavactl.core import progress
from llavactl.core.errors import LlavactlError, RecipeError
from llavactl.core.registry import registry
from llavactl.curation.lengths import Lengths, stage_lengths
from llavactl.curation.scan import Examined, file_records, source_records
from llavactl.data.records import samples
from llavactl.files.json_stream import need_file
from llavactl.images.references import ImageRoot, check_place
from llavactl.recipe.frame import Recipe
from llavactl.recipe.stages import STAGES

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline
    from llavactl.recipe.specs import SourceSpec
    from llavactl.recipe.stages import StageNumber

_KILOBYTE = 1000


@dataclass(frozen=True)
class Input:
    """Records with the place of their images, the stage that they train, and their file, if any.

    The argument of ``records`` says whether samples are needed (for their lengths).
    """

    root: ImageRoot
    stage: StageNumber
    records: Callable[[bool], Iterator[Examined]]
    file: Path | None = None


def inputs(
    recipe: Outline | None,
    file: Path | None,
    images: str | Path | None,
    stage: StageNumber | None,
    *,
    follow_links: bool = False,
) -> list[Input]:
    """``file`` with its images in ``images``, as data of ``stage`` (2); else the sources of ``recipe``, of both stages.

    Raises:
        DataError: a file or folder is not there.
        RecipeError: there is neither a file nor a source.
    """
    return _recipe_inputs(recipe, stage) if file is None else [_file_input(file, images, stage or 2, follow_links)]


def _file_input(file: Path, images: str | Path | None, stage: StageNumber, follow_links: bool) -> Input:
    need_file(file)
    if images is not None:
        check_place(str(images))
    root = ImageRoot(str(images or file.parent), follow_links)
    return Input(
        root,
        stage,
        lambda sampled: file_records(file, root, sampled=sampled),
        file,
    )


def _recipe_inputs(recipe: Outline | None, only: StageNumber | None) -> list[Input]:
    specs: list[tuple[StageNumber, SourceSpec]] = []
    if recipe is not None:
        specs = [(stage, spec) for stage in STAGES for spec in recipe.sources(stage)]
    specs = [(stage, spec) for stage, spec in specs if only in (None, stage)]
    if not specs:
        raise RecipeError("there are no records", hint="name a file, or with -r a recipe with sources in `data`")
    return [_source_input(spec, stage) for stage, spec in specs]


def _source_input(spec: SourceSpec, stage: StageNumber) -> Input:
    options = registry().options("sources", spec.spec())
    if isinstance(options, LlavaJsonOptions):
        return _file_input(options.path, options.images or options.path.parent, stage, options.follow_links)
    return Input(ImageRoot(""), stage, lambda _: source_records(spec.name, lambda: samples([spec])))


def counted_lengths(recipe: Outline | None, stage: StageNumber) -> tuple[Lengths | None, str]:
    """How tokens of ``stage`` are counted, and what to say of it; None where that can't be."""
    if not isinstance(recipe, Recipe):
        return None, "not counted: no recipe says which tokenizer"
    try:
        lengths = stage_lengths(recipe, stage)
    except LlavactlError as error:
        return None, f"not counted for stage {stage}: {error.message}"
    return lengths, f"stage {stage}, max_length {lengths.max_length}, {lengths.encoding.image_tokens} tokens an image"


def with_bar(records: Iterator[Examined], each: Input, verb: str) -> Iterator[Examined]:
    """``records``, with a bar of how far the file is read."""
    with reading(each.file, verb) if each.file else nullcontext(_nothing) as show:
        for count, examined in enumerate(records, 1):
            yield examined
            show(examined.done, count)


@contextmanager
def reading(file: Path, verb: str) -> Iterator[Callable[[int, int], None]]:
    """A bar of how far ``file`` is read; the function given takes characters and records done so far."""
    need_file(file)
    shown = 0
    with progress.bar(file.stat().st_size // _KILOBYTE, f"{verb} {file.name}", "kB") as bar:

        def show(done: int, count: int) -> None:
            nonlocal shown
            if (now := done // _KILOBYTE) > shown:
                bar.show(now - shown, records=f"{count:,}")
                shown = now

        yield show


def _nothing(done: int, count: int) -> None:
    """For sources that don't know how much there is."""


def caption_file(recipe: Outline | None, file: Path | None) -> Path:
    """``file``, or that of the only source of stage 1 in ``recipe``.

    Raises:
        RecipeError: there is not one such source, or it is no file of LLaVA records.
    """
    if file is not None:
        return file
    specs = recipe.sources(1) if recipe is not None else ()
    options = [registry().options("sources", spec.spec()) for spec in specs]
    if len(options) != 1 or not isinstance(options[0], LlavaJsonOptions):
        raise RecipeError("data.stage1 is not one file of captions", hint="name the file: `llavactl data filter FILE`")
    return options[0].path
