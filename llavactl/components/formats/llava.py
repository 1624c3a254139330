"""The original LLaVA's checkpoints: full, LoRA with its ``non_lora_trainables.bin``, or a bare ``mm_projector.bin``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.components.formats.generation import generation_config
from llavactl.components.formats.native import CONNECTORS, Native, adopt, connector_of, shape_of
from llavactl.components.formats.weights import read, stamps, tensors
from llavactl.core.errors import ModelError
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import registry

if TYPE_CHECKING:
    import torch

PROJECTOR_FILE, ADAPTER_FILE = "mm_projector.bin", "non_lora_trainables.bin"
KEY = re.compile(r"^(base_model\.model\.)?(model\.)?mm_projector\.")
OWN = "llavactl"
"""A key of config.json for what the layout itself doesn't say: LLaVA keeps it and ignores it."""

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
        """Writes the model folder ``model`` that stands for the checkpoint in ``folder``.

        Raises:
            ModelError: it needs what llavactl doesn't have, such as tokens around an image.
        """
        config = read_json(folder / "config.json")
        _refuse(config, folder)
        method, found = _weights(folder)
        projection = {KEY.sub("", name): weight for name, weight in found.items()}
        if "mm_vision_tower" not in config:
            self._bare(folder, model, projection)
            return
        vision = {
            "name": "clip",
            "model": _near(config["mm_vision_tower"], folder),
            "layer": config.get("mm_vision_select_layer", -2),
            "select": "cls-patch" if config.get("mm_vision_select_feature") == "cls_patch" else "patch",
            "image": "pad" if config.get("image_aspect_ratio") == "pad" else "square",
        }
        own = config.get(OWN, {})
        description = {
            "method": method,
            "vision": vision,
            "shape": shape_of(vision),
            "connector": connector_of(projection, folder),
            "language": _language(config, folder, method),
            "template": None,
            "precision": str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        }
        adopt(model, projection, {**description, **own}, seen={"config": config, "weights": stamps(folder)})
        if method == "lora":
            (model / "adapter").mkdir(exist_ok=True)
            for file in folder.glob("adapter_*"):
                shutil.copyfile(file, model / "adapter" / file.name)

    def _bare(self, folder: Path, model: Path, projection: Mapping[str, torch.Tensor]) -> None:
        """Only a projector, perhaps beside its base: the backbone and the rest are for a recipe to say."""
        base = {"name": "hf", "model": str(folder.absolute())} if stamps(folder) else None
        nothing = dict.fromkeys(("vision", "shape", "template", "precision"))
        description = {"connector": connector_of(projection, folder), "language": base, **nothing}
        seen = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.bin"))]
        adopt(model, projection, description, seen={"weights": seen})

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` to ``to``; a stage 1 model as a bare projector, an adapter merged."""
        import torch

        native = Native(model)
        projection = native.projection()
        _refuse_backbone(native)
        if native.method == "connector" and native.description["stage"] == 1:
            to.mkdir(parents=True, exist_ok=True)
            torch.save({f"model.mm_projector.{name}": each for name, each in projection.items()}, to / PROJECTOR_FILE)
            base = native.description["language"].get("model", native.description["language"]["name"])
            write_json(to / "config.json", _written(native, {"model_type": "llava_llama", "_name_or_path": base}))
            native.tokenizer().save_pretrained(to)
            _vision(native, to)
            return
        language = native.language()
        state = language.state_dict() | {f"model.mm_projector.{name}": each for name, each in projection.items()}
        if language.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        language.generation_config = generation_config(language, native.tokenizer(), native.description)
        # The language model's own way of saving, so that shards, index and generation settings are as ever.
        language.save_pretrained(to, state_dict=_untied(state), max_shard_size=SHARD)
        native.tokenizer().save_pretrained(to)
        write_json(to / "config.json", _written(native, read_json(to / "config.json")))
        _vision(native, to)


def _refuse_backbone(native: Native) -> None:
    """LLaVA's programs read the backbone as CLIP's, and one of its layers."""
    vision = native.description["vision"]
    if not isinstance(vision["layer"], int):
        raise ModelError("layout llava has one vision layer", hint="train with vision.layer: -2, say, or --format hf")
    config = getattr(registry().create("vision", vision), "config", {})
    if (kind := config.get("model_type", "not of transformers")) not in ("clip", "clip_vision_model"):
        raise ModelError(
            f"layout llava can't hold vision backbone {vision['name']} ({kind}): LLaVA's programs read CLIP",
            hint="`--format hf` holds other backbones of transformers",
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
    keep = ("template", "image_order", "precision", "features", "stage")
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
        OWN: {key: description[key] for key in keep},
    }


def _family(kind: str) -> str:
    return {"llama": "Llama", "mistral": "Mistral", "mpt": "Mpt"}.get(kind.removeprefix("llava_"), kind.capitalize())


def _weights(folder: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """How it was trained, and the projector's weights by their full names."""
    if (folder / "adapter_config.json").is_file():
        if not (folder / ADAPTER_FILE).is_file():
            raise ModelError(f"{folder}: an adapter without {ADAPTER_FILE}: its connector is missing")
        found = read(folder / ADAPTER_FILE)
        if others := sorted(name for name in found if not KEY.match(name)):
            raise ModelError(f"{folder / ADAPTER_FILE}: holds more than a connector, such as {others[0]}")
        return "lora", found
    if found := tensors(folder, ("model.mm_projector.", "mm_projector.")):
        return "connector", found
    if (folder / PROJECTOR_FILE).is_file():
        return "connector", read(folder / PROJECTOR_FILE)
    raise ModelError(f"{folder}: no mm_projector in its weights, and no {PROJECTOR_FILE}")


def _language(config: Mapping[str, Any], folder: Path, method: str) -> dict[str, str] | None:
    """The language model: its own weights here, or the base that the checkpoint names; None where it names none."""
    base: Any = folder.absolute()
    if method == "lora":
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    elif not stamps(folder):
        base = config.get("_name_or_path")
    return {"name": "hf", "model": _near(str(base), folder)} if base else None


def _near(model: str, folder: Path) -> str:
    """A relative path that exists beside the checkpoint is meant from there; all else is an id or a path as it is."""
    beside = folder / model
    return str(beside.resolve()) if not Path(model).is_absolute() and (beside / "config.json").is_file() else model


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    """What would silently give another model is refused."""
    for key, why in (
        ("mm_use_im_start_end", "it puts tokens of its own around an image"),
        ("unfreeze_mm_vision_tower", "its vision backbone was trained too"),
    ):
        if config.get(key):
            raise ModelError(f"{folder}: {key} is true: {why}", hint="llavactl reads LLaVA v1 and v1.5 without these")
    if config.get("image_aspect_ratio") == "anyres":
        raise ModelError(f"{folder}: image_aspect_ratio anyres (LLaVA-NeXT) is another architecture")
