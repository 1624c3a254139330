"""liger's kernels are used where they agree with torch; a package of plain torch functions takes their place."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from llavactl.model.cuda import liger

CPU = torch.device("cpu")
LLAMA: Any = SimpleNamespace(
    config=SimpleNamespace(
        model_type="llama", hidden_act="silu", hidden_size=64, intermediate_size=128, rms_norm_eps=1e-6
    )
)


class Norm:
    """The interface of ``LigerRMSNormFunction``."""

    calls = 0

    @classmethod
    def apply(cls, x: Any, weight: Any, epsilon: float, offset: float, casting_mode: str, in_place: bool) -> Any:
        assert (offset, casting_mode, in_place) == (0.0, "llama", False)
        cls.calls += 1
        r = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
        return weight * (x.float() * r).to(x.dtype)


class SiluMul:
    """The interface of ``LigerSiLUMulFunction``."""

    calls = 0

    @classmethod
    def apply(cls, gate: Any, up: Any) -> Any:
        cls.calls += 1
        return functional.silu(gate) * up


@pytest.fixture(autouse=True)
def liger_kernel(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in for the package."""
    package, ops = ModuleType("liger_kernel"), ModuleType("liger_kernel.ops")
    ops.LigerRMSNormFunction, ops.LigerSiLUMulFunction = Norm, SiluMul  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", package)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ops)
    monkeypatch.setattr(Norm, "calls", 0)
    monkeypatch.setattr(SiluMul, "calls", 0)
    return ops


def test_where_it_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert liger.blocker(LLAMA, cuda) == ""
    assert "CUDA" in liger.blocker(LLAMA, CPU)
    gemma: Any = SimpleNamespace(config=SimpleNamespace(model_type="gemma2", hidden_act="gelu"))
    assert "gemma2" in liger.blocker(gemma, cuda)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    assert "not installed" in liger.blocker(LLAMA, cuda)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_right_kernels(dtype: torch.dtype) -> None:
    assert liger.fault(LLAMA, dtype, CPU) == ""
    assert (Norm.calls, SiluMul.calls) == (1, 1)


@pytest.mark.parametrize(
    ("kernel", "wrong"),
    [
        (Norm, lambda right: lambda *args: right(*args) * 1.2),
        (SiluMul, lambda _: lambda gate, up: functional.gelu(gate) * up),
        (SiluMul, lambda right: lambda gate, up: right(gate, up.detach() + 0 * up)),
        (SiluMul, lambda right: lambda gate, up: right(gate, up) * float("nan")),
    ],
    ids=["scale", "activation", "gradient", "not a number"],
)
def test_wrong_kernels(monkeypatch: pytest.MonkeyPatch, kernel: Any, wrong: Any) -> None:
    monkeypatch.setattr(kernel, "apply", wrong(kernel.apply))
    assert {Norm: "RMSNorm", SiluMul: "SwiGLU"}[kernel] in liger.fault(LLAMA, torch.bfloat16, CPU)


def test_kernels_that_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(Norm, "apply", fails)
    assert "no compiler" in liger.fault(LLAMA, torch.bfloat16, CPU)


def test_all_norms_and_mlps_of_a_model_use_them(toys: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(toys / "language")
    ids = torch.arange(12)[None]
    reference = copy.deepcopy(model)
    expected = reference(ids).logits
    expected.square().sum().backward()
    with liger.liger_layers(model):
        logits = model(ids).logits
        logits.square().sum().backward()
    layers = model.config.num_hidden_layers
    assert (Norm.calls, SiluMul.calls) == (2 * layers + 1, layers)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    for weight, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, rtol=1e-3, atol=1e-3)
    model(ids)
    assert SiluMul.calls == layers, "not after the context"
