"""llavactl's own model folder: reading its parts for an export, and writing one for another program's checkpoint.

``open_model`` and ``save_model`` are all that a format needs; no other module of formats reads or writes the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llavactl.components.templates.stop_criteria import stop_criteria
from llavactl.core.errors import ModelError
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_description import (
    ADAPTER,
    CONNECTOR,
    DESCRIPTION,
    FORMAT,
    ModelDescription,
    feature_shape,
    language_spec,
    read_description,
    shape_entry,
)
from llavactl.core.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from llavactl.core.paths import write_json
from llavactl.core.protocols import ExportableTemplate, ExportableVision, ShapedVision, SkeletonLanguage
from llavactl.core.protocols.members import missing_members
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape
from llavactl.core.typed import Typed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llavactl.core.protocols import Template
    from llavactl.core.schema import Turn

TOKENIZER_TEMPLATE = "tokenizer"
"""The name of the template that uses the tokenizer's own chat template."""

SETTINGS = ("template", "image_order", "precision", "features", "stage")
"""Keys of ``llavactl.json`` that other formats lack: an export stores them separately, and reading restores them."""

ATTENTION = "attention"
"""An option of the language model that other formats lack as well."""


def exportable_vision(spec: Mapping[str, Any]) -> ExportableVision:
    """The vision backbone ``spec``. Raises ModelError if it can't be exported."""
    backbone = registry().create("vision", spec)
    if not isinstance(backbone, ExportableVision):
        missing = ", ".join(missing_members(backbone, ExportableVision))
        raise ModelError(
            f"vision backbone {spec['name']} can't be exported: it isn't an ExportableVision (no {missing})",
            hint="see docs/reference/plugins.md#vision; backbones of transformers can be exported",
        )
    return backbone


@dataclass(frozen=True)
class SavedModel(Typed):
    """The model in llavactl's model folder ``folder``, as ``open_model`` returns it. Its parts are read on demand."""

    folder: Path

    @cached_property
    def description(self) -> ModelDescription:
        """The contents of ``llavactl.json``, with current paths if the project was moved."""
        return read_description(self.folder)

    @property
    def shape(self) -> FeatureShape:
        """The shape of the vision features of an image."""
        return feature_shape(self.description)

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter of a model trained with LoRA, as peft saves it."""
        return self.folder / ADAPTER if self.description["method"] == "lora" else None

    def vision(self) -> ExportableVision:
        """The vision backbone. Raises ModelError if it can't be exported."""
        return exportable_vision(self.description["vision"])

    def connector_weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the connector, in full precision.

        Those of the connectors ``linear`` and ``mlp2x-gelu`` have LLaVA's names: ``weight`` and ``bias``, or
        ``0.weight`` … ``2.bias``.
        """
        from safetensors.torch import load_file

        with reading(file := self.folder / CONNECTOR):
            return load_file(file)

    def template(self) -> Template:
        """The conversation template."""
        return registry().create("templates", self.description["template"])

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the language model."""
        return registry().create("languages", self.language_spec).tokenizer()

    def exported_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; if the model uses its chat template, with its arguments and date fixed as in training."""
        tokenizer, template = self.tokenizer(), self.template()
        if isinstance(template, ExportableTemplate):
            tokenizer.chat_template = template.exported_chat_template(tokenizer)
        return tokenizer

    def chat_template(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        image: str = "<image>",
        separator: Callable[[str], str] = lambda _: "",
    ) -> str:
        """A Jinja chat template that renders conversations as in training, with ``image`` for an image.

        ``separator`` returns the text to insert between an image and the given text after it.

        Raises:
            ModelError: no chat template is equivalent to the conversation template.
        """
        from llavactl.components.formats.chat_template import chat_template

        return chat_template(self.template(), tokenizer, image=image, separator=separator)

    def prompt(self, turns: Sequence[Turn], *, image: str = "<image>") -> str:
        """The text that the template renders for ``turns``, which end with the user's, with ``image`` for an image."""
        from llavactl.components.formats.chat_template import render_text

        return render_text(self.template(), self.tokenizer(), turns, True, image)

    def stop_criteria(self, tokenizer: PreTrainedTokenizerBase) -> tuple[frozenset[int], tuple[str, ...]]:
        """The token ids that end an answer, and the stop strings that aren't a single token."""
        return stop_criteria(self.template(), tokenizer)

    def language_config(self) -> PreTrainedConfig:
        """The language model's configuration; weights are read only if the component is no ``SkeletonLanguage``."""
        language = registry().create("languages", self.language_spec)
        model = language.skeleton() if isinstance(language, SkeletonLanguage) else self.language(merged=False)
        config: PreTrainedConfig = model.config
        return config

    def language(self, *, merged: bool = True) -> PreTrainedModel:
        """The language model on the CPU, in the precision of its training; an adapter is ``merged``, or else left out.

        Adapters are merged in float32: in bfloat16, updates that are much smaller than their weights would be lost.
        """
        base = registry().create("languages", self.language_spec).load(self.description["precision"])
        base.config.use_cache = True  # training turns it off; generation would be slow without it
        if self.adapter is None or not merged:
            return base
        import torch
        from peft import PeftModel

        dtype = base.dtype
        with loading("adapter", self.adapter):
            adapted = PeftModel.from_pretrained(base.to(torch.float32), self.adapter, autocast_adapter_dtype=False)
        merged_model: PreTrainedModel = adapted.merge_and_unload().to(dtype)
        return merged_model

    def settings(self) -> dict[str, Any]:
        """Settings that other formats lack, as JSON: an export stores them, and ``save_model`` restores them.

        The arguments and the date of an ``ExportableTemplate`` are left out, because its exported chat template has
        them in its text.
        """
        values: Mapping[str, Any] = self.description
        plain = {"template": TOKENIZER_TEMPLATE} if isinstance(self.template(), ExportableTemplate) else {}
        return {**{key: values[key] for key in SETTINGS}, **plain, ATTENTION: self.language_spec.get(ATTENTION)}

    @property
    def language_spec(self) -> dict[str, Any]:
        """The component ``{"name", options}`` of the language model, without its adapter."""
        return language_spec(self.folder, self.description)


