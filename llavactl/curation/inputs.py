"""The records that the data commands read: those of a file, or of a recipe's sources; with progress bars."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core import progress
from llavactl.core.errors import DataError, LlavactlError, RecipeError
from llavactl.core.hashes import hash_json
from llavactl.core.protocols import RecordSource, RepairingSource, check_component
from llavactl.core.quantities import BYTE
from llavactl.core.registry import registry
from llavactl.curation.lengths import Lengths, stage_lengths
from llavactl.curation.scan import ScannedRecord, scan_records, scan_samples
from llavactl.data.records import samples
from llavactl.features.reader import stage_fingerprint
from llavactl.features.store import FeatureStore
from llavactl.files.text import require_file
from llavactl.recipe.frame import Outline, Recipe, VisionRecipe
from llavactl.recipe.stages import STAGES

if TYPE_CHECKING:
    from llavactl.recipe.specs import SourceSpec
    from llavactl.recipe.stages import StageNumber

FILE_SOURCE = "llava-json"
"""The source that reads a FILE named on the command line."""

_KILOBYTE = 1000


@dataclass(frozen=True)
class Input:
    """A source ``name``, read by ``stages``; ``records`` is None if it yields samples only.

    The argument of ``scan`` says whether samples are needed, for their lengths.
    """

    name: str
    stages: tuple[StageNumber, ...]
    scan: Callable[[bool], Iterator[ScannedRecord]]
    records: RecordSource | None = None


def inputs(
    recipe: Outline | None,
    file: Path | None,
    images: str | Path | None,
    stage: StageNumber | None,
    *,
    follow_links: bool = False,
) -> list[Input]:
    """``file`` with its images in ``images``, as data of ``stage`` (2); without a file, the sources of ``recipe``.

    A source that the recipe names several times, for example in both stages, is one input.

    Raises:
        DataError: a file or folder is missing.
        RecipeError: neither a file nor a source is given.
    """
    if file is None:
        return _recipe_inputs(recipe, stage)
    return [_record_input(FILE_SOURCE, file_source(file, images, follow_links=follow_links), (stage or 2,))]


def file_source(file: Path, images: str | Path | None = None, *, follow_links: bool = False) -> RecordSource:
    """The records of ``file``, named on the command line.

    Raises:
        DataError: ``file`` is missing or a folder.
    """
    require_file(file)
    images = images if images is not None else file.parent
    spec = {"name": FILE_SOURCE, "path": file, "images": images, "follow_links": follow_links}
    source = registry().create("sources", spec)
    assert isinstance(source, RecordSource)
    return source


def _recipe_inputs(recipe: Outline | None, only: StageNumber | None) -> list[Input]:
    specs: list[tuple[StageNumber, SourceSpec]] = []
    if recipe is not None:
        specs = [(stage, spec) for stage in STAGES for spec in recipe.sources(stage)]
    specs = [(stage, spec) for stage, spec in specs if only in (None, stage)]
    if not specs:
        raise RecipeError("no records", hint="name a file, or with -r a recipe with sources in `data`")
    stages: dict[str, list[StageNumber]] = {}
    first: dict[str, SourceSpec] = {}
    for stage, spec in specs:
        same_samples = hash_json([spec.spec(), spec.split_turns])
        first.setdefault(same_samples, spec)
        stages.setdefault(same_samples, []).append(stage)
    return [_source_input(spec, tuple(dict.fromkeys(stages[same_samples]))) for same_samples, spec in first.items()]


def _source_input(spec: SourceSpec, stages: tuple[StageNumber, ...]) -> Input:
    source = registry().create("sources", spec.spec())
    if isinstance(source, RecordSource):
        return _record_input(spec.name, source, stages)
    return Input(spec.name, stages, lambda _: scan_samples(spec.name, samples([spec])))


def _record_input(name: str, source: RecordSource, stages: tuple[StageNumber, ...]) -> Input:
    if not source.path.is_dir():
        require_file(source.path)
    check_component(source)
    return Input(name, stages, lambda with_samples: scan_records(source, with_samples=with_samples), source)


def token_lengths(recipe: Outline | None, stage: StageNumber) -> tuple[Lengths | None, str]:
    """The lengths of samples in tokens of ``stage`` and how they are counted; None and the reason if they can't be."""
    if not isinstance(recipe, Recipe):
        return None, "not counted: needs a recipe, for its tokenizer"
    try:
        lengths = stage_lengths(recipe, stage)
    except LlavactlError as error:
        return None, f"not counted for stage {stage}: {error.message}"
    return lengths, f"stage {stage}, max_length {lengths.max_length}, {lengths.encoding.image_tokens} tokens per image"


