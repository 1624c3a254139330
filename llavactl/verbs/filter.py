"""``llavactl data filter``: captions balanced by concept, as LLaVA's 595K of CC3M's 3 million were."""

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

from llavactl.core.errors import DataError, PluginError
from llavactl.curation.captions import Caption, read_captions
from llavactl.curation.concepts import Concepts, phrase_key
from llavactl.curation.inputs import reading
from llavactl.curation.noun_phrases import DEFAULT, load_extractor
from llavactl.features.prepare import map_ordered
from llavactl.files.json_stream import never_onto, write_stream

_BATCH = 2000
_SMALL = 8_000_000
"""Bytes of a file that one process is through with before others have started."""

_HINT = "an extractor takes a list of captions and gives a list of phrases of each"


@dataclass(frozen=True)
class FilterReport:
    """What was kept of ``captions``. Of distinct ``phrases``, ``rare`` ones chose nothing, ``frequent`` ones a draw."""

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
    file: Path,
    out: Path,
    *,
    at_least: int = 3,
    at_most: int = 100,
    seed: int = 0,
    extractor: str = DEFAULT,
    workers: int | None = None,
) -> FilterReport:
    """Writes to ``out`` the records of ``file`` that LLaVA's balance keeps, as they are and in their order.

    Two passes: the first finds the noun phrases of every caption, with ``workers`` processes, the second copies.

    Raises:
        DataError: a record that can't be read or has no caption, or the file changed between the passes.
        PluginError: the ``extractor`` can't be loaded, or gives something else than phrases.
    """
    began = time.perf_counter()
    load_extractor(extractor)
    never_onto(file, out)
    concepts = Concepts()
    if workers is None:
        workers = (os.cpu_count() or 1) if file.is_file() and file.stat().st_size > _SMALL else 1
    with reading(file, "noun phrases") as show, _pool(workers) as pool:
        for batch, found in map_ordered(
            pool, partial(_extracted, extractor), _batches(read_captions(file)), 2 * workers
        ):
            for keys in found:
                concepts.add(keys)
            show(batch.done, concepts.captions)
    kept = concepts.kept(at_least, at_most, seed)
    count = 0
    with reading(file, "writing") as show, write_stream(out) as write:
        for count, caption in enumerate(read_captions(file), 1):
            if count > concepts.captions:
                break
            if kept.chosen[count - 1]:
                write(caption.record)
            show(caption.done, count)
        if count != concepts.captions:
            raise DataError(f"{file}: it changed while it was being read", hint="nothing was written")
    return FilterReport(
        out=str(out),
        captions=count,
        kept=int(kept.chosen.sum()),
        phrases=kept.phrases,
        rare=kept.rare,
        frequent=kept.frequent,
        extractor=extractor,
        seed=seed,
        seconds=round(time.perf_counter() - began, 3),
    )


@dataclass(frozen=True)
class CaptionChunk:
    """The texts of captions; ``done`` characters of the file are read with them."""

    texts: tuple[str, ...]
    done: int


def _batches(captions: Iterator[Caption]) -> Iterator[CaptionChunk]:
    while some := list(itertools.islice(captions, _BATCH)):
        yield CaptionChunk(tuple(caption.text for caption in some), some[-1].done)


def _extracted(extractor: str, batch: CaptionChunk) -> list[list[int]]:
    """The keys of the noun phrases of each caption."""
    try:
        found = [[phrase_key(phrase) for phrase in phrases] for phrases in load_extractor(extractor)(batch.texts)]
    except (TypeError, AttributeError) as error:
        raise PluginError(f"extractor {extractor}: {error}", hint=_HINT) from error
    if len(found) != len(batch.texts):
        raise PluginError(f"extractor {extractor}: {len(found)} answers for {len(batch.texts)} captions", hint=_HINT)
    return found


def _pool(workers: int) -> Executor:
    """Processes, for Python runs one thread at a time; one worker is a thread of this process."""
    if workers == 1:
        return ThreadPoolExecutor(1)
    context = multiprocessing.get_context("spawn")  # a fork would take the progress bar's thread along
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_interrupts_to_the_parent)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
