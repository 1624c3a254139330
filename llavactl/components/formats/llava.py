"""The original LLaVA's checkpoints: full, LoRA with its ``non_lora_trainables.bin``, or a bare ``mm_projector.bin``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.generation import generation_config
from llavactl.components.formats.known import BASE_KEYS, foreign_keys
from llavactl.components.formats.llava_read import OWN, PROJECTOR_FILE, read_llava
from llavactl.components.formats.native import CONNECTORS, Native
from llavactl.components.languages.images import image_token
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import registry

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TOWER = "vision_tower"
SHARD = "5GB"


class OriginalLlava:
    """The layout ``llava``."""

    reload = Path(__file__).with_name("reload_llava.py")

    def __init__(self, options: Any) -> None:
        pass

    def recognise(self, folder: Path) -> bool:
        return "mm_vision_tower" in read_json(folder / "config.json") or (folder / PROJECTOR_FILE).is_file()

    def read(self, folder: Path, model: Path) -> None:
        """Converts the checkpoint in ``folder`` to the model folder ``model``."""
        read_llava(folder, model)

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``; a stage 1 model as a bare projector, an adapter merged."""
        import torch

        native = Native(model)
        projection = native.projection()
        _refuse_backbone(native)
        _refuse_processor(native.tokenizer())
        if native.method == "connector" and native.description["stage"] == 1:
            to.mkdir(parents=True, exist_ok=True)
            torch.save({f"model.mm_projector.{name}": each for name, each in projection.items()}, to / PROJECTOR_FILE)
            base = native.description["language"].get("model", native.description["language"]["name"])
            write_json(to / "config.json", _written(native, {"model_type": "llava_llama", "_name_or_path": base}))
            native.exported_tokenizer().save_pretrained(to)
            _vision(native, to)
            return
        language = native.language()
        positions = _positions(language.config.to_dict())
        state = language.state_dict() | {f"model.mm_projector.{name}": each for name, each in projection.items()}
        if language.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        language.generation_config = generation_config(language, native.tokenizer(), native.description)
        # The language model's own way of saving, so that shards, index and generation settings are as ever.
        language.save_pretrained(to, state_dict=_untied(state), max_shard_size=SHARD)
        native.exported_tokenizer().save_pretrained(to)
        write_json(to / "config.json", {**_written(native, read_json(to / "config.json")), **positions})
        _vision(native, to)


def _positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary positions of the families that LLaVA itself has, by the names that its transformers (4.37) reads: by
    newer names alone it would take a theta of 10,000 and no scaling.

    Raises:
        ModelError: it has no such positions, or takes another width of a head than hidden size / heads.
    """
    if config["model_type"] not in ("llama", "mistral"):
        return {}
    rope = config["rope_parameters"]
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "dynamic"):
        raise ModelError(
            f"layout llava can't hold position embeddings of type {kind}: LLaVA knows default, linear and dynamic",
            hint="`--format hf` holds them",
        )
    width, heads, head = (config.get(key) for key in ("hidden_size", "num_attention_heads", "head_dim"))
    if width and heads and head and head * heads != width:
        raise ModelError(
            f"layout llava can't hold attention heads of width {head}: LLaVA's programs take {width} / {heads}",
            hint="`--format hf` holds them",
        )
    scaling = None if kind == "default" else {"type": kind, "factor": rope["factor"]}
    return {"rope_theta": rope["rope_theta"], "rope_scaling": scaling}


def _refuse_backbone(native: Native) -> None:
    """LLaVA's programs support only CLIP backbones and a single vision layer."""
    vision = native.description["vision"]
    if not isinstance(vision["layer"], int):
        hint = "use `--format hf`, or train with one layer such as `vision.layer: -2`"
        raise ModelError("layout llava supports a single vision layer", hint=hint)
    config = getattr(registry().create("vision", vision), "config", {})
    if (kind := config.get("model_type", "not of transformers")) not in ("clip", "clip_vision_model"):
        raise ModelError(
            f"layout llava can't represent vision backbone {vision['name']} ({kind}): LLaVA's programs read only CLIP",
            hint="`--format hf` supports other backbones of transformers",
        )


def _refuse_processor(tokenizer: PreTrainedTokenizerBase) -> None:
    """LLaVA's programs tokenise the text after an image by itself."""
    token = image_token(tokenizer)
    after = "\nWhat"
    alone, within = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (after, f"{token}{after}"))
    if token is not None and within[1:] != alone:
        raise ModelError(
            "layout llava can't hold this model: its processor encodes the text after an image differently than "
            "LLaVA's programs, which split the text there",
            hint="use `--format hf`",
        )


def _vision(native: Native, to: Path) -> None:
    """Keeps the backbone beside the weights where it lies in a larger checkpoint: no name leads to it alone."""
    backbone = registry().create("vision", native.description["vision"])
    if not getattr(backbone, "inside", False):
        return
    tower = backbone.whole()
    tower.__dict__.pop("_weight_conversions", None)  # its own names, not those it had in there
    tower.save_pretrained(to / TOWER)
    backbone.processor.save_pretrained(to / TOWER)
    write_json(to / "config.json", {**read_json(to / "config.json"), "mm_vision_tower": TOWER})


def _untied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: weight.contiguous() for name, weight in state.items()}


def _written(native: Native, config: Mapping[str, Any]) -> dict[str, Any]:
    """LLaVA's config.json: the language model's, and what belongs to the image."""
    description = native.description
    vision, (height, width) = description["vision"], description["shape"]["grid"]
    kind = str(config["model_type"])
    return {
        **config,
        "architectures": [f"Llava{_family(kind)}ForCausalLM"],
        "model_type": kind if kind.startswith("llava_") else f"llava_{kind}",
        "mm_vision_tower": vision.get("model", vision["name"]),
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
