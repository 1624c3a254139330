"""References to images: below a folder, inside archives, at a URL, or as base64 in a record."""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from os.path import realpath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, unquote_to_bytes

from llavactl.core.errors import DataError, RecipeError
from llavactl.core.locations import is_absolute, is_file_url, is_url, local_path, shortened
from llavactl.core.schema import ImageRef
from llavactl.core.typed import Typed, check_fields
from llavactl.images.archives import check_archives, find_member, is_archive
from llavactl.images.byte_ranges import stamp_of
from llavactl.images.decode import decode
from llavactl.images.image_file import ImageFile, RelativeImage
from llavactl.images.known import is_known_root
from llavactl.images.lookup import spellings

if TYPE_CHECKING:
    import PIL.Image

T = TypeVar("T")

log = logging.getLogger(__name__)

_PLAIN = re.compile(r"(?!\./)(?!~)[^/\\:\s](?:[^/\\:]|/(?![/.]))*")
"""An ordinary relative path, as in nearly all records, which needs no further checks."""

_DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w=.+-]+)*?)(;base64)?,", re.IGNORECASE)
_BASE64 = re.compile(r"[A-Za-z0-9+/_\s-]+={0,2}\s*")
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR", "Qk0", "Qk1", "SUkqA", "TU0AK")
"""The first characters of JPEG, PNG, GIF, WebP, BMP and TIFF in base64."""

_MIN_BASE64 = 64
_MAX_FILE_NAME = 255
_MAX_PATH = 4096
"""Limits of file systems: a longer string is not a path."""

_PNG_MODES = frozenset({"1", "I", "I;16", "L", "LA", "P", "RGB", "RGBA"})
"""PIL's modes that PNG can store; others, such as CMYK, are stored as RGB."""

_MAX_BYTES = 1 << 28
_TIMEOUT_S = 60


@dataclass(frozen=True, slots=True)
class ImageMember(RelativeImage):
    """The member ``path`` of the archives ``root``: a .zip, a .tar, a pattern of them (``shards/*.tar``), a URL."""

    def read(self) -> bytes:
        return find_member(self.root, self.path).read()

    def stamp(self) -> str | None:
        member = find_member(self.root, self.path)
        return f"{member.archive}\0{member.stamp}\0{member.offset}" if member.stamp else None


@dataclass(frozen=True, slots=True)
class ImageAtUrl(RelativeImage):
    """The image ``path`` below the URL ``root``, which fsspec opens."""

    def read(self) -> bytes:
        return self._first_existing(_read_url)

    def stamp(self) -> str | None:
        url, stamp = self._first_existing(lambda url: (url, stamp_of(url)))
        return f"{url}\0{stamp}" if stamp else None

    def _first_existing(self, read: Callable[[str], T]) -> T:
        """The result of ``read`` for the first spelling of the URL that exists."""
        for path in (self.path, *spellings(self.path)):
            try:
                return read(f"{self.root.rstrip('/')}/{path}")
            except FileNotFoundError:
                continue
            except OSError:
                raise
            except Exception as error:  # fsspec's file systems raise exceptions of their libraries, such as aiohttp
                raise OSError(_reason(error)) from error
        raise FileNotFoundError(2, "no such file")


@dataclass(frozen=True, slots=True)
class ImageBytes:
    """An image in memory, from base64 in a record or from a URL; equal if ``digest``, the sha256 of ``data``, is.

    It is pickled with its bytes: a source with many images should refer to them instead. ``name`` is the name in
    messages; ``fault`` is the reason why ``data`` is not an image, if known.
    """

    name: str
    digest: str
    data: bytes = field(compare=False, repr=False)
    fault: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_fields(self)

    def read(self) -> bytes:
        if self.fault:
            raise OSError(self.fault)
        return self.data

    def stamp(self) -> str | None:
        if self.fault:
            raise OSError(self.fault)
        return self.digest


