"""What int8 features cost: error and cosine beside float16, bytes, time, and the loss of a real stage 1.

    python benchmarks/int8.py                         # minutes on 2 cores, most of them training
    python benchmarks/int8.py --out benchmarks/results/int8-2-cores.json
    python benchmarks/int8.py --train 0               # without training

Needs the demo plugin (DINOv2, SmolLM2) and the photos of ``../shared/data/coco-mini``. Errors are relative, in the
norm of an image's features; those called ``even`` are with every channel brought to one size first, so that a few
huge channels don't hide what became of the others. Beside it stand one scale a token and one a channel.
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

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "coco-mini"
CLIP = FeatureShape((24, 24), 1024)


def a_scale_each(axis: int) -> Callable[[np.ndarray], np.ndarray]:
    """Plain symmetric int8 with one scale for what lies along ``axis``."""

    def round_trip(features: np.ndarray) -> np.ndarray:
        values = features.astype(np.float32)
        scale = np.maximum(np.abs(values).max(axis=axis, keepdims=True), 1e-12) / 127
        return np.rint(values / scale) * scale

    return round_trip


WAYS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "ours": lambda features: as_stored(features, "int8"),
    "a scale a token": a_scale_each(1),
    "a scale a channel": a_scale_each(0),
}


def errors(images: Sequence[np.ndarray], way: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
    """Mean and worst over ``images`` [P, Dv] of what ``way`` does to them."""
    relative, even, cosine, even_cosine = [], [], [], []
    for image in images:
        wanted, found = image.astype(np.float64), way(image).astype(np.float64)
        size = np.sqrt((wanted**2).mean(axis=0)) + 1e-12
        for numbers, angles, scale in ((relative, cosine, 1.0), (even, even_cosine, size)):
            ours, theirs = found / scale, wanted / scale
            numbers.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
            norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
            angles += list((ours * theirs).sum(axis=1) / np.maximum(norms, 1e-12))
    return {
        "relative": statistics.mean(relative),
        "relative_worst": max(relative),
        "cosine_of_a_token_worst": min(cosine),
        "even": statistics.mean(even),
        "even_worst": max(even),
        "even_cosine_of_a_token_worst": min(even_cosine),
    }


def encoded(model: Path, layer: int, photos: Sequence[Path]) -> list[np.ndarray]:
    encoder = TransformersVision(ClipOptions(model=str(model), layer=layer, image="square")).load("cpu", "float32")
    pixels = [prepare(encoder, ImageFile(str(path.parent), path.name)) for path in photos]
    good = [each for each in pixels if not isinstance(each, Failure)]
    return list(Backbone(encoder, "cpu", 1).encode(good))


def planted(folder: Path) -> Path:
    """A CLIP-shaped tower of random weights whose residual stream has a few channels of huge magnitude, and tokens."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=16, image_size=336,
        patch_size=14,
    )  # fmt: skip
    model = CLIPVisionModel(config)
    with torch.no_grad():
        vision = getattr(model, "vision_model", model)
        # After the first norm: three channels stand out in every token; six tokens stand out in all channels.
        for channel, gain, shift in ((7, 30.0, 0.0), (300, 60.0, 40.0), (900, 20.0, 0.0)):
            vision.pre_layrnorm.weight[channel] = gain
            vision.pre_layrnorm.bias[channel] = shift
    model.save_pretrained(folder)
    return folder


