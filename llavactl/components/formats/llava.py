"""Format ``llava``: checkpoints of the original LLaVA, full, LoRA or a bare ``mm_projector.bin``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from llavactl.components.formats.connectors import LINEAR_LAYERS, refuse_connector
from llavactl.components.formats.generation import generation_config
from llavactl.components.formats.llava_read import PROJECTOR_FILE, SETTINGS_KEY, read_llava
from llavactl.components.formats.llava_support import loads_vision_encoder, older_rope_keys, uses_fast_tokenizer
from llavactl.components.formats.llava_tokenizer import loads_tokenizer, older_files, save_tokenizer
from llavactl.components.formats.native import SavedModel, exportable_vision, open_model
from llavactl.components.formats.supported_keys import BASE_KEYS, ignored_keys
from llavactl.components.languages.image_token import image_token
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import Options

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

ENCODER_FOLDER = "vision_tower"
MAX_SHARD_SIZE = "5GB"


class OriginalLlavaOptions(Options):
    """``strict``: refuse models that LLaVA's code can't load, and write files for its older version of transformers."""

    strict: bool = Field(
        True, description="refuse models that LLaVA's code can't load; write files for its version of transformers"
    )


class OriginalLlava:
    """The format ``llava``."""

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
        """Raises ModelError if the format can't represent a model of these components; see ``CheckableFormat``."""
        refuse_connector(connector)
        _refuse_backbone(vision)
        older_rope_keys(language.config.to_dict(), strict=self.options.strict)
        _refuse_processor_ids(tokenizer)
        if self.options.strict:
            older_files(tokenizer, fast=uses_fast_tokenizer(language.config.model_type))

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``: a stage 1 model as a bare projector, an adapter merged."""
        saved, strict = open_model(model), self.options.strict
        refuse_connector(saved.description["connector"])
        projection = {f"model.mm_projector.{name}": weight for name, weight in saved.connector_weights().items()}
        _refuse_backbone(saved.description["vision"])
        language = saved.language_config().to_dict()
        rope_keys, tokenizer = older_rope_keys(language, strict=strict), saved.exported_tokenizer()
        _refuse_processor_ids(tokenizer)
        if strict:
            save_tokenizer(tokenizer, to, fast=uses_fast_tokenizer(language["model_type"]))
            # LLaVA's load_pretrained_model chooses the class by words in the folder's name.
            words = " and ".join(dict.fromkeys(("llava", language["model_type"].replace("llama", "llava"))))
            log.info("LLaVA's code loads this model only from a folder with %s in its name", words)
        else:
            tokenizer.save_pretrained(to)
        vision_tower = _vision_tower(saved, to)
        if saved.description["method"] == "connector" and saved.description["stage"] == 1:
            config = language | _save_projector(saved, projection, to)
            if strict and not loads_tokenizer(Path(config["_name_or_path"])):
                hint = "copy it, and replace the tokenizer files of the copy by those of this export"
                log.warning("LLaVA's code can't read the tokenizer of %s: %s", config["_name_or_path"], hint)
        else:
            config = _save_full(saved, projection, to)
        write_json(to / "config.json", {**_llava_config(saved, config), **rope_keys, "mm_vision_tower": vision_tower})


def _save_projector(saved: SavedModel, projection: Mapping[str, torch.Tensor], to: Path) -> dict[str, Any]:
    """Saves the connector only; returns the key of config.json that names its language model."""
    import torch

    torch.save(projection, to / PROJECTOR_FILE)
    return {"_name_or_path": saved.description["language"].get("model", saved.description["language"]["name"])}


def _save_full(saved: SavedModel, projection: Mapping[str, torch.Tensor], to: Path) -> dict[str, Any]:
    """Saves the language model with the connector; returns its config.json."""
    language, tokenizer = saved.language(), saved.tokenizer()
    state = language.state_dict() | projection
    if language.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    language.generation_config = generation_config(language, tokenizer, *saved.stop_criteria(tokenizer))
    # Saved by transformers, which writes shards, index and generation config.
    language.save_pretrained(to, state_dict=_contiguous(state), max_shard_size=MAX_SHARD_SIZE)
    return read_json(to / "config.json")


def _refuse_backbone(vision: Mapping[str, Any]) -> None:
    """Raises ModelError for a backbone other than CLIP or several vision layers, which LLaVA's code doesn't support."""
    if not isinstance(vision["layer"], int):
        hint = "use `--format hf`, or train with one layer such as `vision.layer: -2`"
        raise ModelError("format llava supports a single vision layer", hint=hint)
    backbone = exportable_vision(vision)
    if (kind := backbone.config.get("model_type", "not of transformers")) not in ("clip", "clip_vision_model"):
        raise ModelError(
            f"format llava can't represent vision backbone {vision['name']} ({kind}): LLaVA's code supports only CLIP",
            hint="`--format hf` supports other backbones of transformers",
        )


def _refuse_processor_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ModelError if LLaVA's code, which splits the text at images, would encode it differently."""
    token = image_token(tokenizer)
    after = "\nWhat"
    separate, joined = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (after, f"{token}{after}"))
    if token is not None and joined[1:] != separate:
        raise ModelError(
            "format llava can't represent this model: its processor encodes the text after an image differently than "
            "LLaVA's code, which splits the text at images",
            hint="use `--format hf`",
        )


def _vision_tower(saved: SavedModel, to: Path) -> str:
    """``mm_vision_tower``: the encoder's id or path if LLaVA's code can load it, else the path of a copy in ``to``."""
    vision, backbone = saved.description["vision"], saved.vision()
    name = str(vision.get("model", vision["name"]))
    if not backbone.inside and loads_vision_encoder(name):
        return name
    encoder = backbone.whole()
    encoder.__dict__.pop("_weight_conversions", None)  # else transformers would save the checkpoint's tensor names
    prefix = "vision_model."  # as in older versions of transformers; newer ones read names with and without it
    state = {f"{prefix}{name.removeprefix(prefix)}": weight for name, weight in encoder.state_dict().items()}
    encoder.save_pretrained(to / ENCODER_FOLDER, state_dict=_contiguous(state))
    backbone.processor.save_pretrained(to / ENCODER_FOLDER)
    return str(to.absolute() / ENCODER_FOLDER)


def _contiguous(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.contiguous() for name, weight in state.items()}


def _llava_config(saved: SavedModel, config: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's config.json: the language model's ``config`` with the keys of connector and vision encoder."""
    description, shape = saved.description, saved.shape
    vision = description["vision"]
    kind = str(config["model_type"])
    return {
        **config,
        "architectures": [f"Llava{_family(kind)}ForCausalLM"],
        "torch_dtype": description["precision"],
        "model_type": kind if kind.startswith("llava_") else f"llava_{kind}",
        "mm_hidden_size": shape.width,
        "mm_projector_type": {1: "linear", 2: "mlp2x_gelu"}[LINEAR_LAYERS[description["connector"]["name"]]],
        "mm_vision_select_layer": vision["layer"],
        "mm_vision_select_feature": "patch" if vision["select"] == "patch" else "cls_patch",
        "image_aspect_ratio": "pad" if vision["image"] == "pad" else "square",
        "image_grid": list(shape.grid),
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
        SETTINGS_KEY: {**saved.settings(), BASE_KEYS: ignored_keys(config, kind)},
    }


def _family(kind: str) -> str:
    return {"llama": "Llama", "mistral": "Mistral", "mpt": "Mpt"}.get(kind.removeprefix("llava_"), kind.capitalize())
