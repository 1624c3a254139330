"""``llavactl chat``: one question, a file of questions, or a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.chat.conversation import Conversation
from llavactl.chat.opening import open_assistant
from llavactl.components.sources.llava_record import image_names, names_images, place_images, unread_media
from llavactl.core.errors import DataError
from llavactl.core.locations import shortened
from llavactl.core.schema import Content, ImageRef, Turn
from llavactl.features.keys import why
from llavactl.files.json_stream import JsonEntry, read_stream
from llavactl.images.decode import ImageError, decode
from llavactl.images.references import named_image
from llavactl.model.folder import latest_model
from llavactl.model.generate import Sampling
from llavactl.model.imported import resolve

if TYPE_CHECKING:
    from llavactl.chat.assistant import Assistant
    from llavactl.recipe.frame import Outline

BATCH = 8
FORM = '--batch takes a JSONL of {"image": "file", "prompt": "text"}'


@dataclass(frozen=True)
class ChatReport:
    """One answer."""

    answer: str
    prompt: str
    images: tuple[str, ...]
    model: str


def open_chat(recipe: Outline | None, model: str | None = None, template: str | None = None) -> Conversation:
    """A conversation with ``model`` (of any format), else with the recipe's last finished stage."""
    if model is None:
        assert recipe is not None
        return Conversation(open_assistant(latest_model(recipe.run_dir), template=template))
    return Conversation(open_assistant(resolve(model, recipe), template=template))


WANTED = "expected an image file (PNG, JPEG, WebP, …), its URL, or base64"


def open_images(names: Sequence[str], base: Path | None = None) -> list[ImageRef]:
    """The images that the user names: files relative to ``base`` (default: the working directory), URLs or base64.

    Raises:
        DataError: an image can't be read; raised before a model is loaded.
    """
    images = []
    for name in names:
        try:
            image = named_image(name, base)
            decode(image.read())
        except OSError as error:
            raise DataError(f"image {shortened(name)}: {why(error)}", hint=WANTED) from error
        except ImageError as error:
            raise DataError(f"image {shortened(name)}: {error.reason}", hint=WANTED) from error
        images.append(image)
    return images


def content(
    prompt: str, images: Sequence[str | ImageRef], base: Path | None = None, *, named: bool = False
) -> tuple[Content, ...]:
    """The user's turn: the images, already opened or by name as in ``open_images``, then ``prompt``.

    ``<image>`` in ``prompt`` is an image's position, as in records: see ``place_images``.

    Raises:
        DataError: an image can't be read, or the tags don't fit the images.
    """
    opened = [ref for each in images for ref in (open_images([each], base) if isinstance(each, str) else [each])]
    return place_images([prompt], opened, named=named)[0]


def say(conversation: Conversation, prompt: str, images: Sequence[str | ImageRef], sampling: Sampling) -> ChatReport:
    """One question and its whole answer."""
    pieces = conversation.ask(*content(prompt, images), sampling=sampling)
    answer = "".join(pieces).strip()
    names = tuple(each if isinstance(each, str) else each.name for each in images)
    return ChatReport(answer, prompt, names, conversation.assistant.name)


BatchRecord = tuple[dict[str, Any], tuple[Content, ...]]


def read_batch(file: Path) -> list[BatchRecord]:
    """The records of a JSONL of ``{"image", "prompt"}``, each with its content; a JSON list is read, too.

    ``image`` may be a list or absent; its items are as in ``open_images``, with paths relative to ``file``.

    Raises:
        DataError: a record or an image can't be read; names its line.
    """
    try:
        return [_record(entry, f"{file}:{entry.place}", file.parent) for entry in read_stream(file)]
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}", hint=FORM) from error


def answer_batch(assistant: Assistant, records: Sequence[BatchRecord], sampling: Sampling) -> list[dict[str, Any]]:
    """``records`` in order, each with its ``answer``."""
    answers: list[str] = []
    for at in range(0, len(records), BATCH):
        asked = [(Turn("user", said),) for _, said in records[at : at + BATCH]]
        answers += assistant.answer(asked, sampling)
    return [{**record, "answer": answer} for (record, _), answer in zip(records, answers, strict=True)]


def _record(entry: JsonEntry, where: str, base: Path) -> BatchRecord:
    record = entry.value
    if entry.problem:
        raise DataError(f"{where}: {entry.problem}", hint=FORM)
    if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
        raise DataError(f"{where}: no text `prompt`", hint=FORM)
    try:
        names = image_names(record)
        if key := unread_media(record, images=bool(names)):
            raise DataError(f"unsupported key `{key}`", hint=FORM)
        return record, content(record["prompt"], names, base, named=names_images(record))
    except DataError as error:
        raise DataError(f"{where}: {error.message}", hint=error.hint) from error
