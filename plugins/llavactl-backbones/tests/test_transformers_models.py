"""SigLIP, SigLIP 2, DINOv2 and DINOv3: pixels and hidden states are those of transformers."""

import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from llavactl_backbones.small_models import WRITERS
from PIL import Image

from llavactl import ModelError, registry
from llavactl.testing import check_vision

Saved = Callable[[str], Path]

OPTIONS: dict[str, dict[str, Any]] = {
    "siglip": {"name": "siglip"},
    "siglip2": {"name": "siglip2"},
    "dinov2": {"name": "dinov2", "image_size": 42},
    "dinov2-registers": {"name": "dinov2", "image_size": 70},
    "dinov3": {"name": "dinov3", "image_size": 40},
    "siglip2-naflex": {"name": "siglip2-naflex", "max_num_patches": 38},
}
"""Per family: the component and its options."""

GRID = {"siglip": 2, "siglip2": 4, "dinov2": 3, "dinov2-registers": 5, "dinov3": 5, "siglip2-naflex": 6}
PREFIX = {"siglip": 0, "siglip2": 0, "dinov2": 1, "dinov2-registers": 5, "dinov3": 5, "siglip2-naflex": 0}
PATCH = {"siglip": 14, "siglip2": 8, "dinov2": 14, "dinov2-registers": 14, "dinov3": 8, "siglip2-naflex": 8}
CLASSES = {
    "siglip": "SiglipVisionModel",
    "siglip2": "SiglipVisionModel",
    "dinov2": "Dinov2Model",
    "dinov2-registers": "Dinov2WithRegistersModel",
    "dinov3": "DINOv3ViTModel",
    "siglip2-naflex": "Siglip2VisionModel",
}
ALL = pytest.mark.parametrize("family", OPTIONS)


def create(saved: Saved, family: str, **options: Any) -> Any:
    return registry().create("vision", {"model": str(saved(family)), **OPTIONS[family], **options})


def original_states(folder: Path, family: str, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The hidden states of the complete model of transformers for ``pixels`` [I, 3, H, W], before its final norm."""
    model = getattr(transformers, CLASSES[family]).from_pretrained(folder).eval()
    if family == "siglip2-naflex":
        side, patch = GRID[family], PATCH[family]
        patches = (
            pixels.reshape(len(pixels), 3, side, patch, side, patch).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
        )
        mask, shapes = torch.ones(len(pixels), side**2), torch.tensor([[side, side]] * len(pixels))
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    else:
        inputs = {"pixel_values": pixels}
    with torch.no_grad():
        states: tuple[torch.Tensor, ...] = model(**inputs, output_hidden_states=True).hidden_states
    return states


@ALL
@pytest.mark.parametrize("layer", [-2, 0, -1, (1, -2)])
def test_features_equal_those_of_transformers(
    saved: Saved, images: list[Image.Image], family: str, layer: int | tuple[int, ...]
) -> None:
    vision = create(saved, family, layer=layer)
    encoder = vision.load("cpu", "float32")
    pixels = torch.from_numpy(np.stack([encoder.preprocess(image) for image in images]))
    states = original_states(Path(vision.options.model), family, pixels)
    layers = (layer,) if isinstance(layer, int) else layer
    expected = torch.cat([states[index] for index in layers], dim=-1)[:, PREFIX[family] :]
    features = encoder.encode(pixels)
    assert vision.shape() == encoder.shape
    assert (encoder.shape.grid, encoder.shape.prefix) == ((GRID[family],) * 2, 0)
    assert features.shape == (len(images), encoder.shape.patches, encoder.shape.width) == expected.shape
    torch.testing.assert_close(features, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("family", [family for family in OPTIONS if family != "siglip2-naflex"])
def test_cls_patch_keeps_class_token_and_registers(saved: Saved, images: list[Image.Image], family: str) -> None:
    vision = create(saved, family, select="cls-patch")
    encoder = vision.load("cpu", "float32")
    pixels = torch.from_numpy(np.stack([encoder.preprocess(image) for image in images]))
    expected = original_states(Path(vision.options.model), family, pixels)[-2]
    assert vision.shape() == encoder.shape
    assert encoder.shape.prefix == PREFIX[family]
    torch.testing.assert_close(encoder.encode(pixels), expected, atol=2e-6, rtol=2e-6)


def library_pixels(family: str, image: Image.Image, side: int) -> np.ndarray:
    """Pixels [3, side, side] of transformers' own image processor; for NaFlex, patches joined to an image."""
    square = {"height": side, "width": side}
    imagenet = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if family.startswith("dinov2"):
        processor: Any = transformers.BitImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, resample=3, **imagenet
        )
    elif family == "siglip2-naflex":
        processor = transformers.Siglip2ImageProcessorPil(patch_size=PATCH[family], max_num_patches=GRID[family] ** 2)
        outputs = processor(images=image, return_tensors="np")
        assert outputs["spatial_shapes"].tolist() == [[GRID[family]] * 2]
        patches = outputs["pixel_values"][0].reshape(GRID[family], GRID[family], PATCH[family], PATCH[family], 3)
        joined: np.ndarray = patches.transpose(4, 0, 2, 1, 3).reshape(3, side, side)
        return joined
    else:
        processor = transformers.SiglipImageProcessorPil(size=square)
    pixels: np.ndarray = processor(images=image, return_tensors="np")["pixel_values"][0]
    return pixels


