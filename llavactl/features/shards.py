"""One shard: a plain HDF5 file of ``features (N, P, Dv)`` and ``keys (N,)``, laid out so that it can be memory-mapped.

h5py writes the layout, with both datasets allocated and empty; the rows then go to the features' offset by
plain writes. These are faster, let other threads run, and a full disk is an ``OSError`` and not a half-dead
HDF5 library.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from llavactl.core.errors import StoreError
from llavactl.core.schema import FeatureShape
from llavactl.features.fingerprint import FORMAT, Fingerprint

KEY_BYTES = 64
_KEY = np.dtype(f"S{KEY_BYTES}")
_ROW = np.dtype("<f2")
_LAYOUT_BYTES = 6144  # what h5py puts before the features, whatever their number
_COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Shard:
    """A finished shard: ``keys`` [N] (fixed-length ASCII) and the byte ``offset`` of features [N, P, Dv]."""

    path: Path
    fingerprint: Fingerprint
    shape: FeatureShape
    keys: np.ndarray
    offset: int

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Reads all but the features.

        Raises:
            StoreError: it is not a whole shard of this format.
        """
        try:
            with h5py.File(path, "r") as file:
                features, attributes = file["features"], file.attrs
                if attributes["format"] != FORMAT or features.dtype != _ROW:
                    raise ValueError(f"format {attributes['format']}, {features.dtype}")
                grid = tuple(int(side) for side in attributes["grid"])
                shape = FeatureShape((grid[0], grid[1]), int(features.shape[2]), int(attributes["prefix"]))
                keys, offset = file["keys"][:], features.id.get_offset()
                if features.shape != (len(keys), shape.patches, shape.width) or keys.dtype != _KEY or offset is None:
                    raise ValueError(f"features are {features.shape} for {len(keys)} keys")
                return cls(path, Fingerprint.from_json(attributes["fingerprint"]), shape, keys, int(offset))
        except (OSError, KeyError, ValueError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise damaged(path, str(error)) from error

    def map(self) -> np.ndarray:
        """The features [N, P, Dv] as a read-only memory map, which needs no lock and no HDF5."""
        return np.memmap(
            self.path, _ROW, mode="r", offset=self.offset, shape=(len(self.keys), self.shape.patches, self.shape.width)
        )


def bytes_of(shape: FeatureShape, images: int, shard_images: int) -> int:
    """What ``images`` take on disk, ``shard_images`` a shard."""
    row = _ROW.itemsize * shape.patches * shape.width + KEY_BYTES
    return images * row + math.ceil(images / shard_images) * _LAYOUT_BYTES


def damaged(path: Path, reason: str) -> StoreError:
    """The error for a shard that can't be trusted."""
    return StoreError(
        f"{path} is damaged: {' '.join(reason.split())}",
        hint="`llavactl cache verify` sets damaged shards aside; `llavactl extract` then makes their images again",
    )


class Partial:
    """A shard being written at ``path`` (``*.partial``), for at most ``capacity`` images."""

    def __init__(self, path: Path, fingerprint: Fingerprint, shape: FeatureShape, capacity: int) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.shape = shape
        self.capacity = capacity
        self.keys: list[str] = []
        self._row_bytes = shape.patches * shape.width * _ROW.itemsize
        self._handle = -1
        try:
            self._features_at, self._keys_at = _lay_out(path, fingerprint, shape, capacity)
            self._handle = os.open(path, os.O_RDWR)
        except BaseException:
            self.discard()
            raise

    @property
    def room(self) -> int:
        """How many more images fit."""
        return self.capacity - len(self.keys)

    def append(self, keys: Sequence[str], features: np.ndarray) -> None:
        """Adds ``features`` [n, P, Dv] float16; raises OSError."""
        rows = np.ascontiguousarray(features, _ROW)
        _write(self._handle, rows.view(np.uint8).reshape(-1).data, self._features_at + len(self.keys) * self._row_bytes)
        self.keys += keys

    def finish(self) -> None:
        """Makes it a whole shard of the rows it has, safe on disk; raises OSError."""
        if self.room:
            self._shrink()
        _write(self._handle, np.array(self.keys, _KEY).view(np.uint8).data, self._keys_at)
        os.fsync(self._handle)
        self._close()

    def discard(self) -> None:
        """Removes it."""
        self._close()
        with contextlib.suppress(OSError):
            self.path.unlink()

    def _close(self) -> None:
        handle, self._handle = self._handle, -1
        if handle >= 0:
            os.close(handle)

    def _shrink(self) -> None:
        """Copies the rows into a layout of their number: HDF5 can't shorten a contiguous dataset."""
        short = self.path.with_name(f"short.{self.path.name}")
        features_at, keys_at = _lay_out(short, self.fingerprint, self.shape, len(self.keys))
        handle = os.open(short, os.O_RDWR)
        try:
            for done in range(0, len(self.keys) * self._row_bytes, _COPY_BYTES):
                size = min(_COPY_BYTES, len(self.keys) * self._row_bytes - done)
                _write(handle, memoryview(os.pread(self._handle, size, self._features_at + done)), features_at + done)
            short.replace(self.path)
        except BaseException:
            os.close(handle)
            short.unlink(missing_ok=True)
            raise
        self._close()
        self._handle, self._features_at, self._keys_at = handle, features_at, keys_at
        self.capacity = len(self.keys)


def _lay_out(path: Path, fingerprint: Fingerprint, shape: FeatureShape, images: int) -> tuple[int, int]:
    """An HDF5 file with room for ``images``; where its features and its keys begin, in bytes. Raises OSError."""
    try:
        with h5py.File(path, "w") as file:
            file.attrs["fingerprint"] = fingerprint.json
            file.attrs["format"] = FORMAT
            file.attrs["grid"] = shape.grid
            file.attrs["prefix"] = shape.prefix
            features = _allocate(file, "features", (images, shape.patches, shape.width), _ROW)
            keys = _allocate(file, "keys", (images,), _KEY)
            return features, keys
    except RuntimeError as error:  # what h5py makes of a full disk while it closes a file
        raise OSError(str(error)) from error


def _allocate(file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
    """A contiguous dataset whose bytes have a place now and are never filled; the place."""
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.CONTIGUOUS)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    return int(file.create_dataset(name, shape, dtype, dcpl=creation).id.get_offset())


def _write(handle: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written


def sync_folder(folder: Path) -> None:
    """Makes a rename in ``folder`` survive a power cut, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksum(path: Path) -> str:
    """sha256 of the whole file (1.7 GB/s on one core; blake2b: 1.2)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
