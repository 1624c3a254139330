"""The rules for a single LLaVA record, shared by reading and checking: images, messages and placeholders."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llavactl.core.errors import DataError
from llavactl.core.schema import Content, ImageRef, Role
from llavactl.files.records import IMAGE_KEYS

ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
TAG = "<image>"
UNREAD = frozenset(
    "system tools weight loss bbox bboxes box boxes objects region regions mask masks segmentation messages history "  # noqa: SIM905
    "chosen rejected rejected_response".split()
)
"""Keys that have a meaning in other formats and none here."""

_MEDIA = re.compile(
    r"\s*(?:(?P<image>image|img|picture|pic|photo)|video|frame|audio)s?"
    r"(?:[_ -]?(?:path|file|filename|file_name|name|url|uri|base64|b64|bytes|data|list))?s?\s*",
    re.IGNORECASE,
)
_FILE = re.compile(
    r"[^\n]{1,1000}\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif|mp4|webm|mov|mkv|avi|wav|mp3|flac|ogg|m4a)",
    re.IGNORECASE,
)
"""The name of a media file, under whatever key."""

_NO_FILE = re.compile(r"(?:.*[_-])?(?:id|source|from|value)", re.IGNORECASE)
"""Keys whose values may look like a file's name without asking for the file."""

_PLACEHOLDER = re.compile(
    r"<\|?\s*/?(?:start_of_)?(?:image|img|im|picture|photo|video|audio|vision)s?(?:here|[_ -]\w+)?\s*/?\s*\|?>"
    r"|\[(?:IMG|IMAGE|VIDEO|AUDIO)\]",
    re.IGNORECASE,
)
_INLINE = re.compile(r"<img>\s*[^<>\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)\s*</img>", re.IGNORECASE)
_KEYS_SHOWN = 8


def names_images(record: Mapping[str, Any]) -> bool:
    """Whether ``record`` has a key for images, even if its value is empty. LLaVA trains records without one as text."""
    return any(key in record for key in IMAGE_KEYS)


def tag_fault(texts: Sequence[str], images: int, *, named: bool) -> str:
    """Why the tags in the user's ``texts`` don't fit the number of ``images``; "" if they do.

    If the record has no key for images (not ``named``), ``<image>`` is text. Several tags in one text stand for the
    only image once. Both as in LLaVA's training, which fails, or uses images of other records, where a reason is given.
    """
    tags = sum(text.count(TAG) for text in texts)
    if not tags or tags == images:
        return ""
    if not images:
        return f"{tags} {TAG} {'tag' if tags == 1 else 'tags'}, but no image" if named else ""
    tagged = sum(TAG in text for text in texts)
    if images == 1:
        return f"{TAG} in {tagged} questions, but there is only one image" if tagged > 1 else ""
    return f"{tags} {TAG} {'tag' if tags == 1 else 'tags'} for {images} images"


def place_images(texts: Sequence[str], images: Sequence[ImageRef], *, named: bool) -> list[tuple[Content, ...]]:
    """The user's ``texts`` with ``images`` in place of their tags (see ``tag_fault``); without tags, images come first.

    Raises:
        DataError: tags and images don't fit together.
    """
    if fault := tag_fault(texts, len(images), named=named):
        raise DataError(fault)
    if not images or not any(TAG in text for text in texts):
        front: tuple[Content, ...] = tuple(part for image in images for part in (image, "\n"))
        return [(*front, text) if at == 0 else (text,) for at, text in enumerate(texts)]
    queue = list(images)

    def placed(text: str) -> Iterable[Content]:
        for piece in re.split(f"({TAG})", text):
            if piece == TAG and queue:  # a further tag of the only image is left out
                yield queue.pop(0)
            elif piece and piece != TAG:
                yield piece

    return [tuple(placed(text)) for text in texts]


def unread_media(fields: Mapping[str, Any], *, images: bool, read: Iterable[str] = IMAGE_KEYS) -> str:
    """The key of ``fields`` with media that would be ignored, or "".

    Video and audio are never read; images only under the keys ``read``. If the record has ``images`` there, other image
    keys (``image_url``) are taken as metadata. In a record without, any key may not name a media file.
    """
    for key, value in fields.items():
        if key in read:
            continue
        if (match := _MEDIA.fullmatch(key)) and _names_something(value):
            if images and match["image"]:
                continue
            return key
        if not images and not _NO_FILE.fullmatch(key) and _names_file(value):
            return key
    return ""


def _names_file(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(each, str) and _FILE.fullmatch(each.strip()) for each in values)


def _names_something(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_names_something, value))
    return bool(value.strip() if isinstance(value, str) else value) and isinstance(value, str | dict)


def message_fault(message: Any, *, images: bool) -> tuple[str, str] | None:
    """The problem of one message, as a kind of ``data check`` and a description; None if it is valid."""
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        return "message", f"no text `value` in {message!r:.60}"
    speaker = message.get("from")
    if not isinstance(speaker, str) or speaker not in ROLES:
        return "role", f"unknown `from` {speaker!r:.40}, expected one of {', '.join(ROLES)}"
    if key := unread_media(message, images=images, read=()):
        return "media", f"unsupported media in `{key}` of a message"
    if ROLES[speaker] == "assistant" and (key := _excluded(message)):
        return "message", f"`{key}: {message[key]!r}` is not supported: every answer is trained"
    return None


def _excluded(message: Mapping[str, Any]) -> str:
    """The key that excludes this answer from training, or ""."""
    for key in ("weight", "loss", "loss_scale", "train", "trainable"):
        value = message.get(key)
        if isinstance(value, bool | int | float) and not value:
            return key
    return ""


def foreign_placeholder(texts: Iterable[str], *, images: bool) -> str:
    """Another tool's placeholder for an image in the user's ``texts``; "" if there is none.

    In a record without ``images`` only one that names a file counts; others may be part of the conversation.
    """
    pattern = _PLACEHOLDER if images else _INLINE
    return next((match[0] for text in texts for match in pattern.finditer(text) if match[0] != TAG), "")


def placeholder_as_text(texts: Iterable[str]) -> str:
    """Another tool's placeholder in the user's ``texts`` of a record without images; "" if there is none."""
    return foreign_placeholder(texts, images=True)


def no_conversations(record: Mapping[str, Any]) -> str:
    """The problem of a ``record`` without a list ``conversations``."""
    if "conversations" in record:
        return "`conversations` is not a list"
    keys = [*map(str, record)][:_KEYS_SHOWN] + ["…"] * (len(record) > _KEYS_SHOWN)
    return f"no `conversations`: its keys are {', '.join(keys) or 'none'}"
