"""Images that may be absent from this machine: their content keys, known from imported feature packs.

One file per root of images holds, for each path below the root, a hash of the path and the sha256 of the image: 48
bytes, sorted, and mapped into memory. An image is looked up only if it can't be read.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError
from llavactl.core.hashes import STAMP_BYTES, stamp_bytes
from llavactl.core.locations import is_url
from llavactl.core.paths import cache_dir, exclusive_lock, open_atomic
from llavactl.images.image_file import RelativeImage

if TYPE_CHECKING:
    import numpy as np

    from llavactl.core.schema import ImageRef

_KEY_BYTES = 32


def root_id(root: str) -> str:
    """A hash of the location of ``root``: a folder, an archive, a pattern of archives or a URL."""
    return stamp_bytes(root.rstrip("/") if is_url(root) else os.path.abspath(root)).hex()  # noqa: PTH100


def is_known_root(root: str) -> bool:
    """Whether content keys of images below ``root`` are known."""
    return _file(root_id(root)).is_file()


def known_files() -> list[Path]:
    """The files of known images, one for each root."""
    return sorted(_file("").parent.glob("*.npy"))


def interrupted_files() -> list[Path]:
    """What interrupted imports left."""
    return sorted(_file("").parent.glob(".*.npy.*"))


def keys_in(file: Path) -> list[str]:
    """The content keys of the images in ``file``, one of ``known_files``.

    Raises:
        DataError: the file is damaged.
    """
    data = _table(file, file.stat().st_mtime_ns)[1].tobytes().hex()
    return [data[start : start + 2 * _KEY_BYTES] for start in range(0, len(data), 2 * _KEY_BYTES)]


def forget(file: Path) -> None:
    """Removes ``file``, of ``known_files`` (its images are then not known any more) or ``interrupted_files``.

    Raises:
        DataError: an import is writing it, or it can't be removed.
    """
    try:
        with _locked(file):
            file.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{file} can't be removed: {error.strerror or error}", hint="remove it manually") from error


def known_key(image: ImageRef) -> str | None:
    """The content key of ``image`` as of the import of a feature pack; None if it is not known.

    Raises:
        DataError: the file of known keys is damaged.
    """
    if not isinstance(image, RelativeImage):
        return None
    file = _file(_remembered_root_id(image.root))
    try:
        status = file.stat()
    except OSError:
        return None
    stamps, keys = _table(file, status.st_mtime_ns)
    stamp = stamp_bytes(image.path).rstrip(b"\0")  # NumPy strips zeros, too
    position = int(stamps.searchsorted(stamp))
    if position == len(stamps) or stamps.item(position) != stamp:
        return None
    return keys[position].tobytes().hex()


def remember_keys(identifier: str, stamps: bytes, keys: bytes) -> None:
    """Adds images below the root ``identifier`` (see ``root_id``), replacing what is known of the same paths.

    ``stamps`` are ``stamp_bytes`` of their paths, ``keys`` their sha256, concatenated.

    Raises:
        DataError: another process is doing so.
        OSError: the file can't be written.
    """
    import numpy as np

    file = _file(identifier)
    with _locked(file):
        old = _table(file, file.stat().st_mtime_ns) if file.exists() else _split(np.empty(0, np.uint8))
        new = _split(np.frombuffer(stamps + keys, np.uint8))
        all_stamps = np.concatenate([new[0], old[0]])
        unique, first = np.unique(all_stamps, return_index=True)
        kept = np.concatenate([new[1], old[1]])[first]
        for left in file.parent.glob(f".{file.name}.*"):  # by an interrupted import
            left.unlink()
        with open_atomic(file) as out:
            np.save(out, np.concatenate([unique.view(np.uint8), kept.reshape(-1)]))


def _locked(file: Path) -> AbstractContextManager[None]:
    busy = DataError(f"another process is writing {file}", hint="wait until it has finished, then run the same command")
    identifier = file.name.lstrip(".").partition(".")[0]
    return exclusive_lock(file.with_name(f"{identifier}.lock"), busy, timeout_s=60)


def _file(identifier: str) -> Path:
    return cache_dir() / "images" / f"{identifier}.npy"


_remembered_root_id = lru_cache(maxsize=256)(root_id)
"""``root_id`` for each image of training; relative roots are those of a working directory that doesn't change."""


@lru_cache(maxsize=64)
def _table(file: Path, _modified: int) -> tuple[np.ndarray, np.ndarray]:
    import numpy as np

    try:
        return _split(np.load(file, mmap_mode="r", allow_pickle=False))
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is damaged: {error}", hint="remove it and import the feature pack again") from error


def _split(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The stamps [N] and keys [N, 32] in ``table``, a flat array of bytes."""
    count, rest = divmod(len(table), STAMP_BYTES + _KEY_BYTES)
    if rest or table.dtype != "uint8":
        raise ValueError(f"{table.dtype} {table.shape} is not a table of keys")
    size = count * STAMP_BYTES
    return table[:size].view(f"S{STAMP_BYTES}"), table[size:].reshape(count, _KEY_BYTES)
