"""``llavactl data expand``: converts captions to one-turn conversations, the records of stage 1."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.curation.captions import TagPlace, expanded, read_captions
from llavactl.curation.inputs import reading
from llavactl.files.json_stream import write_stream
from llavactl.files.text import refuse_overwriting

if TYPE_CHECKING:
    from llavactl.core.protocols import RecordSource


@dataclass(frozen=True)
class ExpandReport:
    """The number of ``records`` written to ``out``."""

    out: str
    records: int
    image_tag: TagPlace
    seed: int
    seconds: float


def expand(source: RecordSource, out: Path, *, image_tag: TagPlace = "random", seed: int = 0) -> ExpandReport:
    """Writes a LLaVA record to ``out`` for each caption of ``source``, with an instruction drawn by ``seed``.

    Raises:
        DataError: a record that can't be read, or has no caption or not exactly one image.
    """
    began = time.perf_counter()
    records = 0
    refuse_overwriting(source.path, out)
    with reading(source.path, "expand") as show, write_stream(out) as write:
        for records, caption in enumerate(read_captions(source), 1):
            write(expanded(caption, records - 1, seed, image_tag))
            show(caption.position, records)
    return ExpandReport(str(out), records, image_tag, seed, round(time.perf_counter() - began, 3))
