"""Images of a request: ``data:`` URLs, and with ``--allow-urls`` http(s) URLs."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any

from llavactl import DataError, download_public, image_from_bytes

from .errors import ApiError

MAX_URL_BYTES = 20 << 20
"""The limit for a downloaded image."""

_DATA_URL = re.compile(r"data:[\w.+/-]*(?:;[\w.+-]+=[^;,]*)*(;base64)?,", re.IGNORECASE)


def image_at(url: str, where: str, *, allow_urls: bool) -> Any:
    """The image at ``url``; ``where`` is its path in the request (``messages[0].content[1]``).

    Raises:
        ApiError: the URL is not allowed, or the image can't be read; names ``where``.
    """

    def refused(reason: str, code: str) -> ApiError:
        return ApiError(400, f"{where}: {reason}", param=f"{where}.image_url.url", code=code)

    scheme = url[:8].partition(":")[0].lower()
    if scheme == "data":
        try:
            data = _from_data_url(url)
        except ValueError as error:
            raise refused(str(error), "invalid_base64") from None
    elif scheme not in ("http", "https"):
        raise refused("expected an image as a data: URL (data:image/jpeg;base64,…)", "invalid_image_url")
    elif not allow_urls:
        raise refused(
            "image URLs are not allowed by this server: send the image as a data: URL", "image_urls_not_allowed"
        )
    else:
        try:
            data = download_public(url, MAX_URL_BYTES)
        except DataError as error:
            raise refused(f"the image can't be downloaded: {error.message}", "image_download_failed") from None
    try:
        return image_from_bytes(data, where)
    except DataError as error:
        raise refused(error.message, "invalid_image") from None


def _from_data_url(url: str) -> bytes:
    header = _DATA_URL.match(url)
    if header is None or header[1] is None:
        raise ValueError("expected a data: URL with base64 (data:image/jpeg;base64,…)")
    try:
        return base64.b64decode("".join(url[header.end() :].split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"invalid base64: {error}") from None
