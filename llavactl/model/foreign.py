"""Models that other programs wrote, as model folders of ours: recognised by their files, never by a folder's name."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import hub
from llavactl.core.errors import ModelError
from llavactl.core.hashes import hash_folder, hash_json
from llavactl.core.identity import content_of
from llavactl.core.paths import cache_dir, expand_user, read_json, write_json
from llavactl.core.registry import registry
from llavactl.model.folder import DESCRIPTION, describe, of_run
from llavactl.recipe.frame import Recipe

if TYPE_CHECKING:
    from llavactl.core.protocols import Format
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TEMPLATE = "vicuna-v1"
"""How a conversation is written for a checkpoint that doesn't say: as LLaVA v1.5 writes it."""


def resolve(model: str | Path, recipe: Outline | None = None) -> Path:
    """The model folder that ``model`` names: one of ours as it is, another's as a small one that points to it.

    ``model`` is a folder (a run's means its last finished stage), an id of the hub, which is then downloaded, or a
    bare ``mm_projector.bin``. What a checkpoint doesn't say of itself, its backbone, say, ``recipe`` does.

    Raises:
        ModelError: there is no model, none of the formats recognises it, or it lacks what no recipe tells.
    """
    folder = expand_user(model).absolute()
    if folder.is_file():
        folder = folder.parent
    if not folder.exists() and HUB_ID.fullmatch(str(model)):
        folder = hub.download(str(model), "`--model` takes a folder or a Hugging Face id")
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
            return _completed(_adopted(folder, name, found), folder, recipe if isinstance(recipe, Recipe) else None)
    if any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ModelError(
            f"{folder}: unknown checkpoint format: {_seen(folder)}",
            hint="llavactl reads LlavaForConditionalGeneration of transformers (model_type llava) and the original "
            "LLaVA's checkpoints (mm_vision_tower in config.json, or mm_projector.bin); see `components formats`",
        )
    describe(folder)  # says what is missing, and where a model may be
    return folder


def _seen(folder: Path) -> str:
    """What the files of ``folder`` say about it: architecture and model type, or the base of an adapter."""
    config, adapter = read_json(folder / "config.json"), read_json(folder / "adapter_config.json")
    seen = [f"architecture {', '.join(map(str, config['architectures']))}"] if config.get("architectures") else []
    seen += [f"model_type {config['model_type']}"] if config.get("model_type") else []
    if adapter:
        seen.append(f"a {adapter.get('peft_type')} adapter of {adapter.get('base_model_name_or_path')}")
    return ", ".join(seen) or "neither architecture nor model_type found"


VITAL = ("vision", "language")
READING = 3
"""Increased when formats read checkpoints differently, so that earlier results are ignored."""


def _adopted(folder: Path, name: str, found: Format) -> Path:
    """The model folder that ``found`` converts ``folder`` to, cached by the contents of everything it depends on.

    That is every file of ``folder``, and the models outside it. These are known only after conversion, so a small file
    lists them by the contents of ``folder``.
    """
    try:
        own = hash_json([READING, name, registry().get("formats", name).version, hash_folder(folder)])
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: {error.strerror or error}") from error
    models = cache_dir() / "models"
    note = models / f"{hash_json([str(folder), own])[:16]}.json"
    if (sources := read_json(note).get("sources")) is not None:
        place = models / _place(folder, _digest(own, sources))
        if (place / DESCRIPTION).is_file():
            return place
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=models) as beside:
        made = Path(beside, "model")
        made.mkdir()
        found.read(folder, made)
        description = describe(made)
        sources = description.pop("sources", [])
        digest = _digest(own, sources)
        place = models / _place(folder, digest)
        _settle(made, place, {**description, "digest": digest}, was=made)
    write_json(note, {"sources": sources})
    return place


def _digest(own: str, sources: Sequence[str]) -> str:
    """A hash of a checkpoint's own contents ``own`` and of the models ``sources`` that it depends on."""
    return hash_json([own, [content_of(str(Path(s).absolute()) if Path(s).is_dir() else s) for s in sources]])


def _place(folder: Path, digest: str) -> str:
    """A model folder's name, which includes the path of ``folder`` since the model refers to files there."""
    return hash_json([str(folder), digest])[:16]


def _settle(made: Path, place: Path, description: Mapping[str, Any], *, was: Path) -> None:
    """Moves ``made`` to ``place``, unless another process was first; paths in ``was`` are changed to ``place``."""

    def moved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: moved(each) for key, each in value.items()}
        within = isinstance(value, str) and value.startswith(f"{was}{os.sep}")
        return str(place / Path(value).relative_to(was)) if within else value

    write_json(made / DESCRIPTION, moved(description))
    try:
        made.rename(place)
    except OSError:
        if not (place / DESCRIPTION).is_file():
            raise


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
    digest = hash_json([description["digest"], content_of({key: told[key] for key in missing})])
    copy = place.with_name(hash_json([str(place), whole, digest])[:16])
    if not (copy / DESCRIPTION).is_file():
        with tempfile.TemporaryDirectory(prefix=".", dir=place.parent) as beside:
            made = Path(shutil.copytree(place, Path(beside, "model")))
            _settle(made, copy, {**whole, "digest": digest}, was=place)
    return copy


def _told(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of its model, as ``llavactl.json`` has it."""
    shape = registry().create("vision", recipe.vision.spec()).shape()
    return {
        "vision": recipe.vision.spec(),
        "shape": {"grid": list(shape.grid), "width": shape.width, "prefix": shape.prefix},
        "language": recipe.language.spec(),
        "template": recipe.stage(2).template,
        "precision": recipe.stage2.precision,
    }
