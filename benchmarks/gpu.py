"""Speed and memory on one GPU, with random weights: extraction, and training at the shapes of 1B, 3B and 7B models.

    python benchmarks/gpu.py --json --out gpu.json      # 8 minutes on an H200; from a checkout, without installation
    python benchmarks/gpu.py --sizes 7b --rounds 5
    python benchmarks/gpu.py --smoke                    # tiny models, on any device, to test the script itself

Nothing is downloaded. Training is measured as ``llavactl train`` computes it in bfloat16: forward and backward pass,
accumulation in float32, update of the master weights (with a learning rate of 0). Records are random, with the lengths
of LLaVA's data and 576 tokens per image. Every variant of a model is measured once per round, in random order, after a
round that warms up; results are medians.

- packed    sequence packing, every record with its own image
- shared    sequence packing and prefix sharing: five records per image in stage 1, two in stage 2
- padded    one padded batch of the same records

``samples_per_s`` and ``mfu`` are for a step with a global batch of 256 samples in stage 1 and 128 in stage 2:
micro-batches of ``samples``, and one update. ``mfu`` counts only useful FLOPs (training/throughput.py) and is relative
to ``matmul_flops_per_s``, the fastest of a few products of random matrices on this device. ``peak_bytes`` is the
largest memory of tensors while a variant ran, ``predicted_bytes`` what ``llavactl train --dry-run`` predicts for it. A
variant that doesn't fit has ``"out_of_memory": true`` instead.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout may not be installed

import numpy as np
import torch
from records import PER_IMAGE, RandomFeatures, random_records, with_shared_images
from rounds import Document, Documents, add_options, publish
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, CLIPVisionConfig, CLIPVisionModel, LlamaConfig

from llavactl.components.vision.encoder import VisionEncoder
from llavactl.core.library_errors import out_of_memory
from llavactl.core.schema import IGNORE, Batch, FeatureShape
from llavactl.data.batches import collate, pack
from llavactl.data.packing import MicroBatchLimits, plan_sequences
from llavactl.features.backbone import Backbone
from llavactl.model.build import build_connector
from llavactl.model.cpu.rms_norm import fused_rms_norms
from llavactl.model.cuda import liger
from llavactl.model.cuda.self_check import packed_attention_fault
from llavactl.model.inputs import to_device
from llavactl.model.llava import LlavaModel
from llavactl.model.packed import packed_attention
from llavactl.recipe.stages import AnyStage, Lora, Stage1, Stage2
from llavactl.training.optimizer import Optimizer
from llavactl.training.placement import Placement
from llavactl.training.prediction.fake import as_fake, fake_tensors
from llavactl.training.prediction.step import step_memory
from llavactl.training.prediction.weights import Weights
from llavactl.training.throughput import TrainingFlops, Work, peak, training_flops
from llavactl.training.trainable import configure_trainable
from llavactl.training.update_rules import assign_update_rules, moments_by_weight

DTYPE = torch.bfloat16
LAYOUTS = ("packed", "shared", "padded")
STAGES: dict[str, tuple[int, AnyStage]] = {
    "stage1": (1, Stage1()),
    "stage2-full": (2, Stage2(method="full")),
    "stage2-lora": (2, Stage2(method="lora")),
}


@dataclass(frozen=True)
class Scale:
    """The size of the benchmark: Llama shapes by name, a CLIP shape, and numbers of samples and images.

    ``micro_batch``: samples with and without gradient checkpointing.
    """

    languages: dict[str, dict[str, Any]]
    vision: dict[str, int]
    micro_batch: dict[bool, int]
    images: int
    image_batch: int
    matrix_rows: int
    rank: int

    @property
    def features(self) -> FeatureShape:
        side = self.vision["image_size"] // self.vision["patch_size"]
        return FeatureShape((side, side), self.vision["hidden_size"])


FULL = Scale(
    languages={
        "1b": {  # Llama 3.2 1B
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
        "3b": {  # Llama 3.2 3B
            "hidden_size": 3072,
            "intermediate_size": 8192,
            "num_hidden_layers": 28,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
        "7b": {  # Vicuna v1.5 7B
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "vocab_size": 32000,
        },
    },
    # CLIP ViT-L/14-336 up to its second-to-last layer
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    micro_batch={True: 16, False: 4},
    images=1024,
    image_batch=64,
    matrix_rows=8192,
    rank=128,
)
SMOKE = Scale(
    languages={
        "tiny": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 300,
        }
    },
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
    },
    micro_batch={True: 4, False: 2},
    images=8,
    image_batch=4,
    matrix_rows=128,
    rank=4,
)


Variant = tuple[str, bool]
"""Layout, and whether activations are checkpointed."""


@dataclass
class Samples:
    """Measurements of one variant, over rounds."""

    micro_batch_s: list[float] = field(default_factory=list)
    update_s: list[float] = field(default_factory=list)
    peak_bytes: int = 0


class Clock:
    """Seconds and peak memory of work on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def seconds(self, work: Callable[[], Any]) -> float:
        self._synchronize()
        began = time.perf_counter()
        work()
        self._synchronize()
        return time.perf_counter() - began

    def reset_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_bytes(self) -> int:
        """0 on a CPU, where the memory of tensors isn't counted."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def matmul_flops_per_s(clock: Clock, rows: int, products: int = 10) -> float:
    """FLOP/s of the fastest of ``products`` products of random square matrices."""
    left, right = (torch.randn(rows, rows, device=clock.device, dtype=DTYPE) for _ in range(2))
    return 2 * rows**3 / min(clock.seconds(lambda: left @ right) for _ in range(products))


def measure_extraction(scale: Scale, clock: Clock, rounds: int, matmul: float) -> Document:
    """Encoding pixels in host memory to features in host memory, as ``llavactl extract`` does after preprocessing."""
    torch.manual_seed(0)
    with torch.device(clock.device):
        model = CLIPVisionModel(CLIPVisionConfig(**scale.vision)).to(DTYPE).eval().requires_grad_(False)
    encoder = VisionEncoder(model, None, scale.features, (scale.vision["num_hidden_layers"],), 1)  # type: ignore[arg-type]
    backbone = Backbone(encoder, str(clock.device), scale.image_batch)
    side = scale.vision["image_size"]
    pixels = list(np.random.default_rng(0).standard_normal((scale.image_batch, 3, side, side), dtype=np.float32))
    with FlopCounterMode(display=False) as counter:
        encoder.encode(torch.from_numpy(pixels[0])[None].to(clock.device))

    def encode_all() -> None:
        pending = [backbone.encode_async(pixels)]
        for _ in range(scale.images // scale.image_batch - 1):
            pending.append(backbone.encode_async(pixels))
            pending.pop(0)()
        pending.pop()()

    clock.reset_peak()
    encode_all()
    seconds = statistics.median(clock.seconds(encode_all) for _ in range(rounds))
    per_s = scale.images / seconds
    return {
        "images_per_s": round(per_s, 2),
        "batch": scale.image_batch,
        "mfu": round(counter.get_total_flops() * per_s / matmul, 4),
        "peak_bytes": clock.peak_bytes(),
    }


def random_model(shape: dict[str, Any], features: FeatureShape, device: torch.device) -> LlavaModel:
    """A model of this ``shape``; without weights on the device ``meta``."""
    torch.manual_seed(0)
    with torch.device(device):
        language = AutoModelForCausalLM.from_config(LlamaConfig(**shape), dtype=DTYPE, attn_implementation="sdpa")
    language.config.use_cache = False
    connector, _ = build_connector({"name": "mlp2x-gelu"}, features, shape["hidden_size"])
    return LlavaModel(connector.to(device, DTYPE), language)


def set_checkpointing(language: Any, enabled: bool) -> None:
    # transformers 6 has only the first name, 5.17 only the second.
    verb = "enable" if enabled else "disable"
    set_it = getattr(language, f"activation_checkpointing_{verb}", None)
    set_it = set_it or getattr(language, f"gradient_checkpointing_{verb}")
    set_it({"use_reentrant": False}) if enabled else set_it()


def micro_batch(layout: str, stage: int, samples: int, scale: Scale, shape: dict[str, Any]) -> Batch:
    """The same records in every layout."""
    features = RandomFeatures(scale.features)
    vocabulary = min(shape["vocab_size"], 32000)
    items = random_records(stage, samples, random.Random(0), scale.features, vocabulary)
    names = [str(index) for index in range(samples)]
    if layout == "padded":
        return collate(items, features, names=names)
    if layout == "shared":
        items = with_shared_images(items, PER_IMAGE[stage])
    (groups,) = plan_sequences(items, scale.features.patches, MicroBatchLimits(samples))
    return pack([(group.prefix_length, [items[i] for i in group.samples]) for group in groups], features, names=names)


@dataclass(frozen=True)
class Trainee:
    """A model in training, whose norms and MLPs are those of liger-kernel if ``with_liger``."""

    model: LlavaModel
    optimizer: Optimizer
    clock: Clock
    with_liger: bool

    def seconds(self, variant: Variant, batch: Batch) -> tuple[float, float] | None:
        """Seconds of a micro-batch and of an update; None if the micro-batch doesn't fit in memory."""
        layout, checkpointing = variant
        language, targets = self.model.language, int((batch.labels != IGNORE).sum())
        set_checkpointing(language, checkpointing)
        self.model.train()

        def run() -> None:
            (self.model(to_device(batch, self.clock.device)) / targets).backward()
            self.optimizer.accumulate()

        self.clock.reset_peak()
        with (
            nullcontext() if layout == "padded" else packed_attention(language),
            fused_rms_norms(language),
            liger.liger_layers(language) if self.with_liger else nullcontext(),
        ):
            try:
                micro_batch_s = self.clock.seconds(run)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
            else:
                return micro_batch_s, self.clock.seconds(lambda: self.optimizer.step(0.0))
        for parameter in self.optimizer.parameters.values():
            parameter.grad = None
        release()
        return None


