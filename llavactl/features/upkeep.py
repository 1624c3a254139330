"""Looking after stores: what is there, is it sound, what nobody needs."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llavactl.core.errors import StoreError
from llavactl.features.manifest import Entry, read_manifest
from llavactl.features.shards import Shard, checksum
from llavactl.features.writer import exclusive, unfinished


@dataclass(frozen=True)
class Damage:
    """A shard that is not what it was when it was written, why, and how many images it takes along."""

    file: str
    reason: str
    images: int


def verify_store(folder: Path) -> list[Damage]:
    """Hashes every shard of the store in ``folder``; sets damaged ones aside as ``*.damaged`` and unlists them.

    Raises:
        StoreError: the manifest can't be read, or another process writes to the store.
    """
    # Where nobody can write, nobody has to be kept out.
    with exclusive(folder) if os.access(folder.parent, os.W_OK) else contextlib.nullcontext():
        manifest = read_manifest(folder)
        if manifest is None:
            if shards := list(folder.glob("*.h5")):
                raise StoreError(
                    f"{folder} has no manifest, and so no checksums of its {len(shards)} shards",
                    hint="`llavactl extract` lists them as they are; remove the folder if you don't trust them",
                )
            return []
        found = [(entry, _damage(folder, entry)) for entry in manifest.shards]
        damages = [Damage(entry.file, reason, entry.images) for entry, reason in found if reason]
        try:
            for damage in damages:
                # Renamed before it is unlisted: a whole-looking unlisted shard would be taken for a new one.
                path = folder / damage.file
                if path.exists():
                    path.rename(path.with_name(f"{path.name}.damaged"))
            if damages:
                replace(manifest, shards=tuple(entry for entry, reason in found if not reason)).write(folder)
        except OSError as error:
            raise StoreError(
                f"damaged shards of {folder} can't be set aside: {error.strerror or error}",
                hint=f"damaged: {', '.join(damage.file for damage in damages)}",
            ) from error
        return damages


def _damage(folder: Path, entry: Entry) -> str:
    """Why the shard of ``entry`` is not sound; empty when it is."""
    path = folder / entry.file
    try:
        if (size := path.stat().st_size) != entry.bytes:
            return f"{size} bytes, not {entry.bytes}"
        if checksum(path) != entry.sha256:
            return "its checksum is not the one it was written with"
        shard = Shard.open(path)
        if shard.fingerprint.id != folder.name:
            return f"it holds features of the fingerprint {shard.fingerprint.id}"
    except OSError as error:
        return error.strerror or str(error)
    except StoreError as error:
        return error.message
    return ""


def debris(folder: Path) -> list[Path]:
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


def remove_debris(folder: Path) -> None:
    """Removes ``debris``; raises StoreError when the store is being written to or the files can't be removed."""
    with exclusive(folder), _removing(folder):
        for path in debris(folder):
            path.unlink()
