"""Every vision model of transformers: right from the images to the features, or refused before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from llavactl.core.errors import ModelError
from llavactl.core.registry import registry

SIDE, PATCH, LAYERS = 32, 8, 3
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
    "num_channels": 3,
    "mlp_dim": 64,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 32, 32, 32],
    "embed_dim": 32,
    "window_size": 4,
}
FEWER = ("image_size", "patch_size", "num_hidden_layers")
LARGEST = 20_000_000
"""Weights; a kind that can't be made smaller with these settings is left out."""

WORKING = ["aimv2_vision_model", "beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2"]
WORKING += ["dinov2_with_registers", "dinov3_vit", "ijepa", "siglip_vision_model", "vit", "vit_msn"]
REFUSED = ["convnext", "convnextv2", "cvt", "internvl_vision", "levit", "pixtral", "pvt", "resnet", "seggpt"]
REFUSED += ["siglip2_vision_model", "vit_mae", "videomae"]


def kinds() -> list[str]:
    """The model types that are given pixels."""
    found = []
    for kind, names in MODEL_MAPPING_NAMES.items():
        model = getattr(transformers, names if isinstance(names, str) else names[0], None)
        if getattr(model, "main_input_name", None) == "pixel_values":
            found.append(kind)
    return found


def made(kind: str, folder: Path) -> bool:
    """Fills ``folder`` with a small random model of ``kind``; False if this kind can't be made here."""
    names = MODEL_MAPPING_NAMES[kind]
    model = getattr(transformers, names if isinstance(names, str) else names[0])
    known = CONFIG_MAPPING[kind]
    keys = known.__dataclass_fields__.keys() | known.attribute_map.keys()
    for some in (SMALL, {key: SMALL[key] for key in FEWER}, {}):
        try:
            config = known(**{key: value for key, value in some.items() if key in keys})
            with torch.device("meta"):
                size = sum(weight.numel() for weight in model(config).parameters())
            if size < LARGEST:
                torch.manual_seed(0)
                model(config).save_pretrained(folder)
                break
        except Exception:  # noqa: BLE001 - settings that it doesn't take
            continue
    else:
        return False
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return True


def works(folder: Path) -> bool:
    """Whether the model in ``folder`` is not refused; then its features are those of the whole model."""
    vision = registry().create("vision", {"name": "clip", "model": str(folder)})
    try:
        shape = vision.shape()
    except ModelError:
        return False
    encoder = vision.load("cpu", "float32")
    assert encoder.shape == shape
    images = [Image.effect_noise((SIDE, SIDE), sigma).convert("RGB") for sigma in (20, 90)]
    pixels = torch.stack([torch.from_numpy(encoder.preprocess(image)) for image in images])
    found = encoder.encode(pixels)
    with torch.no_grad():
        wanted = vision.whole().eval()(pixels, output_hidden_states=True).hidden_states[-2][:, -shape.patches :]
    assert shape.grid == (SIDE // PATCH, SIDE // PATCH)
    assert tuple(found.shape) == (2, shape.patches, shape.width)
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    return True


@pytest.mark.parametrize("kind", WORKING)
def test_a_vision_transformer_works(kind: str, tmp_path: Path) -> None:
    assert made(kind, tmp_path)
    assert works(tmp_path)


@pytest.mark.parametrize("kind", REFUSED)
def test_another_model_is_refused_from_its_configuration(kind: str, tmp_path: Path) -> None:
    assert made(kind, tmp_path)
    assert not works(tmp_path)


@pytest.mark.slow
def test_every_kind_works_or_is_refused(tmp_path: Path) -> None:
    seen = {kind: works(folder) for kind in kinds() if made(kind, folder := tmp_path / kind)}
    assert {kind for kind, fine in seen.items() if fine} >= set(WORKING)
    assert {kind for kind, fine in seen.items() if not fine} >= set(REFUSED)


def processors() -> dict[str, dict[str, Any]]:
    square = {"height": SIDE, "width": SIDE}
    crop = {"do_center_crop": True, "crop_size": square}
    plain = {"size": square, "do_center_crop": False}
    return {
        "shortest edge": {"size": {"shortest_edge": SIDE}, **crop},
        "a larger edge": {"size": {"shortest_edge": SIDE + 12}, **crop},
        "numbers": {"size": SIDE, "do_center_crop": True, "crop_size": SIDE},
        "stretched": plain,
        "bilinear": {**plain, "resample": 2},
        "rescaled otherwise": {**plain, "rescale_factor": 1 / 127.5},
        "not rescaled": {**plain, "do_rescale": False},
        "not normalised": {**plain, "do_normalize": False},
        "one mean": {**plain, "image_mean": 0.5, "image_std": 0.25},
        "not resized": {"do_resize": False, **crop},
        "rgb not said": {**plain, "do_convert_rgb": None},
    }


@pytest.mark.parametrize("settings", processors().values(), ids=processors())
@pytest.mark.parametrize("family", ["CLIP", "Siglip", "ViT", "Bit"])
def test_exported_processors_make_the_same_pixels(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np
    from transformers import AutoImageProcessor

    from llavactl.components.formats.hf import padding_processor

    assert made("clip_vision_model", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": f"{family}ImageProcessor", **settings})
    )
    vision = registry().create("vision", {"name": "clip", "model": str(tmp_path), "image": "pad"})
    ours = vision.load("cpu", "float32").preprocess
    padding_processor(vision.processor).save_pretrained(tmp_path / "out")
    theirs = AutoImageProcessor.from_pretrained(tmp_path / "out")
    for size in ((SIDE, SIDE), (40, 61), (23, 90), (9, 5)):
        image = Image.effect_noise(size, 80).convert("RGB")
        assert np.array_equal(ours(image), theirs(images=image, return_tensors="np")["pixel_values"][0])


def test_padding_without_a_colour_is_refused(tmp_path: Path) -> None:
    assert made("clip_vision_model", tmp_path)
    settings = {"image_processor_type": "CLIPImageProcessor", "do_normalize": False, "image_mean": None}
    settings |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="image_mean"):
        registry().create("vision", {"name": "clip", "model": str(tmp_path)}).shape()
    assert (
        registry().create("vision", {"name": "clip", "model": str(tmp_path), "image": "square"}).shape().patches == 16
    )
