"""Feature packs: a folder with feature stores and the names of their images, to train where the images are not.

pack.json            the format version, the stores, the roots of images, and size and sha256 of every other file
images.jsonl         {"root", "image", "key"}: an image below a root, and its content key
README.md            for people
FINGERPRINT/         for each store: manifest.json, fingerprint.json, shard-*.h5

pack.json is written last, so a folder without it is not a complete pack.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os.path import realpath
from pathlib import Path, PurePosixPath
from typing import Any

from llavactl.core.errors import StoreError
from llavactl.core.locations import is_absolute
from llavactl.core.paths import read_json
from llavactl.features.fingerprint import FORMAT as STORE_FORMAT
from llavactl.features.fingerprint import Fingerprint
from llavactl.features.manifest import Manifest, read_fingerprint, read_manifest
from llavactl.features.shards import checksum
from llavactl.images.lookup import LinkOutsideError, refuse_outside

FORMAT = 1
"""The version of the layout of a pack; a reader refuses any other."""

PACK, UNFINISHED, IMAGES, README = "pack.json", "pack.json.partial", "images.jsonl", "README.md"

_STORE_FILE = re.compile(r"[0-9a-f]{16}/(?:manifest\.json|fingerprint\.json|shard-\d{5,}\.h5)")
_KEY = re.compile(r"[0-9a-f]{64}")
_COPY_AGAIN = "copy the pack again; `llavactl cache import` continues where it stopped"


@dataclass(frozen=True)
class PackedFile:
    """A file of a pack: ``bytes`` and ``sha256``. ``source`` identifies what it was made of when it was exported."""

    bytes: int
    sha256: str
    source: str = ""


@dataclass(frozen=True)
class ImagesRoot:
    """A location of images: the ``id`` of the absolute location (see ``images.known.root_id``).

    ``relative``: the location relative to the folder of the recipe; None for a URL, or outside of this folder.
    """

    id: str
    relative: str | None


@dataclass(frozen=True)
class PackedStore:
    """The store in ``folder`` of a pack."""

    folder: Path
    fingerprint: Fingerprint
    manifest: Manifest


@dataclass(frozen=True)
class Pack:
    """A complete pack in ``folder`` whose files, except for shards and image names, were verified."""

    folder: Path
    stores: tuple[PackedStore, ...]
    roots: tuple[ImagesRoot, ...]
    images: int
    files: Mapping[str, PackedFile]

    def named_images(self) -> Iterator[tuple[int, str, str]]:
        """The index of the root, the path and the content key of every named image.

        Raises:
            StoreError: the list is damaged.
        """
        path = self.folder / IMAGES
        check_file(path, self.files[IMAGES])
        with path.open("rb") as lines:
            for line in lines:
                try:
                    fields = json.loads(line)
                    root, image, key = fields["root"], fields["image"], fields["key"]
                    image.encode("utf-8", "surrogateescape")
                    valid = type(root) is int and 0 <= root < len(self.roots) and _KEY.fullmatch(key)
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    valid = False
                if not valid:
                    raise _invalid(path, f"not an image with its key: {line.strip()[:80].decode(errors='replace')}")
                yield root, image, key


def read_pack(folder: Path) -> Pack:
    """The pack in ``folder``, after checking everything that doesn't need all bytes of its shards.

    Raises:
        StoreError: not a complete pack, of another version, with a missing, truncated or damaged file, or a file that
            doesn't belong into a pack (a path or a link outside it).
    """
    document = _document(folder)
    files = _files(folder, document)
    if missing := [name for name in (*files, IMAGES) if name != README and not (folder / name).is_file()]:
        raise StoreError(
            f"{folder}: {len(missing)} of {len(files)} files are missing: {', '.join(missing[:3])}", hint=_COPY_AGAIN
        )
    for name, file in files.items():
        if name != README:
            _check_place_and_size(folder, name, file)
    identifiers = sorted({name.partition("/")[0] for name in files if "/" in name})
    stores = tuple(_store(folder / name, files) for name in identifiers)
    try:
        roots = tuple(_root(fields) for fields in document["roots"])
        images = _integer(document["images"])
    except (KeyError, TypeError, ValueError) as error:
        raise _invalid(folder / PACK, str(error)) from error
    return Pack(folder, stores, roots, images, files)


def _document(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise StoreError(f"{folder}: no such folder", hint="name the folder that `llavactl cache export` wrote")
    path = folder / PACK
    if not path.exists():
        if (folder / UNFINISHED).exists():
            raise StoreError(
                f"{folder} is not complete: its export was interrupted, or it was copied meanwhile",
                hint="run the same `llavactl cache export` again, then copy the pack",
            )
        raise StoreError(
            f"{folder} is not a feature pack: no {PACK}", hint="name the folder that `llavactl cache export` wrote"
        )
    document = read_json(path)
    if not document:
        raise _invalid(path, "not a JSON object")
    if document.get("format") != FORMAT:
        raise StoreError(
            f"{folder} has format {document.get('format')!r:.80}, expected {FORMAT}",
            hint="export the pack again with this version of llavactl, or install the version that wrote it",
        )
    return document


def _files(folder: Path, document: Mapping[str, Any]) -> dict[str, PackedFile]:
    """The listed files by name; only names that a pack has are accepted, so none can lead outside it."""
    listed = document.get("files")
    if not isinstance(listed, dict):
        raise _invalid(folder / PACK, "no list of files")
    if unexpected := [name for name in listed if not is_pack_file(name)]:
        raise _invalid(folder / PACK, f"no file of a pack has the name {unexpected[0]!r:.80}")
    if IMAGES not in listed:
        raise _invalid(folder / PACK, f"{IMAGES} is not listed")
    try:
        return {name: PackedFile(_integer(file["bytes"]), str(file["sha256"])) for name, file in listed.items()}
    except (TypeError, KeyError, ValueError) as error:
        raise _invalid(folder / PACK, f"files: {error}") from error


def is_pack_file(name: str) -> bool:
    """Whether a file of a pack other than pack.json may have this ``name``."""
    return name in (IMAGES, README) or _STORE_FILE.fullmatch(name) is not None


def _check_place_and_size(folder: Path, name: str, file: PackedFile) -> None:
    path = folder / name
    try:
        refuse_outside(str(folder), realpath(path), name)
        status = path.stat()
    except LinkOutsideError as error:
        raise StoreError(
            f"{path}: a symbolic link points outside the pack", hint="copy the files that links point to: `cp -rL`"
        ) from error
    except OSError as error:
        raise StoreError(
            f"{path} can't be read: {error.strerror or error}", hint="check permissions, disk and mount"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise _invalid(path, "not a file")
    if status.st_size != file.bytes:
        raise StoreError(f"{path} has {status.st_size} bytes, expected {file.bytes}", hint=_COPY_AGAIN)


def check_file(path: Path, file: PackedFile) -> None:
    """Raises a StoreError unless ``path`` has the checksum of ``file``."""
    try:
        digest = checksum(path)
    except OSError as error:
        raise StoreError(f"{path} can't be read: {error.strerror or error}", hint="check disk and mount") from error
    if digest != file.sha256:
        raise damaged_file(path, "checksum mismatch")


def damaged_file(path: Path, reason: str) -> StoreError:
    """The error for a file of a pack whose content is wrong."""
    return StoreError(f"{path} is damaged: {reason}", hint=_COPY_AGAIN)


def _store(folder: Path, files: Mapping[str, PackedFile]) -> PackedStore:
    own = {name.partition("/")[2]: file for name, file in files.items() if name.startswith(f"{folder.name}/")}
    for name in ("manifest.json", "fingerprint.json"):
        if name not in own:
            raise _invalid(folder, f"{name} is not listed")
        check_file(folder / name, own[name])
    try:
        fingerprint, manifest = read_fingerprint(folder), read_manifest(folder)
    except StoreError as error:  # its hint is that for a store
        raise StoreError(error.message, hint="export the pack again") from error
    if fingerprint is None or manifest is None:
        raise _invalid(folder, "it was changed while it was read")
    if (version := fingerprint.fields.get("format")) != STORE_FORMAT:
        raise StoreError(
            f"{folder}: the features have format {version}, expected {STORE_FORMAT}",
            hint="export the pack again with this version of llavactl",
        )
    if fingerprint.id != folder.name:
        raise _invalid(folder / "fingerprint.json", f"its hash is {fingerprint.id}, expected {folder.name}")
    for entry in manifest.shards:
        file = own.get(entry.file)
        if file is None or (file.bytes, file.sha256) != (entry.bytes, entry.sha256):
            raise _invalid(folder / "manifest.json", f"{entry.file!r:.80} is not a listed file, or another one")
    return PackedStore(folder, fingerprint, manifest)


def _root(fields: Any) -> ImagesRoot:
    identifier, relative = fields["id"], fields["relative"]
    if not isinstance(identifier, str) or not re.fullmatch("[0-9a-f]{32}", identifier):
        raise ValueError(f"invalid root {identifier!r:.80}")
    if relative is not None and (not isinstance(relative, str) or "\0" in relative or _leads_outside(relative)):
        raise ValueError(f"invalid root {relative!r:.80}")
    return ImagesRoot(identifier, relative)


def _leads_outside(relative: str) -> bool:
    """Whether a location that should be relative to the folder of the recipe may be outside it."""
    return is_absolute(relative) or ".." in PurePosixPath(relative).parts


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"expected an integer, got {value!r:.80}")
    return value


def _invalid(path: Path, reason: str) -> StoreError:
    return StoreError(f"{path} is not valid: {reason}", hint="export the pack again")
