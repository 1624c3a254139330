"""Resolves `--model` to a model folder, importing checkpoints that other programs wrote.

Formats are recognized by the files in a folder, not by its name.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core import hub, plugins
from llavactl.core.errors import ModelError
from llavactl.core.hashes import hash_folder, hash_json
from llavactl.core.identity import content_of
from llavactl.core.model_description import DESCRIPTION, read_description
from llavactl.core.model_files import ADAPTER_CONFIG
from llavactl.core.paths import cache_dir, expand_user, read_json, write_json
from llavactl.core.protocols import ShapedVision
from llavactl.core.registry import registry
from llavactl.model.folder import latest_model
from llavactl.recipe.frame import Recipe
from llavactl.recipe.stages import STAGES

if TYPE_CHECKING:
    from llavactl.core.protocols import Format
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
TEMPLATE = "vicuna-v1"
"""The conversation template for a checkpoint that doesn't specify one: that of LLaVA v1.5."""


def resolve(model: str | Path, recipe: Outline | None = None) -> Path:
    """The model folder for ``model``; a checkpoint in another format is imported into a small folder that refers to it.

    ``model`` is a folder (a run folder: its last finished stage), an id of the Hugging Face hub, which is downloaded,
    or the file ``mm_projector.bin``. ``recipe`` supplies missing information, such as the vision encoder.

    Raises:
        ModelError: the model doesn't exist, its format is unknown, or information is missing without a recipe.
    """
    folder = expand_user(model).absolute()
    if folder.is_file():
        folder = folder.parent
    if not folder.exists() and HUB_ID.fullmatch(str(model)):
        folder = hub.download(str(model), "`--model` takes a folder or a Hugging Face id")
    if (folder / DESCRIPTION).is_file() or not folder.is_dir():
        read_description(folder)
        return folder
    # The folder of a run, or of one of its stages.
    if any((folder / stage / "model" / DESCRIPTION).is_file() for stage in STAGES.values()):
        return latest_model(folder)
    if (folder / "model" / DESCRIPTION).is_file():
        return folder / "model"
    for name in registry().names("formats"):
        recognised = False
        with plugins.isolated(registry().get("formats", name).plugin, "recognise"):  # the others may still read it
            checkpoint_format = registry().create("formats", {"name": name})
            recognised = checkpoint_format.recognise(folder)
        if recognised:
            imported = _import_checkpoint(folder, name, checkpoint_format)
            return _complete(imported, folder, recipe if isinstance(recipe, Recipe) else None)
    if any((folder / file).is_file() for file in ("config.json", ADAPTER_CONFIG)):
        raise ModelError(
            f"{folder}: unknown checkpoint format: {_summary(folder)}",
            hint="llavactl reads LlavaForConditionalGeneration of transformers (model_type llava) and the original "
            "LLaVA's checkpoints (mm_vision_tower in config.json, or mm_projector.bin); see `components formats`",
        )
    read_description(folder)  # raises an error with a hint
    return folder


def _summary(folder: Path) -> str:
    """Architecture and model type of the checkpoint in ``folder``, or the base model of an adapter."""
    config, adapter = read_json(folder / "config.json"), read_json(folder / ADAPTER_CONFIG)
    facts = [f"architecture {', '.join(map(str, config['architectures']))}"] if config.get("architectures") else []
    facts += [f"model_type {config['model_type']}"] if config.get("model_type") else []
    if adapter:
        facts.append(f"a {adapter.get('peft_type')} adapter of {adapter.get('base_model_name_or_path')}")
    return ", ".join(facts) or "neither architecture nor model_type found"


REQUIRED_KEYS = ("vision", "language")
IMPORT_VERSION = 3
"""Incremented when formats read checkpoints differently, to invalidate cached imports."""


