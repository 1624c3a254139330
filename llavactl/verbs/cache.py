"""``llavactl cache info·verify·prune``: what is stored, is it sound, what nobody needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.features.maintenance import leftover_files, remove_leftovers, remove_store, verify_store
from llavactl.features.manifest import Manifest, read_fingerprint, read_manifest, store_dir, store_dirs, stores_dir
from llavactl.features.reader import recipe_fingerprints

if TYPE_CHECKING:
    from llavactl.recipe.frame import VisionRecipe


@dataclass(frozen=True)
class StoreInfo:
    """One store: ``undecodable`` images have no features; ``leftovers`` are files that no reader uses."""

    id: str
    path: str
    fingerprint: dict[str, Any]
    images: int
    shards: int
    bytes: int
    undecodable: int
    grid: tuple[int, int] | None
    width: int | None
    leftovers: tuple[str, ...]


@dataclass(frozen=True)
class InfoReport:
    """The stores in ``path``; ``missing`` are fingerprints that the recipe needs and nobody extracted."""

    path: str
    images: int
    bytes: int
    stores: tuple[StoreInfo, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Damaged:
    """A damaged shard of ``store``, set aside; ``images`` lost their features until the next extract."""

    store: str
    file: str
    reason: str
    images: int


@dataclass(frozen=True)
class Unchecked:
    """A shard of ``store`` that can't be read (disk, network, permissions). It is left as it is."""

    store: str
    file: str
    reason: str
    images: int


@dataclass(frozen=True)
class VerifyReport:
    """``sound``: every shard could be read and matches its checksum."""

    sound: bool
    stores: int
    shards: int
    images: int
    bytes: int
    damaged: tuple[Damaged, ...]
    unchecked: tuple[Unchecked, ...]


@dataclass(frozen=True)
class PruneReport:
    """What was removed, or with ``dry_run`` would be: whole ``stores`` by id, and ``files`` nothing uses."""

    stores: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    dry_run: bool


def info(recipe: VisionRecipe | None = None) -> InfoReport:
    """What is stored, for every fingerprint or those that ``recipe`` needs.

    Raises:
        StoreError: a manifest can't be read.
    """
    folders = _folders(recipe)
    stores = tuple(_info(folder) for folder in folders if folder.is_dir())
    missing = tuple(folder.name for folder in folders if read_manifest(folder) is None)
    total = sum(store.images for store in stores), sum(store.bytes for store in stores)
    return InfoReport(str(stores_dir()), *total, stores, missing if recipe else ())


def verify(recipe: VisionRecipe | None = None) -> VerifyReport:
    """Hashes every shard of all stores, or of those that ``recipe`` needs; sets damaged ones aside.

    The next extract recomputes the features of damaged shards only. Shards that can't be read are listed separately.

    Raises:
        StoreError: a manifest can't be read, or another process writes to a store.
    """
    folders = [folder for folder in _folders(recipe) if folder.is_dir()]
    manifests = [found for folder in folders if (found := read_manifest(folder)) is not None]
    faults = [(folder.name, each) for folder in folders for each in verify_store(folder)]
    return VerifyReport(
        sound=not faults,
        stores=len(manifests),
        shards=sum(len(manifest.shards) for manifest in manifests),
        images=sum(manifest.images for manifest in manifests),
        bytes=sum(manifest.bytes for manifest in manifests),
        damaged=tuple(Damaged(store, each.file, each.reason, each.images) for store, each in faults if each.damaged),
        unchecked=tuple(
            Unchecked(store, each.file, each.reason, each.images) for store, each in faults if not each.damaged
        ),
    )


def prune(*recipes: VisionRecipe, dry_run: bool = False) -> PruneReport:
    """Removes the stores that none of ``recipes`` needs, and in all others what no reader uses.

    Without a recipe no store is removed: features may have taken days, and there is nothing to say
    that they are not needed.

    Raises:
        StoreError: another process writes to a store that has something to remove.
    """
    needed = {each.id for recipe in recipes for each in recipe_fingerprints(recipe)}
    unneeded = [folder for folder in store_dirs() if recipes and folder.name not in needed]
    kept = [folder for folder in store_dirs() if folder not in unneeded]
    files = [file for folder in kept for file in leftover_files(folder)]
    gone = [file for folder in unneeded for file in folder.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in [*files, *gone])
    if not dry_run:
        for folder in unneeded:
            remove_store(folder)
        for folder in kept:
            if leftover_files(folder):
                remove_leftovers(folder)
    return PruneReport(tuple(folder.name for folder in unneeded), tuple(map(str, files)), size, dry_run)


def _folders(recipe: VisionRecipe | None) -> list[Path]:
    if recipe is None:
        return store_dirs()
    return [store_dir(each) for each in recipe_fingerprints(recipe)]


def _info(folder: Path) -> StoreInfo:
    manifest: Manifest | None = read_manifest(folder)
    made_with = read_fingerprint(folder)
    return StoreInfo(
        id=folder.name,
        path=str(folder),
        fingerprint=dict(made_with.fields) if made_with else {},
        images=manifest.images if manifest else 0,
        shards=len(manifest.shards) if manifest else 0,
        bytes=manifest.bytes if manifest else 0,
        undecodable=len(manifest.skipped) if manifest else 0,
        grid=manifest.shape.grid if manifest else None,
        width=manifest.shape.width if manifest else None,
        leftovers=tuple(path.name for path in leftover_files(folder)),
    )
