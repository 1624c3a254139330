"""The manifest of a store: its finished shards with checksums, and the images known to be undecodable."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from llavactl.core.errors import StoreError
from llavactl.core.paths import cache_dir, read_json, sync_folder, write_json
from llavactl.core.schema import FeatureShape
from llavactl.features.fingerprint import FORMAT, Fingerprint

_MANIFEST = "manifest.json"
_FINGERPRINT = "fingerprint.json"

RECOMPUTED = "recomputed.json"
"""The latest result of `llavactl cache verify --recompute`, which model cards quote."""


@dataclass(frozen=True)
class ShardEntry:
    """A finished shard: ``file`` name, number of ``images``, size in ``bytes`` and checksum."""

    file: str
    images: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The finished ``shards``; ``skipped`` maps the content keys of images without features to the reasons.

    ``conditions`` are those under which each shard was encoded (see ``features.conditions``), by file name, and
    ``recipes`` those whose images were encoded (see ``features.recorded``). In stores of earlier versions both are
    empty.
    """

    shape: FeatureShape
    shards: tuple[ShardEntry, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    conditions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    recipes: tuple[Mapping[str, Any], ...] = ()

    @property
    def images(self) -> int:
        return sum(entry.images for entry in self.shards)

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.shards)

    def with_shard(self, entry: ShardEntry, conditions: Mapping[str, Any] | None = None) -> Manifest:
        """A copy with ``entry`` appended, encoded under ``conditions``."""
        known = {**self.conditions, entry.file: conditions} if conditions else self.conditions
        return replace(self, shards=(*self.shards, entry), conditions=known)

    def with_recipe(self, recipe: Mapping[str, Any]) -> Manifest:
        """A copy with ``recipe`` as the latest one."""
        return replace(self, recipes=(*(other for other in self.recipes if other != recipe), recipe))

    def without(self, files: Container[str]) -> Manifest:
        """A copy without the shards ``files``."""
        shards = tuple(entry for entry in self.shards if entry.file not in files)
        conditions = {file: known for file, known in self.conditions.items() if file not in files}
        return replace(self, shards=shards, conditions=conditions)

    def write(self, folder: Path) -> None:
        """Replaces the manifest of ``folder`` atomically; raises OSError."""
        write_json(folder / _MANIFEST, {"format": FORMAT, **asdict(self)})
        sync_folder(folder)


def stores_dir() -> Path:
    """The parent folder of all stores."""
    return cache_dir() / "features"


def store_dir(fingerprint: Fingerprint) -> Path:
    """The folder of the store for ``fingerprint``; it may not exist yet."""
    return stores_dir() / fingerprint.id


def store_dirs() -> list[Path]:
    """The folders of all stores.

    Raises:
        StoreError: the parent folder can't be listed.
    """
    try:
        return sorted(path for path in stores_dir().iterdir() if path.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _read_error(stores_dir(), error) from error


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of the store in ``folder``, or None if it doesn't exist yet.

    Raises:
        StoreError: the manifest can't be read or parsed.
    """
    try:
        fields = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        shape = fields["shape"]
        return Manifest(
            FeatureShape((shape["grid"][0], shape["grid"][1]), shape["width"], shape["prefix"]),
            tuple(ShardEntry(**entry) for entry in fields["shards"]),
            dict(fields["skipped"]),
            {file: _checked_conditions(file, known) for file, known in fields.get("conditions", {}).items()},
            tuple(fields.get("recipes", ())),
        )
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _read_error(folder / _MANIFEST, error) from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise StoreError(
            f"{folder / _MANIFEST} is damaged: {error}",
            hint="remove this file: `llavactl extract` then lists the existing shards again",
        ) from error


def _checked_conditions(file: str, known: Any) -> dict[str, Any]:
    """The conditions ``known`` of the shard ``file``; they may be those of an imported pack."""
    if not isinstance(known, dict):
        raise ValueError(f"conditions of {file}: expected a mapping, got {known!r:.80}")
    for key, value in known.items():
        if key in ("threads", "batch_size") and (type(value) is not int or value < 1):
            raise ValueError(f"conditions of {file}: {key}: expected a positive integer, got {value!r:.80}")
        if not isinstance(value, str | int | float | None):
            raise ValueError(f"conditions of {file}: {key}: expected a string or a number, got {value!r:.80}")
    return known


def read_recomputed(folder: Path) -> dict[str, Any]:
    """The latest result of `llavactl cache verify --recompute`; {} if there is none, or a compared shard has changed.

    Raises:
        StoreError: the manifest can't be read or parsed.
    """
    result = read_json(folder / RECOMPUTED)
    compared, manifest = result.get("shards"), read_manifest(folder)
    if not isinstance(compared, dict) or manifest is None:
        return {}
    current = {entry.file: entry.sha256 for entry in manifest.shards}
    return result if all(current.get(file) == checksum for file, checksum in compared.items()) else {}


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint stored in ``folder``, or None if there is no fingerprint file.

    Raises:
        StoreError: the file can't be read or parsed.
    """
    try:
        return Fingerprint.from_json((folder / _FINGERPRINT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _read_error(folder / _FINGERPRINT, error) from error
    except ValueError as error:
        raise StoreError(
            f"{folder / _FINGERPRINT} is damaged: {error}",
            hint="run `llavactl extract` to write it again; every shard has a copy in its attributes",
        ) from error


def _read_error(path: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{path} can't be read: {error.strerror or error}",
        hint="check its permissions, disk and mount; the features may be intact",
    )


def write_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Writes the fingerprint file of ``folder``; raises OSError."""
    write_json(folder / _FINGERPRINT, fingerprint.fields)


def check_fingerprint(path: Path, actual: Fingerprint, expected: Fingerprint) -> None:
    """Compares the fingerprint ``actual`` of a store or shard at ``path`` with ``expected``.

    Raises:
        StoreError: they differ; the message lists the differing fields.
    """
    if differences := expected.differences(actual):
        raise StoreError(
            f"{path} has a different fingerprint: {'; '.join(differences)}",
            hint="remove it and run `llavactl extract`, or revert the recipe",
        )
