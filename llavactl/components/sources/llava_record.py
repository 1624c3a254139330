"""Rules for a single LLaVA record, shared by reading and checking: images, messages and placeholders."""

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
_TAGS = re.compile(f"({TAG})")
UNREAD = frozenset(
    "system tools weight loss bbox bboxes box boxes objects region regions mask masks segmentation messages history "  # noqa: SIM905
    "chosen rejected rejected_response".split()
)
"""Keys of other formats, which are ignored."""

_MEDIA = re.compile(
    r"\s*(?:(?P<image>image|img|picture|pic|photo)|video|frame|audio)s?"
    r"(?:[_ -]?(?:path|file|filename|file_name|name|url|uri|base64|b64|bytes|data|list))?s?\s*",
    re.IGNORECASE,
)
_FILE_NAME = re.compile(
    r"[^\n]{1,1000}\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif|mp4|webm|mov|mkv|avi|wav|mp3|flac|ogg|m4a)",
    re.IGNORECASE,
)
"""The name of a media file."""

_METADATA_KEY = re.compile(r"(?:.*[_-])?(?:id|source|from|value)", re.IGNORECASE)
"""Keys whose values may look like a file name without naming an image of the record."""

_PLACEHOLDER = re.compile(
    r"<\|?\s*/?(?:start_of_)?(?:image|img|im|picture|photo|video|audio|vision)s?(?:here|[_ -]\w+)?\s*/?\s*\|?>"
    r"|\[(?:IMG|IMAGE|VIDEO|AUDIO)\]",
    re.IGNORECASE,
)
_INLINE_FILE = re.compile(r"<img>\s*[^<>\n]+\.(?:jpe?g|png|webp|gif|bmp|tiff?)\s*</img>", re.IGNORECASE)
_KEYS_SHOWN = 8


def names_images(record: Mapping[str, Any]) -> bool:
    """Whether ``record`` has a key for images, even an empty one. LLaVA trains records without a key as text."""
    return any(key in record for key in IMAGE_KEYS)


def tag_fault(texts: Sequence[str], images: int, *, named: bool) -> str:
    """Why the tags in the user's ``texts`` don't match the number of ``images``; "" if they do.

    If the record has no key for images (not ``named``), ``<image>`` is text. Several tags in one text stand for the
    only image once. Both are as in LLaVA's training, which fails, or uses another record's images, in the cases for
    which this returns a reason.
    """
    tags = sum(text.count(TAG) for text in texts)
    if not tags or tags == images:
        return ""
    if not images:
        return f"{tags} {TAG} {'tag' if tags == 1 else 'tags'}, but no image" if named else ""
    tagged_texts = sum(TAG in text for text in texts)
    if images == 1:
        return f"{TAG} in {tagged_texts} questions, but only one image" if tagged_texts > 1 else ""
    return f"{tags} {TAG} {'tag' if tags == 1 else 'tags'} for {images} images"


def place_images(texts: Sequence[str], images: Sequence[ImageRef], *, named: bool) -> list[tuple[Content, ...]]:
    """The user's ``texts`` with ``images`` in place of their tags (see ``tag_fault``); without tags, images come first.

    Raises:
        DataError: tags and images don't match.
    """
    if fault := tag_fault(texts, len(images), named=named):
        raise DataError(fault)
    if not images or not any(TAG in text for text in texts):
        front: tuple[Content, ...] = tuple(part for image in images for part in (image, "\n"))
        return [(*front, text) if index == 0 else (text,) for index, text in enumerate(texts)]
    remaining = list(images)

    def with_images(text: str) -> Iterable[Content]:
        for piece in _TAGS.split(text):
            if piece == TAG and remaining:  # further tags of the only image are removed
                yield remaining.pop(0)
            elif piece and piece != TAG:
                yield piece

    return [tuple(with_images(text)) if TAG in text else (text,) * bool(text) for text in texts]


def unread_media(fields: Mapping[str, Any], *, images: bool, read: Iterable[str] = IMAGE_KEYS) -> str:
    """The key of ``fields`` with media that would be ignored, or "".

    Video and audio are never read; images only under the keys ``read``. If the record has ``images`` there, other image
    keys (``image_url``) are metadata. In a record without images, no key may name a media file.
    """
    for key, value in fields.items():
        if key in read:
            continue
        if (match := _MEDIA.fullmatch(key)) and _has_content(value):
            if images and match["image"]:
                continue
            return key
        if not images and not _METADATA_KEY.fullmatch(key) and _names_file(value):
            return key
    return ""


def _names_file(value: Any) -> bool:
    values = value if isinstance(value, list) else [value]
    return any(isinstance(item, str) and _FILE_NAME.fullmatch(item.strip()) for item in values)


def _has_content(value: Any) -> bool:
    if isinstance(value, list):
        return any(map(_has_content, value))
    return bool(value.strip() if isinstance(value, str) else value) and isinstance(value, str | dict)


def message_fault(message: Any, *, images: bool) -> tuple[str, str] | None:
    """The problem of one message, as a kind of ``data check`` and a description; None if it is valid."""
    if not isinstance(message, dict) or not isinstance(message.get("value"), str):
        return "message", f"`value` is missing or not a string: {message!r:.60}"
    role = message.get("from")
    if not isinstance(role, str) or role not in ROLES:
        return "role", f"unknown `from` {role!r:.40}, expected one of {', '.join(ROLES)}"
    if len(message) == len(("from", "value")):
        return None  # for speed: there may be millions
    if key := unread_media(message, images=images, read=()):
        return "media", f"unsupported media in `{key}` of a message"
    if ROLES[role] == "assistant" and (key := _excluding_key(message)):
        return "message", f"`{key}: {message[key]!r}` is not supported: every answer is trained"
    return None


def _excluding_key(message: Mapping[str, Any]) -> str:
    """The key that excludes this answer from training, or ""."""
    for key in ("weight", "loss", "loss_scale", "train", "trainable"):
        value = message.get(key)
        if isinstance(value, bool | int | float) and not value:
            return key
    return ""


def foreign_placeholder(texts: Iterable[str], *, images: bool) -> str:
    """The first image placeholder of another tool in the user's ``texts``, or "".

    In a record without ``images``, only a placeholder that names a file counts; others may be part of the text.
    """
    pattern = _PLACEHOLDER if images else _INLINE_FILE
    return next((match[0] for text in texts for match in pattern.finditer(text) if match[0] != TAG), "")


def placeholder_as_text(texts: Iterable[str]) -> str:
    """The first image placeholder of another tool in the user's ``texts`` of a record without images, or ""."""
    return foreign_placeholder(texts, images=True)


def no_conversations(record: Mapping[str, Any]) -> str:
    """Why ``record`` has no list ``conversations``."""
    if "conversations" in record:
        return "`conversations` is not a list"
    keys = [*map(str, record)][:_KEYS_SHOWN] + ["…"] * (len(record) > _KEYS_SHOWN)
    return f"missing `conversations`; keys: {', '.join(keys) or 'none'}"