def open_model(folder: str | Path) -> SavedModel:
    """The model in llavactl's model folder ``folder``, for a ``Format`` to write.

    Raises:
        ModelError: it isn't a model folder.
    """
    model = SavedModel(Path(folder))
    read_description(model.folder)
    return model


def save_model(
    folder: str | Path,
    connector_weights: Mapping[str, torch.Tensor],
    *,
    connector: Mapping[str, Any],
    language: Mapping[str, Any] | None,
    vision: Mapping[str, Any] | None = None,
    template: str | Mapping[str, Any] | None = None,
    precision: str | None = None,
    adapter: Path | None = None,
    settings: Mapping[str, Any] | None = None,
    sources: Sequence[str] = (),
) -> None:
    """Writes llavactl's model folder ``folder`` for a checkpoint that a ``Format`` reads.

    A component is ``{"name": …, its options}``; weights that it refers to stay where they are. A recipe supplies the
    components and values that are None. The format may keep files of its own in ``folder``, such as a fine-tuned
    vision backbone, in a subfolder with another name than ``language`` and ``adapter``.

    Args:
        connector_weights: the state dict of the connector.
        adapter: a folder with a LoRA adapter of the language model, as peft saves it; it is copied.
        settings: what ``SavedModel.settings`` returned when the checkpoint was exported.
        sources: ids and folders outside the checkpoint that the model depends on; if their contents change, the
            checkpoint is converted again.

    Raises:
        ModelError: the shape of the vision features can't be determined, or the adapter has no weights.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    method: Literal["connector", "lora"] = "connector" if adapter is None else "lora"
    description = {
        "format": FORMAT,
        "stage": 2,
        "method": method,
        "vision": vision,
        "shape": None if vision is None else shape_entry(_vision_shape(vision)),
        "connector": connector,
        "language": language,
        "template": template,
        "precision": precision,
        "features": {"dtype": "float16", "compute": "float32"},
        "fingerprint": None,
        "image_order": "first",
        "versions": {},
        "sources": sorted(set(sources)),
    }
    weights = {name: weight.contiguous().clone() for name, weight in connector_weights.items()}
    save_file(weights, folder / CONNECTOR)
    if adapter is not None:
        _copy_adapter(adapter, folder / ADAPTER)
    write_json(folder / DESCRIPTION, _with_settings(description, settings or {}))


def _vision_shape(spec: Mapping[str, Any]) -> FeatureShape:
    """The shape of the features; weights are read only if the backbone is no ``ShapedVision``."""
    backbone = registry().create("vision", spec)
    return backbone.shape() if isinstance(backbone, ShapedVision) else backbone.load("cpu", "float32").shape


def adapter_weights(folder: Path) -> Path:
    """The weight file of the adapter in ``folder``. Raises ModelError if there is none."""
    file = next((folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise ModelError(f"{folder}: the adapter has no weights", hint=f"expected {' or '.join(ADAPTER_WEIGHTS)}")
    return file


def _copy_adapter(folder: Path, to: Path) -> None:
    to.mkdir(exist_ok=True)
    for source in (folder / ADAPTER_CONFIG, adapter_weights(folder)):
        shutil.copyfile(source, to / source.name)


def _with_settings(description: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``description`` of a checkpoint with the ``settings`` of llavactl's export."""
    restored = {**description, **{key: settings[key] for key in SETTINGS if key in settings}}
    if settings.get(ATTENTION) and restored["language"]:
        restored["language"] = {**restored["language"], ATTENTION: settings[ATTENTION]}
    return restored
