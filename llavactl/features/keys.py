"""Image keys: the sha256 of an image's bytes, cached by the image's stamp."""

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

_ROUND = 4096


def content_key(data: bytes) -> str:
    """The key of an image's bytes: 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def error_reason(error: OSError) -> str:
    """The reason alone: no path, no number, the same on every machine."""
    return printable(error.strerror or str(error) or type(error).__name__)


class ContentKeys:
    """Keys of images; reads an image only when its stamp was never seen.

    Safe in any thread, after a fork, and pickled to another process. With ``remember=False`` nothing is written.
    """

    def __init__(self, file: Path | None = None, *, remember: bool = True, workers: int = 4) -> None:
        self.memory = HashCache(file or cache_dir() / "keys.sqlite", remember=remember)
        self.workers = workers
        self._held = StampIndex({})

    def key(self, image: ImageRef) -> str:
        """The content key of ``image``.

        Raises:
            OSError: it can't be read.
        """
        if len(self._held):
            stamp = _stamp(image)
            if isinstance(stamp, bytes) and (held := self._held.find(stamp)):
                return held
        found = self.many([image])[0]
        if isinstance(found, OSError):
            raise found
        return found

    def many(
        self, images: Sequence[ImageRef], advance: Callable[[int], object] = lambda _count: None
    ) -> list[str | OSError]:
        """The key of each image, or the error that reading it raised; ``advance`` is told how many more are done.

        600,000 known images take what their stamps take; unknown ones are read by ``workers`` threads.
        """
        found: list[str | OSError] = []
        for start in range(0, len(images), _ROUND):
            found += self._round(images[start : start + _ROUND])
            advance(len(found) - start)
        return found

    def hold(self, images: Sequence[ImageRef]) -> list[str | OSError]:
        """Like ``many``; ``key`` then answers for these images from memory as long as their stamps don't change."""
        held: dict[bytes, str] = {}
        found: list[str | OSError] = []
        for start in range(0, len(images), _ROUND):
            found += self._round(images[start : start + _ROUND], held)
        self._held = StampIndex(held)
        return found

    def _round(self, images: Sequence[ImageRef], held: dict[bytes, str] | None = None) -> list[str | OSError]:
        stamps = [_stamp(image) for image in images]
        known = self.memory.find({stamp for stamp in stamps if isinstance(stamp, bytes)})
        found: list[str | OSError | None] = [
            stamp if isinstance(stamp, OSError) else known.get(stamp) if stamp else None for stamp in stamps
        ]
        unknown = [index for index, key in enumerate(found) if key is None]
        fresh = []
        for index, (key, stamp) in zip(unknown, self._hash([images[i] for i in unknown]), strict=True):
            found[index] = key
            # Only content that lay still while it was read may be remembered under its stamp.
            if isinstance(key, str) and isinstance(stamp, bytes) and stamp == stamps[index]:
                fresh.append((stamp, bytes.fromhex(key)))
        self.memory.keep(fresh)
        if held is not None:
            held |= known | {stamp: key.hex() for stamp, key in fresh}
        return [key for key in found if key is not None]

    def _hash(self, images: Sequence[ImageRef]) -> Iterator[tuple[str | OSError, bytes | OSError | None]]:
        if len(images) < 2 or self.workers < 2:
            yield from map(_hash_one, images)
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="hash") as pool:
            yield from pool.map(_hash_one, images)


def _stamp(image: ImageRef) -> bytes | OSError | None:
    """16 bytes that change when the content may have; images of different classes never share them."""
    try:
        with image_errors():
            stamp = image.stamp()
    except OSError as error:
        return error
    if stamp is None:
        return None
    kind = type(image)
    return stamp_bytes(f"{kind.__module__}.{kind.__qualname__}\0{stamp}")


def _hash_one(image: ImageRef) -> tuple[str | OSError, bytes | OSError | None]:
    """The key of ``image`` and its stamp after it was read."""
    try:
        return content_key(read(image)), _stamp(image)
    except OSError as error:
        return error, None
