"""The images and text files below a folder, without hidden files and the files that systems add to folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath

from llavactl.core.errors import DataError
from llavactl.images.lookup import canonical

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .bmp .tif .tiff .heic .heif .avif .ppm .pgm".split()  # noqa: SIM905
)
_SKIPPED_FOLDERS = frozenset({"__MACOSX", "@eaDir", "$RECYCLE.BIN"})
"""Folders of thumbnails, metadata and deleted files that macOS, Synology and Windows add."""
_STEPS = frozenset({"stage1", "stage2", "eval"})
"""Folders of a run's steps."""

_MODEL_FILES = frozenset({"llavactl.json", "llavactl_export.json"})
"""Files that llavactl writes into folders of models."""


@dataclass(frozen=True)
class Listing:
    """The files below ``root`` by their path with slashes, sorted: ``images``, and ``texts`` for all other files.

    ``outputs`` are folders that llavactl wrote, whose files are left out.
    """

    root: Path
    images: Sequence[str]
    texts: Sequence[str]
    outputs: Sequence[str] = ()

    def image(self, folder: str, name: str) -> str:
        """The image ``name``, as written in a table of captions in ``folder``.

        It is relative to the folder of the table, or else to ``root``, or else the only image of this name. Without
        such an image, its path in the table's folder, which doesn't exist.
        """
        written = canonical(name)
        beside = (PurePosixPath(folder) / written).as_posix()
        for path in (beside, written):
            if (found := self._by_path.get(canonical(_normal(path)))) is not None:
                return found
        same_name = self._by_name.get(written, ()) if "/" not in written else ()
        return same_name[0] if len(same_name) == 1 else beside

    @cached_property
    def _by_path(self) -> Mapping[str, str]:
        return {canonical(path): path for path in self.images}

    @cached_property
    def _by_name(self) -> Mapping[str, Sequence[str]]:
        by_name: dict[str, list[str]] = {}
        for path in self.images:
            by_name.setdefault(canonical(PurePosixPath(path).name), []).append(path)
        return by_name


def is_image(name: str) -> bool:
    """Whether the suffix of ``name`` is that of an image."""
    return PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES


def listing(root: Path, *, follow_links: bool = False) -> Listing:
    """The files below ``root``; linked folders are entered with ``follow_links`` only.

    Raises:
        DataError: a folder can't be read.
    """
    outputs: list[str] = []
    files = sorted(_files(root, follow_links, outputs))
    images, texts = [file for file in files if is_image(file)], [file for file in files if not is_image(file)]
    return Listing(root, images, texts, sorted(outputs))


def _files(root: Path, follow_links: bool, outputs: list[str]) -> Iterator[str]:
    """The files below ``root``; adds the folders that llavactl wrote to ``outputs``."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: {error.strerror}", hint="make the folder readable, or move it") from error

    entered: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=refuse, followlinks=follow_links):
        real = os.path.realpath(folder)
        if real in entered:  # a link to a folder that contains it
            folders.clear()
            continue
        entered.add(real)
        if folder != str(root) and _is_output(set(folders), set(names)):
            outputs.append(Path(folder).relative_to(root).as_posix())
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in _SKIPPED_FOLDERS)
        inside = PurePosixPath(Path(folder).relative_to(root).as_posix())
        yield from ((inside / name).as_posix() for name in names if not name.startswith("."))


def _is_output(folders: Set[str], names: Set[str]) -> bool:
    """Whether a folder with these entries is a run, a stage of a run, a model or an export of llavactl."""
    run = "recipe.yaml" in names and _STEPS & folders
    return bool(run or ("metrics.jsonl" in names and "checkpoints" in folders) or _MODEL_FILES & names)


def _normal(path: str) -> str:
    """``path`` without redundant dots."""
    return os.path.normpath(path).replace(os.sep, "/")
