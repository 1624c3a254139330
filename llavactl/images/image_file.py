"""An image file in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path
from stat import S_ISDIR, S_ISLNK, S_ISREG
from typing import ClassVar

from llavactl.core.locations import shortened
from llavactl.core.paths import file_stamp
from llavactl.core.typed import check_fields
from llavactl.images.lookup import find_file, real_folder, refuse_leaving, refuse_outside


@dataclass(frozen=True, slots=True)
class RelativeImage:
    """An image at ``path`` below ``root``; with slots, since there may be millions.

    Raises:
        DataError: ``path`` leads outside ``root``; a record must not reach any other file.
    """

    shared_fields: ClassVar[tuple[str, ...]] = ("root",)

    root: str
    path: str

    def __post_init__(self) -> None:
        if not isinstance(self.root, str) or not isinstance(self.path, str):
            check_fields(self)
        refuse_leaving(self.root, self.path)

    @property
    def name(self) -> str:
        return shortened(self.path)


@dataclass(frozen=True, slots=True)
class ImageFile(RelativeImage):
    """An image file ``path`` below the folder ``root``; with ``follow_links``, links may point outside it.

    ``root`` may itself be a link. If no file has exactly this name, a file with an equivalent name is used, see
    ``llavactl.images.lookup.find_file``.
    """

    shared_fields: ClassVar[tuple[str, ...]] = ("root", "follow_links")

    follow_links: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.follow_links, bool):
            check_fields(self)
        RelativeImage.__post_init__(self)

    @property
    def file(self) -> Path:
        """Its path."""
        return Path(self.root, self.path)

    def locate(self) -> tuple[str, os.stat_result]:
        """The real path of the file, and its status.

        Raises:
            OSError: no such file, or it can't be read.
            LinkOutsideError: a link points outside ``root``.
        """
        # Strings, since pathlib takes twice as long, and training computes a stamp for every sample.
        folder, _, name = f"{self.root}/{self.path}".rpartition("/")
        target = f"{real_folder(folder or '/').rstrip('/')}/{name}"
        try:
            status = os.lstat(target)
            if name in ("", ".") or S_ISLNK(status.st_mode):
                target = realpath(target)
                status = os.stat(target)  # noqa: PTH116
        except (FileNotFoundError, NotADirectoryError):
            target = realpath(find_file(self.root, self.path))
            status = os.stat(target)  # noqa: PTH116
        if not self.follow_links:
            refuse_outside(self.root, target, self.name)
        if not S_ISREG(status.st_mode) and not S_ISDIR(status.st_mode):  # reading a folder raises an error by itself
            raise OSError("a pipe, socket or device, not a file")  # opening a pipe could block
        return target, status

    def read(self) -> bytes:
        return Path(self.locate()[0]).read_bytes()

    def stamp(self) -> str | None:
        target, status = self.locate()
        return f"{target}\0{file_stamp(status)}"
