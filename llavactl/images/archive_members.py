"""Members of zip and tar files: listing them, and reading one with a single ranged read."""

from __future__ import annotations

import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from posixpath import normpath

from llavactl.images.byte_ranges import open_binary, read_range

_MAX_BYTES = 1 << 30
_UNREADABLE = -1
_MAX_LINKS = 8
"""Consecutive links that are followed inside a tar file."""

_HEADER = struct.Struct("<4s5H3I2H")
"""The local header before every member of a zip file; it ends with the lengths of the name and the extra field."""


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """``size`` bytes at ``offset`` of ``archive``, whose ``stamp`` was taken when it was indexed.

    ``method`` is zip's compression method, None for tar; in a zip file, ``offset`` is that of the local header.
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
            raise OSError(f"encrypted, too large, or not compressed by deflate in {self.archive}")
        header = self._range(self.offset, _HEADER.size)
        signature, *_, name_length, extra_length = _HEADER.unpack(header)
        if signature != b"PK\3\4":
            raise OSError(f"{self.archive} is not the indexed zip file any more")
        data = self._range(self.offset + _HEADER.size + name_length + extra_length, self.size)
        if self.method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, self.unpacked)
            except zlib.error as error:
                raise OSError(f"damaged in {self.archive}") from error
        if zlib.crc32(data) != self.checksum:
            raise OSError(f"damaged in {self.archive}")
        return data

    def _range(self, offset: int, size: int) -> bytes:
        data = read_range(self.archive, offset, size)
        if len(data) != size:
            raise OSError(f"{self.archive} is truncated")
        return data


def list_members(archive: str, stamp: str) -> Iterator[tuple[str, ArchiveMember]]:
    """The names and members of the zip or tar file ``archive``, whose stamp is ``stamp``.

    Raises:
        OSError: the archive can't be read.
        zipfile.BadZipFile, tarfile.TarError, ValueError: the archive is damaged.
    """
    with open_binary(archive) as file:
        if archive.lower().endswith(".zip"):
            with zipfile.ZipFile(file) as opened:
                yield from _zip_members(opened, archive, stamp)
            return
        with tarfile.open(fileobj=file, mode="r:") as tar:
            yield from _tar_members(tar, archive, stamp)
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile treats an invalid header as the end
                raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def member_name(name: str) -> str:
    """``name`` without redundant dots and slashes."""
    return str(PurePosixPath(name))


def _zip_members(file: zipfile.ZipFile, archive: str, stamp: str) -> Iterator[tuple[str, ArchiveMember]]:
    for info in file.infolist():
        if not info.is_dir():
            method = info.compress_type if _readable(info) else _UNREADABLE
            member = ArchiveMember(
                archive, stamp, info.header_offset, info.compress_size, method, info.CRC, info.file_size
            )
            yield member_name(_decoded_name(info)), member


def _readable(info: zipfile.ZipInfo) -> bool:
    """Neither encrypted nor compressed by a method unusual for images, nor too large (a zip bomb)."""
    plain = not info.flag_bits & 1 and info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    return plain and info.file_size <= _MAX_BYTES


def _decoded_name(info: zipfile.ZipInfo) -> str:
    """The name of a member. macOS writes UTF-8 without setting the flag, and zipfile then decodes it as cp437."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return info.filename


def _tar_members(tar: tarfile.TarFile, archive: str, stamp: str) -> Iterator[tuple[str, ArchiveMember]]:
    """The regular files, and the links to them, which share their content."""
    members: dict[str, ArchiveMember] = {}
    links: dict[str, str] = {}
    for info in tar:
        name = member_name(info.name)
        if info.isreg() and not info.issparse():
            member = ArchiveMember(archive, stamp, info.offset_data, info.size)
            if name in members:
                yield name, member
            members.setdefault(name, member)
        elif info.islnk():
            links[name] = member_name(info.linkname)
        elif info.issym():
            links[name] = normpath(f"{PurePosixPath(name).parent}/{info.linkname}")
    yield from members.items()
    for name, target in links.items():
        for _ in range(_MAX_LINKS):
            target = links.get(target, target)
        if target in members and name not in members:
            yield name, members[target]
