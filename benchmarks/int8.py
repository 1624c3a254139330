"""The cost of int8 features: quantization error relative to float16, bytes, time, and the loss of a real stage 1.

    python benchmarks/int8.py                         # minutes on 2 cores, mostly training
    python benchmarks/int8.py --out benchmarks/results/int8-2-cores.json
    python benchmarks/int8.py --train 0               # without training

Needs the demo plugin (DINOv2, SmolLM2) and the images of ``../shared/data/coco-mini``. Errors are relative to the norm
of an image's features. ``normalized`` errors are computed after scaling every channel to the same size; otherwise
outlier channels would hide the errors of the others. Plain int8 with one scale per token or per channel is measured as
well.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import Document, Documents, add_options, publish

from llavactl import ImageFile, TransformersVision
from llavactl.components.vision.pretrained import ClipOptions
from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, FeatureShape
from llavactl.data.encode import Encoding
from llavactl.data.micro_batches import Partition, padded_micro_batches
from llavactl.data.packing import MicroBatchLimits
from llavactl.data.split import load_split
from llavactl.features import open_features
from llavactl.features.backbone import Backbone
from llavactl.features.prepare import Failure, prepare
from llavactl.features.quantize import as_stored, dequantize, quantize
from llavactl.features.shards import bytes_of
from llavactl.model import folder as model_folder
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import load_recipe
from llavactl.verbs.extract import extract
from llavactl.verbs.train import train

COCO = Path(__file__).parents[2] / "shared" / "data" / "coco-mini"
CLIP_SHAPE = FeatureShape((24, 24), 1024)


def one_scale_per(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """Plain symmetric int8 with one scale for all values along ``axis``."""

    def round_trip(features: np.ndarray) -> np.ndarray:
        values = features.astype(np.float32)
        scale = np.maximum(np.abs(values).max(axis=axis, keepdims=True), 1e-12) / 127
        return np.rint(values / scale) * scale

    return round_trip


METHODS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "llavactl": lambda features: as_stored(features, "int8"),
    "one scale per token": one_scale_per(1),
    "one scale per channel": one_scale_per(0),
}


def errors(images: Sequence[np.ndarray], round_trip: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Mean and worst errors of ``round_trip`` over ``images`` [P, Dv]."""
    relative, normalized, cosine, normalized_cosine = [], [], [], []
    for image in images:
        expected, actual = image.astype(np.float64), round_trip(image).astype(np.float64)
        size = np.sqrt((expected**2).mean(axis=0)) + 1e-12
        for distances, cosines, scale in ((relative, cosine, 1.0), (normalized, normalized_cosine, size)):
            a, b = actual / scale, expected / scale
            distances.append(float(np.linalg.norm(a - b) / np.linalg.norm(b)))
            norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
            cosines += list((a * b).sum(axis=1) / np.maximum(norms, 1e-12))
    return {
        "relative": statistics.mean(relative),
        "relative_worst": max(relative),
        "token_cosine_worst": min(cosine),
        "normalized": statistics.mean(normalized),
        "normalized_worst": max(normalized),
        "normalized_token_cosine_worst": min(normalized_cosine),
    }


def encoded(model: Path, layer: int, photos: Sequence[Path]) -> list[np.ndarray]:
    """The features of ``photos`` from ``layer`` of ``model``."""
    encoder = TransformersVision(ClipOptions(model=str(model), layer=layer, image="square")).load("cpu", "float32")
    pixels = [prepare(encoder, ImageFile(str(path.parent), path.name)) for path in photos]
    decoded = [each for each in pixels if not isinstance(each, Failure)]
    return list(Backbone(encoder, "cpu", 1).encode(decoded))


def save_outlier_clip(folder: Path) -> Path:
    """A CLIP-shaped encoder with random weights and a few outlier channels in its residual stream."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    model = CLIPVisionModel(config)
    with torch.no_grad():
        vision = getattr(model, "vision_model", model)
        # Three channels are scaled after the first norm, in every token.
        for channel, gain, shift in ((7, 30.0, 0.0), (300, 60.0, 40.0), (900, 20.0, 0.0)):
            vision.pre_layrnorm.weight[channel] = gain
            vision.pre_layrnorm.bias[channel] = shift
    model.save_pretrained(folder)
    return folder


def with_outlier_tokens(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """``images`` with six tokens per image multiplied by eight, like the outlier tokens of CLIP and DINOv2."""
    rng = np.random.default_rng(0)
    changed = []
    for image in images:
        values = image.astype(np.float32)
        values[rng.choice(len(values), 6, replace=False)] *= 8
        changed.append(values.astype(np.float16))
    return changed


def milliseconds(work: Callable[[], object], repeat: int = 30) -> float:
    """The median time of ``work``."""
    times = []
    for _ in range(repeat):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return round(statistics.median(times) * 1e3, 3)


def loss_of(model: Path, recipe: Recipe) -> float:
    """The validation loss of the stage 1 ``model`` with the features of ``recipe``."""
    loaded = model_folder.load(model)
    features = open_features(recipe, 1)
    template = registry().create("templates", {"name": loaded.description["template"]})
    bundle, stage = loaded.bundle, recipe.stage1
    encoding = Encoding(template, bundle.tokenizer, bundle.image_tokens, stage.max_length)
    held_out = load_split(recipe.data.stage1, stage, encoding, features, features.contents, recipe.seed).validation
    total, tokens = 0.0, 0
    for index in range(len(held_out)):
        (batch,) = padded_micro_batches(held_out, [(0, index)], Partition(MicroBatchLimits(1, None)))
        with torch.inference_mode():
            total += bundle.model(batch).item()
        tokens += int((batch.labels != IGNORE).sum())
    return total / tokens


def stage1_losses(samples: int, seeds: int, folder: Path) -> Documents:
    """Train the demo's stage 1 on ``samples`` synthetic scenes with each dtype and several seeds.

    ``loss_change_reading_int8_percent``: the effect of rounding, as the change of the final loss of the connector
    trained on float16 when it reads the int8 features of the same validation scenes.
    ``loss_change_training_on_int8_percent``: the effect of training on int8 from the start. The connector is LLaVA v1's
    single linear layer: the loss of the two-layer connector drops from 2 to 1 within a few steps at a random time. Even
    so, so short a run shows little: ``float16_seed_std_percent`` is the standard deviation of the float16 losses over
    seeds.
    """
    (folder / "recipe.yaml").write_text(
        f"""\
