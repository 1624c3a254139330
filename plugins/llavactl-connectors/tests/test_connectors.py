"""What all connectors have in common: shapes, gradients, independence of images, precision, saving, options."""

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavactl import FeatureShape
from llavactl.testing import check_connector

WIDTH = 20


def test_it_passes_the_conformance_checks(case: Any, shape: FeatureShape):
    assert check_connector(case.create(), grid=shape.grid, width=shape.width) == []


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_shapes(case: Any, shape: FeatureShape, prefix: int):
    connector, shape = case.create(), replace(shape, prefix=prefix)
    assert connector.tokens(shape) == case.tokens
    embeddings = connector.build(shape, WIDTH)(torch.randn(3, shape.patches, shape.width))
    assert embeddings.shape == (3, case.tokens, WIDTH)


def test_a_grid_connector_has_a_token_per_cell(case: Any, shape: FeatureShape):
    connector = case.create()
    assert hasattr(connector, "grid") is not case.keeps_prefix
    if hasattr(connector, "grid"):
        h, w = connector.grid(shape)
        assert h * w == case.tokens


@pytest.mark.parametrize("mode", [True, False])
def test_tokens_before_the_patches_are_kept_or_dropped(case: Any, shape: FeatureShape, mode: bool):
    shape = replace(shape, prefix=2)
    module = case.create().build(shape, WIDTH).train(mode)
    features = torch.randn(1, shape.patches, shape.width)
    changed = features.clone()
    changed[:, :2] = torch.randn(1, 2, shape.width)
    assert torch.equal(module(features), module(changed)) is not case.keeps_prefix
    changed = features.clone()
    changed[:, 2] = torch.randn(shape.width)
    assert not torch.equal(module(features), module(changed)), "the first patch is used"


@pytest.mark.parametrize("mode", [True, False])
def test_an_image_does_not_depend_on_its_batch(case: Any, shape: FeatureShape, mode: bool):
    module = case.create().build(shape, WIDTH).train(mode)
    features = torch.randn(4, shape.patches, shape.width) * torch.tensor([0.1, 1, 5, 10]).view(4, 1, 1)
    together = module(features)
    separately = torch.cat([module(image[None]) for image in features])
    torch.testing.assert_close(together, separately, rtol=1e-4, atol=1e-5)


def test_the_gradients_of_a_batch_are_the_sum_of_those_of_its_images(case: Any, shape: FeatureShape):
    module = case.create().build(shape, WIDTH).train()
    features = torch.randn(3, shape.patches, shape.width)

    def gradients(*batches: torch.Tensor) -> dict[str, torch.Tensor]:
        module.zero_grad()
        for batch in batches:
            module(batch).square().sum().backward()
        return {name: weight.grad.clone() for name, weight in module.named_parameters()}

    together, separately = gradients(features), gradients(*features.split(1))
    for name, gradient in together.items():
        if not without_gradient(name):
            torch.testing.assert_close(gradient, separately[name], rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_every_parameter_is_trained(case: Any, shape: FeatureShape):
    """All gradients are other than 0 from the first step, and the loss falls."""
    torch.manual_seed(0)
    module = case.create().build(shape, WIDTH).train()
    features, target = torch.randn(4, shape.patches, shape.width), torch.randn(4, case.tokens, WIDTH)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        optimizer.zero_grad()
        loss = (module(features) - target).square().mean()
        loss.backward()
        if step == 0:
            gradients = {name: weight.grad for name, weight in module.named_parameters() if not without_gradient(name)}
            assert [name for name, gradient in gradients.items() if not gradient.abs().sum() > 0] == []
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def without_gradient(name: str) -> bool:
    """Attention does not depend on the bias of its keys: softmax is unchanged by a constant."""
    return name.endswith("key.bias")


def test_queries_and_latents_differ(shape: FeatureShape, case: Any):
    if not case.keeps_prefix:
        pytest.skip("its tokens belong to cells")
    embeddings = case.create().build(shape, WIDTH).eval()(torch.randn(1, shape.patches, shape.width))[0]
    distances = torch.cdist(embeddings, embeddings) + torch.eye(case.tokens)
    assert distances.min() > 1e-3


@pytest.mark.parametrize("mode", [True, False])
def test_bfloat16_is_close_to_float32(case: Any, shape: FeatureShape, mode: bool):
    torch.manual_seed(0)
    module = case.create().build(shape, WIDTH).train(mode)
    features = torch.randn(2, shape.patches, shape.width)
    exact = module(features).detach()
    rounded = module.to(torch.bfloat16)(features.to(torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()
    rounded.float().square().sum().backward()
    assert all(weight.grad.isfinite().all() for weight in module.parameters())


def test_autocast(case: Any, shape: FeatureShape):
    module = case.create().build(shape, WIDTH)
    features = torch.randn(2, shape.patches, shape.width)
    exact = module(features).detach()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = module(features)
    assert (rounded.float() - exact).norm() < 0.03 * exact.norm()


def test_it_can_be_saved_and_loaded(case: Any, shape: FeatureShape, tmp_path: Path):
    first, second = (case.create().build(shape, WIDTH).eval() for _ in range(2))
    features = torch.randn(2, shape.patches, shape.width)
    assert not torch.allclose(first(features), second(features))
    save_file(first.state_dict(), tmp_path / "connector.safetensors")
    second.load_state_dict(load_file(tmp_path / "connector.safetensors"))
    assert torch.equal(first(features), second(features))


def test_the_seed_determines_the_weights(case: Any, shape: FeatureShape):
    def weights() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return case.create().build(shape, WIDTH).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_options_and_components_can_be_pickled(case: Any):
    options = case.options(**case.values)
    assert pickle.loads(pickle.dumps(options)) == options
    assert pickle.loads(pickle.dumps(case.component(options))) == case.component(options)


def test_options_have_descriptions_and_bounds(case: Any):
    for name, field in case.options.model_fields.items():
        assert field.description, name
        if field.annotation in (int, float):
            assert len(field.metadata) >= 2, f"{name} has a lower and an upper bound"
            with pytest.raises(ValueError, match=name):
                case.options(**{name: -1})
            with pytest.raises(ValueError, match=name):
                case.options(**{name: 10**9})


def test_norm_removes_the_scale_of_the_features(case: Any, shape: FeatureShape):
    if "norm" not in case.options.model_fields:
        pytest.skip("it always normalizes")
    features = torch.randn(2, shape.patches, shape.width)
    for norm in (True, False):
        module = case.component(case.options(**case.values, norm=norm)).build(shape, WIDTH).eval()
        assert torch.allclose(module(features), module(10 * features + 3), atol=1e-4) is norm
