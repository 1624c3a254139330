"""Images inside zip and tar files, local or at a URL, without unpacking them.

Each archive is indexed once per process, then an image needs one ranged read. No handle stays open, so any number of
threads and processes can read at once.
"""

from __future__ import annotations

import glob
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from mimetypes import guess_type
from pathlib import Path

from llavactl.core.errors import DataError
from llavactl.core.locations import is_url, shortened
from llavactl.images.archive_index import ArchiveIndex
from llavactl.images.archive_members import ArchiveMember, list_members
from llavactl.images.byte_ranges import fsspec_module, stamp_of

SUFFIXES = (".zip", ".tar")
_MACOS_FOLDER = "__MACOSX/"
"""Metadata that macOS adds to archives."""


def is_archive(root: str) -> bool:
    """Whether ``root`` names a zip or tar file, or a pattern of them."""
    return root.lower().endswith(SUFFIXES) and (is_url(root) or not Path(root).is_dir())


class _IndexCache:
    """The indexes of this process by root."""

    def __init__(self) -> None:
        self._indexes: dict[str, ArchiveIndex] = {}
        self._lock = threading.Lock()

    def get(self, root: str) -> ArchiveIndex:
        with self._lock:
            if root not in self._indexes:
                self._indexes[root] = _index(root)
            return self._indexes[root]

    def remove(self, root: str) -> None:
        with self._lock:
            self._indexes.pop(root, None)


_cache = _IndexCache()


def check_archives(root: str) -> None:
    """Indexes the archives ``root``.

    Raises:
        DataError: no archive was found, or one can't be read.
    """
    _cache.get(root)


def find_member(root: str, path: str) -> ArchiveMember:
    """The member ``path`` of the archives ``root``; archives that have changed are indexed again.

    Raises:
        OSError: no such member, or the archives can no longer be read.
        DuplicateMemberError: several members of this name, with different contents.
    """
    for _ in range(2):
        try:
            index = _cache.get(root)
        except DataError as error:
            raise OSError(error.message) from error
        member = index.find(path)
        if member is not None and stamp_of(member.archive) == member.stamp:
            return member
        # Unchanged archives aren't indexed again, which would be slow if many images are missing.
        if member is None and all(stamp_of(archive) == stamp for archive, stamp in index.stamps.items()):
            break
        _cache.remove(root)
    reason = f"no such member in {Path(root).name}"
    if (other := index.different_case(path)) is not None:
        reason += f"; did you mean {shortened(other)} (different case)?"
    raise FileNotFoundError(2, reason)


def _index(root: str) -> ArchiveIndex:
    members: dict[str, ArchiveMember] = {}
    duplicates: dict[str, tuple[ArchiveMember, ...]] = {}
    stamps: dict[str, str] = {}
    folders: set[str] = set()
    archives = list(_archives(root))
    if not archives:
        raise DataError(f"{root}: no such file", hint="`images` is a folder, a .zip, a .tar, or a URL of one")
    for archive in archives:
        try:
            stamps[archive] = stamp_of(archive)
            own: dict[str, ArchiveMember] = {}
            for name, member in list_members(archive, stamps[archive]):
                if name in own:
                    duplicates[name] = (*duplicates.get(name, ()), member)
                else:
                    own[name] = member
        except (OSError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            raise DataError(
                f"{archive} can't be read: {' '.join(str(error).split())}",
                hint="supported: a complete .zip, or a .tar without compression",
            ) from error
        folders |= _image_folders(own)
        for name in members.keys() & own.keys():
            duplicates[name] = (*duplicates.get(name, ()), own.pop(name))
        members |= own
    return ArchiveIndex(members, duplicates, stamps, tuple(sorted(folders)))


def _image_folders(names: Iterable[str]) -> set[str]:
    """The top-level folder that holds all images of an archive, if any; other files may be beside it."""
    folders: set[str] = set()
    for name in names:
        folder, inside, _ = name.partition("/")
        if f"{folder}/" != _MACOS_FOLDER and (inside or (guess_type(name)[0] or "").startswith("image/")):
            folders.add(folder)
        if len(folders) > 1:
            return set()
    return folders


def _archives(root: str) -> Iterator[str]:
    if is_url(root):
        filesystem, path = fsspec_module().core.url_to_fs(root)
        if glob.has_magic(path):
            yield from (filesystem.unstrip_protocol(match) for match in sorted(filesystem.glob(path)))
        elif filesystem.isfile(path):
            yield root
    elif Path(root).is_file():
        yield root
    else:
        yield from sorted(glob.glob(root, recursive=True))  # noqa: PTH207 - pathlib refuses absolute patterns
