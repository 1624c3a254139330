"""Images inside zip and tar files, read where they lie: an index once a process, then one ranged read an image.

Nothing is unpacked and no handle is kept, so any number of threads and processes may read at once. Archives may be
behind a URL, for which fsspec is asked.
"""

from __future__ import annotations

import glob
import struct
import tarfile
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from mimetypes import guess_type
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import IO, Any

from llavactl.core.errors import DataError
from llavactl.core.locations import is_url, shortened
from llavactl.core.paths import file_stamp
from llavactl.images.lookup import canonical

ENDINGS = (".zip", ".tar")
_TELLING = "ETag", "etag", "mtime", "LastModified", "updated", "created"
"""What kinds of file systems call that which changes with the content."""

_MAX_BYTES = 1 << 30
_OF_MACOS = "__MACOSX/"
"""What macOS packs beside what was to be packed."""

_UNREADABLE = -1
_LINKS = 8
"""How many links in a row are followed inside a tar file."""

_HEADER = struct.Struct("<4s5H3I2H")
"""Before every member of a zip file; the last two numbers say how long its name and its extra field are."""


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """Where an image is: ``size`` bytes at ``offset`` of ``archive``, as it was when its ``stamp`` was taken.

    ``method`` is zip's number of the compression; for zip the offset is that of the header before the bytes.
    """

    archive: str
    stamp: str
    offset: int
    size: int
    method: int | None = None
    checksum: int = 0
    unpacked: int = 0

    def read(self) -> bytes:
        """The member's bytes; raises OSError."""
        if self.method is None:
            return self._range(self.offset, self.size)
        if self.method == _UNREADABLE:
            raise OSError(f"it is encrypted, too large, or not compressed by deflate in {self.archive}")
        header = self._range(self.offset, _HEADER.size)
        signature, *_, name, extra = _HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise OSError(f"{self.archive} is no longer the zip file that it was")
        data = self._range(self.offset + _HEADER.size + name + extra, self.size)
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.unpacked)
            except zlib.error as error:
                raise OSError(f"it is damaged in {self.archive}") from error
        if zlib.crc32(data) != self.checksum:
            raise OSError(f"it is damaged in {self.archive}")
        return data

    def _range(self, at: int, size: int) -> bytes:
        data = read_range(self.archive, at, size)
        if len(data) != size:
            raise OSError(f"{self.archive} is truncated")
        return data


def is_archive(root: str) -> bool:
    """Whether ``root`` names a zip or tar file, or a pattern of them."""
    return root.lower().endswith(ENDINGS) and (is_url(root) or not Path(root).is_dir())


class DuplicateMemberError(DataError):
    """An image of this name is several times in the archives, with different contents."""


@dataclass(frozen=True)
class Index:
    """The ``members`` of archives by name, ``others`` of the same name, and the archives' ``stamps`` when indexed.

    ``folders`` are top-level folders that hold all images of an archive, such as ``val2017`` in COCO's val2017.zip:
    records name images without them.
    """

    members: Mapping[str, ArchiveMember]
    others: Mapping[str, tuple[ArchiveMember, ...]]
    stamps: Mapping[str, str]
    folders: tuple[str, ...]

    def find(self, path: str) -> ArchiveMember | None:
        """The member ``path``, else the one of this name in one of the ``folders``, in any equivalent spelling.

        Raises:
            DuplicateMemberError: there are several, with different contents.
        """
        for spelled in (str, canonical):
            name = _name(spelled(path))
            for names in ([name], [f"{folder}/{name}" for folder in self.folders]):
                if found := [member for each in names for member in self._called(each)]:
                    return _only(found, path)
        return None

    def resembling(self, path: str) -> str | None:
        """A member whose name differs from ``path`` only in case, if any."""
        return self._folded.get(_name(canonical(path)).casefold())

    def _called(self, name: str) -> Iterator[ArchiveMember]:
        if name not in self.members:
            name = self._spelled.get(name, "")
        if name in self.members:
            yield self.members[name]
            yield from self.others.get(name, ())

    @cached_property
    def _spelled(self) -> Mapping[str, str]:
        """Names with backslashes, decomposed characters or surrounding space, by their canonical spelling."""
        return {other: name for name in self.members if (other := _name(canonical(name))) != name}

    @cached_property
    def _folded(self) -> Mapping[str, str]:
        return {_name(canonical(name)).casefold(): name for name in self.members}


