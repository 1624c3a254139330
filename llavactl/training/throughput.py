"""Throughput of training: tokens and samples per second, memory, and model FLOPs utilization (MFU).

    MFU = training FLOPs of the step / (seconds · processes · peak FLOP/s of one device)

MFU (Chowdhery et al. 2022, "PaLM", appendix B) counts what the model requires, not what the hardware executes: neither
padding nor activations that are computed again, and a shared prefix once. A multiplication and an addition are 2 FLOPs.
The training FLOPs of a step are the sum of

- 4 FLOPs per weight of the language model's layers and useful token: 2 in the forward pass and 2 for the gradient with
  respect to activations, which reaches the connector through frozen weights as well; 2 more for the gradient of a
  trainable weight. So 4 in stage 1, 6 in full fine-tuning, and with LoRA 4, and 6 per weight of the adapters;
- the same per weight of the head, but only for target tokens: no other logit is needed;
- the same per weight of the connector and image token;
- 12 FLOPs per layer, head dimension, attention head and pair of a query and a key in causal attention: two matrix
  products in the forward and four in the backward pass. A conversation of n tokens has n (n + 1) / 2 pairs.

Embeddings are lookups, and norms, biases and activation functions are elementwise: they don't count. Neither does the
optimizer. Samples without an image count as if they had one.
"""

from __future__ import annotations

import math
import re
import time
from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.core.memory import memory_bytes
from llavactl.core.schema import IGNORE, IMAGE_TOKEN
from llavactl.model.inputs import token_count
from llavactl.model.packed import has_limited_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from accelerate import Accelerator

    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel

_MIN_PRODUCTS = 4
_MEASURED_S = 0.1

DENSE_BF16_TFLOPS: Mapping[str, float] = {
    "A10": 125,
    "A100": 312,
    "A30": 165,
    "A40": 149.7,
    "A800": 312,
    "B200": 2250,
    "GB200": 2500,
    "GH200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756,
    "H100": 989.4,
    "H200": 989.4,
    "H800": 989.4,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "MI300X": 1307.4,
    "MI325X": 1307.4,
    "RTX 3090": 71.2,
    "RTX 4090": 165.2,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
}
"""TFLOP/s of matrix products in bfloat16 with float32 sums, without structured sparsity: NVIDIA's data sheets and
architecture whitepapers, AMD's data sheets. Keys are words of the device's name.
"""


@dataclass(frozen=True)
class Work:
    """The amounts that the FLOPs and the throughput of a step are computed from.

    ``tokens`` of all conversations: a shared prefix counts once for each. ``useful_tokens``: tokens that have to be
    computed, so a shared prefix counts once and padding doesn't. ``target_tokens`` have a label, ``image_tokens`` come
    from the connector. ``pairs``: pairs of a query and a key in one attention layer.
    """

    samples: int = 0
    tokens: int = 0
    useful_tokens: int = 0
    target_tokens: int = 0
    image_tokens: int = 0
    pairs: int = 0

    @classmethod
    def of(cls, batches: Iterable[Batch]) -> Work:
        """The work of ``batches``; those without samples only equalize the number of forward passes."""
        parts = [astuple(_work(batch)) for batch in batches if batch.names]
        return cls(*map(sum, zip(*parts, strict=True))) if parts else cls()


