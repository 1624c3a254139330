"""One shard: a plain HDF5 file of ``features (N, P, Dv)`` and ``keys (N,)`` that can be memory-mapped.

int8 features also have ``scales (N, P + Dv)``. h5py writes the layout with all datasets allocated but empty; rows are
then written at the datasets' offsets with plain writes. These are faster, don't block other threads, and raise
``OSError`` on a full disk instead of leaving HDF5 in a broken state. HDF5's own file locks are off: a finished shard
never changes, a store has its own lock for writers, and some file systems have no locks.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryDirectory

import h5py
import numpy as np

from llavactl.core.errors import StoreError
from llavactl.core.schema import FeatureShape
from llavactl.features.fingerprint import FORMAT, Fingerprint
from llavactl.features.quantize import quantize

KEY_BYTES = 64
_KEY = np.dtype(f"S{KEY_BYTES}")
_LAYOUT_BYTES = 6144, 2048  # what h5py puts before the features, whatever their number, and before scales
_SMALL_BYTES = 64 << 10
_COPY_BYTES = 8 << 20
_QUANTISERS = min(8, os.cpu_count() or 1)
"""Threads, an image each: one makes 560 images/s of 576x1024, a large GPU more."""


@dataclass(frozen=True)
class Column:
    """A dataset of a shard but for its first axis, the images."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What one image takes."""
        return self.dtype.itemsize * math.prod(self.shape)


def columns_of(shape: FeatureShape, dtype: str) -> tuple[Column, ...]:
    """What a shard has of every image beside its key."""
    rows = (shape.patches, shape.width)
    if dtype == "int8":
        return Column("features", np.dtype("i1"), rows), Column("scales", np.dtype("<f4"), (sum(rows),))
    return (Column("features", np.dtype("<f2"), rows),)


@dataclass(frozen=True)
class Shard:
    """A finished shard: ``keys`` [N] (fixed-length ASCII) and the byte ``offsets`` of its columns."""

    path: Path
    fingerprint: Fingerprint
    shape: FeatureShape
    keys: np.ndarray
    offsets: tuple[int, ...]

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Reads all but the features.

        Raises:
            DamagedShardError: it is not a complete shard of this format.
            StoreError: it can't be read.
        """
        try:
            with h5py.File(path, "r", locking=False) as file:
                attributes = file.attrs
                if attributes["format"] != FORMAT:
                    raise ValueError(f"format {attributes['format']}")
                made_with = Fingerprint.from_json(attributes["fingerprint"])
                grid = tuple(int(side) for side in attributes["grid"])
                width = int(file["features"].shape[2])
                shape = FeatureShape((grid[0], grid[1]), width, int(attributes["prefix"]))
                keys = file["keys"][:]
                if keys.dtype != _KEY:
                    raise ValueError(f"keys of {keys.dtype}")
                offsets = [_offset(file, each, len(keys)) for each in columns_of(shape, made_with.dtype)]
                return cls(path, made_with, shape, keys, tuple(offsets))
        except OSError as error:
            raise fault(path, error) from error
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise damaged(path, str(error)) from error

    def map(self) -> tuple[np.ndarray, ...]:
        """Its columns [N, …], views of one read-only memory map, which needs no lock and no HDF5."""
        whole = np.memmap(self.path, np.uint8, mode="r")
        # Plain arrays over the map: NumPy's memmap class costs microseconds at every index.
        return tuple(
            np.ndarray((len(self.keys), *each.shape), each.dtype, whole, offset)
            for each, offset in zip(columns_of(self.shape, self.fingerprint.dtype), self.offsets, strict=True)
        )


def _offset(file: h5py.File, column: Column, images: int) -> int:
    """Where the bytes of ``column`` begin; raises ValueError where it isn't what it should be."""
    found = file[column.name]
    offset = found.id.get_offset()
    if found.shape != (images, *column.shape) or found.dtype != column.dtype or offset is None:
        raise ValueError(f"{column.name} are {found.dtype} {found.shape} for {images} keys")
    return int(offset)


def bytes_of(shape: FeatureShape, images: int, shard_images: int, dtype: str = "float16") -> int:
    """What ``images`` take on disk, ``shard_images`` a shard."""
    whole, rest = divmod(images, shard_images)
    return whole * _shard_bytes(shape, shard_images, dtype) + (_shard_bytes(shape, rest, dtype) if rest else 0)


def _shard_bytes(shape: FeatureShape, images: int, dtype: str) -> int:
    columns = columns_of(shape, dtype)
    rows = images * sum(each.bytes for each in columns)
    if images and rows < _SMALL_BYTES:
        # HDF5 puts small datasets together in ways of its own, so it is asked.
        with TemporaryDirectory() as folder:
            path = Path(folder, "shard.h5")
            _lay_out(path, Fingerprint({"dtype": dtype}), shape, images)
            return path.stat().st_size
    return rows + images * KEY_BYTES + sum(_LAYOUT_BYTES[: len(columns)])


class DamagedShardError(StoreError):
    """A shard was read and its content is wrong; a shard that can't be read raises a plain StoreError."""


