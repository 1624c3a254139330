"""Captions, one per image and record, and their conversion to conversations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core.errors import DataError
from llavactl.files.records import given_id, image_names

if TYPE_CHECKING:
    from llavactl.core.protocols import RawRecord, RecordSource

MAX_PROBLEMS = 20

FORM = "a record is {id, image, caption}"

TagPlace = Literal["first", "last", "random"]

INSTRUCTIONS = (
    "What does this picture show?",
    "Say in a few words what can be seen here.",
    "Sum up this photo in one line.",
    "What is there to see?",
    "Put this picture into words.",
    "Tell me shortly what this is a picture of.",
    "How would you caption this?",
    "Name what is in view.",
    "Write one line about this image.",
    "In short, what is pictured?",
    "What has been photographed here?",
    "Give the gist of this picture.",
    "State the content of this image in a sentence.",
    "Which scene is this?",
)
"""Instructions that ask for a caption, written for llavactl; one is drawn for each record."""


@dataclass(frozen=True)
class Caption:
    """The caption ``text`` of a record ``value`` at ``where``, whose images are ``images``.

    ``position`` is the progress within the source's file.
    """

    text: str
    value: Mapping[str, Any]
    where: str
    position: int
    images: tuple[str, ...] | None = None
    """The images' paths; None: named in ``value``."""


def read_captions(source: RecordSource) -> Iterator[Caption]:
    """The caption of each record: its ``caption``, the first answer of its ``conversations``, or its sample's caption.

    Raises:
        DataError: records that can't be read or have no caption, all at once. No caption is yielded after the first
            of them; the rest of the file is read to collect the others.
    """
    problems: list[str] = []
    more = 0
    for record in source.records():
        caption = None if record.problem else _caption(source, record)
        if caption is not None and not problems:
            yield caption
        elif caption is None and len(problems) < MAX_PROBLEMS:
            problem = record.problem or "no `caption` with text, and no `conversations` with an answer"
            problems.append(f"{record.where}: {problem}")
        else:
            more += caption is None
    if problems:
        lines = [*problems, f"and {more} more"] if more else problems
        raise DataError("\n".join(lines), hint="correct or remove these records; nothing was written")


def _caption(source: RecordSource, record: RawRecord) -> Caption | None:
    value = record.value
    if not isinstance(value, Mapping):
        return None
    if "caption" in value or "conversations" in value:
        text = caption_of(value)
        return Caption(text, value, record.where, record.position) if text is not None else None
    try:
        sample = source.sample(record)
    except DataError:
        return None
    if not sample.captions:
        return None
    images = tuple(image.name for image in sample.images)
    return Caption(sample.captions[0], value, record.where, record.position, images)


def caption_of(record: Mapping[str, Any]) -> str | None:
    """The ``caption`` of a record, or the first answer of its ``conversations``; None without text."""
    text = record.get("caption")
    if text is None and isinstance(messages := record.get("conversations"), list):
        answers = [m.get("value") for m in messages if isinstance(m, dict) and m.get("from") in ("gpt", "assistant")]
        text = answers[0] if answers else None
    return text.strip() if isinstance(text, str) and text.strip() else None


def expanded(caption: Caption, index: int, seed: int, tag: TagPlace) -> dict[str, Any]:
    """``caption``, the ``index``-th of its file, as a LLaVA record: an instruction with the caption as its answer.

    The instruction and a random position of the tag depend only on ``seed`` and the record's id (or index), so adding
    records doesn't change others.

    Raises:
        DataError: the record doesn't name exactly one image.
    """
    try:
        paths = image_names(caption.value) if caption.images is None else caption.images
    except DataError as error:
        raise DataError(f"{caption.where}: {error.message}", hint=FORM) from error
    if len(paths) != 1:
        reason = f"expected one image, got {len(paths)}" if paths else "no `image`"
        raise DataError(f"{caption.where}: {reason}", hint=FORM)
    id_ = given_id(caption.value) or str(index)
    rng = random.Random(f"{seed} {id_}")
    instruction = rng.choice(INSTRUCTIONS)
    last = rng.random() < 0.5 if tag == "random" else tag == "last"
    question = f"{instruction}\n<image>" if last else f"<image>\n{instruction}"
    messages = [{"from": "human", "value": question}, {"from": "gpt", "value": caption.text}]
    return {"id": id_, "image": paths[0], "conversations": messages}