def with_loud_tokens(images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Six tokens an image eight times as large: what registers are in CLIP and DINOv2."""
    chance = np.random.default_rng(0)
    made = []
    for image in images:
        loud = image.astype(np.float32)
        loud[chance.choice(len(loud), 6, replace=False)] *= 8
        made.append(loud.astype(np.float16))
    return made


def milliseconds(work: Callable[[], object], repeat: int = 30) -> float:
    """The median."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return round(statistics.median(times) * 1e3, 3)


def loss_of(model: Path, recipe: Recipe) -> float:
    """The loss of stage 1's ``model`` over the held-out samples, reading the features of ``recipe``."""
    loaded = model_folder.load(model)
    features = open_features(recipe, 1)
    template = registry().create("templates", {"name": loaded.description["template"]})
    parts, stage = loaded.bundle, recipe.stage1
    encoding = Encoding(template, parts.tokenizer, parts.image_tokens, stage.max_length)
    held_out = load_split(recipe.data.stage1, stage, encoding, features, features.contents, recipe.seed).validation
    total, tokens = 0.0, 0
    for index in range(len(held_out)):
        (batch,) = padded_micro_batches(held_out, [(0, index)], Partition(MicroBatchLimits(1, None)))
        with torch.inference_mode():
            total += parts.model(batch).item()
        tokens += int((batch.labels != IGNORE).sum())
    return total / tokens


def trained(samples: int, seeds: int, folder: Path) -> Documents:
    """The demo's stage 1 on ``samples`` drawn scenes with each dtype, all else the same; again with other seeds.

    ``read_percent``, what rounding itself does: the change of the final loss of the connector trained on float16 when
    it reads the int8 features of the same held-out scenes. ``change_percent``: that of training on int8 from the start.
    Its connector is LLaVA v1's one linear layer: the loss of the two-layer one drops from 2 to 1 in a few steps, and
    which ones is chance. So short a training tells little even so: ``spread_percent`` is the standard deviation of
    float16's own losses over seeds.
    """
    (folder / "recipe.yaml").write_text(
        f"""\
extends: demo
name: int8
generate: null
data: {{stage1: [{{name: scenes, content: descriptions, scenes: {samples}}}], stage2: []}}
stage1: {{validation: 0.1}}
eval: {{tasks: []}}
""",
        encoding="utf-8",
    )
    losses: dict[str, list[float]] = {}
    read: dict[str, list[float]] = {}
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
            read.setdefault(dtype, []).append(loss_of(folder / "float16" / str(seed) / "stage1" / "model", recipe))
            yield {"samples": samples, "steps": steps, **changes(losses, read)}


def changes(losses: dict[str, list[float]], read: dict[str, list[float]]) -> dict[str, Any]:
    """Changes by int8, over the seeds that both dtypes were trained with."""
    halves, small = losses["float16"], losses.get("int8", [])
    both = halves[: len(small)]
    reads = zip(read.get("int8", []), read["float16"][: len(small)], strict=True)
    return {
        "read_percent": [100 * (ours / theirs - 1) for ours, theirs in reads],
        "val_loss": losses,
        "change_percent": 100 * (statistics.mean(small) / statistics.mean(both) - 1) if small else None,
        "change_percent_by_seed": [100 * (ours / theirs - 1) for ours, theirs in zip(small, both, strict=True)],
        "spread_percent": 100 * statistics.stdev(halves) / statistics.mean(halves) if len(halves) > 1 else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--train", type=int, default=1000, metavar="SAMPLES")
    parser.add_argument("--seeds", type=int, default=2)
    add_options(parser)
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    publish(documents(given), given, shown)


def documents(given: argparse.Namespace) -> Documents:
    with tempfile.TemporaryDirectory() as name:
        os.environ["LLAVACTL_HOME"] = str(Path(name, "home"))
        document = measured(given, Path(name))
        yield document
        if given.train:
            for found in trained(given.train, given.seeds, Path(name)):
                yield {**document, "stage1": found}


def measured(given: argparse.Namespace, folder: Path) -> Document:
    from llavactl_demo.convert import vision_folder

    paths = sorted(PHOTOS.glob("*2017/*.jpg"))[: given.photos]
    towers = {
        "DINOv2 ViT-S/14, layer -2": encoded(vision_folder(), -2, paths),
        "DINOv2 ViT-S/14, layer 6": encoded(vision_folder(), 6, paths),
        "CLIP L/336 shape, outlier channels": encoded(planted(folder / "clip"), -2, paths[:4]),
    }
    towers["the same, outlier tokens too"] = with_loud_tokens(towers["CLIP L/336 shape, outlier channels"])
    one = towers["the same, outlier tokens too"][0]
    integers, scales = quantize(one)
    return {
        "machine": f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, "
        f"{platform.machine()}",
        "bytes_of_float16": bytes_of(CLIP, 1024, 1024, "int8") / bytes_of(CLIP, 1024, 1024),
        "ms_an_image_576x1024": {
            "quantise": milliseconds(lambda: quantize(one)),
            "restore": milliseconds(lambda: dequantize(integers, scales)),
            "copy float16": milliseconds(one.copy),
        },
        "photos": len(paths),
        "errors": {
            name: {way: errors(images, round_trip) for way, round_trip in WAYS.items()}
            for name, images in towers.items()
        },
    }


def shown(document: Document) -> str:
    lines = [document["machine"], f"bytes of float16's: {document['bytes_of_float16']:.4f}"]
    lines.append("ms: " + ", ".join(f"{what} {ms}" for what, ms in document["ms_an_image_576x1024"].items()))
    for name, ways in document["errors"].items():
        lines += [name, *(f"  {way:<18} even {each['even']:.4f}, worst token's even cosine "
                          f"{each['even_cosine_of_a_token_worst']:.5f}" for way, each in ways.items())]  # fmt: skip
    if "stage1" in document:
        lines.append(json.dumps(document["stage1"], indent=1))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
