"""``llavactl cache``: lists, verifies and prunes the feature stores; writes and reads feature packs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import LlavactlError
from llavactl.data.tables import stage_images
from llavactl.features import pack_export, pack_import
from llavactl.features.maintenance import (
    remove_store,
    remove_unused_files,
    unused_files,
    unused_known_images,
    verify_store,
)
from llavactl.features.manifest import Manifest, read_fingerprint, read_manifest, store_dir, store_dirs, stores_dir
from llavactl.features.pack_export import PackReport
from llavactl.features.pack_import import ImportReport
from llavactl.features.pack_readme import license_items
from llavactl.features.pack_selection import select_of_recipe, select_stores
from llavactl.features.reader import recipe_fingerprints
from llavactl.features.recompute import Recomputed, not_recomputed, recompute_store
from llavactl.images.known import forget, keys_in, known_files
from llavactl.report.card import license_of

if TYPE_CHECKING:
    from llavactl.recipe.frame import VisionRecipe


@dataclass(frozen=True)
class StoreInfo:
    """One feature store. ``undecodable``: number of images known to have no features; ``width``: feature width Dv."""

    id: str
    path: str
    fingerprint: dict[str, Any]
    images: int
    shards: int
    bytes: int
    undecodable: int
    grid: tuple[int, int] | None
    width: int | None
    unused_files: tuple[str, ...]


@dataclass(frozen=True)
class KnownImages:
    """A file with the content keys of ``images`` below one root, as of the import of a feature pack."""

    path: str
    images: int
    bytes: int


@dataclass(frozen=True)
class InfoReport:
    """The stores in ``path``. ``missing``: fingerprints that the recipe needs and that have no features yet.

    ``known_images``: images that may be absent, because a feature pack names them.
    """

    path: str
    images: int
    bytes: int
    stores: tuple[StoreInfo, ...]
    missing: tuple[str, ...]
    known_images: tuple[KnownImages, ...]


@dataclass(frozen=True)
class FaultyShard:
    """A damaged or unreadable shard of ``store``; ``images``: number of images in it."""

    store: str
    file: str
    reason: str
    images: int


@dataclass(frozen=True)
class VerifyReport:
    """``sound``: all shards are readable and match their checksums.

    ``damaged`` shards were set aside; the next extract recomputes their features. ``unchecked`` shards can't be read
    (disk, network, permissions) and are unchanged. ``recomputed``: the stores whose images were encoded again.
    """

    sound: bool
    stores: int
    shards: int
    images: int
    bytes: int
    damaged: tuple[FaultyShard, ...]
    unchecked: tuple[FaultyShard, ...]
    recomputed: tuple[Recomputed, ...] = ()


@dataclass(frozen=True)
class PruneReport:
    """The removed ``stores`` (ids) and unused ``files``, or with ``dry_run`` those that would be removed."""

    stores: tuple[str, ...]
    files: tuple[str, ...]
    bytes: int
    dry_run: bool


def info(recipe: VisionRecipe | None = None) -> InfoReport:
    """Describes all stores, or the stores that ``recipe`` needs.

    Raises:
        StoreError: a manifest can't be read.
        DataError: a file of known images is damaged.
    """
    folders = _folders(recipe)
    stores = tuple(_info(folder) for folder in folders if folder.is_dir())
    missing = tuple(folder.name for folder in folders if read_manifest(folder) is None)
    images, size = sum(store.images for store in stores), sum(store.bytes for store in stores)
    known = tuple(KnownImages(str(file), len(keys_in(file)), file.stat().st_size) for file in known_files())
    return InfoReport(str(stores_dir()), images, size, stores, missing if recipe else (), known)


def verify(recipe: VisionRecipe | None = None, *, recompute: int = 0, seed: int = 0) -> VerifyReport:
    """Verifies the checksums of all stores, or of the stores that ``recipe`` needs, and sets damaged shards aside.

    Then encodes ``recompute`` images of each store again, chosen by ``seed``, and compares the features to the bit.
    Backbone and images are those of ``recipe``, or of the recipes that the store records. Errors of a store's recipes,
    records or backbone are the ``reason`` of its result, whose verdict is then ``none``.

    Raises:
        StoreError: a manifest can't be read, or another process writes to a store.
    """
    folders = [folder for folder in _folders(recipe) if folder.is_dir()]
    manifests = [manifest for folder in folders if (manifest := read_manifest(folder)) is not None]
    faults = [(folder.name, fault) for folder in folders for fault in verify_store(folder)]
    shards = [(FaultyShard(store, fault.file, fault.reason, fault.images), fault.damaged) for store, fault in faults]
    return VerifyReport(
        sound=not faults,
        stores=len(manifests),
        shards=sum(len(manifest.shards) for manifest in manifests),
        images=sum(manifest.images for manifest in manifests),
        bytes=sum(manifest.bytes for manifest in manifests),
        damaged=tuple(shard for shard, damaged in shards if damaged),
        unchecked=tuple(shard for shard, damaged in shards if not damaged),
        recomputed=tuple(
            _recomputed(folder, recipe, recompute, seed)
            for folder in folders
            if recompute and read_manifest(folder) is not None
        ),
    )


def _recomputed(folder: Path, recipe: VisionRecipe | None, count: int, seed: int) -> Recomputed:
    try:
        return recompute_store(folder, recipe, count, seed, stage_images)
    except LlavactlError as error:  # shards may have been set aside: the report must not be lost
        return not_recomputed(folder, error.message, seed)


def prune(*recipes: VisionRecipe, dry_run: bool = False) -> PruneReport:
    """Removes the stores that none of ``recipes`` needs, and unused files.

    These are the unused files of all other stores, and the names of images that none of them has. Without a recipe no
    store is removed: extracting features may have taken days.

    Raises:
        StoreError: another process writes to a store that would be changed.
        DataError: a file of known images is damaged, is being written, or can't be removed.
    """
    needed = {fingerprint.id for recipe in recipes for fingerprint in recipe_fingerprints(recipe)}
    unneeded = [folder for folder in store_dirs() if recipes and folder.name not in needed]
    kept = [folder for folder in store_dirs() if folder not in unneeded]
    unused = [file for folder in kept for file in unused_files(folder)]
    of_unneeded = [file for folder in unneeded for file in folder.rglob("*") if file.is_file()]
    unnamed = unused_known_images(kept)
    size = sum(file.stat().st_size for file in [*unused, *of_unneeded, *unnamed])
    if not dry_run:
        for folder in unneeded:
            remove_store(folder)
        for folder in kept:
            if unused_files(folder):
                remove_unused_files(folder)
        for file in unnamed:
            forget(file)
    return PruneReport(tuple(folder.name for folder in unneeded), tuple(map(str, [*unused, *unnamed])), size, dry_run)


def export_pack(
    folder: Path,
    recipe: VisionRecipe | None = None,
    *,
    base: Path | None = None,
    license_note: str = "",
    dry_run: bool = False,
) -> PackReport:
    """Writes all stores, or the features that the stages of ``recipe`` need, to ``folder`` as a feature pack.

    Locations of images are recorded relative to ``base``, the folder of the recipe (default: the working directory).
    An interrupted export continues. Nothing is locked meanwhile: training can read the stores.

    Raises:
        StoreError: images have no features yet, another process is writing to a store, a shard is damaged, or
            ``folder`` is not a pack, can't be written or is too small.
        DataError: a record of the recipe is invalid.
    """
    selected = select_stores(store_dirs(), stage_images) if recipe is None else select_of_recipe(recipe, stage_images)
    otherwise = "see its source; its license also applies to these features"
    licenses = license_items(license_note, selected.stores, lambda name: license_of(name, otherwise))
    return pack_export.export_pack(folder, selected, base or Path.cwd(), licenses, dry_run=dry_run)


def import_pack(
    folder: Path, recipe: VisionRecipe | None = None, *, base: Path | None = None, dry_run: bool = False
) -> ImportReport:
    """Adds the features of the pack in ``folder``, or those that ``recipe`` needs, to the stores of this machine.

    From then on, images that can't be read are identified by the pack. Relative locations of images are relative to
    ``base``, the folder of the recipe (default: the working directory).

    Raises:
        StoreError: the pack is incomplete, damaged, of another version or has no features for ``recipe``; the disk is
            too small; another process is writing to a store.
    """
    needed = None if recipe is None else recipe_fingerprints(recipe)
    return pack_import.import_pack(folder, base or Path.cwd(), needed, dry_run=dry_run)


def _folders(recipe: VisionRecipe | None) -> list[Path]:
    if recipe is None:
        return store_dirs()
    return [store_dir(fingerprint) for fingerprint in recipe_fingerprints(recipe)]


def _info(folder: Path) -> StoreInfo:
    manifest: Manifest | None = read_manifest(folder)
    fingerprint = read_fingerprint(folder)
    return StoreInfo(
        id=folder.name,
        path=str(folder),
        fingerprint=dict(fingerprint.fields) if fingerprint else {},
        images=manifest.images if manifest else 0,
        shards=len(manifest.shards) if manifest else 0,
        bytes=manifest.bytes if manifest else 0,
        undecodable=len(manifest.skipped) if manifest else 0,
        grid=manifest.shape.grid if manifest else None,
        width=manifest.shape.width if manifest else None,
        unused_files=tuple(path.name for path in unused_files(folder)),
    )