def predicted_bytes(
    shape: dict[str, Any], features: FeatureShape, settings: AnyStage, batch: Batch, device: torch.device
) -> int:
    """The peak of the memory of tensors on ``device`` that ``llavactl train --dry-run`` predicts for ``batch``."""
    model = random_model(shape, features, torch.device("meta"))
    with torch.device("meta"):
        configure_trainable(model, settings, seed=0)
    state = Weights(model, DTYPE.itemsize, moments_by_weight(model, settings)).memory(Placement(), 1).device
    with fake_tensors():
        as_fake(model, DTYPE)
        step = step_memory(model, batch, cuda=device.type == "cuda", master_gradients=True).whole
    return round(sum(state.values()) + sum(step.values()))


def measure_training(
    name: str, shape: dict[str, Any], scale: Scale, clock: Clock, rounds: int, matmul: float, kernels: dict[str, str]
) -> list[Document]:
    """All variants of one model and stage: layouts, with and without gradient checkpointing."""
    stage, settings = STAGES[name]
    if isinstance(settings, Stage2):
        settings = settings.model_copy(update={"lora": Lora(r=scale.rank, alpha=2 * scale.rank)})
    batches = {
        (layout, checkpointing): micro_batch(layout, stage, scale.micro_batch[checkpointing], scale, shape)
        for layout, checkpointing in product(("padded",) if kernels["packing"] else LAYOUTS, (True, False))
    }
    measured = {variant: Samples() for variant in batches}
    flops = None
    try:
        model = random_model(shape, scale.features, clock.device)
        rates = configure_trainable(model, settings, seed=0)
        optimizer = Optimizer(model, rates, assign_update_rules(model, settings), settings.weight_decay)
        flops = training_flops(model)
        _measure_rounds(Trainee(model, optimizer, clock, not kernels["liger"]), batches, measured, rounds)
    except (RuntimeError, MemoryError) as error:  # weights or optimizer state don't fit, whatever the variant
        if not out_of_memory(error):
            raise
    return [
        {
            "stage": name,
            "layout": layout,
            "gradient_checkpointing": checkpointing,
            "samples": len(batch.names),
            "predicted_bytes": predicted_bytes(
                shape,
                scale.features,
                settings.model_copy(update={"gradient_checkpointing": checkpointing}),
                batch,
                clock.device,
            ),
            **_summary(measured[layout, checkpointing], Work.of([batch]), flops, settings.batch_size, matmul),
        }
        for (layout, checkpointing), batch in batches.items()
    ]


