"""Regenerates recipes/memory.json, the predicted memory of the recipes: ``python docs/memory.py`` (minutes on a core).

The models are written as configurations with the published sizes; no weights are needed. docs/how-to/memory.md and
``llavactl doctor`` show the file.
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
from llavactl.training.prediction.choose import Target, choose
from llavactl.training.prediction.model import feature_shape
from llavactl.training.prediction.predict import StagePredictor

FILE = Path(__file__).parent.parent / "recipes" / "memory.json"
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
    shape = feature_shape(recipe, stage)
    for count in DEVICES:
        predictor = StagePredictor(recipe, stage, shape, shape.patches, None, count, cuda=True)
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


def main() -> None:
    """Regenerates the file."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, stage in itertools.product(RECIPES, STAGES):
            rows += predictions(name, stage, Path(folder))
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
