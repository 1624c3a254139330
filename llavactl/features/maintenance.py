"""Verifies feature stores, and removes stores and unused files."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavactl.core.errors import StoreError
from llavactl.features.finite import non_finite_features
from llavactl.features.manifest import ShardEntry, read_fingerprint, read_manifest
from llavactl.features.shards import DamagedShardError, Shard, checksum
from llavactl.features.store import FeatureStore
from llavactl.features.writer import exclusive, is_writable, unfinished_files
from llavactl.images.known import interrupted_files, keys_in, known_files

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShardFault:
    """A shard of ``images`` images that failed verification.

    ``damaged``: its content is wrong. Otherwise it couldn't be read and may be intact.
    """

    file: str
    reason: str
    images: int
    damaged: bool


def verify_store(folder: Path) -> list[ShardFault]:
    """Hashes every shard of the store in ``folder``; damaged ones are renamed to ``*.damaged`` and unlisted.

    Shards that can't be read (disk, network, permissions) are left unchanged, since their content may be intact.

    Raises:
        StoreError: the manifest can't be read, or another process is writing to the store.
    """
    with exclusive(folder) if is_writable(folder) else contextlib.nullcontext():
        manifest = read_manifest(folder)
        if manifest is None:
            if shards := list(folder.glob("*.h5")):
                raise StoreError(
                    f"{folder} has no manifest, so the checksums of its {len(shards)} shards are unknown",
                    hint="`llavactl extract` lists the shards without checking them; or remove the folder",
                )
            return []
        faults = [fault for entry in manifest.shards if (fault := _shard_fault(folder, entry))]
        damaged = {fault.file for fault in faults if fault.damaged}
        try:
            for name in sorted(damaged):
                # Renamed before it is unlisted: an unlisted ``*.h5`` would be listed again by the next writer.
                path = folder / name
                if path.exists():
                    path.rename(path.with_name(f"{path.name}.damaged"))
            if damaged:
                manifest.without(damaged).write(folder)
        except OSError as error:
            raise StoreError(
                f"damaged shards of {folder} can't be set aside: {error.strerror or error}",
                hint=f"damaged: {', '.join(sorted(damaged))}",
            ) from error
        return faults


def _shard_fault(folder: Path, entry: ShardEntry) -> ShardFault | None:
    """The fault of the shard ``entry``, or None if the shard is intact."""
    path = folder / entry.file
    try:
        if (size := path.stat().st_size) != entry.bytes:
            reason = f"expected {entry.bytes} bytes, got {size}"
        elif checksum(path) != entry.sha256:
            reason = "checksum mismatch"
        elif (fingerprint := (shard := Shard.open(path)).fingerprint.id) != folder.name:
            reason = f"expected fingerprint {folder.name}, got {fingerprint}"
        elif not (reason := non_finite_features(shard)):
            return None
    except FileNotFoundError as error:
        reason = error.strerror or str(error)
    except DamagedShardError as error:
        reason = error.message
    except OSError as error:
        return ShardFault(entry.file, error.strerror or str(error), entry.images, damaged=False)
    except StoreError as error:
        return ShardFault(entry.file, error.message, entry.images, damaged=False)
    return ShardFault(entry.file, reason, entry.images, damaged=True)


def unused_files(folder: Path) -> list[Path]:
    """Files that no reader uses: unfinished shards of interrupted writers, and shards set aside as damaged."""
    return [*unfinished_files(folder), *sorted(folder.glob("*.damaged"))]


def unused_known_images(folders: Sequence[Path]) -> list[Path]:
    """The files of known images (``images.known``) of which none is in the stores in ``folders``, or left unfinished.

    If a store can't be read, all known images are kept: some of them may be in it.

    Raises:
        DataError: such a file is damaged.
    """
    unfinished = interrupted_files()
    if not (files := known_files()):
        return unfinished
    try:
        stores = [
            FeatureStore(folder, fingerprint, manifest)
            for folder in folders
            if (fingerprint := read_fingerprint(folder)) and (manifest := read_manifest(folder))
        ]
    except StoreError as error:
        log.warning("known images of feature packs are kept: %s", error.message)
        return unfinished
    return [*unfinished, *(file for file in files if not any(store.has_any(keys_in(file)) for store in stores))]


@contextlib.contextmanager
def _removal_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder} can't be removed: {error.strerror or error}", hint="remove it manually") from error


def remove_store(folder: Path) -> None:
    """Removes the store in ``folder``.

    Raises:
        StoreError: another process is writing to it, or it can't be removed.
    """
    with exclusive(folder), _removal_errors(folder):
        shutil.rmtree(folder)


def remove_unused_files(folder: Path) -> None:
    """Removes the ``unused_files`` of the store in ``folder``.

    Raises:
        StoreError: another process is writing to the store, or the files can't be removed.
    """
    with exclusive(folder), _removal_errors(folder):
        for path in unused_files(folder):
            path.unlink()