def _measure_rounds(
    trainee: Trainee, batches: dict[Variant, Batch], measured: dict[Variant, Samples], rounds: int
) -> None:
    order, fitting = random.Random(0), list(batches)
    for round_number in range(rounds + 1):
        for variant in order.sample(fitting, len(fitting)):
            seconds = trainee.seconds(variant, batches[variant])
            if seconds is None:
                fitting.remove(variant)
            elif round_number:  # the first round warms up
                samples = measured[variant]
                samples.micro_batch_s.append(seconds[0])
                samples.update_s.append(seconds[1])
                samples.peak_bytes = max(samples.peak_bytes, trainee.clock.peak_bytes())


def _summary(samples: Samples, work: Work, flops: TrainingFlops | None, batch_size: int, matmul: float) -> Document:
    if flops is None or not samples.micro_batch_s:
        return {"out_of_memory": True}
    micro_batch_s, update_s = statistics.median(samples.micro_batch_s), statistics.median(samples.update_s)
    micro_batches = batch_size / work.samples
    step_s = micro_batches * micro_batch_s + update_s
    return {
        "tokens": work.tokens,
        "samples_per_s": round(batch_size / step_s, 2),
        "tokens_per_s": round(micro_batches * work.tokens / step_s, 1),
        "mfu": round(micro_batches * flops.of(work) / step_s / matmul, 4),
        "micro_batch_s": round(micro_batch_s, 4),
        "update_s": round(update_s, 4),
        "peak_bytes": samples.peak_bytes,
    }


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def checked_kernels(shape: dict[str, Any], device: torch.device) -> dict[str, str]:
    """The results of the checks before training for a model of ``shape``: "" if a kernel is used, else the reason."""
    language: Any = SimpleNamespace(config=LlamaConfig(**shape))
    return {
        "packing": packed_attention_fault(language, DTYPE, device),
        "liger": liger.blocker(language, device) or liger.fault(language, DTYPE, device),
    }


