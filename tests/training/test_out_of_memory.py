"""A stage that runs out of memory names its micro-batch and the settings to change."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llavactl.core.errors import RecipeError
from llavactl.core.schema import Batch, Span
from llavactl.model.llava import LlavaModel
from llavactl.recipe.stages import Stage1, Stage2
from llavactl.testing import run_cli
from llavactl.training.optimizer import Optimizer
from llavactl.training.out_of_memory import out_of_memory_named
from llavactl.training.placement import Placement

CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HOST = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried …")


def message(
    settings: Any, batch: Batch | None, error: BaseException = CUDA, placement: Placement | None = None
) -> RecipeError:
    with (
        pytest.raises(RecipeError) as caught,
        out_of_memory_named("stage2", settings, placement or Placement(), "step 3", batch),
    ):
        raise error
    assert caught.value.__cause__ is error
    return caught.value


def padded(*lengths: int) -> Batch:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids = torch.zeros(mask.shape, dtype=torch.long)
    return Batch(ids, mask, ids, None, tuple(f"sample-{length}" for length in lengths))


def test_a_padded_micro_batch() -> None:
    error = message(Stage2(micro_batch_size=8), padded(7, 30, 12, 5))
    for part in ("stage2", "step 3", "4 samples", "120 tokens", "sample-30, 30 tokens", "2.00 GiB"):
        assert part in error.message
    assert "stage2.micro_batch_size=2" in error.hint
    assert "stage2.gradient_checkpointing=true" in error.hint


def test_the_longest_sample_of_a_packed_micro_batch_includes_its_prefix() -> None:
    """Spans: one sample, and a prefix with two samples; the last token of each group is padding."""
    spans = (Span(10), Span(20, None), Span(4, 1), Span(6, 1))
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, [9, 39]] = False
    ids = torch.zeros(1, 40, dtype=torch.long)
    batch = Batch(ids, mask, ids, None, ("alone", "short", "long"), spans)
    error = message(Stage2(micro_batch_tokens=4096), batch)
    assert "long, 25 tokens" in error.message
    assert "stage2.micro_batch_tokens=20" in error.hint


def test_a_smaller_micro_batch_size_divides_the_batch_size() -> None:
    assert "micro_batch_size=3`" in message(Stage2(batch_size=9, micro_batch_size=9), padded(*[5] * 9)).hint


@pytest.mark.parametrize(("method", "smaller"), [("full", "lora"), ("lora", "qlora")])
def test_a_single_sample_with_checkpointing_needs_another_method_or_length(method: Any, smaller: str) -> None:
    hint = message(Stage2(method=method, gradient_checkpointing=True), padded(30)).hint
    assert f"stage2.method={smaller}" in hint
    assert "stage2.max_length=15" in hint
    assert "micro_batch" not in hint


def test_weights_that_do_not_fit() -> None:
    assert "optimizer_state=host" in message(Stage2(), None).hint
    assert "lora.r" in message(Stage2(method="qlora"), None).hint
    assert "sharding=full" in message(Stage1(), None).hint


def test_settings_that_are_in_use_are_not_suggested() -> None:
    hint = message(Stage2(), None, placement=Placement(sharded=True, optimizer_state="host")).hint
    assert "sharding=full" not in hint
    assert "optimizer_state=host" not in hint
    assert "more processes" in hint


@pytest.mark.parametrize("error", [CUDA, HOST, MemoryError(), RuntimeError("CUDA error: out of memory")], ids=str)
def test_all_kinds_of_memory(error: BaseException) -> None:
    assert "4 samples" in message(Stage2(), padded(*[4] * 4), error).message


def test_other_errors_are_unchanged() -> None:
    with (
        pytest.raises(RuntimeError, match="shape"),
        out_of_memory_named("stage2", Stage2(), Placement(), "step 1", None),
    ):
        raise RuntimeError("shape mismatch")


def failing(function: Callable[..., Any], fails: Callable[..., bool]) -> Callable[..., Any]:
    """``function`` that runs out of memory if ``fails`` returns True for its arguments."""

    def run(*arguments: Any, **options: Any) -> Any:
        if fails(*arguments):
            raise CUDA
        return function(*arguments, **options)

    return run


BACKWARD = failing(torch.Tensor.backward, lambda loss, *_: "Div" in loss.grad_fn.name())  # not that of a check before
UPDATE = failing(Optimizer.step, lambda *_: True)
VALIDATION = failing(LlavaModel.forward, lambda model, _batch: not model.training)


@pytest.mark.parametrize(
    ("target", "replacement", "parts"),
    [
        ("torch.Tensor.backward", BACKWARD, ("step 1", "micro-batch of 2 samples", "longest: r")),
        ("llavactl.training.optimizer.Optimizer.step", UPDATE, ("update of the weights in step 1",)),
        ("llavactl.model.llava.LlavaModel.forward", VALIDATION, ("validation", "micro-batch of ", "longest: r")),
        ("llavactl.model.llava.LlavaModel.to", failing(LlavaModel.to, lambda *_: True), ("loading the model on cpu",)),
    ],
    ids=["backward pass", "update", "validation", "loading"],
)
def test_where_a_stage_runs_out_of_memory(
    toy: Path, monkeypatch: pytest.MonkeyPatch, target: str, replacement: Any, parts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(target, replacement)
    options = ["stage2.init=scratch", "features.mode=live", f"run_dir={toy}/run", "stage2.validation=0.2"]
    words = [word for option in options for word in ("-o", option)]
    result = run_cli("train", "--stage", "2", "-r", str(toy / "recipe.yaml"), *words)
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    for part in ("stage2", "out of memory", "2.00 GiB", "hint:", *parts):
        assert part in result.stderr
