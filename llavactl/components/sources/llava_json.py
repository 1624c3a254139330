"""The source ``llava-json``: LLaVA's records, ``{"id", "image", "conversations": [{"from", "value"}, …]}``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import Field

from llavactl.components.sources.llava_checks import llava_findings
from llavactl.components.sources.llava_record import (
    ROLES,
    TAG,
    foreign_placeholder,
    message_fault,
    names_images,
    no_conversations,
    place_images,
    unread_media,
)
from llavactl.components.sources.llava_repair import repair
from llavactl.core.errors import DataError
from llavactl.core.hashes import hash_file
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.protocols import Finding, RawRecord
from llavactl.core.registry import Options
from llavactl.core.schema import ImageRef, Json, Sample, Turn
from llavactl.files.json_stream import STREAM_SUFFIXES, read_stream
from llavactl.files.records import IMAGE_KEYS, given_id, image_names
from llavactl.images.references import ImageLocation, ImageRoot, check_image_root, image_in

PATH_HINT = "check `path`; if the recipe generates this file, run `llavactl data generate` first"
FORM = 'a record is {"id", "image", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value"}]}'
MEDIA = "name images in `image` or `images`; remove records with video or audio, which can't be trained"


class LlavaJsonOptions(Options):
    """``images``: what image paths are relative to (default: the records' own folder): a folder, a .zip or .tar, a
    pattern of those (``shards/*.tar``), or a URL that fsspec opens (``s3://…``); nothing is unpacked.
    """

    path: RecipePath = Field(description="JSON list or JSONL of records")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar, pattern of these, or URL of the images; null: the folder of `path`"
    )
    follow_links: FollowLinks = False


class LlavaJson:
    """One sample per record of a JSON list or a JSONL file, in the file's order.

    ``image`` (or ``images``) may be a string, a list or absent. Every ``<image>`` in the user's turns stands for the
    next image, and several in one turn for the only image. Without tags, images go before the first question. In
    answers, and in records without either key, ``<image>`` is text.
    If a record with an image has a single answer, this is also its caption for a teacher.
    A record without an id is identified by its index in the file, from 0.
    """

    def __init__(self, options: LlavaJsonOptions) -> None:
        self.path: Path = options.path
        self.images = options.images
        self.root = ImageRoot(str(options.images or options.path.parent), options.follow_links)

    def __iter__(self) -> Iterator[Sample]:
        """Raises DataError with the line of the first record that can't be used."""
        self.check()
        for record in self.records():
            if record.problem:
                raise self._with_repair_hint(DataError(f"{record.where}: {record.problem}"))
            yield self.sample(record)

    def identity(self) -> Mapping[str, Json]:
        """A hash of the records; paths of files and images are options."""
        return {"records": hash_file(self.path), "images": self.root.root}

    def check(self) -> None:
        """Raises DataError if the file or the images' location doesn't exist."""
        if not self.path.is_file():
            raise DataError(f"{self.path}: no such file", hint=PATH_HINT)
        if self.images is not None:
            check_image_root(self.root.root)

    def records(self) -> Iterator[RawRecord]:
        for entry in read_stream(self.path):
            yield RawRecord(f"{self.path}:{entry.location}", entry.value, entry.index, entry.problem, entry.position)

    def examine(self, record: RawRecord) -> tuple[list[Finding], list[ImageRef]]:
        return llava_findings(record.value, self.root)

    def sample(self, record: RawRecord) -> Sample:
        try:
            return llava_sample(record.value, record.where, self.root, record.index)
        except DataError as error:
            raise self._with_repair_hint(error) from error

    def repair(self, record: RawRecord) -> tuple[Mapping[str, Any] | None, list[str]]:
        return repair(record.value, self.root)

    @cached_property
    def repair_command(self) -> str:
        """The command that repairs the records of this file."""
        suffix = self.path.suffix if self.path.suffix in STREAM_SUFFIXES else ".json"
        words = ["llavactl", "data", "check", str(self.path)]
        words += [] if self.images is None else ["--images", str(self.images)]
        words += ["--follow-links"] if self.root.follow_links else []
        return shlex.join([*words, "--fix", str(self.path.with_name(f"{self.path.stem}.fixed{suffix}"))])

    def _with_repair_hint(self, error: DataError) -> DataError:
        """``error`` about one record, with a hint that also names ``repair_command``."""
        fix = f"`{self.repair_command}` writes a file in which such records are repaired or dropped"
        return DataError(error.message, hint=f"{error.hint}; {fix}" if error.hint else fix)


def llava_sample(record: Any, where: str, root: ImageLocation, index: int = 0) -> Sample:
    """A LLaVA record, ``{"id", "image", "conversations"}``, as a sample.

    ``root`` is the location of its images as in ``image_in``; ``index`` is the id of a record without an id.

    Raises:
        DataError: the record can't be used; the message begins with ``where``.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where}: not a LLaVA record: expected an object, got {record!r:.60}")
    if not isinstance(record.get("conversations"), list):
        raise DataError(f"{where}: not a LLaVA record: {no_conversations(record)}", hint=FORM)
    images = _images(record, where, root)
    turns = _alternating([_turn(message, where, bool(images)) for message in record["conversations"]], where)
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise DataError(f"{where}: no answer: the record has no target tokens")
    extra = {key: value for key, value in record.items() if key not in ("id", "conversations", *IMAGE_KEYS)}
    answers = [turn.text.strip() for turn in turns if turn.role == "assistant"]
    captions = tuple(answers) if len(answers) == 1 and images else ()
    turns_with_images = tuple(_with_images(turns, images, where, named=names_images(record)))
    return Sample(given_id(record) or str(index), turns_with_images, where, captions=captions, extra=extra)


def _images(record: Mapping[str, Any], where: str, root: ImageLocation) -> list[ImageRef]:
    try:
        images = [image_in(root, path) for path in image_names(record)]
    except DataError as error:
        raise DataError(f"{where}: {error.message}", hint=error.hint) from error
    if key := unread_media(record, images=bool(images)):
        raise DataError(f"{where}: unsupported media in `{key}`", hint=MEDIA)
    return images


def _turn(message: Any, where: str, images: bool) -> Turn:
    if fault := message_fault(message, images=images):
        raise DataError(f"{where}: invalid message: {fault[1]}", hint=FORM)
    return Turn(ROLES[message["from"]], (message["value"],))


def _alternating(turns: list[Turn], where: str) -> list[Turn]:
    """User and assistant turns that alternate, without answers before the first question, as in LLaVA."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    messages = turns[len(system) :]
    while messages and messages[0].role == "assistant":
        messages = messages[1:]
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(messages)):
        raise DataError(
            f"{where}: user and assistant messages don't alternate: {', '.join(turn.role for turn in turns)}"
        )
    return system + messages


def _with_images(turns: list[Turn], images: list[ImageRef], where: str, *, named: bool) -> Iterator[Turn]:
    """``turns`` with the images in place of the tags."""
    questions = [turn.text for turn in turns if turn.role == "user"]
    try:
        contents = iter(place_images(questions, images, named=named))
    except DataError as error:
        raise DataError(f"{where}: {error.message}", hint=f"{TAG} stands for an image of the record") from error
    tagged = bool(images) and any(TAG in text for text in questions)
    if not tagged and (found := foreign_placeholder(questions, images=bool(images))):
        raise DataError(f"{where}: {found} would be trained as text", hint=f"the placeholder of an image is {TAG}")
    for turn in turns:
        if turn.role == "user" and (content := next(contents)) != turn.content:
            yield Turn("user", content)
        else:
            yield turn