def documents(options: argparse.Namespace) -> Documents:
    began = time.monotonic()
    scale = SMOKE if options.smoke else FULL
    clock = Clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    matmul = matmul_flops_per_s(clock, scale.matrix_rows)
    known = peak(clock.device, DTYPE)
    result: Document = {
        "description": "extraction and training with random weights on one device, in bfloat16",
        "machine": torch.cuda.get_device_name(clock.device) if clock.device.type == "cuda" else "cpu",
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "matmul_flops_per_s": round(matmul),
        "peak": {"flops_per_s": known.flops_per_s, "source": known.source},
        "kernels": {},
        "training": [],
        "left_out": [],
    }
    yield result
    result["extraction"] = measure_extraction(scale, clock, options.rounds, matmul)
    release()
    yield result
    for size, stage in _models(scale, options):
        if time.monotonic() - began > 60 * options.minutes:
            result["left_out"].append(f"{size} {stage}: after {options.minutes} minutes")
            continue
        shape = scale.languages[size]
        kernels = result["kernels"][size] = checked_kernels(shape, clock.device)
        variants = measure_training(stage, shape, scale, clock, options.rounds, matmul, kernels)
        result["training"] += [{"model": size, **variant} for variant in variants]
        release()
        seconds = time.monotonic() - began
        print(f"{size} {stage}: measured after {seconds:.0f} s", file=sys.stderr, flush=True)
        yield {**result, "seconds": round(seconds, 1)}


def _models(scale: Scale, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    sizes = [size for size in scale.languages if options.smoke or size in options.sizes]
    return ((size, stage) for size in sizes for stage in options.stages)


def as_text(document: Document) -> str:
    lines = [f"{document['machine']}: {document['matmul_flops_per_s'] / 1e12:.1f} TFLOP/s in products of matrices"]
    if extraction := document.get("extraction"):
        lines.append(f"extraction: {extraction['images_per_s']} images/s, MFU {100 * extraction['mfu']:.1f} %")
    for variant in document["training"]:
        checkpointing = "checkpointing" if variant["gradient_checkpointing"] else ""
        name = f"{variant['model']} {variant['stage']:<12} {variant['layout']:<7} {checkpointing:<14}"
        predicted = variant["predicted_bytes"] / 1e9
        if variant.get("out_of_memory"):
            lines.append(f"{name} out of memory with {variant['samples']} samples, predicted {predicted:.1f} GB")
            continue
        lines.append(
            f"{name} {variant['samples_per_s']:8.2f} samples/s {variant['tokens_per_s']:10.1f} tokens/s "
            f"MFU {100 * variant['mfu']:5.1f} %  peak {variant['peak_bytes'] / 1e9:6.1f} GB "
            f"(predicted {predicted:.1f})"
        )
    lines += [
        f"{size}: {kernel} is not used: {reason}"
        for size, kernels in document["kernels"].items()
        for kernel, reason in kernels.items()
        if reason
    ]
    lines += [f"left out: {reason}" for reason in document["left_out"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--sizes", nargs="+", choices=FULL.languages, default=list(FULL.languages))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=6, help="begin no further model after this many minutes")
    parser.add_argument("--smoke", action="store_true", help="tiny models, to test the script itself")
    add_options(parser)
    options = parser.parse_args()
    if not (options.smoke or torch.cuda.is_available()):
        parser.error("no CUDA device; --smoke runs tiny models on a CPU")
    publish(documents(options), options, as_text)


if __name__ == "__main__":
    main()