extends: demo-full
name: int8
generate: null
data: {{stage1: [{{name: scenes, content: descriptions, scenes: {samples}}}], stage2: []}}
stage1: {{validation: 0.1}}
eval: {{tasks: []}}
""",
        encoding="utf-8",
    )
    losses: dict[str, list[float]] = {}
    losses_reading: dict[str, list[float]] = {}
    steps = 0
    for seed in range(seeds):
        for dtype in ("float16", "int8"):
            overrides = [
                "connector.name=linear",
                f"features.dtype={dtype}",
                f"seed={seed}",
                f"run_dir={folder / dtype / str(seed)}",
            ]
            recipe = load_recipe(folder / "recipe.yaml", overrides)
            extract(recipe)
            report = train(recipe, 1)
            losses.setdefault(dtype, []).append(report.val_loss)
            steps = report.steps
            print(f"{dtype}, seed {seed}: {report.val_loss}", file=sys.stderr, flush=True)
            float16_model = folder / "float16" / str(seed) / "stage1" / "model"
            losses_reading.setdefault(dtype, []).append(loss_of(float16_model, recipe))
            yield {"samples": samples, "steps": steps, **changes(losses, losses_reading)}


def changes(losses: dict[str, list[float]], losses_reading: dict[str, list[float]]) -> dict[str, Any]:
    """Changes of the loss with int8, over the seeds trained with both dtypes."""
    float16, int8 = losses["float16"], losses.get("int8", [])
    compared = float16[: len(int8)]
    reading = zip(losses_reading.get("int8", []), losses_reading["float16"][: len(int8)], strict=True)
    mean_change = 100 * (statistics.mean(int8) / statistics.mean(compared) - 1) if int8 else None
    seed_std = 100 * statistics.stdev(float16) / statistics.mean(float16) if len(float16) > 1 else None
    return {
        "loss_change_reading_int8_percent": [100 * (a / b - 1) for a, b in reading],
        "val_loss": losses,
        "loss_change_training_on_int8_percent": mean_change,
        "loss_change_training_on_int8_percent_by_seed": [
            100 * (a / b - 1) for a, b in zip(int8, compared, strict=True)
        ],
        "float16_seed_std_percent": seed_std,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=16, help="images for the quantization errors")
    parser.add_argument("--train", type=int, default=1000, metavar="SAMPLES", help="scenes to train on; 0: no training")
    parser.add_argument("--seeds", type=int, default=2, help="trained models per dtype")
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    publish(documents(options), options, as_text)


def documents(options: argparse.Namespace) -> Documents:
    with tempfile.TemporaryDirectory() as name:
        os.environ["LLAVACTL_HOME"] = str(Path(name, "home"))
        document = quantization_results(options, Path(name))
        yield document
        if options.train:
            for result in stage1_losses(options.train, options.seeds, Path(name)):
                yield {**document, "stage1": result}


def quantization_results(options: argparse.Namespace, folder: Path) -> Document:
    from llavactl_demo.convert import vision_folder

    paths = sorted(COCO.glob("*2017/*.jpg"))[: options.photos]
    features = {
        "DINOv2 ViT-S/14, layer -2": encoded(vision_folder(), -2, paths),
        "DINOv2 ViT-S/14, layer 6": encoded(vision_folder(), 6, paths),
        "CLIP L/336 shape, outlier channels": encoded(save_outlier_clip(folder / "clip"), -2, paths[:4]),
    }
    with_outliers = with_outlier_tokens(features["CLIP L/336 shape, outlier channels"])
    features["CLIP L/336 shape, outlier channels and tokens"] = with_outliers
    image = with_outliers[0]
    integers, scales = quantize(image)
    return {
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{platform.machine()}",
        "bytes_relative_to_float16": bytes_of(CLIP_SHAPE, 1024, 1024, "int8") / bytes_of(CLIP_SHAPE, 1024, 1024),
        "ms_per_image_576x1024": {
            "quantize": milliseconds(lambda: quantize(image)),
            "dequantize": milliseconds(lambda: dequantize(integers, scales)),
            "copy float16": milliseconds(image.copy),
        },
        "photos": len(paths),
        "errors": {
            name: {method: errors(images, round_trip) for method, round_trip in METHODS.items()}
            for name, images in features.items()
        },
    }


def as_text(document: Document) -> str:
    times = ", ".join(f"{step} {ms}" for step, ms in document["ms_per_image_576x1024"].items())
    lines = [
        document["machine"],
        f"bytes relative to float16: {document['bytes_relative_to_float16']:.4f}",
        f"milliseconds per image: {times}",
    ]
    for name, methods in document["errors"].items():
        lines.append(f"{name}:")
        lines += [
            f"  {method:<21} normalized error {error['normalized']:.4f}, "
            f"worst normalized cosine of a token {error['normalized_token_cosine_worst']:.5f}"
            for method, error in methods.items()
        ]
    if "stage1" in document:
        lines.append(json.dumps(document["stage1"], indent=1))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
