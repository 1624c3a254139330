"""``fused_rms_norms`` computes the same as the RMSNorm of transformers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from llavactl.model.cpu.rms_norm import fused_rms_norms

WIDTH = 48


def tiny_model(model_type: str, precision: torch.dtype) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(model_type, **sizes, num_key_value_heads=2, head_dim=12, vocab_size=400)
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).to(precision)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1, 0.5)
    return model


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_as_accurate_as_transformers(precision: torch.dtype) -> None:
    model = tiny_model("llama", precision)
    norm = model.model.norm  # type: ignore[union-attr]
    torch.manual_seed(1)
    # Inputs of very different sizes, and a gradient with a mean other than 0.
    hidden = (torch.randn(3, 200, WIDTH) * torch.logspace(-2, 2, 200)[:, None] + 0.1).to(precision)
    output_gradient = (torch.randn_like(hidden) + 0.5).to(precision)

    def computed(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = x.clone().requires_grad_()
        norm.weight.data = weight
        norm.weight.grad = None
        output = norm(x)
        output.backward(output_gradient.to(output.dtype))
        return output.detach(), x.grad, norm.weight.grad  # type: ignore[return-value]

    weight = norm.weight.data.clone()
    theirs = computed(hidden, weight)
    with fused_rms_norms(model):  # type: ignore[arg-type]
        ours = computed(hidden, weight)
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    output = w * (x * (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt())
    output.backward(output_gradient.double())
    for actual, reference, exact in zip(ours, theirs, (output.detach(), x.grad, w.grad), strict=True):
        assert actual.dtype == reference.dtype
        assert actual.shape == reference.shape
        assert relative_error(actual, exact) < max(1.5 * relative_error(reference, exact), 1e-6)
    if precision == torch.bfloat16:
        assert torch.equal(ours[0], theirs[0]), "rounded like transformers"


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "olmo2"])
def test_gradients_of_a_model_are_equal_and_its_norms_are_restored(model_type: str) -> None:
    model = tiny_model(model_type, torch.float32)
    ids = torch.arange(60).view(2, 30)

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        return {name: parameter.grad.double() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]

    exact = gradients()
    with fused_rms_norms(model):  # type: ignore[arg-type]
        patched = [module for module in model.modules() if "forward" in vars(module)]
        actual = gradients()
    assert len(patched) == {"qwen3": 9, "olmo2": 0}.get(model_type, 5)
    for name, gradient in actual.items():
        assert relative_error(gradient, exact[name]) < 1e-5, name
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_frozen_weight_gets_no_gradient() -> None:
    model = tiny_model("llama", torch.float32)
    norm = model.model.norm  # type: ignore[union-attr]
    norm.weight.requires_grad_(False)
    hidden = torch.randn(1, 5, WIDTH, requires_grad=True)
    with fused_rms_norms(model):  # type: ignore[arg-type]
        norm(hidden).sum().backward()
    assert norm.weight.grad is None
    assert hidden.grad is not None
