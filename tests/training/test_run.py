"""Where training packs samples, and why it pads them elsewhere."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llavactl.core.errors import RecipeError
from llavactl.recipe.stages import Stage2
from llavactl.training import run

MODEL: Any = SimpleNamespace(language=None)
FAULT = "packed attention fails on Tesla T4: FlashAttention only supports Ampere GPUs or newer."


def padding_reason(
    monkeypatch: pytest.MonkeyPatch, packing: str, device: str, *faults: str, precision: str = "bfloat16"
) -> str:
    """With one process per fault ("": none) that its check of the kernel finds; this process has the first."""
    checked = []

    def check(_language: Any, dtype: torch.dtype, _device: torch.device) -> str:
        checked.append(dtype)
        return faults[0]

    monkeypatch.setattr(run, "packing_blocker", lambda language: "")
    monkeypatch.setattr(run, "packed_attention_fault", check)
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: [*own, *faults[1:]])
    accelerator: Any = SimpleNamespace(device=torch.device(device), num_processes=max(1, len(faults)))
    settings = Stage2(packing=packing, precision=precision)  # type: ignore[arg-type]
    reason = run._padding_reason(MODEL, settings, accelerator)
    assert checked == ([getattr(torch, precision)] if faults else [])
    return reason


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_auto_packs_on_cuda_where_the_check_succeeds(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    assert padding_reason(monkeypatch, "auto", "cuda", "", precision=precision) == ""


def test_auto_pads_on_cuda_where_the_check_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert padding_reason(monkeypatch, "auto", "cuda", FAULT) == FAULT
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert FAULT in record.getMessage()


def test_no_process_packs_if_the_check_fails_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert padding_reason(monkeypatch, "auto", "cuda", "", "", FAULT) == FAULT


def test_always_is_an_error_where_the_check_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match="Tesla T4"):
        padding_reason(monkeypatch, "always", "cuda", FAULT)


def test_the_kernel_is_not_checked_where_it_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "packing: never" in padding_reason(monkeypatch, "never", "cuda")
    assert padding_reason(monkeypatch, "auto", "cpu") == ""
    assert "mps" in padding_reason(monkeypatch, "auto", "mps")
    assert padding_reason(monkeypatch, "always", "mps") == ""


def liger_fault(monkeypatch: pytest.MonkeyPatch, blocker: str, fault: str) -> str:
    monkeypatch.setattr(run.liger, "blocker", lambda language, device: blocker)
    monkeypatch.setattr(run.liger, "fault", lambda language, dtype, device: fault)
    return run._liger_fault(MODEL, Stage2(), torch.device("cuda"))


def test_liger_is_used_where_its_check_succeeds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert liger_fault(monkeypatch, "", "") == ""
    assert liger_fault(monkeypatch, "not installed", "wrong") == "not installed"
    assert caplog.records == []
    assert liger_fault(monkeypatch, "", "wrong") == "wrong"
    assert [record.getMessage() for record in caplog.records] == ["wrong"]