def stored_features(recipe: Outline | None, stages: Sequence[StageNumber]) -> Callable[[str], bool]:
    """Whether the stores of ``stages`` have an image by its content key, or the reason why it has no features.

    A store that can't be read has none. The stores are opened on the first call.
    """

    @cache
    def stores() -> list[FeatureStore | None]:
        if not isinstance(recipe, VisionRecipe):
            return []
        try:
            return [FeatureStore.find(stage_fingerprint(recipe, stage)) for stage in stages]
        except LlavactlError:
            return []

    def has_features(key: str) -> bool:
        return bool(stores()) and all(store and (key in store or key in store.skipped) for store in stores())

    return has_features


def with_progress(records: Iterator[ScannedRecord], source: RecordSource | None, verb: str) -> Iterator[ScannedRecord]:
    """``records``, with a progress bar over the file of ``source``, if any."""
    if source is None:
        yield from records
        return
    with reading(source.path, verb) as show:
        for count, record in enumerate(records, 1):
            yield record
            show(record.position, count)


@contextmanager
def reading(file: Path, verb: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over ``file``; the function it gives is called with the characters and records read so far.

    No bar for a folder, whose size says nothing.
    """
    if file.is_dir():
        yield lambda _characters, _count: None
        return
    require_file(file)
    shown, bytes_per_character = 0, _bytes_per_character(file)
    with progress.bar(file.stat().st_size, f"{verb} {file.name}", BYTE) as bar:

        def show(characters: int, count: int) -> None:
            nonlocal shown
            position = round(characters * bytes_per_character)
            if position >= shown + _KILOBYTE:  # not for every record: there may be millions
                bar.advance(position - shown, records=f"{count:,}")
                shown = position

        yield show


def caption_source(recipe: Outline | None, file: Path | None) -> RecordSource:
    """The captions of ``file``, or of the only source of stage 1 in ``recipe``.

    Raises:
        DataError: the file is missing, or the source yields samples only.
        RecipeError: stage 1 has no source, or several.
    """
    if file is not None:
        return file_source(file)
    specs = recipe.sources(1) if recipe is not None else ()
    if len(specs) != 1:
        raise RecipeError(
            f"data.stage1: expected one source of captions, got {len(specs)}",
            hint="name the file: `llavactl data filter FILE`",
        )
    source = registry().create("sources", specs[0].spec())
    if not isinstance(source, RecordSource):
        raise _unsupported(specs[0].name, "doesn't read single records", "RecordSource")
    if not source.path.is_dir():
        require_file(source.path)
    return source


def repairing_source(source: Input) -> RepairingSource:
    """The records of ``source``, which can be repaired.

    Raises:
        DataError: the source can't repair records.
    """
    if not isinstance(source.records, RepairingSource):
        raise _unsupported(source.name, "can't repair records (--fix)", "RepairingSource")
    return source.records


def _unsupported(name: str, reason: str, protocol: str) -> DataError:
    plugin = registry().get("sources", name).plugin
    return DataError(
        f"source {name!r} of plugin {plugin} {reason}: it isn't a {protocol}",
        hint="name a JSON or JSONL file of LLaVA records instead; in your own plugin, implement "
        f"{protocol} (docs/reference/plugins.md#record-sources)",
    )


def _bytes_per_character(file: Path) -> float:
    """The mean size of the characters of ``file``, 3 bytes in Chinese text, estimated from its beginning."""
    with file.open("rb") as opened:
        beginning = opened.read(2**16)
    return len(beginning) / max(len(beginning.decode("utf-8", "replace")), 1)
