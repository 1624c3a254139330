"""Pixels and hidden states are those of transformers, to the bit: on real photos where they are there."""

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
    """Wide, tall and square ones."""
    files = [*sorted(COCO.glob("train2017/*.jpg"))[:6], *sorted((toys / "images").iterdir())[:4]]
    return [*(Image.open(file).convert("RGB") for file in files), Image.new("RGB", (31, 31), (9, 90, 200))]


def tower(folder: Path, **options: Any) -> VisionEncoder:
    made: VisionEncoder = (
        registry().create("vision", {"name": "clip", "model": str(folder), **options}).load("cpu", "float32")
    )
    return made


def test_square_is_the_models_own_processor(toys: Path, photos: list[Image.Image]) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(toys / "clip")
    ours = tower(toys / "clip", image="square").preprocess
    for photo in photos:
        theirs = processor(images=photo, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(ours(photo), theirs)


def test_pad_is_llavas(toys: Path, photos: list[Image.Image]) -> None:
    """As ``LlavaImageProcessor`` with ``do_pad``, which holds LLaVA's expand2square."""
    from transformers import CLIPImageProcessor
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

    own = CLIPImageProcessor.from_pretrained(toys / "clip").to_dict()
    keep = ("size", "crop_size", "image_mean", "image_std", "resample", "rescale_factor")
    processor = LlavaImageProcessorPil(do_pad=True, **{key: own[key] for key in keep})
    ours = tower(toys / "clip", image="pad").preprocess
    for photo in photos:
        theirs = processor(images=photo, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(ours(photo), theirs)


@pytest.mark.parametrize(("size", "corner"), [((10, 7), (0, 1)), ((7, 10), (1, 0)), ((4, 9), (2, 0)), ((5, 5), (0, 0))])
def test_padding_by_hand(size: tuple[int, int], corner: tuple[int, int]) -> None:
    """The picture lies at floor((side - its size) / 2), the rest is CLIP's mean as LLaVA rounds it."""
    grey = (122, 116, 104)
    padded = np.asarray(pad_to_square(Image.new("RGB", size, "red"), grey))
    assert padded.shape[:2] == (max(size), max(size))
    left, top = corner
    inside = np.zeros(padded.shape[:2], dtype=bool)
    inside[top : top + size[1], left : left + size[0]] = True
    assert (padded[inside] == (255, 0, 0)).all()
    assert (padded[~inside] == grey).all()


@pytest.mark.parametrize("layer", [-2, -1, 0, 1, 3, (0, -1), (-2, 1)])
@pytest.mark.parametrize("select", ["patch", "cls-patch"])
def test_hidden_states_are_those_of_transformers(
    toys: Path, photos: list[Image.Image], layer: int | tuple[int, ...], select: str
) -> None:
    from transformers import CLIPVisionModel

    ours = tower(toys / "clip", layer=layer, select=select)
    pixels = torch.from_numpy(np.stack([ours.preprocess(photo) for photo in photos]))
    whole = CLIPVisionModel.from_pretrained(toys / "clip").eval()
    with torch.no_grad():
        states = whole(pixels, output_hidden_states=True).hidden_states
    wanted = torch.cat([states[each] for each in ((layer,) if isinstance(layer, int) else layer)], dim=-1)
    wanted = wanted[:, 1:] if select == "patch" else wanted
    found = ours.encode(pixels)
    assert torch.equal(found, wanted)
    assert tuple(found.shape[1:]) == (ours.shape.patches, ours.shape.width)


def test_no_block_is_run_that_nobody_looks_at(toys: Path) -> None:
    for layer, blocks in ((-2, 2), (-1, 3), (1, 1), (0, 1)):
        assert len(tower(toys / "clip", layer=layer)._blocks) == blocks


def test_a_layer_that_is_not_there(toys: Path) -> None:
    for layer in (4, -5):
        with pytest.raises(ModelError, match="hidden states 0 to 3"):
            tower(toys / "clip", layer=layer)


def test_backbones_with_more_or_fewer_tokens_than_patches(tmp_path: Path) -> None:
    """SigLIP has no class token, DINOv2 may have registers beside it: patches are what is left."""
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
            ours = tower(folder, layer=-2, select=select)
            with torch.no_grad():
                wanted = model(pixels, output_hidden_states=True).hidden_states[-2]
            assert ours.shape.prefix == (prefix if select == "cls-patch" else 0)
            assert torch.equal(ours.encode(pixels), wanted if select == "cls-patch" else wanted[:, prefix:])


@pytest.mark.parametrize(("kind", "mean"), [("clip", 0.48145466), ("siglip", 0.5)])
def test_a_bare_tower_has_its_familys_preprocessing(tmp_path: Path, kind: str, mean: float) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": f"{kind}_vision_model", "image_size": 28}))
    processor = TransformersVision(TransformersVisionOptions(model=str(tmp_path))).processor
    assert processor.image_mean[0] == mean
    assert type(processor).__name__.endswith("Pil"), "the same pixels with torchvision as without"


def test_a_bare_tower_of_another_family_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "dinov2", "image_size": 28}))
    with pytest.raises(ModelError, match=r"preprocessor_config\.json"):
        _ = TransformersVision(TransformersVisionOptions(model=str(tmp_path))).processor
