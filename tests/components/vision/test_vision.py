"""Pixels and hidden states are bit-identical to those of transformers, on real photos if available."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from llavactl.components.vision.encoder import VisionEncoder, pad_to_square
from llavactl.components.vision.pretrained import TransformersVision, TransformersVisionOptions
from llavactl.core.errors import ModelError
from llavactl.core.registry import registry

COCO = Path(__file__).parents[4] / "shared/data/coco-mini"


@pytest.fixture(scope="session")
def photos(toys: Path) -> list[Image.Image]:
    """Wide, tall and square images."""
    files = [*sorted(COCO.glob("train2017/*.jpg"))[:6], *sorted((toys / "images").iterdir())[:4]]
    return [*(Image.open(file).convert("RGB") for file in files), Image.new("RGB", (31, 31), (9, 90, 200))]


def load_encoder(folder: Path, **options: Any) -> VisionEncoder:
    vision = registry().create("vision", {"name": "clip", "model": str(folder), **options})
    encoder: VisionEncoder = vision.load("cpu", "float32")
    return encoder


def test_square_uses_the_processor_of_the_model(toys: Path, photos: list[Image.Image]) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(toys / "clip")
    preprocess = load_encoder(toys / "clip", image="square").preprocess
    for photo in photos:
        expected = processor(images=photo, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(preprocess(photo), expected)


def test_pad_agrees_with_llava(toys: Path, photos: list[Image.Image]) -> None:
    """Compared with ``LlavaImageProcessor`` with ``do_pad``, which implements LLaVA's expand2square."""
    from transformers import CLIPImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    settings = CLIPImageProcessor.from_pretrained(toys / "clip").to_dict()
    keep = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    processor = LlavaImageProcessorPil(do_pad=True, **{key: settings[key] for key in keep})
    preprocess = load_encoder(toys / "clip", image="pad").preprocess
    for photo in photos:
        expected = processor(images=photo, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(preprocess(photo), expected)


@pytest.mark.parametrize(("size", "corner"), [((10, 7), (0, 1)), ((7, 10), (1, 0)), ((4, 9), (2, 0)), ((5, 5), (0, 0))])
def test_padding_position_and_color(size: tuple[int, int], corner: tuple[int, int]) -> None:
    """The image is placed at floor((side - size) / 2); the rest has CLIP's mean, rounded as in LLaVA."""
    gray = (122, 116, 104)
    padded = np.asarray(pad_to_square(Image.new("RGB", size, "red"), gray))
    assert padded.shape[:2] == (max(size), max(size))
    left, top = corner
    inside = np.zeros(padded.shape[:2], dtype=bool)
    inside[top : top + size[1], left : left + size[0]] = True
    assert (padded[inside] == (255, 0, 0)).all()
    assert (padded[~inside] == gray).all()


@pytest.mark.parametrize("layer", [-2, -1, 0, 1, 3, (0, -1), (-2, 1)])
@pytest.mark.parametrize("select", ["patch", "cls-patch"])
def test_hidden_states_equal_those_of_transformers(
    toys: Path, photos: list[Image.Image], layer: int | tuple[int, ...], select: str
) -> None:
    from transformers import CLIPVisionModel

    encoder = load_encoder(toys / "clip", layer=layer, select=select)
    pixels = torch.from_numpy(np.stack([encoder.preprocess(photo) for photo in photos]))
    full_model = CLIPVisionModel.from_pretrained(toys / "clip").eval()
    with torch.no_grad():
        states = full_model(pixels, output_hidden_states=True).hidden_states
    layers = (layer,) if isinstance(layer, int) else layer
    expected = torch.cat([states[index] for index in layers], dim=-1)
    expected = expected[:, 1:] if select == "patch" else expected
    features = encoder.encode(pixels)
    assert torch.equal(features, expected)
    assert tuple(features.shape[1:]) == (encoder.shape.patches, encoder.shape.width)


def test_unneeded_blocks_are_removed(toys: Path) -> None:
    for layer, blocks in ((-2, 2), (-1, 3), (1, 1), (0, 1)):
        assert len(load_encoder(toys / "clip", layer=layer)._blocks) == blocks


def test_missing_layer_is_refused(toys: Path) -> None:
    for layer in (4, -5):
        with pytest.raises(ModelError, match="0 to 3"):
            load_encoder(toys / "clip", layer=layer)


def test_prefix_tokens_of_other_model_families(tmp_path: Path) -> None:
    """SigLIP has no CLS token; DINOv2 may have registers in addition to it."""
    from transformers import (
        CLIPImageProcessor,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SiglipVisionConfig,
        SiglipVisionModel,
    )

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    for model, prefix in (
        (SiglipVisionModel(SiglipVisionConfig(**small, intermediate_size=64)), 0),
        (Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**small, num_register_tokens=3)), 4),
    ):
        folder = tmp_path / type(model).__name__
        model.eval().save_pretrained(folder)
        processor.save_pretrained(folder)
        pixels = torch.randn(2, 3, 28, 28)
        for select in ("patch", "cls-patch"):
            encoder = load_encoder(folder, layer=-2, select=select)
            with torch.no_grad():
                states = model(pixels, output_hidden_states=True).hidden_states[-2]
            expected = states if select == "cls-patch" else states[:, prefix:]
            assert encoder.shape.prefix == (prefix if select == "cls-patch" else 0)
            assert torch.equal(encoder.encode(pixels), expected)


@pytest.mark.parametrize(("family", "mean"), [("clip", 0.48145466), ("siglip", 0.5)])
def test_encoder_without_processor_uses_the_default_of_its_family(tmp_path: Path, family: str, mean: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"{family}_vision_model", "image_size": 28}))
    processor = TransformersVision(TransformersVisionOptions(model=str(tmp_path))).processor
    assert processor.image_mean[0] == mean
    assert type(processor).__name__.endswith("Pil"), "pixels must not depend on torchvision"


def test_encoder_of_another_family_without_processor_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "image_size": 28}))
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        _ = TransformersVision(TransformersVisionOptions(model=str(tmp_path))).processor
