"""Copies of shards: byte for byte while the checksum is verified, or only some of their rows."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from llavactl.features.finite import non_finite_features
from llavactl.features.manifest import ShardEntry
from llavactl.features.shards import COPY_BYTES, PartialShard, Shard, checksum, damaged_error, open_error

Advance = Callable[[int], object]


def copy_shard(source: Path, entry: ShardEntry, target: Path, rows: np.ndarray | None, advance: Advance) -> ShardEntry:
    """Copies ``source`` to ``target``, only ``rows`` (indices [n], ascending) if given, and syncs it.

    ``entry`` has the size and checksum of ``source``; ``advance`` is called with the number of bytes written. Returns
    the entry of the copy. An incomplete ``target`` is removed.

    Raises:
        DamagedShardError: ``source`` differs from ``entry``, is not a shard, or has features that are not finite.
        StoreError: ``source`` can't be read.
        OSError: ``target`` can't be written.
    """
    try:
        if rows is None:
            copied = _copy_bytes(source, entry, target, advance)
        else:
            _check(source, entry, _read_checksum(source))
            copied = _copy_rows(Shard.open(source), target, rows, advance)
        if reason := non_finite_features(Shard.open(target)):
            raise damaged_error(source, reason)
        return copied
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def row_bytes(shard: Shard, images: int) -> int:
    """The bytes of the features of ``images`` rows of ``shard``, without headers and keys."""
    return images * sum(column.bytes for column in shard.columns)


def _copy_bytes(source: Path, entry: ShardEntry, target: Path, advance: Advance) -> ShardEntry:
    digest = hashlib.sha256()
    try:
        opened = source.open("rb", buffering=0)
    except OSError as error:
        raise open_error(source, error) from error
    with opened, target.open("wb", buffering=0) as out:
        while block := _read(opened, source):
            digest.update(block)
            view = memoryview(block)
            while view:
                view = view[out.write(view) :]
            advance(len(block))
        os.fsync(out.fileno())
    _check(source, entry, digest.hexdigest())
    return ShardEntry(target.name, entry.images, entry.bytes, entry.sha256)


def _read(file: object, path: Path) -> bytes:
    try:
        data: bytes = file.read(COPY_BYTES)  # type: ignore[attr-defined]
    except OSError as error:
        raise open_error(path, error) from error
    return data


def _read_checksum(path: Path) -> str:
    try:
        return checksum(path)
    except OSError as error:
        raise open_error(path, error) from error


def _check(source: Path, entry: ShardEntry, digest: str) -> None:
    if digest != entry.sha256:
        raise damaged_error(source, "checksum mismatch")


def _copy_rows(shard: Shard, target: Path, rows: np.ndarray, advance: Advance) -> ShardEntry:
    columns = shard.map()
    keys = [key.decode() for key in shard.keys[rows].tolist()]
    partial = PartialShard(target, shard.fingerprint, shard.shape, len(rows))
    try:
        per_block = max(1, COPY_BYTES // row_bytes(shard, 1))
        for start in range(0, len(rows), per_block):
            chosen = rows[start : start + per_block]
            partial.append_rows(keys[start : start + per_block], [column[chosen] for column in columns])
            advance(row_bytes(shard, len(chosen)))
        partial.finish()
    except BaseException:
        partial.discard()
        raise
    return ShardEntry(target.name, len(rows), target.stat().st_size, checksum(target))
