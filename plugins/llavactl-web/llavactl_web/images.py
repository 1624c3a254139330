"""Untrusted images: limits, thumbnails, and the images that a loaded conversation names."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl import DataError, ImageRef, download_public

if TYPE_CHECKING:
    from PIL import Image

MAX_IMAGES = 8
"""Images per question."""
MAX_BYTES = 20 << 20
MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")

_THUMBNAIL = (320, 320)
_DATA_URI = re.compile(r"data:[\w.+/-]*;base64,")


def checked(data: bytes) -> str:
    """The encoded image ``data`` as a base64 string for ``Chat.ask``.

    Raises:
        DataError: not an image in one of ``FORMATS``, or above a limit; no pixel is decoded.
    """
    from PIL import Image

    if len(data) > MAX_BYTES:
        raise DataError(f"the image is larger than {MAX_BYTES >> 20} MiB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError as error:
        raise DataError(f"the image has more than {MAX_PIXELS // 10**6} million pixels") from error
    except Exception as error:  # Pillow raises many types for broken files
        raise DataError("not an image", hint=f"supported: {', '.join(FORMATS)}") from error
    if width * height > MAX_PIXELS:
        raise DataError(f"the image has {width} x {height} pixels, more than {MAX_PIXELS // 10**6} million")
    return f"data:;base64,{base64.b64encode(data).decode()}"


@functools.lru_cache(maxsize=512)
def thumbnail(image: ImageRef) -> str:
    """A small JPEG of ``image`` as a data: URL; "" if it can't be read."""
    try:
        return thumbnail_of(checked(image.read()))
    except Exception:  # noqa: BLE001 - of a plugin's image too; a page without it is better than none
        return ""


def thumbnail_of(encoded: str) -> str:
    """A small JPEG of what ``checked`` returned as a data: URL; "" if it can't be decoded."""
    from PIL import Image, ImageOps

    data = base64.b64decode(encoded.partition(",")[2])
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            opened.draft("RGB", _THUMBNAIL)
            small = ImageOps.exif_transpose(opened).convert("RGB")
        small.thumbnail(_THUMBNAIL)
        return data_url(small)
    except Exception:  # noqa: BLE001 - Pillow raises many types for broken files
        return ""


def data_url(image: Image.Image) -> str:
    """``image`` as a JPEG in a data: URL."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def suffix(data: bytes) -> str:
    """The suffix of a file with the image ``data``."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        return str(image.format).lower()


def with_images_embedded(text: str, *, allow_urls: bool, allow_files: bool) -> str:
    """The conversation file ``text`` with every image as base64, so that loading it opens nothing else.

    Raises:
        DataError: not JSON, or an image that can't be read or isn't allowed.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("not a conversation: invalid JSON", hint="`/save FILE` of chat writes such files") from error
    messages = document.get("messages") if isinstance(document, dict) else document
    for message in messages if isinstance(messages, list) else []:
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and "image" in part:
                part["image"] = _embedded(part, allow_urls=allow_urls, allow_files=allow_files)
    return json.dumps(document)


def _embedded(part: Mapping[str, Any], *, allow_urls: bool, allow_files: bool) -> str:
    name = part["image"]
    if not isinstance(name, str):
        raise DataError("expected the image of a message as a string")
    if header := _DATA_URI.match(name):
        try:
            return checked(base64.b64decode(name[header.end() :], validate=True))
        except binascii.Error as error:
            raise DataError("an image of the conversation is invalid base64") from error
    if name.lower().startswith(("http://", "https://")):
        return checked(image_at(name, allow_urls=allow_urls))
    if not allow_files:
        raise DataError(
            f"the conversation names the image file {name[:80]!r}",
            hint="files of the server are not read: the images must be part of the conversation, as base64",
        )
    file = Path(name)
    try:
        if not file.is_absolute() or not file.is_file() or file.stat().st_size > MAX_BYTES:
            raise OSError("not an image file")
        return checked(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"image {name[:80]!r} of the conversation: {error}") from error


def image_at(url: str, *, allow_urls: bool) -> bytes:
    """The bytes at the http(s) ``url``.

    Raises:
        DataError: URLs are not allowed, or it can't be downloaded.
    """
    if not allow_urls:
        raise DataError("images by URL are disabled", hint="start with --allow-urls")
    return download_public(url.strip(), MAX_BYTES)
