"""What a teacher made, on one page that needs nothing else: counts, lengths, and samples beside their pictures.

All of it comes from a language model: the template escapes every value, and the page may load nothing.
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

SHOWN_SIGNS = 2000


@dataclass(frozen=True)
class InstructionExample:
    """One sample: its picture, and its turns as (question, answer)."""

    kind: str
    image: str
    picture: str
    turns: tuple[tuple[str, str], ...]


def write_instructions(
    path: Path,
    name: str,
    figures: Mapping[str, Any],
    examples: Sequence[tuple[str, Sequence[ImageRef], Mapping[str, Any] | None]],
) -> Path:
    """Writes the page to ``path``. ``figures`` are ``teaching.summary``'s; an example is (kind, images, record)."""
    made, refused, lengths = figures["made"], figures["refused"], figures["lengths"]
    kinds = sorted({*made, *(kind for counts in refused.values() for kind in counts)})
    columns = list(next(iter(lengths.values()), {}))
    counted = [("written", made), *refused.items()]
    openings: Mapping[str, int] = figures["openings"]
    write_atomic(
        path,
        template("instructions.html").render(
            name=name,
            kinds=kinds,
            counts=[(what, [show(each.get(kind, 0)) for kind in kinds]) for what, each in counted],
            columns=columns,
            lengths=[(what, [show(each[column]) for column in columns]) for what, each in lengths.items()],
            openings=[(what, show(n), 100 * n / max(openings.values())) for what, n in openings.items()],
            examples=[_shown(kind, images, record or {}) for kind, images, record in examples],
        ),
    )
    return path


def _shown(kind: str, images: Sequence[ImageRef], record: Mapping[str, Any]) -> InstructionExample:
    said = [each["value"].replace("<image>\n", "")[:SHOWN_SIGNS] for each in record.get("conversations", ())]
    picture = name = ""
    if images:
        name = images[0].name
        try:
            picture = safe_image(thumbnail(images[0].read()))
        except OSError:  # not on this disk: the sample is still worth reading
            picture = ""
    return InstructionExample(kind, name, picture, tuple(zip(said[::2], said[1::2], strict=True)))
