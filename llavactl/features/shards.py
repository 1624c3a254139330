"""One shard: a plain HDF5 file of ``features (N, P, Dv)`` and ``keys (N,)`` that can be memory-mapped.

int8 features also have ``scales (N, P + Dv)``. h5py allocates all datasets without filling them; the rows are then
written with plain writes at the offsets of the datasets. Plain writes are faster, don't block other threads, and raise
``OSError`` on a full disk instead of leaving HDF5 in an invalid state. HDF5's own file locks are disabled: a finished
shard never changes, the store has its own lock for writers, and some file systems have no locks.
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
_HEADER_BYTES = 6144, 2048  # written by h5py before the features and before the scales, for any number of images
_SMALL_BYTES = 64 << 10
COPY_BYTES = 8 << 20
_QUANTIZE_THREADS = min(8, os.cpu_count() or 1)
"""One image per thread. One thread quantizes 560 images/s of 576x1024, fewer than a large GPU encodes."""


@dataclass(frozen=True)
class Column:
    """A dataset of a shard: its name, and the dtype and shape of one image's entry."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Bytes per image."""
        return self.dtype.itemsize * math.prod(self.shape)


def columns_of(shape: FeatureShape, dtype: str) -> tuple[Column, ...]:
    """The datasets of a shard, except for the keys."""
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
        """Reads everything except the features.

        Raises:
            DamagedShardError: the file is not a complete shard of this format.
            StoreError: the file can't be read.
        """
        try:
            with h5py.File(path, "r", locking=False) as file:
                attributes = file.attrs
                if attributes["format"] != FORMAT:
                    raise ValueError(f"format {attributes['format']}, expected {FORMAT}")
                fingerprint = Fingerprint.from_json(attributes["fingerprint"])
                grid = tuple(int(side) for side in attributes["grid"])
                width = int(file["features"].shape[2])
                shape = FeatureShape((grid[0], grid[1]), width, int(attributes["prefix"]))
                keys = file["keys"][:]
                if keys.dtype != _KEY:
                    raise ValueError(f"keys have dtype {keys.dtype}, expected {_KEY}")
                offsets = [_offset(file, column, len(keys)) for column in columns_of(shape, fingerprint.dtype)]
                return cls(path, fingerprint, shape, keys, tuple(offsets))
        except OSError as error:
            raise open_error(path, error) from error
        except (KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise damaged_error(path, str(error)) from error

    @property
    def columns(self) -> tuple[Column, ...]:
        """The datasets, except for the keys."""
        return columns_of(self.shape, self.fingerprint.dtype)

    def map(self) -> tuple[np.ndarray, ...]:
        """The columns [N, …] as views of one read-only memory map, without locks and HDF5."""
        file_bytes = np.memmap(self.path, np.uint8, mode="r")
        # Plain arrays over the map: NumPy's memmap class adds microseconds to every index operation.
        return tuple(
            np.ndarray((len(self.keys), *column.shape), column.dtype, file_bytes, offset)
            for column, offset in zip(self.columns, self.offsets, strict=True)
        )


def _offset(file: h5py.File, column: Column, images: int) -> int:
    """The byte offset of ``column``; raises ValueError if its shape, dtype or layout is not as expected."""
    dataset = file[column.name]
    offset = dataset.id.get_offset()
    expected = (images, *column.shape)
    if dataset.shape != expected or dataset.dtype != column.dtype or offset is None:
        raise ValueError(
            f"{column.name}: expected contiguous {column.dtype} {expected}, got {dataset.dtype} {dataset.shape}"
        )
    return int(offset)


def bytes_of(shape: FeatureShape, images: int, shard_images: int, dtype: str = "float16") -> int:
    """The bytes on disk of ``images``, stored ``shard_images`` per shard."""
    full, rest = divmod(images, shard_images)
    return full * _shard_bytes(shape, shard_images, dtype) + (_shard_bytes(shape, rest, dtype) if rest else 0)


def _shard_bytes(shape: FeatureShape, images: int, dtype: str) -> int:
    columns = columns_of(shape, dtype)
    data_bytes = images * sum(column.bytes for column in columns)
    if images and data_bytes < _SMALL_BYTES:
        # HDF5 packs small datasets differently, so a file is created to measure its size.
        with TemporaryDirectory() as folder:
            path = Path(folder, "shard.h5")
            _create_layout(path, Fingerprint({"dtype": dtype}), shape, images)
            return path.stat().st_size
    return data_bytes + images * KEY_BYTES + sum(_HEADER_BYTES[: len(columns)])


class DamagedShardError(StoreError):
    """The content of a shard is wrong. A shard that can't be read raises a plain StoreError."""


def damaged_error(path: Path, reason: str) -> DamagedShardError:
    """The error for a shard with wrong content."""
    return DamagedShardError(
        f"{path} is damaged: {' '.join(reason.split())}",
        hint="run `llavactl cache verify` to set damaged shards aside, then `llavactl extract` to recompute them",
    )


_CONTENT_ERRNOS = (None, 0, errno.ENOENT, errno.EINVAL, errno.EOVERFLOW)
"""HDF5 sets no errno for a file that isn't HDF5; the other values are a missing file and invalid offsets."""


def open_error(path: Path, error: OSError) -> StoreError:
    """The error for a shard that can't be opened: damaged, or only unreadable (disk, network, permissions)."""
    if error.errno in _CONTENT_ERRNOS:
        return damaged_error(path, error.strerror or str(error))
    return StoreError(
        f"{path} can't be read: {os.strerror(error.errno or 0)}",
        hint="its content may be intact: check its permissions, disk and mount, then try again",
    )


class PartialShard:
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
            self._offsets, self._keys_offset = _create_layout(path, fingerprint, shape, capacity)
            self._file = FileIO(path, "r+")
        except BaseException:
            self.discard()
            raise

    @property
    def remaining(self) -> int:
        """The number of images that still fit."""
        return self.capacity - len(self.keys)

    def append(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Appends ``features`` [n, P, Dv] float16; raises OSError."""
        self.append_rows(keys, self._column_rows(features))

    def append_rows(self, keys: Sequence[str], columns: Sequence[np.ndarray]) -> None:
        """Appends the rows [n, …] of every column as they are stored; raises OSError."""
        for column, offset, rows in zip(self._columns, self._offsets, columns, strict=True):
            data = np.ascontiguousarray(rows, column.dtype).view(np.uint8).reshape(-1).data
            _write(self._open_file, data, offset + len(self.keys) * column.bytes)
        self.keys += keys

    def _column_rows(self, features: np.ndarray) -> tuple[np.ndarray, ...]:
        """``features`` converted to the rows of each column."""
        if len(self._columns) == 1:
            return (features,)
        with ThreadPoolExecutor(_QUANTIZE_THREADS, thread_name_prefix="quantize") as pool:
            integers, scales = zip(*pool.map(quantize, features), strict=True)
        return np.stack(integers), np.stack(scales)

    def finish(self) -> None:
        """Completes the shard with the images appended so far and flushes it to disk; raises OSError."""
        if self.remaining:
            self._shrink()
        _write(self._open_file, np.array(self.keys, _KEY).view(np.uint8).data, self._keys_offset)
        os.fsync(self._open_file.fileno())
        self._close()

    def discard(self) -> None:
        """Removes the file."""
        self._close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    @property
    def _open_file(self) -> FileIO:
        assert self._file is not None
        return self._file

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _shrink(self) -> None:
        """Copies the rows into a smaller file, since HDF5 can't shorten a contiguous dataset."""
        short = self.path.with_name(f"short.{self.path.name}")
        try:
            offsets, keys_offset = _create_layout(short, self.fingerprint, self.shape, len(self.keys))
            with FileIO(short, "r+") as file:
                for column, source, target in zip(self._columns, self._offsets, offsets, strict=True):
                    _copy(self._open_file, source, file, target, len(self.keys) * column.bytes)
            self._close()  # Windows can't replace an open file
            short.replace(self.path)
        except BaseException:
            short.unlink(missing_ok=True)
            raise
        self._file, self._offsets, self._keys_offset = FileIO(self.path, "r+"), offsets, keys_offset
        self.capacity = len(self.keys)


def _copy(source: FileIO, source_offset: int, target: FileIO, target_offset: int, size: int) -> None:
    """Copies ``size`` bytes from one file to another."""
    for done in range(0, size, COPY_BYTES):
        source.seek(source_offset + done)
        _write(target, memoryview(source.read(min(COPY_BYTES, size - done))), target_offset + done)


def _create_layout(path: Path, fingerprint: Fingerprint, shape: FeatureShape, images: int) -> tuple[list[int], int]:
    """Creates an HDF5 file with space for ``images``.

    Returns the byte offsets of its columns and of its keys. Raises OSError.
    """
    try:
        with h5py.File(path, "w", locking=False) as file:
            file.attrs["fingerprint"] = fingerprint.json
            file.attrs["format"] = FORMAT
            file.attrs["grid"] = shape.grid
            file.attrs["prefix"] = shape.prefix
            columns = columns_of(shape, fingerprint.dtype)
            offsets = [_allocate(file, column.name, (images, *column.shape), column.dtype) for column in columns]
            return offsets, _allocate(file, "keys", (images,), _KEY)
    except RuntimeError as error:  # h5py raises it if the disk is full when a file is closed
        raise OSError(str(error)) from error


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Creates a contiguous dataset, allocated early and never filled; returns its byte offset."""
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
    """The sha256 of the file (1.7 GB/s on one core; blake2b: 1.2)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