def _only(found: Sequence[ArchiveMember], path: str) -> ArchiveMember:
    first = found[0]
    for other in found[1:]:
        if not _same(first, other):
            where = "twice" if other.archive == first.archive else f"and in {other.archive}"
            raise DuplicateMemberError(
                f"image {shortened(path)} is in {first.archive} {where}, with different contents",
                hint="keep each image in one archive only, or include the folder in image paths",
            )
    return first


@lru_cache(maxsize=4096)
def _same(one: ArchiveMember, other: ArchiveMember) -> bool:
    """Whether two members have the same content."""
    if None not in (one.method, other.method):
        return (one.checksum, one.unpacked) == (other.checksum, other.unpacked)
    try:
        return one.read() == other.read()
    except OSError:
        return False


class _Indexes:
    """The indexes of this process, each made once."""

    def __init__(self) -> None:
        self._made: dict[str, Index] = {}
        self._lock = threading.Lock()

    def of(self, root: str) -> Index:
        with self._lock:
            if root not in self._made:
                self._made[root] = _index(root)
            return self._made[root]

    def forget(self, root: str) -> None:
        with self._lock:
            self._made.pop(root, None)


_indexes = _Indexes()


def check_archives(root: str) -> None:
    """Indexes the archives ``root``.

    Raises:
        DataError: no archive was found, or one can't be read.
    """
    _indexes.of(root)


def find_member(root: str, path: str) -> ArchiveMember:
    """The member ``path`` of the archives ``root``; archives that have changed are indexed again.

    Raises:
        OSError: there is no such member, or the archives can no longer be read.
        DuplicateMemberError: there are several, with different contents.
    """
    for _ in range(2):
        try:
            index = _indexes.of(root)
        except DataError as error:
            raise OSError(error.message) from error
        member = index.find(path)
        if member is not None and stamp_of(member.archive) == member.stamp:
            return member
        # Many missing images must not make many indexes: only what has changed is looked at again.
        if member is None and all(stamp_of(each) == stamp for each, stamp in index.stamps.items()):
            break
        _indexes.forget(root)
    reason = f"no such member in {Path(root).name}"
    if (other := index.resembling(path)) is not None:
        reason += f"; did you mean {shortened(other)} (different case)?"
    raise FileNotFoundError(2, reason)


def _index(root: str) -> Index:
    found: dict[str, ArchiveMember] = {}
    others: dict[str, tuple[ArchiveMember, ...]] = {}
    stamps: dict[str, str] = {}
    folders: set[str] = set()
    archives = list(_archives(root))
    if not archives:
        raise DataError(f"{root}: no such file", hint="`images` is a folder, a .zip, a .tar, or a URL of one")
    for archive in archives:
        try:
            stamps[archive] = stamp_of(archive)
            members: dict[str, ArchiveMember] = {}
            for name, member in _members(archive, stamps[archive]):
                if name in members:
                    others[name] = (*others.get(name, ()), member)
                else:
                    members[name] = member
        except (OSError, zipfile.BadZipFile, tarfile.TarError, ValueError) as error:
            raise DataError(
                f"{archive} can't be read: {' '.join(str(error).split())}",
                hint="an archive must be a whole .zip, or a .tar that is not compressed",
            ) from error
        folders |= _top(members)
        for name in found.keys() & members.keys():
            others[name] = (*others.get(name, ()), members.pop(name))
        found |= members
    return Index(found, others, stamps, tuple(sorted(folders)))


