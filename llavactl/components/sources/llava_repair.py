"""Repairs of one LLaVA record, with a list of the changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llavactl.components.sources.llava_checks import images_of
from llavactl.components.sources.llava_record import (
    ROLES,
    TAG,
    foreign_placeholder,
    message_fault,
    names_images,
    tag_fault,
)
from llavactl.images.references import ImageLocation

ROLE_SYNONYMS = {
    "bot": "gpt",
    "model": "gpt",
    "ai": "gpt",
    "chatgpt": "gpt",
    "gpt-4": "gpt",
    "answer": "gpt",
    "question": "human",
    "person": "human",
}
"""Role names of other formats, in lower case, and LLaVA's."""

Message = dict[str, Any]


def repair(record: Any, root: ImageLocation) -> tuple[dict[str, Any] | None, list[str]]:
    """``record`` repaired for the source ``llava-json`` (None: dropped), and a list of the changes.

    ``record`` itself is not changed. No content is invented: roles are renamed, messages merged or removed, tags
    added. If that isn't enough, or a question would then be about another image, the record is dropped.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return None, ["dropped: not a LLaVA record"]
    images, findings = images_of(record, root)
    if findings:
        return None, [f"dropped: {findings[0].kind} {findings[0].detail}"]
    changes: list[str] = []
    messages = _with_known_roles(record["conversations"], changes)
    if messages is None:
        return None, [*changes, "dropped: a message with an unknown role or without text"]
    if faults := [fault for message in messages if (fault := message_fault(message, images=bool(images)))]:
        return None, [*changes, f"dropped: {faults[0][1]}"]
    tags_before = _count_tags(messages)
    mismatch = tag_fault(_questions(messages), len(images), named=names_images(record))
    if mismatch and tags_before > len(images):
        return None, [*changes, f"dropped: {mismatch}"]
    messages = _alternating(messages, changes)
    messages = _answered(messages, changes)
    if not any(_role(message) == "assistant" for message in messages):
        return None, [*changes, "dropped: no answer is left"]
    tags = _count_tags(messages)
    if tags != tags_before and len(images) > 1:
        return None, [*changes, "dropped: a removed question had one of several images"]
    if not (tags and images) and (found := foreign_placeholder(_questions(messages), images=bool(images))):
        return None, [*changes, f"dropped: {found} instead of {TAG}"]
    messages = _with_all_tags(messages, len(images), changes)
    return ({**record, "conversations": messages} if changes else record), changes


def _questions(messages: Sequence[Message]) -> list[str]:
    return [message["value"] for message in messages if _role(message) == "user"]


def _count_tags(messages: Sequence[Message]) -> int:
    return sum(text.count(TAG) for text in _questions(messages))


def _role(message: Message) -> str:
    """``user``, ``assistant`` or ``system``."""
    return ROLES[message["from"]]


def _with_known_roles(messages: Sequence[Any], changes: list[str]) -> list[Message] | None:
    """``messages`` with LLaVA's role names; None if one has an unknown role or no text."""
    renamed = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            return None
        role = message.get("from")
        if isinstance(role, str) and role not in ROLES:
            lower = role.strip().lower()
            known = lower if lower in ROLES else ROLE_SYNONYMS.get(lower)
            if known is not None:
                changes.append(f"renamed the role {role!r} to {known!r}")
            role = known
        if not isinstance(role, str):
            return None
        renamed.append({**message, "from": role})
    return renamed


def _alternating(messages: Sequence[Message], changes: list[str]) -> list[Message]:
    """A system message first, if any, no answer before a question, and consecutive messages of one role merged."""
    kept: list[Message] = []
    for message in messages:
        role = _role(message)
        has_question = any(_role(other) != "system" for other in kept)
        if role == "system" and kept:
            changes.append("removed a later system message")
        elif role == "assistant" and not has_question:
            changes.append("removed an answer before the first question")
        elif kept and _role(kept[-1]) == role:
            changes.append(f"merged two consecutive {role} messages")
            kept[-1] = {**kept[-1], "value": f"{kept[-1]['value']}\n{message['value']}".strip()}
        else:
            kept.append(message)
    return kept


def _answered(messages: Sequence[Message], changes: list[str]) -> list[Message]:
    """Without questions that have no answer, or an empty one."""
    kept = []
    for index, message in enumerate(messages):
        if _role(message) == "system":
            kept.append(message)
        elif _role(message) == "assistant":
            if message["value"].strip():
                kept += [messages[index - 1], message]
            else:
                changes.append("removed an empty answer and its question")
    if messages and _role(messages[-1]) == "user":
        changes.append("removed a last question without an answer")
    return kept


def _with_all_tags(messages: Sequence[Message], images: int, changes: list[str]) -> list[Message]:
    """``messages`` with as many tags as images: missing tags are added after the last one."""
    tags = _count_tags(messages)
    if not tags or tags >= images:
        return list(messages)
    added = images - tags
    changes.append(f"added {added} {TAG} {'tag' if added == 1 else 'tags'}")
    last = max(i for i, message in enumerate(messages) if _role(message) == "user" and TAG in message["value"])
    before, _, after = messages[last]["value"].rpartition(TAG)
    text = before + "\n".join([TAG] * (added + 1)) + after
    return [{**message, "value": text} if i == last else message for i, message in enumerate(messages)]
