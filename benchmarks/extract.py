"""From image files to stored features: ours beside the bare tower and beside what else there is, in one run.

    python benchmarks/extract.py                                       # 6 minutes on 2 cores
    python benchmarks/extract.py --out benchmarks/results/extract-2-cores.json
    python benchmarks/extract.py --towers tiny --images 8 --rounds 1   # does it run?

Towers have the shape of the real ones and random weights; photos are those of ``../shared/data/coco-mini``, or drawn.
In every round each way takes the same photos, in an order drawn anew; figures are medians over rounds. Models are
loaded and warm. Wall time, and the processor time of all threads and workers, which other work on the machine hardly
changes.

- bare        the tower, cut at the layer it needs, on ready batches of pixels: nothing read, nothing written
- ours        files hashed, read, decoded, preprocessed and encoded, features written, fsynced, checksummed and listed
- loader      what one writes oneself: a DataLoader with two workers before the cut tower, an .npy an image, fsynced
- pipeline    transformers' image-feature-extraction: the whole tower, its last layer, nothing written
- one by one  as LLaVA does in training: one image at a time through the whole tower, nothing written

``of_bare`` is the speed relative to bare. Where preprocessing binds, the bare tower is no limit: ``needed`` has the
processor seconds that an image needs, each part alone on one thread, and ``of_needed`` is the speed relative to all
cores doing nothing else.
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

PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "coco-mini"
GROUP = 4


def large(folder: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
        patch_size=14, projection_dim=768,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)


def small(folder: Path) -> None:
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, image_size=224, patch_size=14)
    Dinov2Model(config).save_pretrained(folder)


@dataclass(frozen=True)
class Shape:
    """A tower to measure: how it is made, and how many photos a round it takes in a bearable time."""

    what: str
    make: Callable[[Path], object]
    images: int


TOWERS = {
    "large": Shape("CLIP ViT-L/14, 336 px", large, 8),
    "small": Shape("DINOv2 ViT-S/14, 224 px", small, 64),
    "tiny": Shape("CLIP, 3 layers of width 32, 28 px", toy_clip, 64),
}


@dataclass(frozen=True)
class Bench:
    """One tower and its photos. ``ready`` are batches of pixels [GROUP, 3, H, W]."""

    folder: Path
    vision: TransformersVision
    backbone: Backbone
    whole: torch.nn.Module
    photos: Sequence[ImageFile]
    ready: Sequence[torch.Tensor]

    @property
    def tower(self) -> VisionEncoder:
        found: VisionEncoder = self.backbone.encoder  # type: ignore[assignment]
        return found


def photos(folder: Path, count: int) -> list[ImageFile]:
    """``count`` JPEG files, no two alike: real ones over and over, a byte behind their end changed, or drawn ones."""
    folder.mkdir()
    real = sorted(PHOTOS.glob("*2017/*.jpg"))
    sources = [path.read_bytes() for path in real] or [drawn(seed) for seed in range(16)]
    for number, data in enumerate(islice(cycle(sources), count)):
        (folder / f"{number}.jpg").write_bytes(data + number.to_bytes(2))
    return [ImageFile(str(folder), f"{number}.jpg") for number in range(count)]


def drawn(seed: int) -> bytes:
    """A JPEG of 640x480 with as much detail as a photo has."""
    chance = np.random.default_rng(seed)
    coarse = Image.fromarray(chance.integers(0, 256, (60, 80, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    made = io.BytesIO()
    coarse.save(made, "JPEG", quality=90)
    return made.getvalue()


def prepared(name: str, count: int, folder: Path) -> Bench:
    shape = TOWERS[name]
    torch.manual_seed(0)
    shape.make(folder / name)
    vision = TransformersVision(ClipOptions(model=str(folder / name), layer=-2, image="pad"))
    backbone = Backbone(vision.load("cpu", "float32"), "cpu", GROUP)
    images = photos(folder / f"photos of {name}", count)
    pixels = [prepare(backbone.encoder, image) for image in images]
    backbone.encode(pixels[:GROUP])  # type: ignore[arg-type] # compares batches with single images, once a process
    whole = vision.whole().eval().requires_grad_(False)
    ready = [torch.from_numpy(np.stack(pixels[at : at + GROUP])) for at in range(0, count, GROUP)]  # type: ignore[arg-type]
    return Bench(folder, vision, backbone, whole, images, ready)


def bare(bench: Bench) -> None:
    for batch in bench.ready:
        bench.tower.encode(batch)


@contextmanager
def fresh_home(folder: Path) -> Iterator[None]:
    """A store of its own, removed when the clock stands still."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        os.environ["LLAVACTL_HOME"] = name
        yield


