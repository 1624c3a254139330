"""Tokens, FLOPs and the peak that MFU is computed from."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, FeatureShape, ImageRef
from llavactl.data.batches import collate, pack
from llavactl.images.image_file import ImageFile
from llavactl.model.build import build
from llavactl.model.llava import LlavaModel
from llavactl.recipe.stages import Lora, Stage1, Stage2
from llavactl.training.throughput import DENSE_BF16_TFLOPS, Peak, Throughput, Work, peak, training_flops
from llavactl.training.trainable import configure_trainable

SHAPE = FeatureShape((2, 2), 32)
STAGES = {
    "stage 1": Stage1(),
    "full": Stage2(),
    "lora": Stage2(method="lora", lora=Lora(r=8, alpha=16, dropout=0.0)),
    "some modules": Stage2(trainable_modules=("self_attn",)),
}


class Features:
    """Random features of any image."""

    def arrays(self, image: ImageRef) -> tuple[np.ndarray, ...]:
        return (np.random.default_rng(0).standard_normal((SHAPE.patches, SHAPE.width)).astype(np.float32),)


def conversation(*answer: int) -> Encoded:
    """A prompt of 5 tokens, 4 of them of an image, and the target tokens ``answer``."""
    ids = (0, *[IMAGE_TOKEN] * SHAPE.patches, *answer)
    return Encoded(ids, (IGNORE,) * 5 + answer, (ImageFile("/photos", "a.jpg"),))


def toy_model(toys: Path) -> LlavaModel:
    language = {"name": "hf", "model": str(toys / "language")}
    return build({"name": "mlp2x-gelu"}, language, SHAPE, dtype="float32").model


@pytest.mark.parametrize("stage", STAGES)
def test_the_formula_counts_the_matrix_products_of_torch(toys: Path, stage: str) -> None:
    model = toy_model(toys)
    configure_trainable(model, STAGES[stage], seed=0)
    model.language.config._attn_implementation = "eager"
    batch = collate([conversation(*range(40, 52))], Features(), names=["a"])
    with FlopCounterMode(display=False) as counter:
        model(batch).backward()
    flops, work = training_flops(model), Work.of([batch])
    assert flops is not None
    tokens = work.useful_tokens
    # Eager attention computes all pairs, causal or not; the connector's first layer needs no gradient of the features.
    computed = flops.of(work) + flops.pair * (tokens**2 - work.pairs)
    computed -= 2 * model.connector[0].weight.numel() * work.image_tokens
    assert counter.get_total_flops() == computed


def test_weights_count_four_flops_in_stage_1_and_six_in_full_training(toys: Path) -> None:
    model = toy_model(toys)
    weights = sum(p.numel() for name, p in model.language.named_parameters() if p.ndim == 2 and ".layers." in name)
    configure_trainable(model, Stage1(), seed=0)
    frozen = training_flops(model)
    configure_trainable(model, Stage2(), seed=0)
    full = training_flops(model)
    assert frozen is not None
    assert full is not None
    assert (frozen.useful_token, full.useful_token) == (4 * weights, 6 * weights)


def test_a_shared_prefix_counts_once_and_padding_never() -> None:
    items = [conversation(40, 41, 42), conversation(43)]
    shared = Work.of([pack([(5, items)], Features(), names=["a", "b"])])
    assert shared == Work(2, tokens=8 + 6, useful_tokens=5 + 3 + 1, target_tokens=4, image_tokens=4, pairs=15 + 21 + 6)
    padded = Work.of([collate(items, Features(), names=["a", "b"])])
    assert padded == Work(2, tokens=14, useful_tokens=14, target_tokens=4, image_tokens=8, pairs=36 + 21)
    separate = [pack([(0, [item])], Features(), names=["a"]) for item in items]
    assert Work.of(separate) == padded, "on one conversation per sequence both agree"
    assert Work.of([]) == Work()


def test_an_architecture_without_a_formula_has_no_mfu(toys: Path) -> None:
    model = toy_model(toys)
    model.language.config.num_local_experts = 8
    assert training_flops(model) is None
    throughput = Throughput(None, Peak(1e12, ""), 1, lambda: Peak(1e12, ""))
    assert "mfu" not in throughput.fields(Work(1, 10), 0.5)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        *(("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"), ("NVIDIA H200", "H200")),
        *(("NVIDIA A100-SXM4-80GB", "A100"), ("NVIDIA A10", "A10"), ("NVIDIA L40S", "L40S"), ("NVIDIA L4", "L4")),
    ],
)
def test_the_peak_of_a_known_device(monkeypatch: pytest.MonkeyPatch, name: str, key: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    known = peak(torch.device("cuda"), torch.float32)
    assert known.flops_per_s == DENSE_BF16_TFLOPS[key] * 1e12
    assert name in known.source


def test_the_peak_of_another_device_is_measured() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    measured = peak(torch.device("cpu"), torch.float32)
    assert 1e8 < measured.flops_per_s < 1e14
    assert "measured" in measured.source
    assert torch.equal(torch.get_rng_state(), before)


def test_mfu_is_relative_to_the_peak_of_all_processes(toys: Path) -> None:
    model = toy_model(toys)
    configure_trainable(model, Stage2(), seed=0)
    flops, work = training_flops(model), Work(4, 400, 300, 100, 16, 5000)
    assert flops is not None
    throughput = Throughput(flops, Peak(1e9, ""), 2, lambda: Peak(1e9, ""))
    fields = throughput.fields(work, 0.5)
    assert fields["mfu"] == pytest.approx(flops.of(work) / (0.5 * 2 * 1e9), abs=1e-4)
    assert (fields["tokens_per_s"], fields["samples_per_s"]) == (800, 8)
    assert fields["memory_bytes"] > 10_000_000


def test_a_peak_that_a_step_exceeds_is_measured_again() -> None:
    """The first measurement was disturbed by other load; one per record, as each takes time."""
    measurements = iter([Peak(50, "disturbed"), Peak(400, "undisturbed"), Peak(300, "disturbed")])
    throughput = Throughput(None, Peak(100, "first"), 2, lambda: next(measurements))
    assert throughput.mfu(100, 1) == 0.5
    assert throughput.mfu(300, 1) is None, "150 FLOP/s per process: more than both measurements"
    assert throughput.peak.flops_per_s == 100, "the highest is kept"
    assert throughput.mfu(260, 1) is None, "not measured again: the device was already as fast"
    assert throughput.mfu(400, 1) == 0.5
    assert throughput.peak == Peak(400, "undisturbed")
    assert throughput.mfu(1000, 1) is None
    assert throughput.peak == Peak(400, "undisturbed")
    assert next(measurements, None) is None


@settings(max_examples=100, deadline=None)
@given(steps=st.lists(st.floats(1e-3, 1e6), max_size=30), peaks=st.lists(st.floats(1, 1e6), min_size=1))
def test_mfu_is_a_fraction_or_unknown(steps: list[float], peaks: list[float]) -> None:
    measured = map(Peak, itertools.cycle(peaks), itertools.repeat(""))
    throughput = Throughput(None, next(measured), 1, lambda: next(measured))
    for seconds in steps:
        mfu = throughput.mfu(1000, seconds)
        assert mfu is None or 0 <= mfu <= 1
