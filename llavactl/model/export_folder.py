"""An export's folder: atomic writing, the record of its origin and files, and the stored verification result."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from llavactl.core.component_calls import call_error
from llavactl.core.errors import ModelError
from llavactl.core.hashes import hash_file, hash_json
from llavactl.core.paths import read_json, write_atomic, write_json
from llavactl.core.plugin_faults import plugin_fault
from llavactl.model.folder import replace_folder

if TYPE_CHECKING:
    from llavactl.core.protocols import Format

_STORAGE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of the storage, whichever format was writing: not faults of its plugin."""

RECORD = "llavactl_export.json"
"""In every export: its origin, the hashes of its files and its verification. Other folders are never overwritten."""

CARD = "README.md"

CARD_KEYS = ("stop_strings", "limitations", "usage")
"""Lists in the record for the model card: texts that end answers, sentences, and lines of Markdown."""

_VERIFICATION_KEYS = ("verified", "verified_content")
"""Keys of the record: the verification result, and the hash of the contents that were verified."""


@dataclass(frozen=True)
class ExportFolder:
    """The export in the folder ``path``, an absolute path."""

    path: Path

    def is_current(self, origin: Mapping[str, Any]) -> bool:
        """Whether the folder is an export with this ``origin`` whose files are unchanged, except its model card.

        An export that contains absolute paths and was moved isn't current.
        """
        record = self._record()
        if record.get("location", str(self.path)) != str(self.path):
            return False
        if {key: record.get(key) for key in origin} != origin:
            return False
        current, written = file_hashes(self.path), record.get("files", {})
        return {**current, CARD: None} == {**written, CARD: None}

    def write(
        self,
        export_format: Format,
        model: Path,
        origin: Mapping[str, Any],
        model_card: Callable[..., str],
    ) -> None:
        """Writes ``model`` in ``export_format``; an existing export is kept until the new one is complete.

        ``model_card`` returns the text of the model card, given the lists of ``CARD_KEYS`` that the format wrote.

        Raises:
            ModelError: the folder has other files, can't be written, or the format can't represent the model.
            PluginError: the format wrote no file.
        """
        self._refuse_other_files()
        temporary = self.path.with_name(f".{self.path.name}.partial")
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            export_format.write(model, temporary)
            if not any(file.is_file() for file in temporary.rglob("*")):
                raise call_error(export_format, "write", "wrote no file")
            records = [read_json(file) for file in sorted(temporary.rglob(RECORD))]
            listed = {key: [*chain(*(record.get(key, []) for record in records))] for key in CARD_KEYS}
            (temporary / CARD).write_text(model_card(**listed), encoding="utf-8")
            location = {"location": str(self.path)} if _replace_paths(temporary, self.path) else {}
            record = {**read_json(temporary / RECORD), **origin, **location, "files": file_hashes(temporary)}
            write_json(temporary / RECORD, record)
            replace_folder(temporary, self.path)
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) not in _STORAGE and plugin_fault(error):
                raise
            raise ModelError(
                f"{self.path}: can't be written: {' '.join(str(error).split())}",
                hint="free disk space, or check its permissions",
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def differs(self) -> bool:
        """Whether the last verification found that the export differs from its model."""
        return bool((self._record().get("verified") or {}).get("faults"))

    def verification(self) -> Any:
        """The stored verification result; None if there is none or a file has changed since."""
        record = self._record()
        return record.get("verified") if record.get("verified_content") == self.content() else None

    def remove_verification(self) -> None:
        """Removes the stored verification result."""
        record = {key: value for key, value in self._record().items() if key not in _VERIFICATION_KEYS}
        write_json(self.path / RECORD, record)

    def store_verification(self, result: Mapping[str, Any], content: str) -> None:
        """Stores the verification ``result`` of the files with hash ``content``."""
        write_json(self.path / RECORD, {**self._record(), "verified": result, "verified_content": content})

    def update_card(self, change: Callable[[str], str]) -> None:
        """Replaces the text of the model card, if there is one, by ``change`` of it."""
        file = self.path / CARD
        if not file.is_file():
            return
        text = file.read_text(encoding="utf-8", errors="surrogateescape")
        if (changed := change(text)) != text:
            write_atomic(file, changed)
            record = self._record()
            write_json(self.path / RECORD, {**record, "files": {**record.get("files", {}), CARD: hash_file(file)}})

    def content(self) -> str:
        """A hash of the names and contents of all files but the record and the model card."""
        return hash_json({name: value for name, value in file_hashes(self.path).items() if name != CARD})

    def files(self) -> list[Path]:
        return sorted(file for file in self.path.rglob("*") if file.is_file())

    def _record(self) -> dict[str, Any]:
        return read_json(self.path / RECORD)

    def _refuse_other_files(self) -> None:
        if not self.path.exists():
            return
        others = [self.path.name]
        if self.path.is_dir():
            others = sorted(_file_names(self.path) - self._record().get("files", {}).keys())
        if others:
            raise ModelError(
                f"{self.path}: contains files that are not part of an export by llavactl, such as {others[0]}",
                hint="pass another folder to `--to`",
            )


def file_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file in ``folder`` but the record, by relative path."""
    return {name: hash_file(folder / name) for name in sorted(_file_names(folder))}


def _file_names(folder: Path) -> set[str]:
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    return names - {RECORD}


def _replace_paths(folder: Path, final: Path) -> bool:
    """Replaces paths into ``folder`` in its config.json by paths into ``final``; returns whether there were any."""
    config = read_json(folder / "config.json")
    paths = {key: value for key, value in config.items() if isinstance(value, str) and value.startswith(str(folder))}
    if paths:
        replaced = {key: str(final / Path(value).relative_to(folder)) for key, value in paths.items()}
        write_json(folder / "config.json", {**config, **replaced})
    return bool(paths)
