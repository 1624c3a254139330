"""The model folder, llavactl's format for trained models, and its description ``llavactl.json``.

model/
  llavactl.json            the description, see ``ModelDescription``
  connector.safetensors    the connector
  language/                the language model and its tokenizer, after full fine-tuning in stage 2
  adapter/                 the PEFT adapter, after stage 2 with LoRA
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, cast

from llavactl.core import plugins
from llavactl.core.errors import ModelError
from llavactl.core.identity import with_moved_paths
from llavactl.core.model_files import check_files
from llavactl.core.paths import read_json
from llavactl.core.registry import OF_PLUGIN, Spec, component_name, kind_label, registry
from llavactl.core.schema import FeatureShape

DESCRIPTION = "llavactl.json"
CONNECTOR = "connector.safetensors"
LANGUAGE = "language"
ADAPTER = "adapter"

FORMAT = 1
"""The version of the layout; a reader refuses any other."""


class _OptionalKeys(TypedDict, total=False):
    location: Annotated[str, "the path where the folder was written, to find files that were moved with it"]
    trained_language: Annotated[dict[str, Any], "with `method: full`: the component that loads `language/`"]
    quantised: Annotated[str | None, "`nf4` if the language model was trained in 4 bits (QLoRA)"]
    digest: Annotated[str, "a hash of everything that the training, or the imported checkpoint, depends on"]
    sources: Annotated[list[str], "what a checkpoint depends on besides its folder; removed when it is imported"]
    plugins: Annotated[
        dict[str, dict[str, str]],
        "the plugins of its components, by kind: `plugin`, its `package` or file, `version`; not llavactl's own",
    ]
    restore_best: Annotated[bool, "whether the weights are those of the best checkpoint, not of the last one"]


class ModelDescription(_OptionalKeys):
    """The contents of ``llavactl.json``.

    A component is ``{"name": …, its options}`` with absolute paths. Readers ignore unknown keys. Values that
    ``save_model`` was not given are null until the model is first used: a recipe supplies them.
    """

    format: Annotated[int, "version of the layout, 1; a reader refuses any other"]
    stage: Annotated[int, "the last training stage, 1 or 2"]
    method: Annotated[
        Literal["connector", "full", "lora"],
        "what was trained: the connector only, all weights (in `language/`), or an adapter as well (in `adapter/`)",
    ]
    vision: Annotated[dict[str, Any], "the vision backbone, a component"]
    shape: Annotated[dict[str, Any], "`FeatureShape` of its features: `grid` [h, w], `width`, `prefix`"]
    connector: Annotated[dict[str, Any], "the connector, a component; its state dict is `connector.safetensors`"]
    language: Annotated[dict[str, Any], "the language model that training started from, a component"]
    template: Annotated[str | dict[str, Any], "the conversation template, a name or a component"]
    image_order: Annotated[Literal["first", "random", "as-data"], "`image_order` of the stage"]
    precision: Annotated[str, "dtype of the language model: `float32`, `bfloat16` or `float16`"]
    features: Annotated[dict[str, Any], "`dtype` and `compute` of `features` in the recipe"]
    fingerprint: Annotated[dict[str, Any] | None, "the fingerprint of the features; null for an imported checkpoint"]
    versions: Annotated[dict[str, str], "versions of llavactl, torch and transformers"]


def read_description(folder: Path) -> ModelDescription:
    """The description of the model in ``folder``; if the model was moved, with paths to files moved with it updated.

    Raises:
        ModelError: it is missing or incomplete, or was written by a newer version of llavactl.
    """
    path = folder / DESCRIPTION
    if not path.exists():
        candidates = sorted(str(p.parent) for p in folder.glob(f"**/{DESCRIPTION}")) if folder.is_dir() else []
        hint = (
            f"did you mean {candidates[-1]}?"
            if candidates
            else "expected a run folder, a model/ folder, a checkpoint of another program, or a Hugging Face id"
        )
        reason = f"not a model folder (no {DESCRIPTION})" if folder.is_dir() else "no such folder"
        raise ModelError(f"{folder}: {reason}", hint=hint)
    check_files([path])
    description = read_json(path)
    if description.get("format") != FORMAT:
        raise ModelError(
            f"{path}: unsupported format {description.get('format')}, expected {FORMAT}", hint="update llavactl"
        )
    if missing := sorted(ModelDescription.__required_keys__ - description.keys()):
        raise ModelError(f"{path}: no {', '.join(missing)}", hint="copy the complete model folder, or train again")
    described = cast("ModelDescription", with_moved_paths(description, folder))
    for key in ("vision", "connector", "language"):
        if description[key] is not None:  # a checkpoint of another program may lack it; a recipe then provides it
            require_component(folder, described, key)
    return described


KINDS = {"vision": "vision", "connector": "connectors", "language": "languages", "template": "templates"}
"""The kinds of the components in a description, by key."""


def require_component(folder: Path, description: Mapping[str, Any], key: str) -> None:
    """Checks that the component ``key`` of the model in ``folder`` is registered.

    Raises:
        ModelError: it isn't; the hint names the plugin that it is from, if it is known.
    """
    spec = language_spec(folder, description) if key == "language" else description[key]
    name, kind = component_name(spec), KINDS[key]
    if name in registry().names(kind):
        return
    hint = OF_PLUGIN
    if origin := description.get("plugins", {}).get(kind):
        what, package = "{plugin} {version}".format_map(origin), origin["package"]
        is_file = package.endswith(".py")
        hint = f"it is from plugin {what}: " + (f"pass --plugin {package}" if is_file else f"install {package}")
    raise ModelError(f"{folder / DESCRIPTION}: unknown {kind_label(kind)} {name!r}", hint=hint)


def component_plugins(components: Mapping[str, Spec]) -> dict[str, dict[str, str]]:
    """``plugins`` of a description with these ``components``, by key."""
    entries = (registry().get(KINDS[key], component_name(spec)) for key, spec in components.items())
    return {
        entry.kind: {"plugin": entry.plugin, "package": package, "version": version}
        for entry in entries
        if entry.plugin != plugins.BUILTIN
        for package, version in [plugins.package_named(entry.plugin)]
    }


def feature_shape(description: Mapping[str, Any]) -> FeatureShape:
    """``shape`` of ``description``."""
    return FeatureShape(**{**description["shape"], "grid": tuple(description["shape"]["grid"])})


def shape_entry(shape: FeatureShape) -> dict[str, Any]:
    """``shape`` as in a description; the inverse of ``feature_shape``."""
    return {"grid": list(shape.grid), "width": shape.width, "prefix": shape.prefix}


def language_spec(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """The spec ``{"name", options}`` of the language model of the model in ``folder``, without its adapter."""
    if description["method"] != "full":
        return dict(description["language"])
    return {**description.get("trained_language", {"name": "hf"}), "model": str((folder / LANGUAGE).absolute())}
