"""Speed of extraction, from image files to stored features, compared with the encoder alone and with other programs.

    python benchmarks/extract.py                                       # 6 minutes on 2 cores
    python benchmarks/extract.py --out benchmarks/results/extract-2-cores.json
    python benchmarks/extract.py --encoders tiny --images 8 --rounds 1 # a quick functional check

Encoders have the architecture of real models and random weights. Images are those of ``../shared/data/coco-mini`` if
present, otherwise synthetic. In every round each method processes the same images, in random order of methods; results
are medians over rounds, with models loaded and warm. Besides wall time, the CPU time of all threads and workers is
reported, which other load on the machine hardly affects.

- encoder only           the encoder, truncated at the layer it needs, on pixels in memory: no reading, no writing
- llavactl               files hashed, read, decoded, preprocessed and encoded; features written, fsynced, checksummed
- DataLoader             a PyTorch DataLoader with two workers, the truncated encoder, one fsynced .npy per image
- transformers pipeline  image-feature-extraction: the full model, its last layer, nothing written
- one image at a time    as in LLaVA's training loop: the full model, nothing written

``speed_vs_encoder_only`` is the ratio of wall times. If preprocessing is the bottleneck, the encoder alone is no
meaningful limit: ``cpu_s_per_image_by_step`` is the CPU time of each step, measured separately on one thread, and
``speed_vs_cpu_limit`` is the ratio to all cores doing only these steps.
"""

from __future__ import annotations

import argparse
import io
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rounds import Document, Documents, add_options, publish

from llavactl import ImageFile, TransformersVision
from llavactl.components.vision.encoder import Preprocess, VisionEncoder, pad_to_square
from llavactl.components.vision.pretrained import ClipOptions
from llavactl.features import ContentKeys, StoreWriter, content_key
from llavactl.features.backbone import Backbone
from llavactl.features.fill import ExtractionJob, fill_store
from llavactl.features.fingerprint import identity_fingerprint
from llavactl.features.plan import ExtractionTarget, plan_extraction
from llavactl.features.prepare import prepare
from llavactl.recipe.sections import Features
from llavactl.testing import toy_clip

COCO = Path(__file__).parents[2] / "shared" / "data" / "coco-mini"
BATCH_SIZE = 4


def save_large(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)


def save_small(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)


@dataclass(frozen=True)
class EncoderSetup:
    """An encoder to measure: how to create it, and the default number of images per round."""

    description: str
    save: Callable[[Path], object]
    images: int


ENCODERS = {
    "large": EncoderSetup("CLIP ViT-L/14, 336 px", save_large, 8),
    "small": EncoderSetup("DINOv2 ViT-S/14, 224 px", save_small, 64),
    "tiny": EncoderSetup("CLIP, 3 layers of width 32, 28 px", toy_clip, 64),
}


@dataclass(frozen=True)
class Bench:
    """One encoder and its images. ``batches`` are pixels [BATCH_SIZE, 3, H, W] in memory."""

    folder: Path
    vision: TransformersVision
    backbone: Backbone
    full_model: torch.nn.Module
    images: Sequence[ImageFile]
    batches: Sequence[torch.Tensor]

    @property
    def encoder(self) -> VisionEncoder:
        encoder: VisionEncoder = self.backbone.encoder  # type: ignore[assignment]
        return encoder


def image_files(folder: Path, count: int) -> list[ImageFile]:
    """``count`` JPEG files with distinct bytes: real images with different trailing bytes, or synthetic ones."""
    folder.mkdir()
    real = sorted(COCO.glob("*2017/*.jpg"))
    sources = [path.read_bytes() for path in real] or [synthetic_jpeg(seed) for seed in range(16)]
    for index, data in enumerate(islice(cycle(sources), count)):
        (folder / f"{index}.jpg").write_bytes(data + index.to_bytes(2))
    return [ImageFile(str(folder), f"{index}.jpg") for index in range(count)]