def _import_checkpoint(folder: Path, name: str, checkpoint_format: Format) -> Path:
    """The model folder converted from ``folder``, cached by the contents of everything that it depends on.

    It depends on all files of ``folder`` and on models outside it. The latter are known only after the conversion, so a
    small file lists them by the contents of ``folder``.
    """
    try:
        contents = hash_json([IMPORT_VERSION, name, registry().get("formats", name).version, hash_folder(folder)])
    except OSError as error:
        raise ModelError(f"{error.filename or folder}: {error.strerror or error}") from error
    models = cache_dir() / "models"
    sources_file = models / f"{hash_json([str(folder), contents])[:16]}.json"
    if (sources := read_json(sources_file).get("sources")) is not None:
        target = models / _folder_name(folder, _digest(contents, sources))
        if (target / DESCRIPTION).is_file():
            return target
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=models) as temporary:
        converted = Path(temporary, "model")
        converted.mkdir()
        checkpoint_format.read(folder, converted)
        description = read_description(converted)
        sources = description.pop("sources", [])
        digest = _digest(contents, sources)
        target = models / _folder_name(folder, digest)
        _move(converted, target, {**description, "digest": digest}, referenced=converted)
    write_json(sources_file, {"sources": sources})
    return target


def _digest(contents: str, sources: Sequence[str]) -> str:
    """A hash of a checkpoint's ``contents`` (a hash) and of the models ``sources`` that it depends on."""
    return hash_json([contents, [content_of(str(Path(s).absolute()) if Path(s).is_dir() else s) for s in sources]])


def _folder_name(folder: Path, digest: str) -> str:
    """The name of an imported model's folder; it covers the path of ``folder``, as the model refers to files there."""
    return hash_json([str(folder), digest])[:16]


def _move(source: Path, target: Path, description: Mapping[str, Any], *, referenced: Path) -> None:
    """Moves ``source`` to ``target``, unless another process did.

    Paths below ``referenced`` in ``description`` become paths below ``target``.
    """

    def relocated(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: relocated(item) for key, item in value.items()}
        is_below = isinstance(value, str) and value.startswith(f"{referenced}{os.sep}")
        return str(target / Path(value).relative_to(referenced)) if is_below else value

    write_json(source / DESCRIPTION, relocated(description))
    try:
        source.rename(target)
    except OSError:
        if not (target / DESCRIPTION).is_file():
            raise


def _complete(imported: Path, folder: Path, recipe: Recipe | None) -> Path:
    """``imported`` if its description is complete, else a copy with the missing values from ``recipe``.

    A missing template doesn't require a recipe.
    """
    description = read_description(imported)
    missing = [key for key, value in description.items() if value is None and key != "fingerprint"]
    if not missing:
        return imported
    if recipe is None and missing != ["template"]:
        names = " and ".join(key for key in REQUIRED_KEYS if key in missing)
        raise ModelError(
            f"{folder}: a connector without information about its {names}",
            hint="pass a recipe with the keys `vision` and `language`: `-r recipe.yaml`",
        )
    values = {"template": TEMPLATE} if recipe is None else _recipe_values(recipe)
    if recipe is None:
        log.warning("%s doesn't specify a conversation template: using %s", folder, TEMPLATE)
    completed = {**description, **{key: values[key] for key in missing}}
    digest = hash_json([description["digest"], content_of({key: values[key] for key in missing})])
    copy = imported.with_name(hash_json([str(imported), completed, digest])[:16])
    if not (copy / DESCRIPTION).is_file():
        with tempfile.TemporaryDirectory(prefix=".", dir=imported.parent) as temporary:
            source = Path(shutil.copytree(imported, Path(temporary, "model")))
            _move(source, copy, {**completed, "digest": digest}, referenced=imported)
    return copy


def _recipe_values(recipe: Recipe) -> dict[str, Any]:
    """The values of ``llavactl.json`` that a recipe determines."""
    last = recipe.stages()[-1]
    vision = registry().create("vision", recipe.vision.spec())
    shape = vision.shape() if isinstance(vision, ShapedVision) else vision.load("cpu", recipe.features.compute).shape
    return {
        "vision": recipe.vision.spec(),
        "shape": {"grid": list(shape.grid), "width": shape.width, "prefix": shape.prefix},
        "language": recipe.language.spec(),
        "template": last.template,
        "precision": last.settings.precision,
    }
