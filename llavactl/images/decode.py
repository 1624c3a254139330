"""Decoding untrusted images to upright RGB, or a short reason why that fails."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from llavactl.core.errors import DataError, LlavactlError
from llavactl.core.library_errors import reason
from llavactl.images.image_file import ImageFile
from llavactl.images.sniffing import HEAD_BYTES, NO_MEMORY, file_kind, reads_heif

if TYPE_CHECKING:
    from PIL import Image

    from llavactl.core.schema import ImageRef

MAX_PIXELS = 89_478_485
"""Pillow only warns above this limit. With 4 bytes per pixel, an image and each copy need at most 360 MB."""

MAX_SIDE = 16_384
MAX_RATIO = 200
"""Limits for padding a long image to a square, or scaling up its short side, which could create gigapixels."""

FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The formats that Pillow may decode, HEIF with pillow-heif. EPS is excluded, since it would run Ghostscript."""

_ORIENTATION, _FIRST_SIDEWAYS = 274, 5
"""The EXIF tag of the orientation, and the first of its values that swap width and height."""

_MAX_REASON = 200
_TAIL_BYTES = 32


class ImageError(DataError):
    """Bytes that can't be decoded as an image; ``reason`` is short and deterministic."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the image can't be read: {reason}")
        self.reason = reason


@contextmanager
def image_errors() -> Iterator[None]:
    """Converts any exception of a plugin's image, except LlavactlError, to OSError (an unreadable image)."""
    try:
        yield
    except (OSError, LlavactlError):
        raise
    except MemoryError as error:
        raise OSError(NO_MEMORY) from error
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def read(image: ImageRef) -> bytes:
    """The encoded ``image``.

    Raises:
        OSError: the image can't be read, or ``read()`` doesn't return bytes.
        DataError: reading it is not allowed.
    """
    with image_errors():
        data: object = image.read()
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"read() returned {type(data).__name__}, expected bytes")
        return bytes(data)


def decode(data: bytes) -> Image.Image:
    """The first frame of the encoded image ``data`` in RGB, with the EXIF orientation applied.

    Alpha is dropped, not composited (``.convert("RGB")``), as in transformers' ``load_image`` and in LLaVA, which
    doesn't apply EXIF. 16-bit gray keeps its high byte; Pillow's conversion would make most of it white.

    Raises:
        ImageError: empty, of an unknown format, truncated, corrupt, or above ``MAX_PIXELS``,
            ``MAX_SIDE`` or ``MAX_RATIO``; the size is read from the header, before any pixel is decoded.
    """
    from PIL import ImageOps

    with _opened(io.BytesIO(data)) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def size(data: bytes) -> tuple[int, int]:
    """(width, height) of the upright encoded image ``data``, from its header.

    Raises:
        ImageError: as in ``decode``.
    """
    with _opened(io.BytesIO(data)) as image:
        width, height = image.size
        sideways = image.getexif().get(_ORIENTATION, 1) >= _FIRST_SIDEWAYS
    return (height, width) if sideways else (width, height)


def inspect(image: ImageRef, *, whole: bool) -> None:
    """Checks that ``image`` can be decoded: if ``whole`` by decoding it, otherwise by its header and its end.

    A JPEG or PNG file without a valid end is decoded in any case, and so are images that are not files.

    Raises:
        OSError: the image can't be read.
        ImageError: as in ``decode``.
        DataError: reading it is not allowed (a link to outside its folder).
    """
    if not isinstance(image, ImageFile):
        decode(read(image))
        return
    with Path(image.locate()[0]).open("rb") as file:
        if not whole:
            complete = _ends_well(file)
            with _opened(file):
                if complete:
                    return
            file.seek(0)
        decode(file.read())


def _ends_well(file: IO[bytes]) -> bool:
    """Whether a file that begins like JPEG or PNG also ends like one."""
    start = file.read(3)
    file.seek(0, os.SEEK_END)
    file.seek(max(file.tell() - _TAIL_BYTES, 0))
    tail = file.read()
    file.seek(0)
    end = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PN": b"IEND"}.get(start)
    return end is None or end in tail


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """The image in ``file`` after checking its size, before decoding; any exception becomes an ImageError."""
    from PIL import Image, UnidentifiedImageError

    Image.init()
    reads_heif()
    try:
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            _check_size(image)
            yield image
    except ImageError:
        raise
    except UnidentifiedImageError:
        file.seek(0)
        raise ImageError(file_kind(file.read(HEAD_BYTES))) from None
    except MemoryError as error:
        raise ImageError(NO_MEMORY) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        # Pillow's parsers raise exceptions of any type for broken bytes.
        raise ImageError(_short(error)) from error


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ImageError(f"{width}x{height} is more than {MAX_PIXELS} pixels")
    if not width * height:
        raise ImageError(f"{width}x{height} has no pixels")
    if max(width, height) > min(MAX_SIDE, MAX_RATIO * min(width, height)):
        raise ImageError(f"{width}x{height} is longer than {MAX_SIDE} or than {MAX_RATIO} times its other side")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _high_byte(image).convert("RGB")
    if image.mode == "P" and "transparency" in image.info:
        # The same colors, without Pillow's warning about the dropped alpha.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """16-bit gray to 8 bits, as Pillow reads 16-bit color; 32-bit integers up to 255 are kept."""
    import numpy as np
    from PIL import Image as PillowImage

    values = np.asarray(image).astype(np.int64)
    if values.max() > 255:
        values >>= 8
    return PillowImage.fromarray(values.clip(0, 255).astype(np.uint8))


def _short(error: Exception) -> str:
    text = reason(error)
    return text if len(text) <= _MAX_REASON else text[: _MAX_REASON - 1] + "…"
