"""Models that other programs wrote, as model folders of ours: recognised by their files, never by a folder's name."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import faults
from llavactl.core.errors import ModelError
from llavactl.core.paths import cache_dir, expanded, write_json
from llavactl.core.registry import registry
from llavactl.model.folder import DESCRIPTION, describe, of_run

if TYPE_CHECKING:
    from llavactl.core.protocols import Format
    from llavactl.recipe.frame import Recipe

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TEMPLATE = "vicuna-v1"
"""How a conversation is written for a checkpoint that doesn't say: as LLaVA v1.5 writes it."""


def resolve(model: str | Path, recipe: Recipe | None = None) -> Path:
    """The model folder that ``model`` names: one of ours as it is, another's as a small one that points to it.

    ``model`` is a folder (a run's means its last finished stage), an id of the hub, which is then downloaded, or a
    bare ``mm_projector.bin``. What a checkpoint doesn't say of itself, its backbone, say, ``recipe`` does.

    Raises:
        ModelError: there is no model, none of the formats recognises it, or it lacks what no recipe tells.
    """
    folder = expanded(model).absolute()
    if folder.is_file():
        folder = folder.parent
    if not folder.exists() and HUB_ID.fullmatch(str(model)):
        folder = faults.downloaded(str(model), "`--model` takes a folder or an id")
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
            return _completed(_adopted(folder, found), folder, recipe)
    if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelError(
            f"{folder}: no format recognises this checkpoint",
            hint="`llavactl components formats` lists what can be read",
        )
    describe(folder)  # says what is missing, and where a model may be
    return folder


VITAL = ("vision", "language")
READING = 1
"""Changes when formats read checkpoints another way: what was read before is then not looked at."""


def _adopted(folder: Path, found: Format) -> Path:
    """What ``found`` reads out of ``folder``, kept in the cache until a file of ``folder`` changes."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    seen = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    place = cache_dir() / "models" / hashlib.sha256(repr((READING, seen)).encode()).hexdigest()[:16]
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


def _completed(place: Path, folder: Path, recipe: Recipe | None) -> Path:
    """``place`` itself where it lacks nothing, else a copy with what ``recipe`` says (its template is never vital)."""
    description = describe(place)
    missing = [key for key, value in description.items() if value is None and key != "fingerprint"]
    if not missing:
        return place
    if recipe is None and missing != ["template"]:
        raise ModelError(
            f"{folder}: a connector that doesn't name its {' and '.join(key for key in VITAL if key in missing)}",
            hint="a recipe does: `-r recipe.yaml`, keys `vision` and `language`",
        )
    told = {"template": TEMPLATE} if recipe is None else _told(recipe)
    if recipe is None:
        log.warning("%s doesn't say how conversations are written: taking %s", folder, TEMPLATE)
    whole = {**description, **{key: told[key] for key in missing}}
    total = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    copy = place.with_name(total[:16])
    if not (copy / DESCRIPTION).is_file():
        with tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as beside:
            made = Path(shutil.copytree(place, Path(beside, "model")))
            write_json(made / DESCRIPTION, {**whole, "digest": total})
            if not copy.exists():
                made.rename(copy)
    return copy


def _told(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of its model, as ``llavactl.json`` has it."""
    shape = registry().create("vision", recipe.vision.spec()).shape()
    return {
        "vision": recipe.vision.spec(),
        "shape": {"grid": list(shape.grid), "width": shape.width, "prefix": shape.prefix},
        "language": recipe.language.spec(),
        "template": recipe.language.template,
        "precision": recipe.stage2.precision,
    }
