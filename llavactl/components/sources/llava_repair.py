"""A record mended so that it can be trained, and what was done to it; or dropped, and why."""

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
from llavactl.images.references import ImageRoot

SYNONYMS = {
    "bot": "gpt",
    "model": "gpt",
    "ai": "gpt",
    "chatgpt": "gpt",
    "gpt-4": "gpt",
    "answer": "gpt",
    "question": "human",
    "person": "human",
}
"""Names of speakers that other formats use, in lower case, and LLaVA's."""

Message = dict[str, Any]


def repair(record: Any, root: ImageRoot | str) -> tuple[dict[str, Any] | None, list[str]]:
    """``record`` repaired for the source `llava-json` (None: dropped), and a list of what was done.

    ``record`` itself is not changed. No content is invented: roles are renamed, messages merged or removed, tags
    added. If that isn't enough, or a question would then be about another image, the record is dropped.
    """
    if not isinstance(record, dict) or not isinstance(record.get("conversations"), list):
        return None, ["dropped: not a LLaVA record"]
    images, wrong = images_of(record, root)
    if wrong:
        return None, [f"dropped: {wrong[0].kind} {wrong[0].detail}"]
    did: list[str] = []
    messages = _speakers(record["conversations"], did)
    if messages is None:
        return None, [*did, "dropped: a message without a speaker that we know or without text"]
    if faults := [fault for message in messages if (fault := message_fault(message, images=bool(images)))]:
        return None, [*did, f"dropped: {faults[0][1]}"]
    before = _count(messages)
    mismatch = tag_fault(_asked(messages), len(images), named=names_images(record))
    if mismatch and before > len(images):
        return None, [*did, f"dropped: {mismatch}"]
    messages = _alternating(messages, did)
    messages = _answered(messages, did)
    if not any(role_of(message) == "assistant" for message in messages):
        return None, [*did, "dropped: no answer is left"]
    left = _count(messages)
    if left != before and len(images) > 1:
        return None, [*did, "dropped: a removed question had one of several images"]
    if not (left and images) and (found := foreign_placeholder(_asked(messages), images=bool(images))):
        return None, [*did, f"dropped: {found} in place of {TAG}"]
    messages = _tagged(messages, len(images), did)
    return ({**record, "conversations": messages} if did else record), did


def _asked(messages: Sequence[Message]) -> list[str]:
    return [message["value"] for message in messages if role_of(message) == "user"]


def _count(messages: Sequence[Message]) -> int:
    return sum(text.count(TAG) for text in _asked(messages))


def role_of(message: Message) -> str:
    """``user``, ``assistant`` or ``system``."""
    return ROLES[message["from"]]


def _speakers(messages: Sequence[Any], did: list[str]) -> list[Message] | None:
    named = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("value"), str):
            return None
        speaker = message.get("from")
        if isinstance(speaker, str) and speaker not in ROLES:
            lower = speaker.strip().lower()
            known = lower if lower in ROLES else SYNONYMS.get(lower)
            if known is not None:
                did.append(f"from {speaker!r} is {known!r}")
            speaker = known
        if not isinstance(speaker, str):
            return None
        named.append({**message, "from": speaker})
    return named


def _alternating(messages: Sequence[Message], did: list[str]) -> list[Message]:
    """System first if at all, no answer before a question, and messages of one speaker in a row joined."""
    kept: list[Message] = []
    for message in messages:
        role = role_of(message)
        talk = [each for each in kept if role_of(each) != "system"]
        if role == "system" and kept:
            did.append("a later system message left out")
        elif role == "assistant" and not talk:
            did.append("an answer before any question left out")
        elif kept and role_of(kept[-1]) == role:
            did.append(f"two messages of the {role} joined")
            kept[-1] = {**kept[-1], "value": f"{kept[-1]['value']}\n{message['value']}".strip()}
        else:
            kept.append(message)
    return kept


def _answered(messages: Sequence[Message], did: list[str]) -> list[Message]:
    """Without questions that have no answer, or an empty one."""
    kept = []
    for index, message in enumerate(messages):
        if role_of(message) == "system":
            kept.append(message)
        elif role_of(message) == "assistant":
            if message["value"].strip():
                kept += [messages[index - 1], message]
            else:
                did.append("an empty answer and its question left out")
    if messages and role_of(messages[-1]) == "user":
        did.append("a last question without an answer left out")
    return kept


def _tagged(messages: Sequence[Message], images: int, did: list[str]) -> list[Message]:
    """``messages`` with as many tags as images: missing tags are added after the last one."""
    tags = _count(messages)
    if not tags or tags >= images:
        return list(messages)
    did.append(f"{tags} {TAG} tags made {images}")
    last = max(at for at, each in enumerate(messages) if role_of(each) == "user" and TAG in each["value"])
    before, _, after = messages[last]["value"].rpartition(TAG)
    text = before + "\n".join([TAG] * (images - tags + 1)) + after
    return [{**each, "value": text} if at == last else each for at, each in enumerate(messages)]