@pytest.mark.timm
@pytest.mark.parametrize("family", [family for family in OPTIONS if family != "dinov3"])
def test_pixels_equal_those_of_the_image_processor(saved: Saved, images: list[Image.Image], family: str) -> None:
    preprocess = create(saved, family, image="square").load("cpu", "float32").preprocess
    side = GRID[family] * PATCH[family]
    for image in images:
        if family == "siglip2-naflex" and image.width != image.height:
            continue  # its processor keeps the aspect ratio
        pixels = preprocess(image)
        assert pixels.dtype == np.float32
        assert np.array_equal(pixels, library_pixels(family, image, side).astype(np.float32)), image.size


@pytest.mark.timm
def test_naflex_stretches_or_pads_to_a_square(saved: Saved) -> None:
    """A wide white image: stretched, it fills the square; padded, the rest has the mean color, which becomes 0."""
    wide = Image.new("RGB", (120, 60), "white")
    stretched, padded = (
        create(saved, "siglip2-naflex", image=image).load("cpu", "float32").preprocess(wide)
        for image in ("square", "pad")
    )
    assert (stretched == 1).all()
    assert (padded[:, 16:32] == 1).all()
    assert np.abs(padded[:, :8]).max() < 0.01
    assert np.abs(padded[:, -8:]).max() < 0.01


@pytest.mark.timm
def test_naflex_enlarges_tiny_images(saved: Saved) -> None:
    """transformers' processor enlarges by a factor of at most 100, so a single pixel would get a smaller grid."""
    preprocess = create(saved, "siglip2-naflex", max_num_patches=400).load("cpu", "float32").preprocess
    assert preprocess(Image.new("RGB", (1, 1), "white")).shape == (3, 160, 160)


@pytest.mark.timm
def test_dinov3_pixels_are_resized_as_floats(saved: Saved, images: list[Image.Image]) -> None:
    """Compared with Pillow's resampling of floats, with a tolerance of 1e-4 (values have a range of about 4.5)."""
    preprocess = create(saved, "dinov3", image="square").load("cpu", "float32").preprocess
    settings = json.loads((saved("dinov3") / "preprocessor_config.json").read_text())
    mean, std = (np.array(settings[key]).reshape(3, 1, 1) for key in ("image_mean", "image_std"))
    for image in images:
        channels = [Image.fromarray(np.asarray(channel, dtype=np.float32) / 255) for channel in image.split()]
        resized = np.stack([channel.resize((40, 40), Image.Resampling.BILINEAR) for channel in channels])
        np.testing.assert_allclose(preprocess(image), (resized - mean) / std, atol=1e-4)


@pytest.mark.timm
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="torchvision is not installed: make test")
def test_dinov3_pixels_equal_those_of_the_image_processor(saved: Saved, images: list[Image.Image]) -> None:
    preprocess = create(saved, "dinov3", image="square").load("cpu", "float32").preprocess
    settings = json.loads((saved("dinov3") / "preprocessor_config.json").read_text())
    settings["size"] = {"height": 40, "width": 40}
    processor = transformers.DINOv3ViTImageProcessor.from_dict(settings)
    for image in images:
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0].numpy()
        assert np.array_equal(preprocess(image), expected), image.size


