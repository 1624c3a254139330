"""Opening images that nobody has looked at: to RGB, the right way up, or a short reason why not."""

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
from llavactl.images.sniffing import LOOKED_AT, NO_MEMORY, reads_heif, what_it_is

if TYPE_CHECKING:
    from PIL import Image

    from llavactl.core.schema import ImageRef

MAX_PIXELS = 89_478_485
"""Pillow warns above this, we refuse: at most 4 bytes a pixel are in memory, about 360 MB an image and copy."""

MAX_SIDE = 16_384
MAX_RATIO = 200
"""Padding a long image to a square, or scaling its short side up, must not make gigapixels of it."""

FORMATS = ("AVIF", "BMP", "GIF", "HEIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""The formats that Pillow may read; HEIF with pillow-heif. EPS is excluded: Pillow would run Ghostscript on it."""

_LONGEST_REASON = 200
_TAIL = 32


class ImageError(DataError):
    """Bytes that are no image we can decode; ``reason`` is short and the same for the same bytes."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the image can't be read: {reason}")
        self.reason = reason


@contextmanager
def image_errors() -> Iterator[None]:
    """Converts any exception of a plugin's image to OSError (an unreadable image), except LlavactlError."""
    try:
        yield
    except (OSError, LlavactlError):
        raise
    except MemoryError as error:
        raise OSError(NO_MEMORY) from error
    except (Exception, SystemExit, GeneratorExit) as error:
        raise OSError(" ".join(f"{type(error).__name__}: {error}".split())) from error


def read(image: ImageRef) -> bytes:
    """The encoded ``image``.

    Raises:
        OSError: it can't be read, or ``read()`` returns no bytes.
        DataError: reading it is not allowed.
    """
    with image_errors():
        data: object = image.read()
        if not isinstance(data, bytes | bytearray | memoryview):
            raise TypeError(f"read() returned {type(data).__name__}, expected bytes")
        return bytes(data)


def decode(data: bytes) -> Image.Image:
    """The first frame of the encoded image ``data`` in RGB, turned as its EXIF says.

    Like ``load_image`` of transformers, and LLaVA but for EXIF, alpha is dropped, not composited
    (``.convert("RGB")``): what was trained so is asked so. Sixteen-bit grey keeps its high byte, where a
    plain conversion would make nearly all of it white.

    Raises:
        ImageError: empty, of no known format, truncated, corrupt, or beyond ``MAX_PIXELS``,
            ``MAX_SIDE`` or ``MAX_RATIO``; the size is taken from the header, before any pixel is decoded.
    """
    from PIL import ImageOps

    if not data:
        raise ImageError("the file is empty")
    with _opened(io.BytesIO(data)) as image:
        image.load()
        return _rgb(ImageOps.exif_transpose(image))


def inspect(image: ImageRef, *, whole: bool) -> None:
    """Checks that ``image`` can be decoded: with ``whole`` by decoding it, else by its header and its end.

    A JPEG or PNG file without a proper end is decoded in any case. Images that are not files are always decoded, since
    they are in memory anyway.

    Raises:
        OSError: it can't be read.
        ImageError: as of ``decode``.
        DataError: reading it is not allowed (a link outside its folder).
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
    """Whether a file that begins like JPEG or PNG ends like one, too."""
    start = file.read(3)
    file.seek(0, os.SEEK_END)
    file.seek(max(file.tell() - _TAIL, 0))
    tail = file.read()
    file.seek(0)
    end = {b"\xff\xd8\xff": b"\xff\xd9", b"\x89PN": b"IEND"}.get(start)
    return end is None or end in tail


@contextmanager
def _opened(file: IO[bytes]) -> Iterator[Image.Image]:
    """The image in ``file`` if we take its size, nothing decoded yet; whatever goes wrong with it is an ImageError."""
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
        raise ImageError(what_it_is(file.read(LOOKED_AT))) from None
    except MemoryError as error:
        raise ImageError(NO_MEMORY) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(f"more than {MAX_PIXELS} pixels") from None
    except Exception as error:
        # Pillow's parsers raise anything at all on broken bytes.
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
        # The same colours by a way on which Pillow doesn't warn of the alpha it drops.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _high_byte(image: Image.Image) -> Image.Image:
    """Grey of 16 bits to 8, as Pillow reads 16-bit colour. 32-bit integers of small range are taken as they are."""
    import numpy as np
    from PIL import Image as Images

    values = np.asarray(image).astype(np.int64)
    if values.max() > 255:
        values >>= 8
    return Images.fromarray(values.clip(0, 255).astype(np.uint8))


def _short(error: Exception) -> str:
    words = reason(error)
    return words if len(words) <= _LONGEST_REASON else words[: _LONGEST_REASON - 1] + "…"
