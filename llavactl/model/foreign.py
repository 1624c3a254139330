"""Models that other programs wrote, as model folders of ours: recognised by their files, never by a folder's name."""

from __future__ import annotations

import hashlib
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import ModelError
from llavactl.core.paths import cache_dir
from llavactl.core.registry import registry
from llavactl.model.folder import DESCRIPTION, describe, of_run

if TYPE_CHECKING:
    from llavactl.core.protocols import Format

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def resolve(model: str | Path) -> Path:
    """The model folder that ``model`` names: one of ours as it is, another's as a small one that points to it.

    ``model`` is a folder (a run's means its last finished stage), or an id of the hub, which is then downloaded.

    Raises:
        ModelError: there is no model, or none of the formats recognises it.
    """
    folder = Path(model).expanduser().absolute()
    if not folder.exists() and HUB_ID.fullmatch(str(model)):
        folder = _downloaded(str(model))
    if (folder / DESCRIPTION).is_file() or not folder.is_dir():
        describe(folder)
        return folder
    # A run's folder, or a stage's in it.
    if any((folder / stage / "model" / DESCRIPTION).is_file() for stage in ("stage1", "stage2")):
        return of_run(folder)
    if (folder / "model" / DESCRIPTION).is_file():
        return folder / "model"
    for name in registry().names("formats"):
        found: Format = registry().create("formats", {"name": name})
        if found.recognise(folder):
            return _adopted(folder, found)
    if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelError(
            f"{folder}: no format recognises this checkpoint",
            hint="`llavactl components formats` lists what can be read",
        )
    describe(folder)  # says what is missing, and where a model may be
    return folder


def _adopted(folder: Path, found: Format) -> Path:
    """What ``found`` reads out of ``folder``, kept in the cache until a file of ``folder`` changes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    place = cache_dir() / "models" / hashlib.sha256(repr(seen).encode()).hexdigest()[:16]
    if (place / DESCRIPTION).is_file():
        return place
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".", dir=place.parent))
    try:
        found.read(folder, temporary)
        if not place.exists():
            temporary.rename(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(temporary, ignore_errors=True)
    return place


def _downloaded(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, ignore_patterns=["*.gguf", "*.onnx", "*.msgpack", "*.h5"]))
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model {model!r}: there is no such folder, and it can't be had from the hub: {reason}",
            hint="`--model` takes a folder or an id",
        ) from error
