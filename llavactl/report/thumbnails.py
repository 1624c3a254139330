"""Small copies of images that a page can carry inside itself."""

from __future__ import annotations

import base64
import io
import re

from llavactl.core.errors import DataError
from llavactl.images.decode import decode

_SAFE = re.compile(r"data:image/(?:jpeg|png);base64,[A-Za-z0-9+/]+={0,2}")


def thumbnail(data: bytes, side: int = 224) -> str:
    """The encoded image ``data`` as a JPEG data URI of at most ``side`` pixels a side; "" when it can't be read."""
    try:
        image = decode(data)
    except DataError:
        return ""
    image.thumbnail((side, side))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return data_uri(out.getvalue(), "jpeg")


def data_uri(data: bytes, kind: str) -> str:
    """``data`` as the address of an image of ``kind`` (``jpeg``, ``png``)."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def safe_image(uri: object) -> str:
    """``uri`` where it is a JPEG or PNG that lies in it whole, else "": a page must never fetch what data names."""
    return uri if isinstance(uri, str) and _SAFE.fullmatch(uri) else ""