def ours(bench: Bench) -> None:
    settings = Features(shard_images=len(bench.photos))
    fingerprint = identity_fingerprint({"identity": bench.vision.identity()}, settings)
    target = ExtractionTarget(bench.vision, fingerprint, "pad", (1,), tuple(bench.photos))
    result = fill_store(ExtractionJob(plan_extraction(target, ContentKeys()), bench.backbone, settings))
    if result.encoded != len(bench.photos):
        raise SystemExit(f"{result.encoded} of {len(bench.photos)} photos were stored: {result.failures}")


def opened(preprocess: Preprocess, image: ImageFile) -> np.ndarray:
    with Image.open(io.BytesIO(image.read())) as picture:
        return preprocess(picture.convert("RGB"))


class Photos(torch.utils.data.Dataset[np.ndarray]):
    def __init__(self, bench: Bench) -> None:
        self.photos, self.preprocess = bench.photos, bench.tower.preprocess

    def __len__(self) -> int:
        return len(self.photos)

    def __getitem__(self, index: int) -> np.ndarray:
        return opened(self.preprocess, self.photos[index])


def loader(bench: Bench) -> None:
    number = 0
    for batch in torch.utils.data.DataLoader(Photos(bench), batch_size=GROUP, num_workers=2):
        for features in bench.tower.encode(batch).to(torch.float16).numpy():
            with Path(os.environ["LLAVACTL_HOME"], f"{number}.npy").open("wb") as file:
                np.save(file, features)
                os.fsync(file.fileno())
            number += 1


def pipeline(bench: Bench) -> Callable[[], None]:
    from transformers import pipeline

    pipe = pipeline("image-feature-extraction", model=bench.whole, image_processor=bench.vision.processor, device="cpu")
    files = [str(image.file) for image in bench.photos]

    def run() -> None:
        pipe(files, batch_size=GROUP, return_tensors=True)

    return run


@torch.inference_mode()
def one_by_one(bench: Bench) -> None:
    processor = bench.vision.processor
    colour = tuple(int(mean * 255) for mean in processor.image_mean)
    for image in bench.photos:
        with Image.open(image.file) as picture:
            square = pad_to_square(picture.convert("RGB"), colour)
        pixels = processor(images=square, return_tensors="pt")["pixel_values"]
        bench.whole(pixel_values=pixels, output_hidden_states=True).hidden_states[-2][:, 1:].to(torch.float16)


def processor_s() -> float:
    """Of this process, its threads, and the workers that it waited for."""
    used = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def needed(bench: Bench) -> dict[str, float]:
    """Processor seconds an image, each part alone on one thread."""
    some = bench.photos[: 4 * GROUP]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    features = bench.backbone.encode(list(bench.ready[0].numpy()))
    began = processor_s()
    for image in some:
        prepare(bench.tower, image, content_key(image.read()))
    read = processor_s()
    few = bench.ready[: 1 if bench.tower.shape.patches > 400 else len(bench.ready)]
    for batch in few:
        bench.tower.encode(batch)
    encoded = processor_s()
    repeat = 16
    with StoreWriter(
        identity_fingerprint({"identity": bench.vision.identity()}, Features()),
        bench.tower.shape,
        repeat * len(features),
    ) as writer:
        for number in range(repeat):
            writer.append([content_key(b"%d %d" % (number, row)) for row in range(len(features))], features)
    stored = processor_s()
    torch.set_num_threads(threads)
    return {
        "prepare": (read - began) / len(some),
        "encode": (encoded - read) / sum(map(len, few)),
        "store": (stored - encoded) / (repeat * len(features)),
    }


