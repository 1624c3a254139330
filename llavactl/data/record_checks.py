"""All problems of one LLaVA record at once, where the source `llava-json` stops at the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llavactl.components.sources.llava_json import ROLES, TAG
from llavactl.core.errors import DataError
from llavactl.core.places import Place, image_in
from llavactl.core.schema import ImageRef
from llavactl.data.problems import Finding


def examine(record: Any, root: Place | str) -> tuple[list[Finding], list[ImageRef]]:
    """What is wrong with ``record`` by itself, and its images, relative to ``root``, which are not looked at.

    A record without a finding of ``problems.REFUSED`` is one that the source `llava-json` takes.
    """
    if not isinstance(record, dict):
        return [Finding("record", f"{record!r:.60} is no object")], []
    images, findings = images_of(record, root)
    named = not findings
    if record.get("id") is None:
        findings.append(Finding("no-id"))
    messages = record.get("conversations")
    if not isinstance(messages, list):
        why = "`conversations` is no list" if "conversations" in record else "no `conversations`"
        return [*findings, Finding("record", why)], images
    if wrong := list(_messages(messages)):
        return [*findings, *wrong], images
    said = [(ROLES[message["from"]], message["value"]) for message in messages]
    return [*findings, *_tags(said, len(images) if named else None), *_turns(said)], images


def images_of(record: Mapping[str, Any], root: Place | str) -> tuple[list[ImageRef], list[Finding]]:
    """The images that ``record`` names below ``root``, and what is wrong with the names."""
    named = record.get("image")
    paths = [] if named is None or named == "" else named if isinstance(named, list) else [named]
    if not all(isinstance(path, str) for path in paths):
        return [], [Finding("record", f"`image` is {named!r:.60}, not a path or a list of paths")]
    images: list[ImageRef] = []
    findings = []
    for path in paths:
        try:
            images.append(image_in(root, path))
        except DataError as error:
            findings.append(Finding("image-path", error.message))
    return images, findings


def _messages(messages: Sequence[Any]) -> Iterator[Finding]:
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            yield Finding("message", f"message {number}: {message!r:.60}")
        elif not isinstance(message.get("from"), str) or message["from"] not in ROLES:
            yield Finding("role", f"message {number}: {message.get('from')!r:.40}")


def _tags(said: Sequence[tuple[str, str]], images: int | None) -> Iterator[Finding]:
    tags = sum(text.count(TAG) for role, text in said if role == "user")
    if images is not None and tags and tags != images:
        yield Finding("tags", f"{tags} {TAG} tags for {images} images")
    if images and not tags:
        yield Finding("no-tag")
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
