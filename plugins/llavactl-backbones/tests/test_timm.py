"""Models of timm: pixels and features are those of timm. `make test` runs these with timm on the path."""

import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llavactl_backbones.small_models import VIT, save_timm
from PIL import Image

from llavactl import ModelError, registry
from llavactl.testing import check_vision, run_cli, toy_recipe

if importlib.util.find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

import timm
from timm.data import create_transform, resolve_model_data_config

pytestmark = pytest.mark.timm

Build = Callable[[str], tuple[Any, Path]]

MODELS: dict[str, dict[str, Any]] = {
    "vit_base_patch16_224": {**VIT, "img_size": 32},
    "vit_large_patch14_reg4_dinov2": {**VIT, "img_size": 28},
    "vit_so400m_patch14_siglip_384": {**VIT, "img_size": 28},
    "vit_small_patch16_dinov3": {**VIT, "img_size": 32, "pretrained_cfg_overlay": {"input_size": (3, 32, 32)}},
    "vit_pe_lang_large_patch14_448": {**VIT, "img_size": 28, "ref_feat_shape": (2, 2)},
    "vit_pe_core_base_patch16_224": {**VIT, "img_size": 32, "ref_feat_shape": (2, 2)},
    "eva02_tiny_patch14_224": {**VIT, "img_size": 28},
}
PREFIX = dict.fromkeys(MODELS, 1) | {
    "vit_large_patch14_reg4_dinov2": 5,
    "vit_so400m_patch14_siglip_384": 0,
    "vit_small_patch16_dinov3": 5,
}
HIERARCHICAL: dict[str, dict[str, Any]] = {
    "convnext_atto": {"depths": (1, 1, 1, 1), "dims": (8, 16, 24, 32)},
    "swin_tiny_patch4_window7_224": {
        "embed_dim": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 3, 4), "img_size": 64, "window_size": 2
    },
    "resnet18": {"block_args": {}, "layers": (1, 1, 1, 1), "channels": (8, 16, 24, 32)},
}  # fmt: skip
ALL = pytest.mark.parametrize("architecture", MODELS)


def save(architecture: str, folder: Path, seed: int = 0) -> Any:
    return save_timm(folder, architecture, seed=seed, **{**MODELS, **HIERARCHICAL}[architecture])


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The model of an architecture and the folder it is saved in, once."""
    models: dict[str, tuple[Any, Path]] = {}

    def build(architecture: str) -> tuple[Any, Path]:
        if architecture not in models:
            folder = tmp_path_factory.mktemp(architecture)
            models[architecture] = save(architecture, folder), folder
        return models[architecture]

    return build


def create(folder: Path, name: str = "timm", **options: Any) -> Any:
    return registry().create("vision", {"name": name, "model": str(folder), **options})


def stacked(encoder: Any, images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([encoder.preprocess(image) for image in images]))


def block_outputs(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The outputs [I, N + P, Dv] of all blocks of the complete ``model``, recorded in its own forward pass."""
    outputs: list[torch.Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _block, _args, output: outputs.append(output)) for block in model.blocks
    ]
    with torch.no_grad():
        model.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    return outputs


@ALL
@pytest.mark.parametrize("layer", [-2, -1, 1, (3, 1)])
@pytest.mark.parametrize("norm", [False, True])
def test_features_equal_those_of_timm(
    built: Build, images: list[Image.Image], architecture: str, layer: int | tuple[int, ...], norm: bool
) -> None:
    model, folder = built(architecture)
    vision = create(folder, layer=layer, norm=norm)
    encoder = vision.load("cpu", "float32")
    pixels = stacked(encoder, images)
    layers = (layer,) if isinstance(layer, int) else layer
    states = [block_outputs(model, pixels)[at - 1 if at > 0 else at] for at in layers]
    if norm:
        states = [model.norm(state) for state in states]
    assert torch.equal(encoder.encode(pixels), torch.cat(states, dim=-1)[:, PREFIX[architecture] :])
    assert vision.shape() == encoder.shape
    assert (encoder.shape.grid, encoder.shape.width, encoder.shape.prefix) == ((2, 2), 32 * len(layers), 0)


@ALL
def test_cls_patch_keeps_class_token_and_registers(built: Build, images: list[Image.Image], architecture: str) -> None:
    model, folder = built(architecture)
    encoder = create(folder, select="cls-patch").load("cpu", "float32")
    pixels = stacked(encoder, images)
    assert encoder.shape.prefix == PREFIX[architecture] == model.num_prefix_tokens
    assert torch.equal(encoder.encode(pixels), block_outputs(model, pixels)[-2])