def _work(batch: Batch) -> Work:
    if batch.spans:
        lengths = [int(part.sum()) for part in batch.mask[0].split([span.length for span in batch.spans])]
        prefixes = [0 if span.after is None else lengths[span.after] for span in batch.spans]
    else:
        lengths = batch.mask.sum(dim=1).tolist()
        prefixes = [0] * len(lengths)
    return Work(
        samples=len(batch.names),
        tokens=token_count(batch),
        useful_tokens=sum(lengths),
        target_tokens=int((batch.labels != IGNORE).sum()),
        image_tokens=int((batch.ids == IMAGE_TOKEN).sum()),
        pairs=sum(n * (n + 1) // 2 + n * prefix for n, prefix in zip(lengths, prefixes, strict=True)),
    )


@dataclass(frozen=True)
class TrainingFlops:
    """The training FLOPs of a model per useful token, target token, image token, and pair of a query and a key."""

    useful_token: int
    target_token: int
    image_token: int
    pair: int

    def of(self, work: Work) -> int:
        """The training FLOPs of ``work``."""
        return (
            self.useful_token * work.useful_tokens
            + self.target_token * work.target_tokens
            + self.image_token * work.image_tokens
            + self.pair * work.pairs
        )


def training_flops(model: LlavaModel) -> TrainingFlops | None:
    """The training FLOPs of ``model`` with its present trainable parameters; only shapes are read.

    None if the formula doesn't hold: for a mixture of experts, and for attention that is limited to a window or
    replaced by a state.
    """
    language = model.language
    config = language.config.get_text_config()
    experts = (getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    heads = getattr(config, "num_attention_heads", None)
    if any(experts) or not heads or has_limited_attention(language):  # a model without heads has states (Mamba, RWKV)
        return None
    head = language.get_output_embeddings()
    head_flops = 0 if head is None else _per_token(head)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return TrainingFlops(
        useful_token=_per_token(language) - head_flops,
        target_token=head_flops,
        image_token=_per_token(model.connector),
        pair=12 * config.num_hidden_layers * heads * head_dim,
    )


def _per_token(module: nn.Module) -> int:
    """FLOPs per token of all matrices in ``module`` except embeddings: 4 per weight, 6 per trainable one."""
    flops = 0
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            continue
        for weight in part.parameters(recurse=False):
            if weight.ndim < 2:
                continue
            # A weight in 4 bits is stored in another shape.
            size = part.in_features * part.out_features if isinstance(part, nn.Linear) else weight.numel()
            flops += size * (6 if weight.requires_grad else 4)
    return flops


def parameter_count(model: nn.Module) -> int:
    """The number of weights of ``model``; weights in 4 bits, which are stored in another shape, count as well."""
    states = [(weight, getattr(weight, "quant_state", None)) for weight in model.parameters()]
    return sum(weight.numel() if state is None else math.prod(state.shape) for weight, state in states)


@dataclass(frozen=True)
class Peak:
    """The peak FLOP/s of one device, and where the number is from."""

    flops_per_s: float
    source: str

    def __str__(self) -> str:
        return f"{self.flops_per_s / 1e12:,.4g} TFLOP/s ({self.source})"


def peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of ``device``: dense bfloat16 according to its data sheet, or measured in ``dtype`` if it isn't known.

    The measured peak is that of the fastest product of square matrices in a tenth of a second: of 1,024 rows on a CPU
    (with this process's threads), of 8,192 on a GPU.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    known = [key for key in DENSE_BF16_TFLOPS if re.search(rf"\b{re.escape(key)}\b", name)]
    if known:
        tflops = DENSE_BF16_TFLOPS[max(known, key=len)]
        return Peak(tflops * 1e12, f"{name}: dense bfloat16 according to its data sheet")
    rows = 1024 if device.type == "cpu" else 8192
    kind = str(dtype).removeprefix("torch.")
    return Peak(_measured(device, dtype, rows), f"{name}: measured with {kind} matrices of {rows:,} × {rows:,}")


_first_peak = cache(peak)
"""``peak``, measured once per process for all its stages and runs."""


def _measured(device: torch.device, dtype: torch.dtype, rows: int) -> float:
    """FLOP/s of the fastest of several matrix products. Doesn't use the random state."""
    matrix = torch.full((rows, rows), 0.5, device=device, dtype=dtype)
    fastest, products, began = float("inf"), 0, time.perf_counter()
    while products < _MIN_PRODUCTS or time.perf_counter() - began < _MEASURED_S:
        start = time.perf_counter()
        matrix @ matrix
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
        products += 1
    return float(2 * rows**3 / fastest)


@dataclass
class Throughput:
    """Computes the throughput of steps. ``flops`` is None if there is no formula for the model.

    A peak that was measured while other programs used the device is too low. So it is measured again when a step is
    faster than it and than all steps before, and the highest value is kept.
    """

    flops: TrainingFlops | None
    peak: Peak
    processes: int
    measured_peak: Callable[[], Peak]
    _fastest: float = 0.0

    @classmethod
    def of(cls, model: LlavaModel, precision: str, accelerator: Accelerator) -> Throughput:
        """The throughput of ``model``, which computes in ``precision``; measures the peak of an unknown device."""
        where = accelerator.device, getattr(torch, precision)
        return cls(training_flops(model), _first_peak(*where), accelerator.num_processes, partial(peak, *where))

    def fields(self, work: Work, seconds: float) -> dict[str, Any]:
        """The fields of metrics.jsonl for a step that did ``work``, of all processes, in ``seconds``.

        ``memory_bytes`` is that of this process. ``mfu`` is missing if it is unknown.
        """
        mfu = None if self.flops is None else self.mfu(self.flops.of(work), seconds)
        return {
            "seconds": round(seconds, 4),
            "tokens_per_s": round(work.tokens / seconds, 1),
            "samples_per_s": round(work.samples / seconds, 3),
            **({} if mfu is None else {"mfu": mfu}),
            "memory_bytes": memory_bytes(),
        }

    def mfu(self, flops: int, seconds: float) -> float | None:
        """``flops`` in ``seconds`` as a fraction of the peak of all processes.

        None if the step was faster than the peak, which is then wrong.
        """
        achieved = flops / (seconds * self.processes)
        if achieved > max(self.peak.flops_per_s, self._fastest):
            self._fastest = achieved
            self.peak = max(self.peak, self.measured_peak(), key=lambda each: each.flops_per_s)
        return round(achieved / self.peak.flops_per_s, 4) if achieved <= self.peak.flops_per_s else None