def image_in_memory(image: PIL.Image.Image) -> ImageBytes:
    """A reference to ``image`` as PNG, which is lossless.

    Raises:
        RecipeError: ``image`` is not a PIL image.
    """
    from PIL import Image

    if not isinstance(image, Image.Image):
        raise RecipeError(f"images: expected files, URLs, base64 strings or PIL images, got {type(image)!r:.80}")
    file = io.BytesIO()
    (image if image.mode in _PNG_MODES else image.convert("RGB")).save(file, "PNG")
    return _in_memory("PIL", file.getvalue())


def image_from_bytes(data: bytes, name: str) -> ImageBytes:
    """A reference to the image in ``data``, the content of an image file; it is decoded to check it.

    Raises:
        DataError: ``data`` can't be decoded, or the image is too large.
    """
    decode(data)
    return ImageBytes(name, hashlib.sha256(data).hexdigest(), data)


@dataclass(frozen=True)
class ImageRoot(Typed):
    """The location of records' images: ``root`` as in ``image_in``, and whether links may point outside it."""

    root: str
    follow_links: bool = False


ImageLocation = str | Path | ImageRoot | Mapping[str, ImageRef]
"""The location of records' images: see ``image_in``."""


def image_in(location: ImageLocation, path: str) -> ImageRef:
    """The image ``path`` of a record, in a folder, in archives (see ``ImageMember``) or below a URL.

    ``path`` is relative to ``location`` or begins with it; or it is the image itself, as base64 or a ``data:`` URI.
    If ``location`` is a mapping, ``path`` is one of its keys.

    Raises:
        DataError: ``path`` leads outside ``location``; a record must not reach any other file.
    """
    if isinstance(location, Mapping):
        if path not in location:
            raise DataError(f"no image is named {shortened(path)!r}")
        return location[path]
    images = location if isinstance(location, ImageRoot) else ImageRoot(str(location))
    root = local_path(images.root)
    if len(path) >= _MIN_BASE64 or not _PLAIN.fullmatch(path):
        if (inline := _inline(path)) is not None:
            return inline
        path = _relative(root, path)
    if is_archive(root):
        return ImageMember(root, path)
    return ImageAtUrl(root, path) if is_url(root) else ImageFile(root, path, images.follow_links)


def _relative(root: str, path: str) -> str:
    """``path`` relative to ``root``, without redundant dots and slashes.

    Raises:
        DataError: a URL or an absolute path outside ``root``, or a string that can't be a path.
    """
    if len(path) > _MAX_PATH:
        raise DataError(
            f"image {shortened(path)!r}: {len(path):,} characters are neither a path nor an image as base64",
            hint="`image` is a path relative to `images`, base64, or a data: URI",
        )
    bare = local_path(path.strip())
    top = f"{root.rstrip('/')}/"
    if is_url(bare):
        if is_url(root) and bare.startswith(top):
            return bare.removeprefix(top)
        raise DataError(
            f"image {shortened(bare)!r}: a URL outside its root {root}",
            hint="set `images` to a local folder, or to the URL that all image URLs begin with",
        )
    if is_absolute(bare):
        if is_archive(root) or is_url(root) or (below := _below(root, bare)) is None:
            raise DataError(
                f"image path {shortened(bare)!r} leads outside its root {root}",
                hint="image paths are relative to the source's `images`, and absolute ones must be inside it: "
                "set `images` to a folder that contains all of them",
            )
        return below
    kept: list[str] = []
    for part in path.split("/"):
        if part == ".." and kept and kept[-1] != "..":
            kept.pop()
        elif part not in ("", "."):
            kept.append(part)
    return "/".join(kept)


def _below(root: str, path: str) -> str | None:
    """The absolute ``path`` relative to the folder ``root``, before or after resolving links; None if outside."""
    real = realpath(root)
    for top in (root, real):
        if path.startswith(top := f"{top.rstrip('/')}/"):
            return path.removeprefix(top)
    folder, _, name = path.rpartition("/")
    inside = f"{realpath(folder)}/"
    top = f"{real.rstrip('/')}/"
    return f"{inside.removeprefix(top)}{name}" if inside.startswith(top) else None


