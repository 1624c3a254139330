"""Captions of pictures, one a record, from a file of many; and how a caption becomes a conversation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavactl.components.sources.llava_record import image_names
from llavactl.core.errors import DataError
from llavactl.files.json_stream import read_stream
from llavactl.files.records import given_id

SHOWN = 20

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
"""Ways to ask for a caption, our own; one is drawn for each record."""


@dataclass(frozen=True)
class Caption:
    """A caption's ``text``, the record that it is in and where that is; ``done`` characters of the file are read."""

    text: str
    record: Mapping[str, Any]
    where: str
    done: int


def read_captions(path: Path) -> Iterator[Caption]:
    """The captions in a JSON or JSONL file: each record's ``caption``, or the first answer of its ``conversations``.

    Raises:
        DataError: records that can't be read or have no caption: after the first one no more are given, but the rest of
            the file is read for more of them.
    """
    problems: list[str] = []
    more = 0
    for entry in read_stream(path):
        where = f"{path}:{entry.place}"
        text = caption_of(entry.value)
        if text is not None and not problems:
            yield Caption(text, entry.value, where, entry.done)
        elif text is None and len(problems) < SHOWN:
            problems.append(f"{where}: {entry.problem or 'no text `caption`, and no `conversations` with an answer'}")
        else:
            more += text is None
    if problems:
        said = [*problems, f"and {more} more"] if more else problems
        raise DataError("\n".join(said), hint="mend these lines or take them out; nothing is written before")


def caption_of(record: Any) -> str | None:
    """The caption of ``record``, if it has one."""
    if not isinstance(record, dict):
        return None
    found = record.get("caption")
    if found is None and isinstance(messages := record.get("conversations"), list):
        answers = [m.get("value") for m in messages if isinstance(m, dict) and m.get("from") in ("gpt", "assistant")]
        found = answers[0] if answers else None
    return found.strip() if isinstance(found, str) and found.strip() else None


def expanded(caption: Caption, index: int, seed: int, tag: TagPlace) -> dict[str, Any]:
    """``caption``, the ``index``-th of its file, as a LLaVA record: an instruction with the caption as its answer.

    The instruction and a random position of the tag depend only on ``seed`` and the record's id (or index), so adding
    records doesn't change others.

    Raises:
        DataError: the record doesn't name one image.
    """
    try:
        named = image_names(caption.record)
    except DataError as error:
        raise DataError(f"{caption.where}: {error.message}", hint=FORM) from error
    if len(named) != 1:
        why = f"expected one image, found {len(named)}" if named else "no `image`"
        raise DataError(f"{caption.where}: {why}", hint=FORM)
    image = named[0]
    name = given_id(caption.record) or str(index)
    chance = random.Random(f"{seed} {name}")
    instruction = chance.choice(INSTRUCTIONS)
    last = chance.random() < 0.5 if tag == "random" else tag == "last"
    asked = f"{instruction}\n<image>" if last else f"<image>\n{instruction}"
    said = [{"from": "human", "value": asked}, {"from": "gpt", "value": caption.text}]
    return {"id": name, "image": image, "conversations": said}
