"""Thumbnails of images as data URIs, embedded in HTML pages."""

from __future__ import annotations

import base64
import io
import re
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import DataError
from llavactl.images.decode import decode

if TYPE_CHECKING:
    from PIL import Image

_SAFE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/]+={0,2}")


def thumbnail(data: bytes, side: int = 224) -> str:
    """The encoded image ``data`` as a JPEG data URI of at most ``side`` × ``side`` pixels; "" if undecodable."""
    try:
        image = decode(data)
    except DataError:
        return ""
    image.thumbnail((side, side))
    return jpeg_uri(image)


def jpeg_uri(image: Image.Image, **options: Any) -> str:
    """``image`` as a JPEG data URI; ``options`` are Pillow's."""
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85, **options)
    return data_uri(out.getvalue(), "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """``data`` as a data URI of an image of ``kind`` (``jpeg``, ``png``)."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def safe_image(uri: object) -> str:
    """``uri`` if it is a JPEG or PNG data URI, else "": a page must not load URLs that data contains."""
    return uri if isinstance(uri, str) and _SAFE.fullmatch(uri) else ""
