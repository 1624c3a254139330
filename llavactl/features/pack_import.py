"""``llavactl cache import``: adds the features of a pack to the stores of this machine, and the names of its images."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llavactl.core import progress
from llavactl.core.errors import StoreError
from llavactl.core.hashes import STAMP_BYTES, stamp_bytes
from llavactl.core.quantities import BYTE
from llavactl.features.disk import check_free_space, free_bytes
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.manifest import ShardEntry, stores_dir
from llavactl.features.pack import IMAGES, Pack, PackedStore, damaged_file, read_pack
from llavactl.features.shard_copy import row_bytes
from llavactl.features.shards import DamagedShardError, Shard
from llavactl.features.store import FeatureStore
from llavactl.features.writer import StoreWriter
from llavactl.images.known import remember_keys, root_id

_DAMAGED_SHARD = (
    "copy the pack again; if this doesn't help, run `llavactl cache verify` and export it where it was made"
)


@dataclass(frozen=True)
class ImportedStore:
    """``images`` in the pack, of which ``added`` were not ``stored`` before; ``bytes`` to write or written."""

    fingerprint: str
    images: int
    stored: int
    added: int
    bytes: int


@dataclass(frozen=True)
class ImportReport:
    """The import of the pack in ``path``, or with ``dry_run`` its plan.

    ``images``: images whose names and content keys are known from now on. ``missing``: fingerprints that the recipe
    needs and the pack doesn't have.
    """

    path: str
    images: int
    bytes: int
    free_bytes: int
    stores: tuple[ImportedStore, ...]
    missing: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True)
class _ShardPlan:
    """A shard of a pack with new features; ``rows`` [n] are their indices, None for all. ``bytes``: those to write."""

    entry: ShardEntry
    rows: np.ndarray | None
    images: int
    bytes: int


def import_pack(
    folder: Path, base: Path, needed: Sequence[Fingerprint] | None = None, *, dry_run: bool = False
) -> ImportReport:
    """Imports the pack in ``folder``, or only its stores with the fingerprints ``needed``.

    Relative locations of images are relative to ``base``. Nothing is stored twice; after an interruption, the import
    continues with the first shard that is not stored.

    Raises:
        StoreError: the pack is incomplete, damaged or of another version; no store of it is needed (the message lists
            the differing fields); the disk is too small; another process is writing to a store.
    """
    pack = read_pack(folder)
    stores = _needed_stores(pack, needed)
    plans = {store.fingerprint.id: _plan(store) for store in stores}
    size = sum(plan.bytes for shards in plans.values() for plan in shards)
    free = free_bytes()
    if not dry_run:
        named = _named_images(pack)  # before anything is stored: the list may be damaged
        check_free_space(size, free)
        with progress.bar(size, "importing", BYTE) as bar:
            for store in stores:
                _merge(store, bar.advance)
        _remember_images(pack, named, base)
    return ImportReport(
        path=str(folder),
        images=pack.images,
        bytes=size,
        free_bytes=free,
        stores=tuple(_imported(store, plans[store.fingerprint.id]) for store in stores),
        missing=tuple(each.id for each in needed or () if each not in [store.fingerprint for store in stores]),
        dry_run=dry_run,
    )


def _needed_stores(pack: Pack, needed: Sequence[Fingerprint] | None) -> list[PackedStore]:
    stores = [store for store in pack.stores if needed is None or store.fingerprint in needed]
    if needed and not stores:
        pairs = [(expected.differences(store.fingerprint), store) for expected in needed for store in pack.stores]
        differences, store = min(pairs, key=lambda pair: len(pair[0]), default=([], None))
        closest = f"; its store {store.fingerprint.id} differs: {'; '.join(differences)}" if store else ""
        raise StoreError(
            f"{pack.folder} has no features for this recipe{closest}",
            hint="change these options in the recipe, or export a pack with it",
        )
    return stores


def _imported(store: PackedStore, plans: Sequence[_ShardPlan]) -> ImportedStore:
    images, added = store.manifest.images, sum(plan.images for plan in plans)
    return ImportedStore(store.fingerprint.id, images, images - added, added, sum(plan.bytes for plan in plans))


def _plan(store: PackedStore) -> list[_ShardPlan]:
    """The shards of ``store`` with features that are not stored on this machine yet.

    Raises:
        StoreError: a shard of the pack, or the store on this machine, is damaged.
    """
    stored = FeatureStore.find(store.fingerprint)
    seen: set[bytes] = set()
    plans = []
    for entry in store.manifest.shards:
        shard = _open(store, entry)
        keys = shard.keys.tolist()
        known = stored.holds([key.decode() for key in keys]) if stored is not None else np.zeros(len(keys), bool)
        rows = []
        for row, key in enumerate(keys):
            if not known[row] and key not in seen:
                seen.add(key)
                rows.append(row)
        if len(rows) == len(keys):
            plans.append(_ShardPlan(entry, None, len(keys), entry.bytes))
        elif rows:
            plans.append(_ShardPlan(entry, np.array(rows), len(rows), row_bytes(shard, len(rows))))
    return plans


def _open(store: PackedStore, entry: ShardEntry) -> Shard:
    path = store.folder / entry.file
    try:
        shard = Shard.open(path)
    except DamagedShardError as error:
        raise damaged_file(path, "it is no shard of features") from error
    if shard.fingerprint != store.fingerprint or shard.shape != store.manifest.shape or len(shard.keys) != entry.images:
        raise damaged_file(path, "its fingerprint, shape or number of images is not that of its store")
    return shard


def _merge(store: PackedStore, advance: Callable[[int], object]) -> None:
    manifest = store.manifest
    with StoreWriter(store.fingerprint, manifest.shape, 1) as writer:
        # Planned again under the lock: recovery after an interruption, or another process, may have added shards.
        for plan in _plan(store):
            path, conditions = store.folder / plan.entry.file, manifest.conditions.get(plan.entry.file)
            try:
                writer.add_shard(path, plan.entry, plan.rows, conditions, advance)
            except DamagedShardError as error:
                raise StoreError(error.message, hint=_DAMAGED_SHARD) from error
        here = FeatureStore.open(store.fingerprint)
        for key, reason in manifest.skipped.items():
            if key not in here and key not in here.skipped:
                writer.skip(key, reason)


def _named_images(pack: Pack) -> list[tuple[bytes, bytes]]:
    """The stamps and the keys of the named images below each root, concatenated.

    Raises:
        StoreError: the list is damaged, or names an image with two contents.
    """
    stamps = [bytearray() for _ in pack.roots]
    keys = [bytearray() for _ in pack.roots]
    for place, image, key in pack.named_images():
        stamps[place] += stamp_bytes(image)
        keys[place] += bytes.fromhex(key)
    for of_root, keys_of_root in zip(stamps, keys, strict=True):
        table = np.frombuffer(of_root, f"S{STAMP_BYTES}")
        order = np.argsort(table, kind="stable")
        ordered_keys = np.frombuffer(keys_of_root, np.uint8).reshape(-1, 32)[order]
        is_repeated = table[order][1:] == table[order][:-1]
        if (is_repeated & (ordered_keys[1:] != ordered_keys[:-1]).any(axis=1)).any():
            raise damaged_file(pack.folder / IMAGES, "an image has two contents")
    return [(bytes(of_root), bytes(keys_of_root)) for of_root, keys_of_root in zip(stamps, keys, strict=True)]


def _remember_images(pack: Pack, named: Sequence[tuple[bytes, bytes]], base: Path) -> None:
    """Makes the keys of the ``named`` images known, below the same locations and those relative to ``base``."""
    for root, (stamps, keys) in zip(pack.roots, named, strict=True):
        identifiers = {root.id} if root.relative is None else {root.id, root_id(os.path.join(base, root.relative))}  # noqa: PTH118
        try:
            for identifier in sorted(identifiers):
                remember_keys(identifier, stamps, keys)
        except OSError as error:
            raise StoreError(
                f"{stores_dir().parent} can't be written: {error.strerror or error}",
                hint="free disk space or set LLAVACTL_HOME, then run the import again",
            ) from error