def _inline(text: str) -> ImageBytes | None:
    """The image in ``text``, as base64 or a ``data:`` URI; None if it is neither."""
    text = text.strip()
    if uri := _DATA_URI.match(text):
        body = text[uri.end() :]
        return _from_base64(unquote(body)) if uri[3] else _in_memory("data", unquote_to_bytes(body))
    if len(text) < _MIN_BASE64:
        return None
    image_start = text.startswith(_BASE64_STARTS)
    # A long string with an image's first bytes is never a path, even if its base64 is invalid; others must be valid.
    long = len(text) > _MAX_FILE_NAME
    if (image_start and long) or ((image_start or (long and "." not in text)) and _BASE64.fullmatch(text)):
        return _from_base64(text)
    return None


def _from_base64(text: str) -> ImageBytes:
    bare = "".join(text.split()).replace("-", "+").replace("_", "/").rstrip("=")
    try:
        return _in_memory("base64", base64.b64decode(bare + "=" * (-len(bare) % 4), validate=True))
    except (binascii.Error, ValueError):
        return _in_memory("base64", text.encode("utf-8", "surrogatepass"), "invalid base64")


def _in_memory(kind: str, data: bytes, fault: str = "") -> ImageBytes:
    digest = hashlib.sha256(data).hexdigest()
    return ImageBytes(f"{kind}:{digest[:12]}", digest, b"" if fault else data, fault)


def named_image(name: str, base: Path | None = None) -> ImageRef:
    """The image named by the user: a file relative to ``base`` (links are followed), a URL, or base64.

    Raises:
        DataError: a URL that can't be read.
    """
    if (inline := _inline(name)) is not None:
        return inline
    if is_url(name) and not is_file_url(name):
        return _fetched(name)
    path = Path(base or Path.cwd(), local_path(name))
    if path.name in ("", ".."):
        raise DataError(f"image {name} is a folder", hint="name an image file")
    return ImageFile(str(path.parent), path.name, follow_links=True)


def _fetched(url: str) -> ImageBytes:
    try:
        data = _downloaded(url) if url.lower().startswith(("http://", "https://")) else _read_url(url)
    except Exception as error:  # of any library, with the cause in its message
        raise DataError(
            f"image {shortened(url)} can't be read: {_reason(error)}", hint="download the image and name the file"
        ) from error
    return ImageBytes(shortened(url), hashlib.sha256(data).hexdigest(), data)


def _downloaded(url: str) -> bytes:
    # fsspec would need aiohttp for HTTP.
    import httpx2

    data = bytearray()
    headers = {"User-Agent": "llavactl"}
    with httpx2.stream("GET", url, follow_redirects=True, timeout=_TIMEOUT_S, headers=headers) as response:
        if response.status_code != httpx2.codes.OK:
            raise OSError(f"HTTP {response.status_code} {response.reason_phrase}")
        for piece in response.iter_bytes():
            data += piece
            if len(data) > _MAX_BYTES:
                raise OSError(f"larger than {_MAX_BYTES >> 20} MiB")
    return bytes(data)


def _read_url(url: str) -> bytes:
    import fsspec

    with fsspec.open(url, "rb") as file:
        data: Any = file.read()
    return bytes(data)


def _reason(error: Exception) -> str:
    return shortened(" ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__)


@cache
def _log_absent(root: str) -> None:
    log.info("images: %s is not on this machine; its images are known from a feature pack", root)


def check_image_root(root: str) -> None:
    """Raises a DataError unless ``root`` can hold images; only URLs of archives are opened.

    It may be absent if a feature pack with the features of its images was imported.
    """
    root = local_path(root)
    if is_known_root(root) and not Path(root).exists():
        _log_absent(root)
        return
    if is_archive(root):
        check_archives(root)
    elif is_url(root):
        _check_protocol(root)
    elif Path(root).is_file():
        raise DataError(
            f"{root} is neither a folder nor a supported archive",
            hint="supported: a complete .zip, or a .tar without compression",
        )
    elif not Path(root).is_dir():
        raise DataError(
            f"{root}: no such folder",
            hint="`images` is the root of image paths: a folder, a .zip, a .tar, or a URL; to train without images, "
            "import a feature pack (docs/how-to/train-elsewhere.md)",
        )


def _check_protocol(root: str) -> None:
    import fsspec

    try:
        fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{root} can't be opened: {error}", hint="most URL protocols need a package for fsspec"
        ) from error
