"""Recognizes the models of a new recipe from the files of their folders, or from their ids."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import LlavactlError, ModelError
from llavactl.core.model_files import local_folder
from llavactl.core.paths import expand_user
from llavactl.core.protocols import ShapedVision, SkeletonLanguage
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape
from llavactl.verbs.preflight import PROBE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO_MODELS = ("dinov2-demo", "smollm2-demo")
"""Components of the demo plugin: small enough for a CPU."""

HUB_MODELS = ("openai/clip-vit-large-patch14-336", "lmsys/vicuna-7b-v1.5")
"""The models of LLaVA v1.5 7B."""

_PATCHES = re.compile(r"patch(\d+)(?:-(\d+))?$")
_LLAVA_PATCHES = 576
_VICUNA_WIDTH = 4096


_GENERIC = {"clip", "hf"}
"""Components that load any model by folder or id."""


@dataclass(frozen=True)
class VisionChoice:
    """A vision encoder; ``shape`` is that of its features, None if its files aren't on this machine."""

    spec: Mapping[str, Any]
    shape: FeatureShape | None
    tokens: int
    """Tokens per image, guessed from the name without ``shape``."""


@dataclass(frozen=True)
class LanguageChoice:
    """A language model, and its conversation template with a reason; ``here``: its files are on this machine."""

    spec: Mapping[str, Any]
    here: bool
    template: str
    why: str
    width: int = _VICUNA_WIDTH
    positions: int | None = None
    """The longest sequence, if limited."""


def default_models(*, cuda: bool) -> tuple[str, str]:
    """The vision encoder and the language model that are used if none is named."""
    installed = DEMO_MODELS[0] in registry().names("vision") and DEMO_MODELS[1] in registry().names("languages")
    return DEMO_MODELS if installed and not cuda else HUB_MODELS


def vision_choice(model: str) -> VisionChoice:
    """The vision encoder ``model``: a folder, an id or a registered name.

    Raises:
        ModelError: the folder is not that of a vision encoder.
    """
    spec: dict[str, Any] = _registered("vision", model) or {
        "name": "clip",
        "model": _folder_or_id(model),
        "layer": -2,
        "select": "patch",
        "image": "pad",
    }
    if not _is_here(spec):
        match = _PATCHES.search(model)
        side = int(match[2] or 224) // int(match[1]) if match else 0
        return VisionChoice(spec, None, side**2 or _LLAVA_PATCHES)
    vision = registry().create("vision", spec)
    shape = vision.shape() if isinstance(vision, ShapedVision) else None
    return VisionChoice(spec, shape, shape.patches if shape else _LLAVA_PATCHES)


def language_choice(model: str) -> LanguageChoice:
    """The language model ``model``: a folder, an id or a registered name.

    Raises:
        ModelError: the folder is not that of a language model.
    """
    spec: dict[str, Any] = _registered("languages", model) or {"name": "hf", "model": _folder_or_id(model)}
    if not _is_here(spec):
        chat = re.search(r"(?i)instruct|chat|[-_]it\b", model)
        template = "tokenizer" if chat and "vicuna" not in model.lower() else "vicuna-v1"
        return LanguageChoice(spec, False, template, "guessed from its name")
    language = registry().create("languages", spec)
    template, why = _template(model, language.tokenizer())
    if not isinstance(language, SkeletonLanguage):
        return LanguageChoice(spec, True, template, why)
    skeleton = language.skeleton()
    positions = getattr(skeleton.config, "max_position_embeddings", None)
    return LanguageChoice(spec, True, template, why, skeleton.get_input_embeddings().weight.shape[1], positions)


def _registered(kind: str, name: str) -> dict[str, Any] | None:
    """The spec of the component ``name`` of a plugin; None if it isn't one.

    Raises:
        ModelError: it is a component of the other kind.
    """
    own = [each for each in registry().names(kind) if each not in _GENERIC]
    other = "languages" if kind == "vision" else "vision"
    if name in own:
        return {"name": name}
    if name in set(registry().names(other)) - _GENERIC:
        what = {"vision": "a vision encoder", "languages": "a language model"}
        available = f"available: {', '.join(own)}; " if own else ""
        raise ModelError(
            f"{name} is {what[other]}, expected {what[kind]}", hint=f"{available}a folder, or an id of the hub"
        )
    return None


def _folder_or_id(model: str) -> str:
    """The absolute path of a folder, or an id."""
    path = expand_user(model)
    if path.is_dir() or path.is_absolute() or model.startswith((".", "~")):
        if not path.is_dir():
            raise ModelError(f"model {model}: no such folder", hint="name a folder, or an id such as org/name")
        return str(path.absolute())
    return model


def _is_here(spec: Mapping[str, Any]) -> bool:
    """Whether the files of the model are on this machine; those of a plugin's component are."""
    return "model" not in spec or Path(spec["model"]).is_absolute() or local_folder(spec["model"]) is not None


def _template(model: str, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """The conversation template for a model with this ``tokenizer``, and why."""
    if "vicuna" in f"{model} {tokenizer.name_or_path}".lower():
        return "vicuna-v1", "the format that Vicuna was tuned with"
    if not tokenizer.chat_template:
        return "vicuna-v1", "as in LLaVA: the tokenizer has no chat template, so this is not a chat model"
    try:
        registry().create("templates", "tokenizer").render(PROBE, tokenizer)
    except LlavactlError as error:
        return "vicuna-v1", f"the tokenizer's chat template can't be used: {error.message}"
    return "tokenizer", "the tokenizer's own chat template, which the model was tuned with"
