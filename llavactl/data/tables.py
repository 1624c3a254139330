"""The samples of a recipe's sources as tables, cached by the content of the files that they come from."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from llavactl.core import progress
from llavactl.core.hashes import hash_json
from llavactl.core.protocols import Identifiable, RecordSource, check_component
from llavactl.core.registry import registry
from llavactl.data import array_cache
from llavactl.data.records import samples
from llavactl.data.sample_table import SampleTable
from llavactl.data.table_view import TableView

if TYPE_CHECKING:
    from llavactl.core.protocols import Source
    from llavactl.core.schema import ImageRef
    from llavactl.recipe.frame import VisionRecipe
    from llavactl.recipe.specs import SourceSpec
    from llavactl.recipe.stages import StageNumber

log = logging.getLogger(__name__)

_KIND = "samples"
_FORMAT = 2
"""The version of a table's layout; part of the cache key."""

CHUNK = 2_000
"""Samples that are read, and counted by another process, at a time."""

MIN_BYTES = 8 << 20
"""The size of a file of records that is cached; a smaller one is read in a second, and its warnings appear again."""

MIN_SAMPLES = 2_000
"""The number of samples in a folder that are cached, for the same reason."""


def sample_table(spec: SourceSpec, on_chunk: Callable[[SampleTable], object] = lambda _chunk: None) -> SampleTable:
    """The samples of ``spec``, each once; read from the cache if none of the source's files has changed.

    While records are read, ``on_chunk`` is called with each ``CHUNK`` samples; it isn't if the table is cached.

    A source is cached if it is ``Identifiable`` and its images can be stored (``image_arrays``). Processes that start
    together read its records once: the first one reads, the others wait for the cached table.

    Raises:
        DataError: a source's file or record can't be used.
        PluginError: the source yields something other than samples.
    """
    source = registry().create("sources", spec.spec())
    if not isinstance(source, Identifiable) or _is_small(source):
        return _read(spec, on_chunk)
    check_component(source)  # as the source itself would before its first record
    key = _key(spec, source)
    if (table := _cached(key)) is not None:
        return table
    with array_cache.computing(_KIND, key):
        if (table := _cached(key)) is not None:
            return table
        table = _read(spec, on_chunk)
        changed = _key(spec, source) != key  # a file, while it was read
        if table.arrays is None or changed or (_is_folder(source) and len(table) < MIN_SAMPLES):
            return table
        array_cache.save(_KIND, key, table.arrays)
        return _cached(key) or table  # the mapped table needs no memory of this process


def distinct_images(specs: Sequence[SourceSpec]) -> list[ImageRef]:
    """The distinct images of all samples, in order of first use. Raises the same errors as ``sample_table``."""
    return list(TableView.of([sample_table(spec) for spec in specs]).images)


def stage_images(recipe: VisionRecipe, stage: StageNumber) -> list[ImageRef]:
    """The ``distinct_images`` of ``stage`` of ``recipe``."""
    return distinct_images(recipe.stage(stage).sources)


def _cached(key: str) -> SampleTable | None:
    arrays = array_cache.load(_KIND, key)
    try:
        return None if arrays is None else SampleTable(arrays)
    except ValueError as error:  # a plugin's class of images has changed
        log.debug("the samples are read again: %s", error)
        return None


def _is_folder(source: Source) -> bool:
    return isinstance(source, RecordSource) and source.path.is_dir()


def _is_small(source: Source) -> bool:
    return isinstance(source, RecordSource) and source.path.is_file() and source.path.stat().st_size < MIN_BYTES


def _key(spec: SourceSpec, source: Identifiable) -> str:
    """A hash of everything that the samples of ``spec`` depend on."""
    options: Any = registry().options("sources", spec.spec())
    return hash_json(
        {
            "format": _FORMAT,
            "source": spec.name,
            "version": registry().get("sources", spec.name).version,
            "options": options.model_dump(mode="json"),
            "identity": source.identity(),
            "split_turns": spec.split_turns,
        }
    )


def _read(spec: SourceSpec, on_chunk: Callable[[SampleTable], object]) -> SampleTable:
    chunks: list[SampleTable] = []
    remaining = samples([spec])
    with progress.bar(None, f"reading {spec.name}", "record") as bar:
        while len(chunk := SampleTable.of(islice(remaining, CHUNK))):
            chunks.append(chunk)
            on_chunk(chunk)
            bar.advance(len(chunk))
    return SampleTable.joined(chunks)
