"""llavactl's own model folder as the formats need it: read whole, or written around a foreign checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.templates.tokenizer import TokenizerTemplate
from llavactl.core.errors import ModelError
from llavactl.core.identity import with_moved_paths
from llavactl.core.library_errors import loading, reading
from llavactl.core.model_files import check_files
from llavactl.core.paths import read_json, write_json
from llavactl.core.protocols import SkeletonLanguage
from llavactl.core.registry import registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

DESCRIPTION = "llavactl.json"
TOKENIZERS = "tokenizer"
"""The name of the template that uses the tokenizer's own chat template."""

CONNECTORS = {"linear": 1, "mlp2x-gelu": 2}
"""The connectors that other programs know, by their linear layers."""

KEPT = ("template", "image_order", "precision", "features", "stage")
"""Keys of ``llavactl.json`` that the layouts lack: an export stores them separately, and reading restores them."""


ATTENTION = "attention"
"""An option of the language model that the layouts lack as well."""


def refuse_connector(spec: Mapping[str, Any]) -> None:
    """Raises ModelError for a connector that other programs don't have."""
    extra = [key for key, plain in (("pixel_shuffle", 1), ("norm", False)) if spec.get(key, plain) != plain]
    if spec["name"] not in CONNECTORS or extra:
        options = f" with {' and '.join(f'{key}: {spec[key]}' for key in extra)}" if extra else ""
        raise ModelError(
            f"other programs have no connector {spec['name']}{options}",
            hint="train with connector linear or mlp2x-gelu, without pixel_shuffle and norm, to export to them",
        )


def exportable_backbone(vision: Mapping[str, Any]) -> Any:
    """The backbone of the spec ``vision``. Raises ModelError if it can't be exported."""
    backbone = registry().create("vision", vision)
    if not hasattr(backbone, "whole"):
        raise ModelError(
            f"vision backbone {vision['name']} can't be exported: it has no `whole`",
            hint="a backbone of transformers has one; see docs/plugins.md, vision",
        )
    return backbone


@dataclass(frozen=True)
class NativeModel:
    """The model in ``folder``."""

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
        """The connector's weights by LLaVA's names: ``weight``, ``bias``; with two layers ``0.weight`` … ``2.bias``.

        Raises:
            ModelError: it is a connector that other programs don't have.
        """
        from safetensors.torch import load_file

        refuse_connector(self.description["connector"])
        with reading(file := self.folder / "connector.safetensors"):
            return load_file(file)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        found: PreTrainedTokenizerBase = registry().create("languages", self._language).tokenizer()
        return found

    def exported_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; if the model uses its chat template, with arguments and date fixed as in training."""
        tokenizer, template = self.tokenizer(), registry().create("templates", self.description["template"])
        if isinstance(template, TokenizerTemplate):
            tokenizer.chat_template = template.exported(tokenizer)
        return tokenizer

    def kept(self) -> dict[str, Any]:
        """What an export stores separately, for ``restored``; its chat template has arguments and date in its text."""
        template = registry().create("templates", self.description["template"])
        own = {"template": TOKENIZERS} if isinstance(template, TokenizerTemplate) else {}
        return {**{key: self.description[key] for key in KEPT}, **own, ATTENTION: self._language.get(ATTENTION)}

    def language_config(self) -> PreTrainedConfig:
        """The language model's configuration; weights are read only if the component is no ``SkeletonLanguage``."""
        language = registry().create("languages", self._language)
        described = language.skeleton() if isinstance(language, SkeletonLanguage) else self.base()
        found: PreTrainedConfig = described.config
        return found

    def base(self) -> PreTrainedModel:
        """The language model below the adapter, where there is one, in the precision it was trained in."""
        found: PreTrainedModel = registry().create("languages", self._language).load(self.description["precision"])
        found.config.use_cache = True  # training turns it off; generation would be slow without it
        return found

    def language(self) -> PreTrainedModel:
        """The language model with its adapter merged into it.

        Merged in float32: in bfloat16 an update much smaller than the weight it is added to would be lost.
        """
        base = self.base()
        if self.method != "lora":
            return base
        import torch
        from peft import PeftModel

        dtype = base.dtype
        with loading("adapter", self.adapter):
            whole = PeftModel.from_pretrained(base.to(torch.float32), self.adapter, autocast_adapter_dtype=False)
        merged: PreTrainedModel = whole.merge_and_unload().to(dtype)
        return merged

    @property
    def _language(self) -> Mapping[str, Any]:
        if self.method != "full":
            spec: Mapping[str, Any] = self.description["language"]
            return spec
        own = self.description.get("trained_language", {"name": "hf"})
        return {**own, "model": str((self.folder / "language").absolute())}


def adopt(
    model: Path,
    projection: Mapping[str, torch.Tensor],
    description: Mapping[str, Any],
    *,
    sources: Sequence[str | None] = (),
) -> None:
    """Writes the model folder ``model`` for another program's checkpoint.

    ``description`` has the keys of ``llavactl.json`` that are not common to all such models. ``sources`` are the models
    outside the checkpoint, ids or folders, that it depends on: if they change, the model does.
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


def restored(description: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The ``description`` of a checkpoint with what llavactl's export stored separately, ``own``."""
    found = {**description, **{key: own[key] for key in KEPT if key in own}}
    if own.get(ATTENTION) and found["language"]:
        found["language"] = {**found["language"], ATTENTION: own[ATTENTION]}
    return found


def shape_of(vision: Mapping[str, Any]) -> dict[str, Any]:
    """What the backbone gives for an image, as ``llavactl.json`` has it; no weights are read."""
    shape = registry().create("vision", vision).shape()
    return {"grid": list(shape.grid), "width": shape.width, "prefix": shape.prefix}


def connector_of(projection: Mapping[str, torch.Tensor], where: Path) -> dict[str, Any]:
    """The connector that weights of LLaVA's names belong to.

    Raises:
        ModelError: none of ours.
    """
    names = frozenset(projection)
    if names == {"weight", "bias"}:
        return {"name": "linear"}
    if names == {"0.weight", "0.bias", "2.weight", "2.bias"}:
        return {"name": "mlp2x-gelu"}
    raise ModelError(
        f"{where}: a connector of {', '.join(sorted(names)) or 'no weights at all'}",
        hint="llavactl reads linear and mlp2x_gelu projectors",
    )
