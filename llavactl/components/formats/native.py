"""llavactl's own model folder: reading its parts for an export, and writing one for another program's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.identity import with_moved_paths
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_files import check_files
from llavactl.core.paths import read_json, write_json
from llavactl.core.protocols import ExportableTemplate, ExportableVision, SkeletonLanguage
from llavactl.core.protocols.members import missing_members
from llavactl.core.registry import registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = "llavactl.json"
TOKENIZER_TEMPLATE = "tokenizer"
"""The name of the template that uses the tokenizer's own chat template."""

LINEAR_LAYERS = {"linear": 1, "mlp2x-gelu": 2}
"""The connectors that other programs support, with their number of linear layers."""

SETTINGS = ("template", "image_order", "precision", "features", "stage")
"""Keys of ``llavactl.json`` that other formats lack: an export stores them separately, and reading restores them."""

ATTENTION = "attention"
"""An option of the language model that other formats lack as well."""


def refuse_connector(spec: Mapping[str, Any]) -> None:
    """Raises ModelError for a connector that other programs don't support."""
    extra = [key for key, plain in (("pixel_shuffle", 1), ("norm", False)) if spec.get(key, plain) != plain]
    if spec["name"] not in LINEAR_LAYERS or extra:
        options = f" with {' and '.join(f'{key}: {spec[key]}' for key in extra)}" if extra else ""
        raise ModelError(
            f"connector {spec['name']}{options} can't be exported: other programs don't support it",
            hint="train with connector linear or mlp2x-gelu, without pixel_shuffle and norm, to export the model",
        )


def exportable_backbone(vision: Mapping[str, Any]) -> ExportableVision:
    """The backbone of the spec ``vision``. Raises ModelError if it can't be exported."""
    backbone = registry().create("vision", vision)
    if not isinstance(backbone, ExportableVision):
        missing = ", ".join(missing_members(backbone, ExportableVision))
        raise ModelError(
            f"vision backbone {vision['name']} can't be exported: it isn't an ExportableVision (no {missing})",
            hint="see docs/reference/plugins.md#vision; backbones of transformers can be exported",
        )
    return backbone


@dataclass(frozen=True)
class NativeModel:
    """The model in the model folder ``folder``."""

    folder: Path

    @cached_property
    def description(self) -> Mapping[str, Any]:
        check_files([self.folder / DESCRIPTION])
        return with_moved_paths(read_json(self.folder / DESCRIPTION), self.folder)

    @property
    def method(self) -> str:
        return str(self.description["method"])

    @property
    def adapter(self) -> Path:
        return self.folder / "adapter"

    def projection(self) -> dict[str, torch.Tensor]:
        """The connector's weights under LLaVA's names: ``weight``, ``bias``; with two layers ``0.weight`` … ``2.bias``.

        Raises:
            ModelError: other programs don't support the connector.
        """
        from safetensors.torch import load_file

        refuse_connector(self.description["connector"])
        with reading(file := self.folder / "connector.safetensors"):
            return load_file(file)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = registry().create("languages", self._language).tokenizer()
        return tokenizer

    def exported_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; if the model uses its chat template, with its arguments and date fixed as in training."""
        tokenizer, template = self.tokenizer(), registry().create("templates", self.description["template"])
        if isinstance(template, ExportableTemplate):
            tokenizer.chat_template = template.exported_chat_template(tokenizer)
        return tokenizer

    def stored_settings(self) -> dict[str, Any]:
        """The settings that an export stores separately, for ``restore_settings``.

        The template's arguments and date are left out, because an exported chat template has them in its text.
        """
        template = registry().create("templates", self.description["template"])
        plain = {"template": TOKENIZER_TEMPLATE} if isinstance(template, ExportableTemplate) else {}
        return {**{key: self.description[key] for key in SETTINGS}, **plain, ATTENTION: self._language.get(ATTENTION)}

    def language_config(self) -> PreTrainedConfig:
        """The language model's configuration; weights are read only if the component is no ``SkeletonLanguage``."""
        language = registry().create("languages", self._language)
        model = language.skeleton() if isinstance(language, SkeletonLanguage) else self.base()
        config: PreTrainedConfig = model.config
        return config

    def base(self) -> PreTrainedModel:
        """The language model without its adapter, in the precision it was trained in."""
        model: PreTrainedModel = registry().create("languages", self._language).load(self.description["precision"])
        model.config.use_cache = True  # training turns it off; generation would be slow without it
        return model

    def language(self) -> PreTrainedModel:
        """The language model with its adapter merged.

        Merged in float32: in bfloat16, updates much smaller than the weights they are added to would be lost.
        """
        base = self.base()
        if self.method != "lora":
            return base
        import torch
        from peft import PeftModel

        dtype = base.dtype
        with loading("adapter", self.adapter):
            adapted = PeftModel.from_pretrained(base.to(torch.float32), self.adapter, autocast_adapter_dtype=False)
        merged: PreTrainedModel = adapted.merge_and_unload().to(dtype)
        return merged

    @property
    def _language(self) -> Mapping[str, Any]:
        if self.method != "full":
            spec: Mapping[str, Any] = self.description["language"]
            return spec
        own = self.description.get("trained_language", {"name": "hf"})
        return {**own, "model": str((self.folder / "language").absolute())}


def write_model_folder(
    model: Path,
    projection: Mapping[str, torch.Tensor],
    description: Mapping[str, Any],
    *,
    sources: Sequence[str | None] = (),
) -> None:
    """Writes the model folder ``model`` for another program's checkpoint.

    ``description`` has the keys of ``llavactl.json`` that are not common to all such models. ``sources`` are models
    outside the checkpoint (ids or folders) that it depends on: if their contents change, it is converted again.
    """
    from safetensors.torch import save_file

    model.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous().clone() for name, weight in projection.items()}
    save_file(weights, model / "connector.safetensors")
    defaults = {
        "format": 1,
        "stage": 2,
        "method": "connector",
        "features": {"dtype": "float16", "compute": "float32"},
        "fingerprint": None,
        "image_order": "first",
        "versions": {},
        "sources": sorted({source for source in sources if source}),
    }
    write_json(model / DESCRIPTION, {**defaults, **description})


def restore_settings(description: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``description`` of a checkpoint with the ``stored_settings`` of llavactl's export."""
    restored = {**description, **{key: settings[key] for key in SETTINGS if key in settings}}
    if settings.get(ATTENTION) and restored["language"]:
        restored["language"] = {**restored["language"], ATTENTION: settings[ATTENTION]}
    return restored


def shape_entry(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The shape of a backbone's features as an entry of ``llavactl.json``; no weights are read."""
    shape = exportable_backbone(vision).shape()
    return {"grid": list(shape.grid), "width": shape.width, "prefix": shape.prefix}


def connector_spec(projection: Mapping[str, torch.Tensor], where: Path) -> dict[str, Any]:
    """The connector with these weights, named as in LLaVA.

    Raises:
        ModelError: llavactl has no connector with such weights.
    """
    names = frozenset(projection)
    if names == {"weight", "bias"}:
        return {"name": "linear"}
    if names == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return {"name": "mlp2x-gelu"}
    raise ModelError(
        f"{where}: unsupported connector with tensors {', '.join(sorted(names))}",
        hint="llavactl reads linear and mlp2x_gelu projectors",
    )
