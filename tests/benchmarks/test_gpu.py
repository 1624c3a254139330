"""The benchmark for GPUs runs on the CPU with tiny models."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llavactl.training.optimizer import Optimizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module ``benchmarks/gpu.py``."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("benchmark_gpu", BENCHMARKS / "gpu.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_gpu", module)  # its data classes look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def without_prediction(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which takes half of the time."""
    monkeypatch.setattr(gpu, "predicted_bytes", lambda *_: 1)


def options(stages: list[str], minutes: float = 5) -> argparse.Namespace:
    return argparse.Namespace(smoke=True, rounds=1, minutes=minutes, stages=stages)


@pytest.mark.slow
def test_all_variants_are_measured(gpu: Any) -> None:
    *_, document = gpu.documents(options(["stage2-lora"]))
    assert document["left_out"] == []
    assert document["kernels"]["tiny"]["packing"] == ""
    assert document["extraction"]["images_per_s"] > 0
    variants = {(v["stage"], v["layout"], v["gradient_checkpointing"]): v for v in document["training"]}
    assert len(variants) == len(document["training"]) == 3 * 2
    for (stage, layout, checkpointing), variant in variants.items():
        assert variant["samples"] == gpu.SMOKE.micro_batch[checkpointing]
        assert variant["tokens"] == variants[stage, "padded", checkpointing]["tokens"], layout
        assert variant["predicted_bytes"] > 0
        assert variant["samples_per_s"] > 0
        assert variant["mfu"] > 0
    assert len(gpu.as_text(document).splitlines()) == 2 + len(variants) + 1, "liger needs a CUDA device"


def test_a_variant_that_does_not_fit_is_reported(
    gpu: Any, without_prediction: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_device = gpu.to_device

    def limited(batch: Any, device: torch.device) -> Any:
        if not batch.spans:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return to_device(batch, device)

    monkeypatch.setattr(gpu, "to_device", limited)
    *_, document = gpu.documents(options(["stage1"]))
    failed = {variant["layout"] for variant in document["training"] if variant.get("out_of_memory")}
    assert failed == {"padded"}
    assert "out of memory" in gpu.as_text(document)


def test_an_optimizer_that_does_not_fit_is_reported(
    gpu: Any, without_prediction: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def step(*_: Any) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Optimizer, "step", step)
    *_, document = gpu.documents(options(["stage1"]))
    assert [variant["out_of_memory"] for variant in document["training"]] == [True] * 6


def test_a_kernel_with_a_fault_is_not_measured(
    gpu: Any, without_prediction: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "packed_attention_fault", lambda *_: "it is wrong")
    *_, document = gpu.documents(options(["stage1"]))
    assert {variant["layout"] for variant in document["training"]} == {"padded"}
    assert "it is wrong" in gpu.as_text(document)


def test_no_model_begins_after_the_time_limit(gpu: Any) -> None:
    *_, document = gpu.documents(options(["stage1"], minutes=0))
    assert document["training"] == []
    assert len(document["left_out"]) == 1
