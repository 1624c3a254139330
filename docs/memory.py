"""Regenerates the predicted memory of the recipes and of four sizes of models: ``python docs/memory.py`` (40 minutes).

The models are written as configurations with the published sizes; no weights are needed. docs/how-to/memory.md shows
recipes/memory.json; ``llavactl doctor`` and ``llavactl init`` use recipes/model_memory.json.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llavactl.recipe.load import load_recipe
from llavactl.recipe.stages import STAGES
from llavactl.training.prediction.choices import distinct_choices
from llavactl.training.prediction.choose import choose
from llavactl.training.prediction.predict import stage_predictor
from llavactl.training.prediction.published import RECIPE
from llavactl.training.prediction.target import Target

FILE = Path(__file__).parent.parent / "recipes" / "memory.json"
MODEL_FILE = FILE.with_name("model_memory.json")
RECIPES = (
    "llava-v1-7b",
    "llava-v1-13b-scienceqa",
    "llava-v1.5-7b",
    "llava-v1.5-7b-lora",
    "llava-v1.5-7b-qlora",
    "llava-v1.5-13b",
)
GIGABYTES = (24, 48, 80, 141)
DEVICES = (1, 8)
MODELS: dict[str, dict[str, Any]] = {
    "SmolLM2 135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama 3.2 1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "Vicuna 7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "Vicuna 13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "vocab_size": 32000,
    },
}
TRAINING = (
    *((method, 1, True) for method in ("connector", "full", "lora", "qlora")),
    *(("full", devices, True) for devices in (2, 4, 8)),
    *((method, 1, False) for method in ("connector", "full", "lora")),
)
"""Method, number of devices and whether they are CUDA devices. LoRA on several devices needs as much as on one."""

IMAGE_SIZES = {"openai/clip-vit-large-patch14": 224, "openai/clip-vit-large-patch14-336": 336}


def write_language(folder: Path, model: str) -> Path:
    """The configuration of Vicuna 7B or 13B, as ``model`` says."""
    from transformers import LlamaConfig

    large = "13b" in model
    LlamaConfig(
        hidden_size=5120 if large else 4096,
        intermediate_size=13824 if large else 11008,
        num_hidden_layers=40 if large else 32,
        num_attention_heads=40 if large else 32,
        vocab_size=32000,
    ).save_pretrained(folder / model)
    return folder / model


def write_vision(folder: Path, model: str) -> Path:
    """The configuration of CLIP ViT-L/14."""
    from transformers import CLIPVisionConfig

    CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=IMAGE_SIZES[model],
        patch_size=14,
    ).save_pretrained(folder / model)
    return folder / model


def predictions(name: str, stage: int, folder: Path) -> Iterator[dict[str, Any]]:
    """The prediction of ``stage`` of recipe ``name`` for each number of devices and memory."""
    recipe = load_recipe(name)
    language = write_language(folder, recipe.language.spec()["model"])
    vision = write_vision(folder, recipe.vision.spec()["model"])
    recipe = load_recipe(name, [f"language.model={language}", f"vision.model={vision}"])
    for count in DEVICES:
        predictor = stage_predictor(recipe, stage, Target(True, 0, count))
        for memory in GIGABYTES:
            prediction, fits = choose(predictor, recipe, Target(True, memory * 10**9, count))
            yield {
                "recipe": name,
                "stage": stage,
                "devices": count,
                "gigabytes": memory,
                "fits": fits,
                "device_bytes": prediction.device_bytes,
                "sharded": prediction.choice.placement.sharded,
                "optimizer_state": prediction.choice.placement.optimizer_state,
                "gradient_checkpointing": prediction.choice.gradient_checkpointing,
                "micro_batch_tokens": prediction.choice.micro_batch_tokens,
            }


def model_predictions(
    model: str, method: str, vision: Path, language: Path, devices: int, *, cuda: bool
) -> dict[str, Any]:
    """The predicted peaks of training ``model``: of every choice of settings that needs less than all faster ones."""
    stage = 1 if method == "connector" else 2
    options = [f"language.model={language}", f"vision.model={vision}"]
    recipe = load_recipe(RECIPE, [*options, *([f"stage2.method={method}"] if stage == 2 else [])])
    target = Target(cuda, 0, devices)
    predictor = stage_predictor(recipe, stage, target)
    peaks: list[dict[str, Any]] = []
    for choice in distinct_choices(predictor, recipe, target):
        size = target.peak_bytes(predictor.predict(choice))
        if not peaks or size < peaks[-1]["bytes"]:
            peaks.append(
                {
                    "bytes": size,
                    "sharded": choice.placement.sharded,
                    "optimizer_state": choice.placement.optimizer_state,
                    "gradient_checkpointing": choice.gradient_checkpointing,
                    "micro_batch_tokens": choice.micro_batch_tokens,
                }
            )
    return {"model": model, "method": method, "cuda": cuda, "devices": devices, "peaks": peaks}


def main() -> None:
    """Regenerates the files."""
    from transformers import LlamaConfig

    rows, model_rows = [], []
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in itertools.product(RECIPES, STAGES):
            rows += predictions(name, stage, Path(folder))
        vision = write_vision(Path(folder), "openai/clip-vit-large-patch14-336")
        for model, sizes in MODELS.items():
            language = Path(folder, model)
            LlamaConfig(**sizes).save_pretrained(language)
            for method, devices, cuda in TRAINING:
                model_rows.append(model_predictions(model, method, vision, language, devices, cuda=cuda))
    for file, lines in ((FILE, rows), (MODEL_FILE, model_rows)):
        file.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
