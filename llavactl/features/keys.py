"""Content keys of images: the sha256 of an image's bytes, cached by the image's stamp."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.hashes import HashCache, stamp_bytes
from llavactl.core.library_errors import printable
from llavactl.core.paths import cache_dir
from llavactl.features.stamp_index import StampIndex
from llavactl.images.decode import image_errors, read

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef

_CHUNK = 4096


def content_key(data: bytes) -> str:
    """The key of an image's bytes: 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def error_reason(error: OSError) -> str:
    """The message of ``error`` without path and error number, the same on every machine."""
    return printable(error.strerror or str(error) or type(error).__name__)


class ContentKeys:
    """Content keys of images; an image is read only if no key is cached for its stamp.

    Can be used from any thread and after a fork, and can be pickled. ``remember=False`` writes nothing to the cache.
    """

    def __init__(self, file: Path | None = None, *, remember: bool = True, workers: int = 4) -> None:
        self.memory = HashCache(file or cache_dir() / "keys.sqlite", remember=remember)
        self.workers = workers
        self._preloaded = StampIndex({})

    def key(self, image: ImageRef) -> str:
        """The content key of ``image``.

        Raises:
            OSError: the image can't be read.
        """
        stamp = _stamp(image)
        if isinstance(stamp, OSError):
            raise stamp
        if isinstance(stamp, bytes) and (key := self._preloaded.find(stamp)):
            return key
        key_or_error = self.keys_of([image])[0]
        if isinstance(key_or_error, OSError):
            raise key_or_error
        return key_or_error

    def keys_of(
        self, images: Sequence[ImageRef], advance: Callable[[int], object] = lambda _count: None
    ) -> list[str | OSError]:
        """The key of each image, or the error raised on reading it. ``advance(n)`` is called after n more images.

        Cached images cost one stat call each; the others are read by ``workers`` threads.
        """
        keys: list[str | OSError] = []
        for start in range(0, len(images), _CHUNK):
            keys += self._chunk_keys(images[start : start + _CHUNK])
            advance(len(keys) - start)
        return keys

    def preload(self, images: Sequence[ImageRef]) -> list[str | OSError]:
        """Like ``keys_of``; afterwards ``key`` finds these images in memory as long as their stamps don't change."""
        preloaded: dict[bytes, str] = {}
        keys: list[str | OSError] = []
        for start in range(0, len(images), _CHUNK):
            keys += self._chunk_keys(images[start : start + _CHUNK], preloaded)
        self._preloaded = StampIndex(preloaded)
        return keys

    def _chunk_keys(
        self, images: Sequence[ImageRef], keys_by_stamp: dict[bytes, str] | None = None
    ) -> list[str | OSError]:
        """The keys of ``images``, which are also added to ``keys_by_stamp``."""
        stamps = [_stamp(image) for image in images]
        cached = self.memory.find({stamp for stamp in stamps if isinstance(stamp, bytes)})
        keys: list[str | OSError | None] = [
            stamp if isinstance(stamp, OSError) else cached.get(stamp) if stamp else None for stamp in stamps
        ]
        unknown = [index for index, key in enumerate(keys) if key is None]
        hashed = []
        for index, (key, stamp) in zip(unknown, self._hash([images[i] for i in unknown]), strict=True):
            keys[index] = key
            # Content that changed while it was read must not be cached under the earlier stamp.
            if isinstance(key, str) and isinstance(stamp, bytes) and stamp == stamps[index]:
                hashed.append((stamp, bytes.fromhex(key)))
        self.memory.keep(hashed)
        if keys_by_stamp is not None:
            keys_by_stamp |= cached | {stamp: digest.hex() for stamp, digest in hashed}
        return [key for key in keys if key is not None]

    def _hash(self, images: Sequence[ImageRef]) -> Iterator[tuple[str | OSError, bytes | OSError | None]]:
        """The key and the stamp of each image, as ``_read_key``."""
        if len(images) < 2 or self.workers < 2:
            yield from map(_read_key, images)
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="hash") as pool:
            yield from pool.map(_read_key, images)


def _stamp(image: ImageRef) -> bytes | OSError | None:
    """16 bytes that change when the content may have changed; never equal for images of different classes."""
    try:
        with image_errors():
            stamp = image.stamp()
    except OSError as error:
        return error
    if stamp is None:
        return None
    kind = type(image)
    return stamp_bytes(f"{kind.__module__}.{kind.__qualname__}\0{stamp}")


def _read_key(image: ImageRef) -> tuple[str | OSError, bytes | OSError | None]:
    """The key of ``image``, and its stamp after reading."""
    try:
        return content_key(read(image)), _stamp(image)
    except OSError as error:
        return error, None
