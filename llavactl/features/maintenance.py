"""Looking after stores: what is there, is it sound, what nobody needs."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llavactl.core.errors import StoreError
from llavactl.features.manifest import ShardEntry, read_manifest
from llavactl.features.shards import DamagedShardError, Shard, checksum
from llavactl.features.writer import exclusive, may_write, unfinished


@dataclass(frozen=True)
class ShardFault:
    """A shard with its number of images and its fault; unless ``damaged``, it couldn't be read and may be intact."""

    file: str
    reason: str
    images: int
    damaged: bool


def verify_store(folder: Path) -> list[ShardFault]:
    """Hashes every shard of the store in ``folder``; renames damaged ones to ``*.damaged`` and unlists them.

    Shards that can't be read (disk, network, permissions) are left as they are, since their content may be intact.

    Raises:
        StoreError: the manifest can't be read, or another process writes to the store.
    """
    with exclusive(folder) if may_write(folder) else contextlib.nullcontext():
        manifest = read_manifest(folder)
        if manifest is None:
            if shards := list(folder.glob("*.h5")):
                raise StoreError(
                    f"{folder} has no manifest, and so no checksums of its {len(shards)} shards",
                    hint="`llavactl extract` lists them as they are; remove the folder if you don't trust them",
                )
            return []
        faults = [fault for entry in manifest.shards if (fault := _fault(folder, entry))]
        damaged = {fault.file for fault in faults if fault.damaged}
        try:
            for name in sorted(damaged):
                # Renamed before it is unlisted: a whole-looking unlisted shard would be taken for a new one.
                path = folder / name
                if path.exists():
                    path.rename(path.with_name(f"{path.name}.damaged"))
            if damaged:
                kept = tuple(entry for entry in manifest.shards if entry.file not in damaged)
                replace(manifest, shards=kept).write(folder)
        except OSError as error:
            raise StoreError(
                f"damaged shards of {folder} can't be set aside: {error.strerror or error}",
                hint=f"damaged: {', '.join(sorted(damaged))}",
            ) from error
        return faults


def _fault(folder: Path, entry: ShardEntry) -> ShardFault | None:
    """The fault of the shard of ``entry``; None if it is intact."""
    path = folder / entry.file
    try:
        if (size := path.stat().st_size) != entry.bytes:
            reason = f"{size} bytes, expected {entry.bytes}"
        elif checksum(path) != entry.sha256:
            reason = "checksum mismatch"
        elif (found := Shard.open(path).fingerprint.id) != folder.name:
            reason = f"it has features of fingerprint {found}"
        else:
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


def leftover_files(folder: Path) -> list[Path]:
    """Files that no reader uses: shards that were never finished and those set aside as damaged."""
    return [*unfinished(folder), *sorted(folder.glob("*.damaged"))]


@contextlib.contextmanager
def _removing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreError(f"{folder} can't be removed: {error.strerror or error}", hint="remove it by hand") from error


def remove_store(folder: Path) -> None:
    """Removes a store; raises StoreError when it is being written to or can't be removed."""
    with exclusive(folder), _removing(folder):
        shutil.rmtree(folder)


def remove_leftovers(folder: Path) -> None:
    """Removes ``debris``; raises StoreError when the store is being written to or the files can't be removed."""
    with exclusive(folder), _removing(folder):
        for path in leftover_files(folder):
            path.unlink()
