"""The key of an image is the sha256 of its bytes; what was hashed once is remembered by the image's stamp.

One SQLite file holds the memory for all processes. It is a convenience: where it is broken, read-only or on
a full disk, images are hashed again and the work goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from llavactl.core.paths import cache_dir
from llavactl.features.recall import STAMP_BYTES, Recall

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef

log = logging.getLogger(__name__)

T = TypeVar("T")

_TABLE = "CREATE TABLE IF NOT EXISTS keys (stamp BLOB PRIMARY KEY, key BLOB NOT NULL) WITHOUT ROWID"
_ROUND = 4096
_VARIABLES = 500


def content_key(data: bytes) -> str:
    """The key of an image's bytes: 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def why(error: OSError) -> str:
    """The reason alone: no path, no number, the same on every machine."""
    return error.strerror or str(error) or type(error).__name__


class ContentKeys:
    """Keys of images; reads an image only when its stamp was never seen.

    Safe in any thread, after a fork, and pickled to another process. With ``remember=False`` nothing is written.
    """

    def __init__(self, file: Path | None = None, *, remember: bool = True, workers: int = 4) -> None:
        self.file = file or cache_dir() / "keys.sqlite"
        self.remember = remember
        self.workers = workers
        self._broken = False
        self._held = Recall({})

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
        self._held = Recall(held)
        return found

    def _round(self, images: Sequence[ImageRef], held: dict[bytes, str] | None = None) -> list[str | OSError]:
        stamps = [_stamp(image) for image in images]
        known = self._recall({stamp for stamp in stamps if isinstance(stamp, bytes)})
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
        self._keep(fresh)
        if held is not None:
            held |= known | {stamp: key.hex() for stamp, key in fresh}
        return [key for key in found if key is not None]

    def _hash(self, images: Sequence[ImageRef]) -> Iterator[tuple[str | OSError, bytes | OSError | None]]:
        if len(images) < 2 or self.workers < 2:
            yield from map(_hash_one, images)
            return
        with ThreadPoolExecutor(self.workers, thread_name_prefix="hash") as pool:
            yield from pool.map(_hash_one, images)

    def _recall(self, stamps: Iterable[bytes]) -> dict[bytes, str]:
        wanted = list(stamps)

        def look(database: sqlite3.Connection) -> dict[bytes, str]:
            found: dict[bytes, str] = {}
            for start in range(0, len(wanted), _VARIABLES):
                some = wanted[start : start + _VARIABLES]
                marks = ",".join("?" * len(some))
                rows = database.execute(f"SELECT stamp, key FROM keys WHERE stamp IN ({marks})", some)  # noqa: S608
                found |= {stamp: key.hex() for stamp, key in rows}
            return found

        return self._ask(look) or {}

    def _keep(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        def insert(database: sqlite3.Connection) -> None:
            with database:
                database.executemany("INSERT OR REPLACE INTO keys VALUES (?, ?)", rows)

        if rows and self.remember:
            self._ask(insert)

    def _ask(self, work: Callable[[sqlite3.Connection], T]) -> T | None:
        """What ``work`` makes of the database; None without a usable file. The first fault makes it unusable.

        Connected anew each time (0.1 ms), since SQLite's connections must cross neither a fork nor threads.
        """
        if self._broken or not (self.remember or self.file.exists()):
            return None
        try:
            with contextlib.closing(self._connect()) as database:
                return work(database)
        except (sqlite3.Error, OSError) as error:
            self._broken = True
            log.warning("%s can't be used (%s): images are hashed again each time", self.file, error)
            garbage = isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError)
            if garbage and self.remember:
                with contextlib.suppress(OSError):
                    self.file.unlink()
            return None

    def _connect(self) -> sqlite3.Connection:
        mode = "rwc" if self.remember else "ro"
        if self.remember:
            self.file.parent.mkdir(parents=True, exist_ok=True)
        made = sqlite3.connect(f"{self.file.absolute().as_uri()}?mode={mode}", uri=True, timeout=60)
        try:
            if self.remember:
                made.execute(_TABLE)
        except sqlite3.Error:
            made.close()
            raise
        return made


def _stamp(image: ImageRef) -> bytes | OSError | None:
    """16 bytes that change when the content may have; images of different classes never share them."""
    try:
        stamp = image.stamp()
    except OSError as error:
        return error
    if stamp is None:
        return None
    kind = type(image)
    return hashlib.blake2b(f"{kind.__module__}.{kind.__qualname__}\0{stamp}".encode(), digest_size=STAMP_BYTES).digest()


def _hash_one(image: ImageRef) -> tuple[str | OSError, bytes | OSError | None]:
    """The key of ``image`` and its stamp after it was read."""
    try:
        return content_key(image.read()), _stamp(image)
    except OSError as error:
        return error, None
