"""All problems of one LLaVA record at once; the source ``llava-json`` raises an error for the first."""

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
from llavactl.images.references import ImageLocation, image_in

REFUSED = frozenset({"record", "media", "message", "role", "turns", "no-answer", "tags", "placeholder", "image-path"})
"""The problems of a single record for which ``llava_sample`` refuses it."""


def llava_findings(record: Any, root: ImageLocation) -> tuple[list[Finding], list[ImageRef]]:
    """All problems of a LLaVA record by itself, and its images, which are not opened.

    ``root`` is that of ``llava_sample``, which accepts exactly the records without a finding that stops a run.
    """
    if not isinstance(record, dict):
        return [Finding("record", f"expected an object, got {record!r:.60}")], []
    images, findings = images_of(record, root)
    valid_paths = not any(finding.kind in ("record", "image-path") for finding in findings)
    if given_id(record) is None:
        findings.append(Finding("no-id"))
    if unread := [key for key in record if key in UNREAD and record[key]]:
        findings.append(Finding("unread", ", ".join(unread)))
    messages = record.get("conversations")
    if not isinstance(messages, list):
        return [*findings, Finding("record", no_conversations(record))], images
    if invalid := list(_message_findings(messages, bool(images) or not valid_paths)):
        return [*findings, *invalid], images
    messages_by_role = [(ROLES[message["from"]], message["value"]) for message in messages]
    tags = _tag_findings(messages_by_role, len(images) if valid_paths else None, names_images(record))
    return [*findings, *tags, *_turn_findings(messages_by_role)], images


def images_of(record: Mapping[str, Any], root: ImageLocation) -> tuple[list[ImageRef], list[Finding]]:
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


def _message_findings(messages: Sequence[Any], images: bool) -> Iterator[Finding]:
    for number, message in enumerate(messages, 1):
        if fault := message_fault(message, images=images):
            yield Finding(fault[0], f"message {number}: {fault[1]}")


def _tag_findings(messages: Sequence[tuple[str, str]], images: int | None, named: bool) -> Iterator[Finding]:
    """``images`` is their number (None: invalid paths), ``named`` whether the record has a key for them."""
    questions = [text for role, text in messages if role == "user"]
    tags = sum(text.count(TAG) for text in questions)
    if images is not None and (fault := tag_fault(questions, images, named=named)):
        yield Finding("tags", fault)
    elif tags and images == 0:
        yield Finding("tag-as-text", f"{tags} tags" if tags > 1 else "")
    elif images == 1 and tags > 1:
        yield Finding("repeated-tag", f"{tags} tags")
    if images is not None and not (tags and images) and (found := foreign_placeholder(questions, images=bool(images))):
        yield Finding("placeholder", found)
    elif images and not tags:
        yield Finding("no-tag")
    elif not images and (found := placeholder_as_text(questions)):
        yield Finding("placeholder-text", found)
    if any(TAG in text for role, text in messages if role == "assistant"):
        yield Finding("tag-in-answer")


def _turn_findings(messages: Sequence[tuple[str, str]]) -> Iterator[Finding]:
    turns = list(messages[1:] if messages and messages[0][0] == "system" else messages)
    first = next((index for index, (role, _) in enumerate(turns) if role != "assistant"), len(turns))
    if first:
        yield Finding("assistant-first")
    turns = turns[first:]
    if any(role != ("user", "assistant")[index % 2] for index, (role, _) in enumerate(turns)):
        yield Finding("turns", ", ".join(role for role, _ in messages[:8]) + (", …" if len(messages) > 8 else ""))
    answers = [text.strip() for role, text in turns if role == "assistant"]
    if not any(answers):
        yield Finding("no-answer")
    elif not all(answers):
        yield Finding("empty-answer", f"answer {answers.index('') + 1} of {len(answers)}")
    if turns and turns[-1][0] == "user":
        yield Finding("unanswered")
    if any(not text.strip() for role, text in turns if role == "user"):
        yield Finding("empty-question")
