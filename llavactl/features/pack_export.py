"""``llavactl cache export``: writes feature stores, or the part that one recipe needs, as a feature pack.

Shards are copied in blocks, so memory doesn't depend on their size. Each finished file is listed in pack.json.partial
with its checksum: after an interruption, the same export keeps these files and continues.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llavactl.core import progress
from llavactl.core.errors import StoreError
from llavactl.core.locations import is_url
from llavactl.core.paths import exclusive_lock, open_atomic, read_json, sync_folder, write_atomic, write_json
from llavactl.core.quantities import BYTE
from llavactl.features.disk import check_free_space, free_bytes
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.manifest import (
    Manifest,
    ShardEntry,
    store_dir,
    write_fingerprint,
)
from llavactl.features.pack import FORMAT, IMAGES, PACK, README, UNFINISHED, ImagesRoot, PackedFile, is_pack_file
from llavactl.features.pack_readme import ExportedStore, readme
from llavactl.features.pack_selection import ExportedShard, Names, Selected, StoreSelection
from llavactl.features.shard_copy import copy_shard
from llavactl.features.shards import checksum
from llavactl.images.known import root_id

log = logging.getLogger(__name__)

_LOCK = ".lock"
_WRITTEN = PACK, UNFINISHED, IMAGES, README, "manifest.json", "fingerprint.json"

Plans = Sequence[tuple[StoreSelection, Sequence[ExportedShard]]]
"""The shards to export of each store."""


@dataclass(frozen=True)
class PackReport:
    """The pack in ``path``, or with ``dry_run`` what it would contain.

    ``images``: names of images in the pack, without which their files would be needed to find their features.
    ``unreadable``: the number of images that can't be read and are therefore not in the pack, by reason.
    ``unchanged``: shards that an earlier export had written.
    """

    path: str
    images: int
    bytes: int
    free_bytes: int
    stores: tuple[ExportedStore, ...]
    unreadable: Mapping[str, int] = field(default_factory=dict)
    unchanged: int = 0
    dry_run: bool = False


def export_pack(
    folder: Path,
    selected: Selected,
    base: Path,
    licenses: Sequence[str],
    *,
    dry_run: bool = False,
) -> PackReport:
    """Writes what is ``selected`` to ``folder``; an earlier export of it is updated.

    ``base`` is the folder of the recipe, ``licenses`` are the items of that section in README.md.

    Raises:
        StoreError: nothing to export; ``folder`` is something else, can't be written or is too small; a shard is
            damaged; another process is exporting to the folder.
    """
    _check_destination(folder)
    names = selected.names
    plans = [(selection, selection.shards()) for selection in selected.stores]
    stores = tuple(
        ExportedStore(
            selection.fingerprint.id,
            sum(plan.images for plan in shards),
            len(shards),
            sum(plan.bytes for plan in shards),
        )
        for selection, shards in plans
    )
    if not any(store.images for store in stores):
        raise StoreError("there are no features to export", hint="run `llavactl extract`")
    report = PackReport(
        path=str(folder),
        images=len(names),
        bytes=sum(store.bytes for store in stores),
        free_bytes=free_bytes(folder),
        stores=stores,
        unreadable=dict(Counter(selected.unreadable.values())),
        dry_run=dry_run,
    )
    if dry_run:
        return report
    try:
        with _locked(folder):
            return replace(report, unchanged=_write(folder, plans, names, base, licenses, report))
    except OSError as error:
        raise StoreError(
            f"{folder} can't be written: {error.strerror or error}",
            hint="free disk space or check permissions, then run the same export again: finished files are kept",
        ) from error


def _check_destination(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file", hint="name a new folder with --to")
    others = [path for path in folder.iterdir() if not _is_temporary(path)] if folder.is_dir() else []
    if others and not ((folder / PACK).exists() or (folder / UNFINISHED).exists()):
        raise StoreError(f"{folder} is not empty and not a feature pack", hint="name a new or empty folder with --to")
    parent = store_dir(Fingerprint({})).parent
    if folder.resolve().is_relative_to(parent.resolve()):
        raise StoreError(f"{folder} is inside the feature stores", hint="name a folder elsewhere with --to")


def _is_temporary(path: Path) -> bool:
    """Whether an interrupted export left ``path``: a partial shard, or another file that was being written."""
    return path.suffix == ".partial" or _is_lock(path) or any(path.name.startswith(f".{name}.") for name in _WRITTEN)


def _is_lock(path: Path) -> bool:
    return path.name.startswith(_LOCK)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    file = folder / _LOCK  # the parent folder may belong to somebody else
    busy = StoreError(f"another process is exporting to {folder}", hint="wait until it has finished")
    with exclusive_lock(file, busy):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.unlink()


def _write(
    folder: Path,
    plans: Plans,
    names: Names,
    base: Path,
    licenses: Sequence[str],
    report: PackReport,
) -> int:
    """Writes all files; returns the number of shards that an earlier export had written."""
    folder.mkdir(parents=True, exist_ok=True)
    previous = _listed_files(folder)
    if (folder / PACK).exists():
        (folder / PACK).replace(folder / UNFINISHED)  # until it is complete again, nobody may import it
    kept = {
        name: previous[name]
        for selection, shards in plans
        for plan in shards
        if (name := _name(selection, plan)) in previous and previous[name].source == plan.source
    }
    check_free_space(report.bytes - sum(file.bytes for file in kept.values()), report.free_bytes, folder)
    files: dict[str, PackedFile] = {}
    unchanged = 0
    _list_files(folder, previous)
    with progress.bar(report.bytes, "exporting", BYTE) as bar:
        for selection, shards in plans:
            entries = []
            for plan in shards:
                name = _name(selection, plan)
                file = kept.get(name)
                if file is not None and _is_intact(folder / name, file):
                    bar.advance(plan.bytes)
                    unchanged += 1
                else:
                    copied = _copy(selection.folder, plan, folder / name, bar.advance)
                    file = PackedFile(copied.bytes, copied.sha256, plan.source)
                files[name] = file
                entries.append(ShardEntry(plan.entry.file, plan.images, file.bytes, file.sha256))
                # Files of an earlier export that are still to come stay listed, for an interruption in between.
                _list_files(folder, {**previous, **files})
            files |= _describe(folder / selection.fingerprint.id, selection, entries)
    roots = _roots(names, base)
    if outside := sum(root.relative is None and not is_url(name) for name, (_, root) in roots.items()):
        log.warning(
            "%d locations of images are outside the recipe's folder: keep their absolute paths where the pack is used",
            outside,
        )
    with open_atomic(folder / IMAGES) as out:
        for (root, path), key in names.items():
            line = {"root": roots[root][0], "image": path, "key": key}
            out.write(f"{json.dumps(line)}\n".encode())
    selections = [selection for selection, _ in plans]
    text = readme(folder.resolve().name, selections, report.stores, report.images, licenses)
    write_atomic(folder / README, text)
    files |= {name: _packed(folder / name) for name in (IMAGES, README)}
    for name in previous.keys() - files.keys():
        (folder / name).unlink(missing_ok=True)
    for left in [*folder.glob(".*"), *folder.glob("*/.*"), *folder.glob("*/*.partial")]:
        if _is_temporary(left) and not _is_lock(left):
            left.unlink()
    document = {
        "format": FORMAT,
        "stores": [asdict(store) for store in report.stores],
        "licenses": list(licenses),
        "images": len(names),
        "roots": [asdict(root) for _, root in roots.values()],
        "files": {name: asdict(file) for name, file in sorted(files.items())},
    }
    write_json(folder / PACK, document)
    (folder / UNFINISHED).unlink(missing_ok=True)
    sync_folder(folder)
    return unchanged


def _list_files(folder: Path, files: Mapping[str, PackedFile]) -> None:
    """Lists the ``files`` that are finished so far."""
    write_json(folder / UNFINISHED, {"files": {name: asdict(file) for name, file in files.items()}})


def _listed_files(folder: Path) -> dict[str, PackedFile]:
    """The files that an earlier export, perhaps an interrupted one, listed; {} if there was none."""
    files: dict[str, PackedFile] = {}
    for document in (PACK, UNFINISHED):
        listed = read_json(folder / document).get("files", {})
        with contextlib.suppress(TypeError, AttributeError):  # of another version: everything is written again
            files |= {name: PackedFile(**file) for name, file in listed.items() if is_pack_file(name)}
    return files


def _name(selection: StoreSelection, plan: ExportedShard) -> str:
    return f"{selection.fingerprint.id}/{plan.entry.file}"


def _is_intact(path: Path, file: PackedFile) -> bool:
    return path.is_file() and path.stat().st_size == file.bytes and checksum(path) == file.sha256


def _copy(store: Path, plan: ExportedShard, target: Path, advance: Callable[[int], object]) -> ShardEntry:
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f"{target.name}.partial")
    copied = copy_shard(store / plan.entry.file, plan.entry, partial, plan.rows, advance)
    partial.replace(target)
    sync_folder(target.parent)
    return copied


def _describe(folder: Path, selection: StoreSelection, entries: Sequence[ShardEntry]) -> dict[str, PackedFile]:
    """Writes the manifest and the fingerprint of a store of the pack; the recipes, with local paths, are left out."""
    names = {entry.file for entry in entries}
    conditions = {file: known for file, known in selection.manifest.conditions.items() if file in names}
    Manifest(selection.manifest.shape, tuple(entries), selection.skipped(), conditions).write(folder)
    write_fingerprint(folder, selection.fingerprint)
    return {f"{folder.name}/{name}": _packed(folder / name) for name in ("manifest.json", "fingerprint.json")}


def _packed(path: Path) -> PackedFile:
    return PackedFile(path.stat().st_size, checksum(path))


def _roots(names: Names, base: Path) -> dict[str, tuple[int, ImagesRoot]]:
    """The locations of images, each with its index in the pack."""
    roots = dict.fromkeys(root for root, _ in names)
    return {root: (index, ImagesRoot(root_id(root), _relative(root, base))) for index, root in enumerate(roots)}


def _relative(root: str, base: Path) -> str | None:
    """``root`` relative to ``base``; None outside it, since its path would disclose the names of local folders."""
    if is_url(root):
        return None
    try:
        relative = Path(os.path.relpath(root, base))
    except ValueError:  # another drive of Windows
        return None
    return None if ".." in relative.parts else relative.as_posix()
