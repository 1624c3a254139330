"""User input for chat: images, questions with ``<image>`` tags, and batch files."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavactl.components.sources.llava_record import names_images, place_images, unread_media
from llavactl.core.errors import DataError
from llavactl.core.locations import shortened
from llavactl.core.schema import Content, ImageRef
from llavactl.features.keys import error_reason
from llavactl.files.json_stream import JsonEntry, read_stream
from llavactl.files.records import image_names
from llavactl.images.decode import ImageError, decode, inspect, read
from llavactl.images.image_file import ImageFile
from llavactl.images.references import named_image

_IMAGE_HINT = "expected an image file (PNG, JPEG, WebP, …), its URL, or base64"
_BATCH_HINT = '--batch takes a JSONL of {"image": "file", "prompt": "text"}'

BatchRecord = tuple[dict[str, Any], tuple[Content, ...]]
"""A record of a batch file, and the content of its user turn."""


@dataclass(frozen=True)
class OpenedImage:
    """An image whose bytes are in memory: later changes of its file have no effect. Equal bytes are equal images.

    ``file`` is the absolute path, "" if the image isn't a file.
    """

    name: str = field(compare=False)
    digest: str
    file: str = field(compare=False)
    data: bytes = field(compare=False, repr=False)

    def read(self) -> bytes:
        return self.data

    def stamp(self) -> str:
        return self.digest


def open_image(name: str, base: Path | None = None) -> OpenedImage:
    """The image named by the user: a file relative to ``base`` (default: the working directory), a URL or base64.

    Its header and its end are checked, which detects most broken files before a model is loaded.

    Raises:
        DataError: it can't be read.
    """
    with _named(name):
        image = named_image(name, base)
        inspect(image, whole=False)
        data = read(image)
    file = str(image.file.absolute()) if isinstance(image, ImageFile) else ""
    return OpenedImage(image.name, hashlib.sha256(data).hexdigest(), file, data)


def open_images(names: Sequence[str], base: Path | None = None) -> list[ImageRef]:
    """The images named by the user as in ``open_image``, decoded once; their bytes are read again when needed.

    Raises:
        DataError: an image can't be read.
    """
    images = []
    for name in names:
        with _named(name):
            image = named_image(name, base)
            decode(image.read())
        images.append(image)
    return images


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Names the image in errors."""
    try:
        yield
    except OSError as error:
        raise DataError(f"image {shortened(name)}: {error_reason(error)}", hint=_IMAGE_HINT) from error
    except ImageError as error:
        raise DataError(f"image {shortened(name)}: {error.reason}", hint=_IMAGE_HINT) from error


def user_content(
    prompt: str, images: Sequence[str | ImageRef], base: Path | None = None, *, named: bool = False
) -> tuple[Content, ...]:
    """The content of a user turn: the images (opened, or names as in ``open_images``), then ``prompt``.

    ``<image>`` tags in ``prompt`` mark the positions of images, as in training records: see ``place_images``.

    Raises:
        DataError: an image can't be read, or the number of tags doesn't match the images.
    """
    opened = [ref for image in images for ref in (open_images([image], base) if isinstance(image, str) else [image])]
    return place_images([prompt], opened, named=named)[0]


def read_batch(file: Path) -> list[BatchRecord]:
    """The records of a JSONL or JSON list of ``{"image", "prompt"}``, each with its content.

    ``image`` may be a list or absent; its items are as in ``open_images``, with paths relative to ``file``.

    Raises:
        DataError: a record or an image can't be read; names the line.
    """
    try:
        return [_batch_record(entry, f"{file}:{entry.location}", file.parent) for entry in read_stream(file)]
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}", hint=_BATCH_HINT) from error


def _batch_record(entry: JsonEntry, where: str, base: Path) -> BatchRecord:
    record = entry.value
    if entry.problem:
        raise DataError(f"{where}: {entry.problem}", hint=_BATCH_HINT)
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected a mapping", hint=_BATCH_HINT)
    if not isinstance(record.get("prompt"), str):
        raise DataError(f"{where}: `prompt` is missing or not a string", hint=_BATCH_HINT)
    if not record["prompt"].strip():
        raise DataError(f"{where}: `prompt` is empty", hint=_BATCH_HINT)
    try:
        names = image_names(record)
        if key := unread_media(record, images=bool(names)):
            raise DataError(f"unsupported key `{key}`", hint=_BATCH_HINT)
        return record, user_content(record["prompt"], names, base, named=names_images(record))
    except DataError as error:
        raise DataError(f"{where}: {error.message}", hint=error.hint) from error