@pytest.mark.parametrize("architecture", HIERARCHICAL)
def test_stages_of_hierarchical_networks(built: Build, images: list[Image.Image], architecture: str) -> None:
    model, folder = built(architecture)
    vision = create(folder, image_size=64)
    encoder = vision.load("cpu", "float32")
    pixels = stacked(encoder, images)
    with torch.no_grad():
        features = model.forward_intermediates(pixels, intermediates_only=True)[-2]
    assert vision.shape() == encoder.shape
    assert encoder.shape.grid == tuple(features.shape[2:]) == (4, 4)
    torch.testing.assert_close(encoder.encode(pixels), features.flatten(2).transpose(1, 2))
    with pytest.raises(ModelError, match="different grids"):
        create(folder, image_size=64, layer=(-1, -2)).shape()


@pytest.mark.parametrize("architecture", [*MODELS, *HIERARCHICAL])
@pytest.mark.parametrize("crop_pct", [1.0, None, 0.8])
def test_pixels_equal_those_of_timms_transform(
    built: Build, images: list[Image.Image], architecture: str, crop_pct: float | None
) -> None:
    folder = built(architecture)[1]
    preprocess = create(folder, image="square", crop_pct=crop_pct).load("cpu", "float32").preprocess
    model = timm.create_model(f"local-dir:{folder}")
    transform = create_transform(**resolve_model_data_config(model, {"crop_pct": crop_pct}), is_training=False)
    for image in images:
        pixels = preprocess(image)
        assert pixels.dtype == np.float32
        assert np.array_equal(pixels, transform(image).numpy()), image.size


def test_padding_keeps_the_whole_image(built: Build) -> None:
    """A wide white image at mean 0.5: the rest is 0 up to rounding, and nothing is cropped."""
    _, folder = built("vit_so400m_patch14_siglip_384")
    pixels = create(folder).load("cpu", "float32").preprocess(Image.new("RGB", (120, 60), "white"))
    assert (pixels[:, 9:19] == 1).all()
    assert np.abs(pixels[:, :4]).max() < 0.01


@ALL
def test_another_image_size_interpolates_positions_as_timm_does(
    built: Build, images: list[Image.Image], architecture: str
) -> None:
    """70 pixels are no multiple of 16: most models ignore what is left of the patches."""
    _, folder = built(architecture)
    side = 70
    if "dinov3" in architecture:
        side = 80
        with pytest.raises(ModelError, match="divisible"):
            create(folder, image_size=70).shape()
    encoder = create(folder, image_size=side).load("cpu", "float32")
    pixels = stacked(encoder, images)
    resized = timm.create_model(f"local-dir:{folder}", pretrained=True, img_size=side).eval()
    expected = block_outputs(resized, pixels)[-2][:, PREFIX[architecture] :]
    assert pixels.shape[2:] == (side, side)
    assert encoder.shape.grid[0] == side // resized.patch_embed.patch_size[0]
    assert torch.equal(encoder.encode(pixels), expected)


@ALL
def test_unneeded_blocks_and_the_head_are_removed(built: Build, architecture: str) -> None:
    _, folder = built(architecture)
    models = [create(folder, layer=layer).load("cpu", "float32").model for layer in (-1, -2, 1)]
    assert [len(model.blocks) for model in models] == [4, 3, 1]
    assert not [name for name, _ in models[0].named_parameters() if name.startswith(("head.", "attn_pool", "norm."))]