@ALL
def test_unneeded_blocks_are_removed(saved: Saved, family: str) -> None:
    def blocks(layer: int) -> int:
        model = create(saved, family, layer=layer).load("cpu", "float32").model
        return max(len(module) for module in model.modules() if isinstance(module, torch.nn.ModuleList))

    assert [blocks(layer) for layer in (-1, -2, 2)] == [4, 3, 2]


@ALL
@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 0.01), ("bfloat16", 0.05)])
def test_half_precision(saved: Saved, images: list[Image.Image], family: str, dtype: str, tolerance: float) -> None:
    exact, half = (create(saved, family).load("cpu", compute) for compute in ("float32", dtype))
    pixels = torch.from_numpy(np.stack([exact.preprocess(image) for image in images]))
    features = half.encode(pixels)
    assert features.dtype == getattr(torch, dtype)
    expected = exact.encode(pixels)
    assert 0 < (features.float() - expected).norm() < tolerance * expected.norm()


@pytest.mark.timm
@ALL
def test_conforms(saved: Saved, family: str) -> None:
    """Constant identity, declared shape, finite features that don't depend on the batch."""
    vision = create(saved, family)
    vision.check()
    assert check_vision(vision) == []
    pickle.loads(pickle.dumps(vision.load("cpu", "float32").preprocess))


@ALL
def test_the_identity_depends_on_every_option(saved: Saved, family: str, tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"layer": -1}, {"layer": (-1, -2)}, {"image": "square"}]
    changes += [{"max_num_patches": 16}] if family == "siglip2-naflex" else [{"select": "cls-patch"}]
    changes += [{"image_size": 56}] if "dino" in family else []
    identities = [dict(create(saved, family, **change).identity()) for change in changes]
    folder = WRITERS[family](tmp_path)
    unchanged = dict(create(saved, family, model=str(folder)).identity())
    processor = folder / "preprocessor_config.json"
    processor.write_text(
        processor.read_text().replace('"resample": 2', '"resample": 0').replace('"resample": 3', '"resample": 2')
    )
    identities.append(dict(create(saved, family, model=str(folder)).identity()))
    model = getattr(transformers, CLASSES[family]).from_pretrained(folder)
    with torch.no_grad():
        next(iter(model.parameters())).add_(1)
    model.save_pretrained(folder)
    identities.append(dict(create(saved, family, model=str(folder)).identity()))
    assert unchanged == identities[0], "the folder's name must not matter"
    assert all(one != other for index, one in enumerate(identities) for other in identities[:index])


@ALL
def test_a_missing_layer_is_refused_without_weights(saved: Saved, family: str) -> None:
    for layer in (5, -6):
        with pytest.raises(ModelError, match="0 to 4"):
            create(saved, family, layer=layer).shape()


def test_a_model_of_another_family_is_refused(saved: Saved) -> None:
    folder = str(saved("siglip"))
    for name in ("dinov2", "dinov3", "siglip2-naflex"):
        vision = registry().create("vision", {"name": name, "model": folder})
        for method in (
            vision.check,
            vision.check,
            vision.identity,
            vision.shape,
            lambda v=vision: v.load("cpu", "float32"),
        ):
            with pytest.raises(ModelError, match="siglip_vision_model") as caught:
                method()
            assert "clip" in caught.value.hint


def test_an_image_smaller_than_a_patch_is_refused(saved: Saved) -> None:
    with pytest.raises(ModelError, match="14 pixels"):
        create(saved, "dinov2", image_size=13).shape()


def test_dinov2_of_the_hub_is_encoded_at_another_size_than_its_processors(saved: Saved) -> None:
    """Its configuration is for 70 pixels and its processor for 28 (on the hub: 518 and 224), which `clip` refuses."""
    folder = str(saved("dinov2"))
    with pytest.raises(ModelError, match="28x28"):
        registry().create("vision", {"name": "clip", "model": folder}).shape()
    assert registry().create("vision", {"name": "dinov2", "model": folder, "image_size": 28}).shape().grid == (2, 2)