def synthetic_jpeg(seed: int) -> bytes:
    """A JPEG of 640x480 with about as much detail as a photo."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8))
    buffer = io.BytesIO()
    coarse.resize((640, 480), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def create_bench(name: str, count: int, folder: Path) -> Bench:
    torch.manual_seed(0)
    ENCODERS[name].save(folder / name)
    vision = TransformersVision(ClipOptions(model=str(folder / name), layer=-2, image="pad"))
    backbone = Backbone(vision.load("cpu", "float32"), "cpu", BATCH_SIZE)
    images = image_files(folder / f"images of {name}", count)
    pixels = [prepare(backbone.encoder, image) for image in images]
    backbone.encode(pixels[:BATCH_SIZE])  # type: ignore[arg-type] # compares batches with single images, once
    full_model = vision.whole().eval().requires_grad_(False)
    starts = range(0, count, BATCH_SIZE)
    batches = [torch.from_numpy(np.stack(pixels[start : start + BATCH_SIZE])) for start in starts]  # type: ignore[arg-type]
    return Bench(folder, vision, backbone, full_model, images, batches)


def encoder_only(bench: Bench) -> None:
    for batch in bench.batches:
        bench.encoder.encode(batch)


@contextmanager
def temporary_home(folder: Path) -> Iterator[None]:
    """An empty store, removed outside of the measured time."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        os.environ["LLAVACTL_HOME"] = name
        yield


def run_llavactl(bench: Bench) -> None:
    settings = Features(shard_images=len(bench.images))
    fingerprint = identity_fingerprint({"identity": bench.vision.identity()}, settings)
    target = ExtractionTarget(bench.vision, fingerprint, "pad", (1,), tuple(bench.images))
    result = fill_store(ExtractionJob(plan_extraction(target, ContentKeys()), bench.backbone, settings))
    if result.encoded != len(bench.images):
        raise SystemExit(f"{result.encoded} of {len(bench.images)} images were stored: {result.failures}")


def decoded_pixels(preprocess: Preprocess, image: ImageFile) -> np.ndarray:
    with Image.open(io.BytesIO(image.read())) as opened:
        return preprocess(opened.convert("RGB"))


class ImageDataset(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, bench: Bench) -> None:
        self.images, self.preprocess = bench.images, bench.encoder.preprocess

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        return decoded_pixels(self.preprocess, self.images[index])


def data_loader(bench: Bench) -> None:
    index = 0
    for batch in torch.utils.data.DataLoader(ImageDataset(bench), batch_size=BATCH_SIZE, num_workers=2):
        for features in bench.encoder.encode(batch).to(torch.float16).numpy():
            with Path(os.environ["LLAVACTL_HOME"], f"{index}.npy").open("wb") as file:
                np.save(file, features)
                os.fsync(file.fileno())
            index += 1


def transformers_pipeline(bench: Bench) -> Callable[[], None]:
    from transformers import pipeline

    processor = bench.vision.processor
    pipe = pipeline("image-feature-extraction", model=bench.full_model, image_processor=processor, device="cpu")
    files = [str(image.file) for image in bench.images]

    def run() -> None:
        pipe(files, batch_size=BATCH_SIZE, return_tensors=True)

    return run


@torch.inference_mode()
def one_at_a_time(bench: Bench) -> None:
    processor = bench.vision.processor
    color = tuple(int(mean * 255) for mean in processor.image_mean)
    for image in bench.images:
        with Image.open(io.BytesIO(image.read())) as opened:
            square = pad_to_square(opened.convert("RGB"), color)
        pixels = processor(images=square, return_tensors="pt")["pixel_values"]
        bench.full_model(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:].to(torch.float16)


