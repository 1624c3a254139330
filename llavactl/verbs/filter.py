"""``llavactl data filter``: selects captions balanced by concept, as LLaVA selected 595K of CC3M's 3 million."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError, PluginError
from llavactl.curation.captions import Caption, read_captions
from llavactl.curation.concepts import Concepts, phrase_key
from llavactl.curation.inputs import reading
from llavactl.curation.noun_phrases import DEFAULT, load_extractor
from llavactl.features.prepare import map_ordered
from llavactl.files.json_stream import write_stream
from llavactl.files.text import refuse_overwriting

if TYPE_CHECKING:
    from llavactl.core.protocols import RecordSource

_BATCH = 2000
_SMALL_FILE = 8_000_000
"""Bytes of a file that one process has read before other processes have started."""

_HINT = "an extractor takes a list of captions and returns a list of phrases for each"


@dataclass(frozen=True)
class FilterReport:
    """``kept`` of ``captions``. Of the distinct ``phrases``, ``rare`` ones were skipped, ``frequent`` ones sampled."""

    out: str
    captions: int
    kept: int
    phrases: int
    rare: int
    frequent: int
    extractor: str
    seed: int
    seconds: float


def filter_captions(
    source: RecordSource,
    out: Path,
    *,
    at_least: int = 3,
    at_most: int = 100,
    seed: int = 0,
    extractor: str = DEFAULT,
    workers: int | None = None,
) -> FilterReport:
    """Writes to ``out`` the records of ``source`` that LLaVA's concept balance selects, unchanged and in order.

    Two passes: the first extracts the noun phrases of every caption, in ``workers`` processes, the second copies.

    Raises:
        DataError: a record that can't be read or has no caption, or the file changed between the passes.
        PluginError: the ``extractor`` can't be loaded, or returns anything but phrases.
    """
    began = time.perf_counter()
    load_extractor(extractor)
    refuse_overwriting(source.path, out)
    concepts = Concepts()
    if workers is None:
        large = source.path.is_file() and source.path.stat().st_size > _SMALL_FILE
        workers = (os.cpu_count() or 1) if large else 1
    with reading(source.path, "noun phrases") as show, _pool(workers) as pool:
        batches = _batches(read_captions(source))
        for batch, phrase_keys in map_ordered(pool, partial(_phrase_keys, extractor), batches, 2 * workers):
            for keys in phrase_keys:
                concepts.add(keys)
            show(batch.position, concepts.captions)
    selection = concepts.select(at_least, at_most, seed)
    count = 0
    with reading(source.path, "writing") as show, write_stream(out) as write:
        for count, caption in enumerate(read_captions(source), 1):
            if count > concepts.captions:
                break
            if selection.selected[count - 1]:
                write(caption.value)
            show(caption.position, count)
        if count != concepts.captions:
            raise DataError(f"{source.path} changed while it was read", hint="nothing was written")
    return FilterReport(
        out=str(out),
        captions=count,
        kept=int(selection.selected.sum()),
        phrases=selection.phrases,
        rare=selection.rare,
        frequent=selection.frequent,
        extractor=extractor,
        seed=seed,
        seconds=round(time.perf_counter() - began, 3),
    )


@dataclass(frozen=True)
class CaptionBatch:
    """The texts of captions; ``position`` is the progress within the source's file after them."""

    texts: tuple[str, ...]
    position: int


def _batches(captions: Iterator[Caption]) -> Iterator[CaptionBatch]:
    while batch := list(itertools.islice(captions, _BATCH)):
        yield CaptionBatch(tuple(caption.text for caption in batch), batch[-1].position)


def _phrase_keys(extractor: str, batch: CaptionBatch) -> list[list[int]]:
    """The keys of the noun phrases of each caption."""
    try:
        keys = [[phrase_key(phrase) for phrase in phrases] for phrases in load_extractor(extractor)(batch.texts)]
    except (TypeError, AttributeError) as error:
        raise PluginError(f"extractor {extractor}: {error}", hint=_HINT) from error
    if len(keys) != len(batch.texts):
        raise PluginError(f"extractor {extractor}: {len(keys)} results for {len(batch.texts)} captions", hint=_HINT)
    return keys


def _pool(workers: int) -> Executor:
    """A pool of processes, since Python threads don't run in parallel; one worker is a thread of this process."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")  # a forked child would inherit the progress bar's thread
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_ignore_interrupts)


def _ignore_interrupts() -> None:
    """In workers: only the parent process handles Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