@ALL
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision(
    built: Build, images: list[Image.Image], architecture: str, dtype: str, tolerance: float
) -> None:
    _, folder = built(architecture)
    exact, half = (create(folder).load("cpu", compute) for compute in ("float32", dtype))
    pixels = stacked(exact, images)
    features, expected = half.encode(pixels), exact.encode(pixels)
    assert features.dtype == getattr(torch, dtype)
    assert 0 < (features.float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("architecture", [*MODELS, *HIERARCHICAL])
def test_conforms(built: Build, architecture: str) -> None:
    vision = create(built(architecture)[1], image_size=64)
    vision.check()
    assert check_vision(vision) == []
    pickle.loads(pickle.dumps(vision.load("cpu", "float32").preprocess))


def test_the_identity_depends_on_every_option(built: Build, tmp_path: Path) -> None:
    architecture = "vit_large_patch14_reg4_dinov2"
    _, folder = built(architecture)
    changes: list[dict[str, Any]] = [{}, {"layer": -1}, {"layer": (-1, -2)}, {"select": "cls-patch"}, {"norm": True}]
    changes += [{"image": "square"}, {"image_size": 56}, {"crop_pct": 0.5}]
    identities = [dict(create(folder, **change).identity()) for change in changes]
    save(architecture, tmp_path)
    assert create(tmp_path).identity() == identities[0], "the folder's name must not matter"
    config = json.loads((tmp_path / "config.json").read_text())
    for section, key, value in (
        ("pretrained_cfg", "interpolation", "bilinear"),
        ("pretrained_cfg", "mean", [0.5, 0.5, 0.5]),
        ("pretrained_cfg", "crop_mode", "squash"),
        ("model_args", "act_layer", "relu"),
    ):
        changed = {**config, section: {**config[section], key: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        identities.append(dict(create(tmp_path).identity()))
    save(architecture, tmp_path, seed=1)
    identities.append(dict(create(tmp_path).identity()))
    assert all(one != other for index, one in enumerate(identities) for other in identities[:index])


def test_what_timm_cannot_load_is_a_model_error(built: Build, tmp_path: Path, saved: Callable[[str], Path]) -> None:
    with pytest.raises(ModelError, match="architecture") as caught:
        create(saved("siglip")).check()
    assert "clip" in caught.value.hint
    architecture = "vit_base_patch16_224"
    save(architecture, tmp_path)
    with pytest.raises(ModelError, match="1 to 4"):
        create(tmp_path, layer=0).shape()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "vit_of_tomorrow"}))
    with pytest.raises(ModelError, match="vit_of_tomorrow"):
        create(tmp_path).check()
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_args": {**config["model_args"], "depth": 5}}))
    with pytest.raises(ModelError, match=r"blocks\.4"):
        create(tmp_path).load("cpu", "float32")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        create(tmp_path).check()


def test_perception_encoder_is_checked_to_be_one(built: Build) -> None:
    with pytest.raises(ModelError, match="vit_base_patch16_224"):
        create(built("vit_base_patch16_224")[1], "perception-encoder").check()


def test_perception_encoder_uses_the_last_layer(built: Build, images: list[Image.Image]) -> None:
    model, folder = built("vit_pe_lang_large_patch14_448")
    encoder = create(folder, "perception-encoder").load("cpu", "float32")
    pixels = stacked(encoder, images)
    with torch.no_grad():
        assert torch.equal(encoder.encode(pixels), model.forward_features(pixels)[:, 1:])
    assert encoder.shape.prefix == 0


def test_fused_with_a_model_of_transformers(
    built: Build, saved: Callable[[str], Path], images: list[Image.Image]
) -> None:
    parts = [
        {"name": "timm", "model": str(built("vit_large_patch14_reg4_dinov2")[1]), "image_size": 28},
        {"name": "siglip", "model": str(saved("siglip"))},
    ]
    encoders = [registry().create("vision", part).load("cpu", "float32") for part in parts]
    fused = registry().create("vision", {"name": "fused", "parts": parts})
    assert check_vision(fused) == []
    encoder = fused.load("cpu", "float32")
    expected = torch.cat([each.encode(stacked(each, images)) for each in encoders], dim=-1)
    assert torch.equal(encoder.encode(stacked(encoder, images)), expected)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        pytest.param("timm", "vit_so400m_patch14_siglip_384", marks=pytest.mark.slow),
        ("perception-encoder", "vit_pe_lang_large_patch14_448"),
    ],
)
def test_extract_and_train(name: str, architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    recipe = toy_recipe(tmp_path / "recipe", photos=6)
    save(architecture, recipe.parent / "timm")
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("vision:")]
    recipe.write_text("\n".join([*lines, f"vision: {{name: {name}, model: timm}}"]))
    extracted = run_cli("extract", "-r", str(recipe), "--json", cwd=tmp_path)
    assert extracted.exit_code == 0, extracted.stderr
    trained = run_cli("train", "-r", str(recipe), "--stage", "1", "-o", "stage1.max_steps=2", "--json", cwd=tmp_path)
    assert trained.exit_code == 0, trained.stderr
    assert trained.json()["steps"] == 2