def cpu_seconds() -> float:
    """CPU time of this process, its threads, and finished child processes."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def cpu_s_by_step(bench: Bench) -> dict[str, float]:
    """CPU seconds per image of each step, measured separately on one thread."""
    sample = bench.images[: 4 * BATCH_SIZE]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    features = bench.backbone.encode(list(bench.batches[0].numpy()))
    started = cpu_seconds()
    for image in sample:
        prepare(bench.encoder, image, content_key(image.read()))
    prepared = cpu_seconds()
    batches = bench.batches[: 1 if bench.encoder.shape.patches > 400 else len(bench.batches)]
    for batch in batches:
        bench.encoder.encode(batch)
    encoded = cpu_seconds()
    repeats = 16
    fingerprint = identity_fingerprint({"identity": bench.vision.identity()}, Features())
    with StoreWriter(fingerprint, bench.encoder.shape, repeats * len(features)) as writer:
        for repeat in range(repeats):
            writer.append([content_key(b"%d %d" % (repeat, row)) for row in range(len(features))], features)
    stored = cpu_seconds()
    torch.set_num_threads(threads)
    return {
        "prepare": (prepared - started) / len(sample),
        "encode": (encoded - prepared) / sum(map(len, batches)),
        "store": (stored - encoded) / (repeats * len(features)),
    }


def measure(name: str, options: argparse.Namespace, folder: Path) -> Documents:
    bench = create_bench(name, options.images or ENCODERS[name].images, folder)
    methods: dict[str, Callable[[], None]] = {
        "encoder only": partial(encoder_only, bench),
        "llavactl": partial(run_llavactl, bench),
        "DataLoader": partial(data_loader, bench),
        "transformers pipeline": transformers_pipeline(bench),
        "one image at a time": partial(one_at_a_time, bench),
    }
    rng, count = random.Random(options.seed), len(bench.images)
    wall: dict[str, list[float]] = {method: [] for method in methods}
    cpu: dict[str, list[float]] = {method: [] for method in methods}
    with temporary_home(folder):
        steps = cpu_s_by_step(bench)
    for round_number in range(1, options.rounds + 1):
        for method in rng.sample(sorted(methods), len(methods)):
            with temporary_home(folder):
                started, cpu_started = time.perf_counter(), cpu_seconds()
                methods[method]()
                wall[method].append((time.perf_counter() - started) / count)
                cpu[method].append((cpu_seconds() - cpu_started) / count)
        print(f"{name}: round {round_number} of {options.rounds}", file=sys.stderr, flush=True)
        yield {
            "description": ENCODERS[name].description,
            "rounds": round_number,
            "images_per_round": count,
            "cpu_s_per_image_by_step": {step: round(seconds, 5) for step, seconds in steps.items()},
            "methods": {method: compared(method, wall, cpu, sum(steps.values())) for method in methods},
        }


def compared(
    method: str, wall: dict[str, list[float]], cpu: dict[str, list[float]], cpu_limit: float
) -> dict[str, float]:
    def vs_encoder_only(times: dict[str, list[float]]) -> float:
        pairs = zip(times["encoder only"], times[method], strict=True)
        return round(statistics.median(encoder / seconds for encoder, seconds in pairs), 3)

    seconds = statistics.median(wall[method])
    return {
        "s_per_image": round(seconds, 5),
        "images_per_s": round(1 / seconds, 2),
        "speed_vs_encoder_only": vs_encoder_only(wall),
        "speed_vs_cpu_limit": round(cpu_limit / cores() / seconds, 3),
        "cpu_s_per_image": round(statistics.median(cpu[method]), 5),
        "speed_vs_encoder_only_by_cpu_time": vs_encoder_only(cpu),
    }


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=["large", "small"])
    parser.add_argument("--images", type=int, help="images per round, a multiple of 4; default: large 8, small 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(cores())
    publish(documents(options), options, as_text)


def documents(options: argparse.Namespace) -> Documents:
    document = {
        "machine": f"{cores()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "transformers", "numpy", "pillow")},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in options.encoders:
            for result in measure(name, options, Path(folder)):
                document |= {name: result}
                yield document


def as_text(document: Document) -> str:
    lines = [str(document["machine"])]
    for result in (value for value in document.values() if isinstance(value, dict) and "methods" in value):
        steps = ", ".join(
            f"{step} {seconds * 1e3:.1f} ms" for step, seconds in result["cpu_s_per_image_by_step"].items()
        )
        lines.append(f"{result['description']}: CPU time per image: {steps}")
        lines += [
            f"  {method:<21} {figures['images_per_s']:>8.2f} images/s, speed relative to encoder only "
            f"{figures['speed_vs_encoder_only']:.3f} (by CPU time {figures['speed_vs_encoder_only_by_cpu_time']:.3f}), "
            f"to the CPU limit {figures['speed_vs_cpu_limit']:.3f}"
            for method, figures in result["methods"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
