"""All problems of one LLaVA record at once, where the source `llava-json` stops at the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llavactl.components.sources.llava_record import (
    ROLES,
    TAG,
    UNREAD,
    foreign_placeholder,
    message_fault,
    names_images,
    no_conversations,
    placeholder_as_text,
    tag_fault,
    unread_media,
)
from llavactl.core.errors import DataError
from llavactl.core.protocols import Finding
from llavactl.core.schema import ImageRef
from llavactl.files.records import given_id, image_names
from llavactl.images.references import ImageRoot, image_in

REFUSED = frozenset({"record", "media", "message", "role", "turns", "no-answer", "tags", "placeholder", "image-path"})
"""The problems of a single record for which ``sample_of`` refuses it."""


def examine(record: Any, root: ImageRoot | str) -> tuple[list[Finding], list[ImageRef]]:
    """What is wrong with ``record`` by itself, and its images, relative to ``root``, which are not looked at.

    A record without a finding of ``REFUSED`` is one that the source `llava-json` takes.
    """
    if not isinstance(record, dict):
        return [Finding("record", f"{record!r:.60} is no object")], []
    images, findings = images_of(record, root)
    named = not any(finding.kind in ("record", "image-path") for finding in findings)
    if given_id(record) is None:
        findings.append(Finding("no-id"))
    if unread := [key for key in record if key in UNREAD and record[key]]:
        findings.append(Finding("unread", ", ".join(unread)))
    messages = record.get("conversations")
    if not isinstance(messages, list):
        return [*findings, Finding("record", no_conversations(record))], images
    if wrong := list(_messages(messages, bool(images) or not named)):
        return [*findings, *wrong], images
    said = [(ROLES[message["from"]], message["value"]) for message in messages]
    tags = _tags(said, len(images) if named else None, names_images(record))
    return [*findings, *tags, *_turns(said)], images


def images_of(record: Mapping[str, Any], root: ImageRoot | str) -> tuple[list[ImageRef], list[Finding]]:
    """The images that ``record`` names below ``root``, and findings about their names and other media."""
    try:
        paths = image_names(record)
    except DataError as error:
        return [], [Finding("record", error.message)]
    images: list[ImageRef] = []
    findings = []
    for path in paths:
        try:
            images.append(image_in(root, path))
        except DataError as error:
            findings.append(Finding("image-path", error.message))
    if key := unread_media(record, images=bool(paths)):
        findings.append(Finding("media", f"`{key}`"))
    return images, findings


def _messages(messages: Sequence[Any], images: bool) -> Iterator[Finding]:
    for number, message in enumerate(messages, 1):
        if fault := message_fault(message, images=images):
            yield Finding(fault[0], f"message {number}: {fault[1]}")


def _tags(said: Sequence[tuple[str, str]], images: int | None, named: bool) -> Iterator[Finding]:
    """``images``: how many; None if their names are wrong. ``named``: whether the record has a key for them."""
    asked = [text for role, text in said if role == "user"]
    tags = sum(text.count(TAG) for text in asked)
    if images is not None and (fault := tag_fault(asked, images, named=named)):
        yield Finding("tags", fault)
    elif tags and images == 0:
        yield Finding("tag-as-text", f"{tags} of them" if tags > 1 else "")
    elif images == 1 and tags > 1:
        yield Finding("repeated-tag", f"{tags} of them")
    if images is not None and not (tags and images) and (found := foreign_placeholder(asked, images=bool(images))):
        yield Finding("placeholder", found)
    elif images and not tags:
        yield Finding("no-tag")
    elif not images and (found := placeholder_as_text(asked)):
        yield Finding("placeholder-text", found)
    if any(TAG in text for role, text in said if role == "assistant"):
        yield Finding("tag-in-answer")


def _turns(said: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    talk = list(said[1:] if said and said[0][0] == "system" else said)
    first = next((index for index, (role, _) in enumerate(talk) if role != "assistant"), len(talk))
    if first:
        yield Finding("assistant-first")
    talk = talk[first:]
    if any(role != ("user", "assistant")[index % 2] for index, (role, _) in enumerate(talk)):
        yield Finding("turns", ", ".join(role for role, _ in said[:8]) + (", …" if len(said) > 8 else ""))
    answers = [text.strip() for role, text in talk if role == "assistant"]
    if not any(answers):
        yield Finding("no-answer")
    elif not all(answers):
        yield Finding("empty-answer", f"answer {answers.index('') + 1} of {len(answers)}")
    if talk and talk[-1][0] == "user":
        yield Finding("unanswered")
    if any(not text.strip() for role, text in talk if role == "user"):
        yield Finding("empty-question")
