"""The HTML page of ``data generate``: counts, lengths, and sample records with their images.

All text comes from a language model: the template escapes every value, and the page may load nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.paths import write_atomic
from llavactl.report.figures import show
from llavactl.report.templates import template
from llavactl.report.thumbnails import safe_image, thumbnail

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef

MAX_CHARACTERS = 2000
"""Of one turn on the page."""


@dataclass(frozen=True)
class InstructionExample:
    """A record on the page: its first image, and its turns as (question, answer)."""

    kind: str
    image: str
    thumbnail: str
    turns: tuple[tuple[str, str], ...]


def write_instructions(
    path: Path,
    name: str,
    summary: Mapping[str, Any],
    examples: Sequence[tuple[str, Sequence[ImageRef], Mapping[str, Any] | None]],
) -> Path:
    """Writes the page to ``path``.

    ``summary`` is the document of ``teaching.summary``; an example is (kind, images, record).
    """
    written, refused, lengths = summary["written"], summary["refused"], summary["lengths"]
    kinds = sorted({*written, *(kind for counts in refused.values() for kind in counts)})
    columns = list(next(iter(lengths.values()), {}))
    counts = [("written", written), *refused.items()]
    openings: Mapping[str, int] = summary["openings"]
    write_atomic(
        path,
        template("instructions.html").render(
            name=name,
            kinds=kinds,
            counts=[(label, [show(by_kind.get(kind, 0)) for kind in kinds]) for label, by_kind in counts],
            columns=columns,
            lengths=[(label, [show(row[column]) for column in columns]) for label, row in lengths.items()],
            openings=[(words, show(n), 100 * n / max(openings.values())) for words, n in openings.items()],
            examples=[_example(kind, images, record or {}) for kind, images, record in examples],
        ),
    )
    return path


def _example(kind: str, images: Sequence[ImageRef], record: Mapping[str, Any]) -> InstructionExample:
    texts = [turn["value"].replace("<image>\n", "")[:MAX_CHARACTERS] for turn in record.get("conversations", ())]
    uri = name = ""
    if images:
        name = images[0].name
        try:
            uri = safe_image(thumbnail(images[0].read()))
        except OSError:  # not on this disk: the text is shown without it
            uri = ""
    return InstructionExample(kind, name, uri, tuple(zip(texts[::2], texts[1::2], strict=True)))