def _top(names: Iterable[str]) -> set[str]:
    """The top-level folder that holds all images of an archive, whatever other files are beside it."""
    tops: set[str] = set()
    for name in names:
        top, inside, _ = name.partition("/")
        if f"{top}/" != _OF_MACOS and (inside or (guess_type(name)[0] or "").startswith("image/")):
            tops.add(top)
        if len(tops) > 1:
            return set()
    return tops


def _archives(root: str) -> Iterator[str]:
    if is_url(root):
        fsspec = _fsspec()
        filesystem, path = fsspec.core.url_to_fs(root)
        if glob.has_magic(path):
            yield from (filesystem.unstrip_protocol(each) for each in sorted(filesystem.glob(path)))
        elif filesystem.isfile(path):
            yield root
    elif Path(root).is_file():
        yield root
    else:
        yield from sorted(glob.glob(root, recursive=True))  # noqa: PTH207 - an absolute pattern, which pathlib refuses


def _members(archive: str, stamp: str) -> Iterator[tuple[str, ArchiveMember]]:
    with _opened(archive) as file:
        if archive.lower().endswith(".zip"):
            with zipfile.ZipFile(file) as opened:
                for info in opened.infolist():
                    if not info.is_dir():
                        yield (
                            _name(_decoded(info)),
                            ArchiveMember(
                                archive,
                                stamp,
                                info.header_offset,
                                info.compress_size,
                                info.compress_type if _readable(info) else _UNREADABLE,
                                info.CRC,
                                info.file_size,
                            ),
                        )
            return
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _of_tar(tar, archive, stamp)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes whatever it doesn't know for the end
                raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def _of_tar(tar: tarfile.TarFile, archive: str, stamp: str) -> Iterator[tuple[str, ArchiveMember]]:
    """The regular files, and links to them, which share their content."""
    found: dict[str, ArchiveMember] = {}
    links: dict[str, str] = {}
    for each in tar:
        name = _name(each.name)
        if each.isreg() and not each.issparse():
            member = ArchiveMember(archive, stamp, each.offset_data, each.size)
            if name in found:
                yield name, member
            found.setdefault(name, member)
        elif each.islnk():
            links[name] = _name(each.linkname)
        elif each.issym():
            links[name] = normpath(f"{PurePosixPath(name).parent}/{each.linkname}")
    yield from found.items()
    for name, target in links.items():
        for _ in range(_LINKS):
            target = links.get(target, target)
        if target in found and name not in found:
            yield name, found[target]


def _readable(info: zipfile.ZipInfo) -> bool:
    """Neither encrypted, nor of a compression that nobody uses for images, nor a bomb."""
    plain = not info.flag_bits & 1 and info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return plain and info.file_size <= _MAX_BYTES


def _decoded(info: zipfile.ZipInfo) -> str:
    """The name of a member. macOS writes UTF-8 without setting the flag, and zipfile then decodes it as cp437."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _name(name: str) -> str:
    return str(PurePosixPath(name))


def _opened(archive: str) -> AbstractContextManager[IO[bytes]]:
    if is_url(archive):
        opened: AbstractContextManager[IO[bytes]] = _fsspec().open(archive, "rb")
        return opened
    return Path(archive).open("rb")


def read_range(place: str, at: int, size: int) -> bytes:
    """``size`` bytes at ``at`` of the file or URL ``place``; raises OSError."""
    if is_url(place):
        filesystem, path = _fsspec().core.url_to_fs(place)
        data: bytes = filesystem.cat_file(path, start=at, end=at + size)
        return data
    with Path(place).open("rb", buffering=0) as file:
        file.seek(at)
        return file.read(size)


def stamp_of(place: str) -> str:
    """Changes when the file or URL ``place`` may have; "" where a URL doesn't tell. Raises OSError."""
    if not is_url(place):
        return file_stamp(Path(place).stat())
    filesystem, path = _fsspec().core.url_to_fs(place)
    about: Mapping[str, Any] = filesystem.info(path)
    told = [about[key] for key in _TELLING if key in about]
    return f"{about.get('size')} {told[0]}" if told else ""


def _fsspec() -> Any:
    import fsspec

    return fsspec
