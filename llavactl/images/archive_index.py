"""The index of the members of one or several archives, by name in any equivalent spelling."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from llavactl.core.errors import DataError
from llavactl.core.locations import shortened
from llavactl.images.archive_members import ArchiveMember, member_name
from llavactl.images.lookup import canonical


class DuplicateMemberError(DataError):
    """Several members of the archives have the name of an image, with different contents."""


@dataclass(frozen=True)
class ArchiveIndex:
    """The ``members`` of archives by name, ``duplicates`` of the same name, and the archives' ``stamps`` when indexed.

    ``folders`` are top-level folders that hold all images of an archive, such as ``val2017`` in COCO's val2017.zip:
    records name images without them.
    """

    members: Mapping[str, ArchiveMember]
    duplicates: Mapping[str, tuple[ArchiveMember, ...]]
    stamps: Mapping[str, str]
    folders: tuple[str, ...]

    def find(self, path: str) -> ArchiveMember | None:
        """The member ``path``, or the one of this name in one of the ``folders``, in any equivalent spelling.

        Raises:
            DuplicateMemberError: there are several, with different contents.
        """
        for spelling in (str, canonical):
            name = member_name(spelling(path))
            for names in ([name], [f"{folder}/{name}" for folder in self.folders]):
                if members := [member for each in names for member in self._members_named(each)]:
                    return _single(members, path)
        return None

    def different_case(self, path: str) -> str | None:
        """The name of a member that differs from ``path`` only in case, if any."""
        return self._names_by_folded.get(member_name(canonical(path)).casefold())

    def _members_named(self, name: str) -> Iterator[ArchiveMember]:
        if name not in self.members:
            name = self._names_by_canonical.get(name, "")
        if name in self.members:
            yield self.members[name]
            yield from self.duplicates.get(name, ())

    @cached_property
    def _names_by_canonical(self) -> Mapping[str, str]:
        """Names with backslashes, decomposed characters or surrounding space, by their canonical spelling."""
        return {other: name for name in self.members if (other := member_name(canonical(name))) != name}

    @cached_property
    def _names_by_folded(self) -> Mapping[str, str]:
        return {member_name(canonical(name)).casefold(): name for name in self.members}


def _single(members: Sequence[ArchiveMember], path: str) -> ArchiveMember:
    first = members[0]
    for other in members[1:]:
        if not _equal(first, other):
            where = "twice" if other.archive == first.archive else f"and in {other.archive}"
            raise DuplicateMemberError(
                f"image {shortened(path)} is in {first.archive} {where}, with different contents",
                hint="keep each image in one archive only, or include the folder in image paths",
            )
    return first


@lru_cache(maxsize=4096)
def _equal(one: ArchiveMember, other: ArchiveMember) -> bool:
    """Whether two members have the same content."""
    if None not in (one.method, other.method):
        return (one.checksum, one.unpacked) == (other.checksum, other.unpacked)
    try:
        return one.read() == other.read()
    except OSError:
        return False