def measured(name: str, given: argparse.Namespace, folder: Path) -> Documents:
    bench = prepared(name, given.images or TOWERS[name].images, folder)
    ways: dict[str, Callable[[], None]] = {
        "bare": partial(bare, bench),
        "ours": partial(ours, bench),
        "loader": partial(loader, bench),
        "pipeline": pipeline(bench),
        "one by one": partial(one_by_one, bench),
    }
    chance, count = random.Random(given.seed), len(bench.photos)
    wall: dict[str, list[float]] = {way: [] for way in ways}
    processor: dict[str, list[float]] = {way: [] for way in ways}
    with fresh_home(folder):
        parts = needed(bench)
    for number in range(given.rounds):
        for way in chance.sample(sorted(ways), len(ways)):
            with fresh_home(folder):
                began, worked = time.perf_counter(), processor_s()
                ways[way]()
                wall[way].append((time.perf_counter() - began) / count)
                processor[way].append((processor_s() - worked) / count)
        print(f"{name}: round {number + 1} of {given.rounds}", file=sys.stderr, flush=True)
        yield {
            "what": TOWERS[name].what,
            "rounds": number + 1,
            "images_a_round": count,
            "needed_processor_s": {part: round(taken, 5) for part, taken in parts.items()},
            "ways": {way: compared(way, wall, processor, sum(parts.values())) for way in ways},
        }


def compared(
    way: str, wall: dict[str, list[float]], processor: dict[str, list[float]], need: float
) -> dict[str, float]:
    def of_bare(times: dict[str, list[float]]) -> float:
        return round(statistics.median(bare / taken for bare, taken in zip(times["bare"], times[way], strict=True)), 3)

    taken = statistics.median(wall[way])
    return {
        "s_an_image": round(taken, 5),
        "images_per_s": round(1 / taken, 2),
        "of_bare": of_bare(wall),
        "of_needed": round(need / cores() / taken, 3),
        "processor_s_an_image": round(statistics.median(processor[way]), 5),
        "processor_of_bare": of_bare(processor),
    }


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--towers", nargs="+", choices=TOWERS, default=["large", "small"])
    parser.add_argument("--images", type=int, help="photos a round, a multiple of 4; large 8, small 64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    add_options(parser)
    given = parser.parse_args()
    torch.set_num_threads(cores())
    publish(documents(given), given, shown)


def documents(given: argparse.Namespace) -> Documents:
    document = {
        "machine": f"{cores()} cores, load {os.getloadavg()[0]:.1f}, {torch.get_num_threads()} threads",
        "versions": {package: version(package) for package in ("torch", "transformers", "numpy", "pillow")},
    }
    with tempfile.TemporaryDirectory() as name:
        for tower in given.towers:
            for found in measured(tower, given, Path(name)):
                document |= {tower: found}
                yield document


def shown(document: Document) -> str:
    lines = [str(document["machine"])]
    for found in (each for each in document.values() if isinstance(each, dict) and "ways" in each):
        parts = ", ".join(f"{part} {taken * 1e3:.1f} ms" for part, taken in found["needed_processor_s"].items())
        lines.append(f"{found['what']}: an image needs {parts} of a processor")
        lines += [
            f"  {way:<11} {each['images_per_s']:>8.2f} images/s, {each['of_bare']:.3f} of bare "
            f"({each['processor_of_bare']:.3f} by processor time), {each['of_needed']:.3f} of needed"
            for way, each in found["ways"].items()
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
