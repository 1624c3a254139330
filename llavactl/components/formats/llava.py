"""The original LLaVA's checkpoints: full, LoRA with its ``non_lora_trainables.bin``, or a bare ``mm_projector.bin``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.generation import generation_config
from llavactl.components.formats.llava_read import OWN, PROJECTOR_FILE, read_llava
from llavactl.components.formats.llava_support import loads_tower, older_config, uses_fast_tokenizer
from llavactl.components.formats.llava_tokenizer import loads_tokenizer, older_files, save_tokenizer
from llavactl.components.formats.native import CONNECTORS, NativeModel, exportable_backbone, refuse_connector
from llavactl.components.formats.supported_keys import BASE_KEYS, foreign_keys
from llavactl.components.languages.image_token import image_token
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import Options, registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

TOWER = "vision_tower"
SHARD = "5GB"


class OriginalLlavaOptions(Options):
    """``strict``: refuse models that LLaVA's own programs can't load, and write the older files that they need."""

    strict: bool = True


class OriginalLlava:
    """The layout ``llava``."""

    reload = Path(__file__).with_name("llava_outputs.py")

    def __init__(self, options: OriginalLlavaOptions) -> None:
        self.options = options

    def recognise(self, folder: Path) -> bool:
        return "mm_vision_tower" in read_json(folder / "config.json") or (folder / PROJECTOR_FILE).is_file()

    def read(self, folder: Path, model: Path) -> None:
        """Converts the checkpoint in ``folder`` to the model folder ``model``."""
        read_llava(folder, model)

    def check(
        self,
        vision: Mapping[str, Any],
        connector: Mapping[str, Any],
        language: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Raises ModelError if it can't hold a model of these components; see ``CheckableFormat``."""
        refuse_connector(connector)
        _refuse_backbone(vision)
        older_config(language.config.to_dict(), strict=self.options.strict)
        _refuse_processor_ids(tokenizer)
        if self.options.strict:
            older_files(tokenizer, fast=uses_fast_tokenizer(language.config.model_type))

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``; a stage 1 model as a bare projector, an adapter merged."""
        native, strict = NativeModel(model), self.options.strict
        projection = {f"model.mm_projector.{name}": each for name, each in native.projection().items()}
        _refuse_backbone(native.description["vision"])
        language = native.language_config().to_dict()
        older, tokenizer = older_config(language, strict=strict), native.exported_tokenizer()
        _refuse_processor_ids(tokenizer)
        if strict:
            save_tokenizer(tokenizer, to, fast=uses_fast_tokenizer(language["model_type"]))
            # LLaVA's load_pretrained_model chooses the class by words in the folder's name.
            words = " and ".join(dict.fromkeys(("llava", language["model_type"].replace("llama", "llava"))))
            log.info("LLaVA's programs load this model only from a folder with %s in its name", words)
        else:
            tokenizer.save_pretrained(to)
        vision = _vision_tower(native, to)
        if native.method == "connector" and native.description["stage"] == 1:
            config = language | _save_projector(native, projection, to)
            if strict and not loads_tokenizer(Path(config["_name_or_path"])):
                hint = "copy the tokenizer files of this export into a copy of it"
                log.warning("LLaVA's programs can't read the tokenizer of %s: %s", config["_name_or_path"], hint)
        else:
            config = _save_whole(native, projection, to)
        write_json(to / "config.json", {**_written(native, config), **older, "mm_vision_tower": vision})


def _save_projector(native: NativeModel, projection: Mapping[str, torch.Tensor], to: Path) -> dict[str, Any]:
    """Saves the connector only; returns the keys of config.json that name its language model."""
    import torch

    torch.save(projection, to / PROJECTOR_FILE)
    return {"_name_or_path": native.description["language"].get("model", native.description["language"]["name"])}


def _save_whole(native: NativeModel, projection: Mapping[str, torch.Tensor], to: Path) -> dict[str, Any]:
    """Saves the language model with the connector; returns its config.json."""
    language = native.language()
    state = language.state_dict() | projection
    if language.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    language.generation_config = generation_config(language, native.tokenizer(), native.description)
    # The language model's own way of saving, so that shards, index and generation settings are as usual.
    language.save_pretrained(to, state_dict=_contiguous(state), max_shard_size=SHARD)
    return read_json(to / "config.json")


def _refuse_backbone(vision: Mapping[str, Any]) -> None:
    """LLaVA's programs support only CLIP backbones and a single vision layer."""
    if not isinstance(vision["layer"], int):
        hint = "use `--format hf`, or train with one layer such as `vision.layer: -2`"
        raise ModelError("layout llava supports a single vision layer", hint=hint)
    backbone = exportable_backbone(vision)
    config = getattr(backbone, "config", {})
    if (kind := config.get("model_type", "not of transformers")) not in ("clip", "clip_vision_model"):
        raise ModelError(
            f"layout llava can't represent vision backbone {vision['name']} ({kind}): LLaVA's programs read only CLIP",
            hint="`--format hf` supports other backbones of transformers",
        )


def _refuse_processor_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if LLaVA's programs, which split the text at images, would encode it differently."""
    token = image_token(tokenizer)
    after = "\nWhat"
    alone, within = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (after, f"{token}{after}"))
    if token is not None and within[1:] != alone:
        raise ModelError(
            "layout llava can't represent this model: its processor encodes the text after an image differently than "
            "LLaVA's programs, which split the text there",
            hint="use `--format hf`",
        )


def _vision_tower(native: NativeModel, to: Path) -> str:
    """``mm_vision_tower``: the encoder's name, or the path of its copy in ``to`` if LLaVA can't load that."""
    vision = native.description["vision"]
    backbone = registry().create("vision", vision)
    name = str(vision.get("model", vision["name"]))
    if not getattr(backbone, "inside", False) and loads_tower(name):
        return name
    tower = backbone.whole()
    tower.__dict__.pop("_weight_conversions", None)  # its own names, not those of the checkpoint
    prefix = "vision_model."  # as in older versions of transformers; newer ones read both
    state = {f"{prefix}{key.removeprefix(prefix)}": each for key, each in tower.state_dict().items()}
    tower.save_pretrained(to / TOWER, state_dict=_contiguous(state))
    backbone.processor.save_pretrained(to / TOWER)
    return str(to.absolute() / TOWER)


def _contiguous(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.contiguous() for name, weight in state.items()}


def _written(native: NativeModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's config.json: the language model's, and what belongs to the image."""
    description = native.description
    vision, (height, width) = description["vision"], description["shape"]["grid"]
    kind = str(config["model_type"])
    return {
        **config,
        "architectures": [f"Llava{_family(kind)}ForCausalLM"],
        "torch_dtype": description["precision"],
        "model_type": kind if kind.startswith("llava_") else f"llava_{kind}",
        "mm_hidden_size": description["shape"]["width"],
        "mm_projector_type": {1: "linear", 2: "mlp2x_gelu"}[CONNECTORS[description["connector"]["name"]]],
        "mm_vision_select_layer": vision["layer"],
        "mm_vision_select_feature": "patch" if vision["select"] == "patch" else "cls_patch",
        "image_aspect_ratio": "pad" if vision["image"] == "pad" else "square",
        "image_grid": [height, width],
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        OWN: {**native.kept(), BASE_KEYS: foreign_keys(config, kind)},
    }


def _family(kind: str) -> str:
    return {"llama": "Llama", "mistral": "Mistral", "mpt": "Mpt"}.get(kind.removeprefix("llava_"), kind.capitalize())