def damaged(path: Path, reason: str) -> DamagedShardError:
    """The error for a shard that can't be trusted."""
    return DamagedShardError(
        f"{path} is damaged: {' '.join(reason.split())}",
        hint="`llavactl cache verify` sets damaged shards aside; `llavactl extract` then makes their images again",
    )


_WRONG_CONTENT = (None, 0, errno.ENOENT, errno.EINVAL, errno.EOVERFLOW)
"""HDF5 gives no errno for a file that isn't HDF5; the others are a missing file and invalid offsets."""


def fault(path: Path, error: OSError) -> StoreError:
    """The error for a shard that can't be opened: damaged, or only unreadable (disk, network, permissions)."""
    if error.errno in _WRONG_CONTENT:
        return damaged(path, error.strerror or str(error))
    return StoreError(
        f"{path} can't be read: {os.strerror(error.errno or 0)}",
        hint="its content may be intact: check its permissions, disk and mount, then try again",
    )


class Partial:
    """A shard being written at ``path`` (``*.partial``), for at most ``capacity`` images."""

    def __init__(self, path: Path, fingerprint: Fingerprint, shape: FeatureShape, capacity: int) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.shape = shape
        self.capacity = capacity
        self.keys: list[str] = []
        self._columns = columns_of(shape, fingerprint.dtype)
        self._file: FileIO | None = None
        try:
            self._offsets, self._keys_at = _lay_out(path, fingerprint, shape, capacity)
            self._file = FileIO(path, "r+")
        except BaseException:
            self.discard()
            raise

    @property
    def room(self) -> int:
        """How many more images fit."""
        return self.capacity - len(self.keys)

    def append(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Adds ``features`` [n, P, Dv] float16; raises OSError."""
        for column, offset, rows in zip(self._columns, self._offsets, self._rows(features), strict=True):
            data = np.ascontiguousarray(rows, column.dtype).view(np.uint8).reshape(-1).data
            _write(self._opened, data, offset + len(self.keys) * column.bytes)
        self.keys += keys

    def _rows(self, features: np.ndarray) -> tuple[np.ndarray, ...]:
        """``features`` as the columns hold them."""
        if len(self._columns) == 1:
            return (features,)
        with ThreadPoolExecutor(_QUANTISERS, thread_name_prefix="quantise") as pool:
            integers, scales = zip(*pool.map(quantize, features), strict=True)
        return np.stack(integers), np.stack(scales)

    def finish(self) -> None:
        """Makes it a whole shard of the rows it has, safe on disk; raises OSError."""
        if self.room:
            self._shrink()
        _write(self._opened, np.array(self.keys, _KEY).view(np.uint8).data, self._keys_at)
        os.fsync(self._opened.fileno())
        self._close()

    def discard(self) -> None:
        """Removes it."""
        self._close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    @property
    def _opened(self) -> FileIO:
        assert self._file is not None
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _shrink(self) -> None:
        """Copies the rows into a layout of their number: HDF5 can't shorten a contiguous dataset."""
        short = self.path.with_name(f"short.{self.path.name}")
        try:
            offsets, keys_at = _lay_out(short, self.fingerprint, self.shape, len(self.keys))
            with FileIO(short, "r+") as file:
                for column, here, there in zip(self._columns, self._offsets, offsets, strict=True):
                    _copy(self._opened, here, file, there, len(self.keys) * column.bytes)
            self._close()  # Windows renames over no open file
            short.replace(self.path)
        except BaseException:
            short.unlink(missing_ok=True)
            raise
        self._file, self._offsets, self._keys_at = FileIO(self.path, "r+"), offsets, keys_at
        self.capacity = len(self.keys)


def _copy(source: FileIO, here: int, target: FileIO, there: int, size: int) -> None:
    """``size`` bytes from the offset ``here`` of one file to ``there`` of another."""
    for done in range(0, size, _COPY_BYTES):
        source.seek(here + done)
        _write(target, memoryview(source.read(min(_COPY_BYTES, size - done))), there + done)


def _lay_out(path: Path, fingerprint: Fingerprint, shape: FeatureShape, images: int) -> tuple[list[int], int]:
    """An HDF5 file with room for ``images``; where its columns and its keys begin, in bytes. Raises OSError."""
    try:
        with h5py.File(path, "w", locking=False) as file:
            file.attrs["fingerprint"] = fingerprint.json
            file.attrs["format"] = FORMAT
            file.attrs["grid"] = shape.grid
            file.attrs["prefix"] = shape.prefix
            columns = columns_of(shape, fingerprint.dtype)
            offsets = [_allocate(file, each.name, (images, *each.shape), each.dtype) for each in columns]
            return offsets, _allocate(file, "keys", (images,), _KEY)
    except RuntimeError as error:  # what h5py makes of a full disk while it closes a file
        raise OSError(str(error)) from error


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """A contiguous dataset whose bytes have a place now and are never filled; the place."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return int(file.create_dataset(name, shape, dtype, dcpl=creation).id.get_offset())


def _write(file: FileIO, data: memoryview, offset: int) -> None:
    file.seek(offset)
    while data:
        data = data[file.write(data) :]


def checksum(path: Path) -> str:
    """sha256 of the whole file (1.7 GB/s on one core; blake2b: 1.2)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
