"""Images where they lie: below a folder, inside archives, or behind a URL."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavactl.core.archives import check_archives, find_member, is_archive, is_url, stamp_of
from llavactl.core.errors import DataError
from llavactl.core.schema import Below, ImageFile, ImageRef


@dataclass(frozen=True, slots=True)
class ImageMember(Below):
    """The member ``path`` of the archives ``root``: a .zip, a .tar, a pattern of them (``shards/*.tar``), a URL."""

    def read(self) -> bytes:
        return find_member(self.root, self.path).read()

    def stamp(self) -> str | None:
        member = find_member(self.root, self.path)
        return f"{member.archive}\0{member.stamp}\0{member.offset}" if member.stamp else None


@dataclass(frozen=True, slots=True)
class ImageAtUrl(Below):
    """The image ``path`` below the URL ``root``, which fsspec opens."""

    @property
    def url(self) -> str:
        return f"{self.root.rstrip('/')}/{self.path}"

    def read(self) -> bytes:
        import fsspec

        try:
            with fsspec.open(self.url, "rb") as file:
                data: Any = file.read()
        except FileNotFoundError:
            raise FileNotFoundError(2, "there is no such file") from None
        return bytes(data)

    def stamp(self) -> str | None:
        try:
            told = stamp_of(self.url)
        except FileNotFoundError:
            raise FileNotFoundError(2, "there is no such file") from None
        return f"{self.url}\0{told}" if told else None


def image_in(root: str, path: str) -> ImageRef:
    """The image ``path`` of ``root``: a folder, archives (see ``ImageMember``) or a URL.

    Raises:
        DataError: ``path`` leads outside.
    """
    if is_archive(root):
        return ImageMember(root, path)
    return ImageAtUrl(root, path) if is_url(root) else ImageFile(root, path)


def check_place(root: str) -> None:
    """Raises a DataError unless images can be looked for in ``root``; of URLs only archives are opened."""
    if is_archive(root):
        check_archives(root)
    elif is_url(root):
        _check_protocol(root)
    elif Path(root).is_file():
        raise DataError(
            f"{root} is neither a folder nor an archive that can be read where it lies",
            hint="an archive must be a whole .zip, or a .tar that is not compressed",
        )
    elif not Path(root).is_dir():
        raise DataError(
            f"{root}: there is no such folder",
            hint="`images` is the folder that image paths are relative to, a .zip, a .tar, or a URL",
        )


def _check_protocol(root: str) -> None:
    import fsspec

    try:
        fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        raise DataError(
            f"{root} can't be opened: {error}", hint="fsspec opens URLs; most kinds need a package"
        ) from error
