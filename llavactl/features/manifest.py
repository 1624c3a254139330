"""What a store holds: its finished shards with their checksums, and the images known to be undecodable."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llavactl.core.errors import StoreError
from llavactl.core.paths import cache_dir, sync_folder, write_json
from llavactl.core.schema import FeatureShape
from llavactl.features.fingerprint import FORMAT, Fingerprint

_NAME = "manifest.json"
_FINGERPRINT = "fingerprint.json"


@dataclass(frozen=True)
class ShardEntry:
    """One finished shard: its ``file`` name, how many ``images`` it holds, its size and sha256."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The finished shards, and by content key why an image's content has no features."""

    shape: FeatureShape
    shards: tuple[ShardEntry, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @property
    def images(self) -> int:
        return sum(entry.images for entry in self.shards)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.shards)

    def listing(self, entry: ShardEntry) -> Manifest:
        """The same manifest with one shard more."""
        return replace(self, shards=(*self.shards, entry))

    def write(self, folder: Path) -> None:
        """Replaces the manifest of ``folder`` in one step; raises OSError."""
        write_json(folder / _NAME, {"format": FORMAT, **asdict(self)})
        sync_folder(folder)


def stores_dir() -> Path:
    """The folder of all stores."""
    return cache_dir() / "features"


def store_dir(fingerprint: Fingerprint) -> Path:
    """The folder of the store for ``fingerprint``, whether or not it exists."""
    return stores_dir() / fingerprint.id


def store_dirs() -> list[Path]:
    """The folders of all stores; raises StoreError if they can't be listed."""
    try:
        return sorted(path for path in stores_dir().iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unreadable(stores_dir(), error) from error


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the store in ``folder``; None where there is none yet.

    Raises:
        StoreError: it can't be read or is not a manifest.
    """
    try:
        found = json.loads((folder / _NAME).read_text(encoding="utf-8"))
        shape = found["shape"]
        return Manifest(
            FeatureShape((shape["grid"][0], shape["grid"][1]), shape["width"], shape["prefix"]),
            tuple(ShardEntry(**entry) for entry in found["shards"]),
            dict(found["skipped"]),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(folder / _NAME, error) from error
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise StoreError(
            f"{folder / _NAME} is damaged: {error}",
            hint="remove that file: `llavactl extract` lists the shards beside it again, as they then are",
        ) from error


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """What ``folder`` says its features were made with; None where it doesn't say.

    Raises:
        StoreError: it can't be read.
    """
    try:
        return Fingerprint.from_json((folder / _FINGERPRINT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(folder / _FINGERPRINT, error) from error
    except ValueError as error:
        raise StoreError(
            f"{folder / _FINGERPRINT} is damaged: {error}",
            hint="`llavactl extract` writes it again, and so may you: every shard has its text as an attribute",
        ) from error


def _unreadable(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} can't be read: {error.strerror or error}",
        hint="check its permissions, disk and mount; the features themselves may be intact",
    )


def write_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Says in ``folder`` what its features are made with; raises OSError."""
    write_json(folder / _FINGERPRINT, fingerprint.fields)


def check_fingerprint(folder: Path, found: Fingerprint, wanted: Fingerprint) -> None:
    """Raises a StoreError that lists the fields in which ``found``, in ``folder``, differs from ``wanted``."""
    if differences := wanted.differences(found):
        raise StoreError(
            f"{folder} holds features of another fingerprint: {'; '.join(differences)}",
            hint="remove that folder and run `llavactl extract`, or change the recipe back",
        )
