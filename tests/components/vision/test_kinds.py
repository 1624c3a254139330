"""Every vision model of transformers either gives correct features or is refused before weights are read."""

from __future__ import annotations

import json
from contextlib import suppress
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
MINIMAL = ("image_size", "patch_size", "num_hidden_layers")
MAX_PARAMETERS = 20_000_000
"""Model types that can't be made smaller with these settings are left out."""

SUPPORTED = ["aimv2_vision_model", "beit", "clip_vision_model", "data2vec-vision", "deit", "dinov2"]
SUPPORTED += ["dinov2_with_registers", "dinov3_vit", "ijepa", "siglip_vision_model", "vit", "vit_msn"]
REFUSED = ["convnext", "convnextv2", "cvt", "internvl_vision", "levit", "pixtral", "pvt", "resnet", "seggpt"]
REFUSED += ["siglip2_vision_model", "vit_mae", "videomae"]


def model_types() -> list[str]:
    """The model types whose main input is pixel_values."""
    types = []
    for model_type, names in MODEL_MAPPING_NAMES.items():
        model = getattr(transformers, names if isinstance(names, str) else names[0], None)
        with suppress(ImportError):  # some need packages that are not installed
            if getattr(model, "main_input_name", None) == "pixel_values":
                types.append(model_type)
    return types


def save_small_model(model_type: str, folder: Path) -> bool:
    """Save a small random model of ``model_type``; False if it can't be created with these settings."""
    names = MODEL_MAPPING_NAMES[model_type]
    model = getattr(transformers, names if isinstance(names, str) else names[0])
    config_class = CONFIG_MAPPING[model_type]
    keys = config_class.__dataclass_fields__.keys() | config_class.attribute_map.keys()
    for settings in (SMALL, {key: SMALL[key] for key in MINIMAL}, {}):
        try:
            config = config_class(**{key: value for key, value in settings.items() if key in keys})
            with torch.device("meta"):
                size = sum(weight.numel() for weight in model(config).parameters())
            if size < MAX_PARAMETERS:
                torch.manual_seed(0)
                model(config).save_pretrained(folder)
                break
        except Exception:  # noqa: BLE001 - settings that the model type rejects
            continue
    else:
        return False
    processor = {"image_processor_type": "ViTImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return True


def is_supported(folder: Path) -> bool:
    """Whether the model in ``folder`` is accepted; if so, checks its features against the complete model."""
    vision = registry().create("vision", {"name": "clip", "model": str(folder)})
    try:
        shape = vision.shape()
    except ModelError:
        return False
    encoder = vision.load("cpu", "float32")
    assert encoder.shape == shape
    images = [Image.effect_noise((SIDE, SIDE), sigma).convert("RGB") for sigma in (20, 90)]
    pixels = torch.stack([torch.from_numpy(encoder.preprocess(image)) for image in images])
    features = encoder.encode(pixels)
    with torch.no_grad():
        expected = vision.whole().eval()(pixels, output_hidden_states=True).hidden_states[-2][:, -shape.patches :]
    assert shape.grid == (SIDE // PATCH, SIDE // PATCH)
    assert tuple(features.shape) == (2, shape.patches, shape.width)
    assert (features - expected).abs().max() <= 1e-5 * expected.abs().max()
    return True


@pytest.mark.parametrize("model_type", SUPPORTED)
def test_vision_transformer_is_supported(model_type: str, tmp_path: Path) -> None:
    assert save_small_model(model_type, tmp_path)
    assert is_supported(tmp_path)


@pytest.mark.parametrize("model_type", REFUSED)
def test_other_model_is_refused_from_its_configuration(model_type: str, tmp_path: Path) -> None:
    assert save_small_model(model_type, tmp_path)
    assert not is_supported(tmp_path)


@pytest.mark.slow
def test_every_model_type_is_supported_or_refused(tmp_path: Path) -> None:
    results = {
        name: is_supported(folder) for name in model_types() if save_small_model(name, folder := tmp_path / name)
    }
    assert {name for name, supported in results.items() if supported} >= set(SUPPORTED)
    assert {name for name, supported in results.items() if not supported} >= set(REFUSED)


def processor_settings() -> dict[str, dict[str, Any]]:
    square = {"height": SIDE, "width": SIDE}
    crop = {"do_center_crop": True, "crop_size": square}
    plain = {"size": square, "do_center_crop": False}
    return {
        "shortest edge": {"size": {"shortest_edge": SIDE}, **crop},
        "a larger edge": {"size": {"shortest_edge": SIDE + 12}, **crop},
        "integer sizes": {"size": SIDE, "do_center_crop": True, "crop_size": SIDE},
        "stretched": plain,
        "bilinear": {**plain, "resample": 2},
        "other rescale factor": {**plain, "rescale_factor": 1 / 127.5},
        "not rescaled": {**plain, "do_rescale": False},
        "not normalized": {**plain, "do_normalize": False},
        "scalar mean": {**plain, "image_mean": 0.5, "image_std": 0.25},
        "not resized": {"do_resize": False, **crop},
        "unspecified do_convert_rgb": {**plain, "do_convert_rgb": None},
    }


@pytest.mark.parametrize("settings", processor_settings().values(), ids=processor_settings())
@pytest.mark.parametrize("family", ["CLIP", "Siglip", "ViT", "Bit"])
def test_exported_processors_give_the_same_pixels(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import numpy as np
    from transformers import AutoImageProcessor

    from llavactl.components.formats.hf import padding_processor

    assert save_small_model("clip_vision_model", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": f"{family}ImageProcessor", **settings})
    )
    vision = registry().create("vision", {"name": "clip", "model": str(tmp_path), "image": "pad"})
    preprocess = vision.load("cpu", "float32").preprocess
    padding_processor(vision.processor).save_pretrained(tmp_path / "out")
    exported = AutoImageProcessor.from_pretrained(tmp_path / "out")
    for size in ((SIDE, SIDE), (40, 61), (23, 90), (9, 5)):
        image = Image.effect_noise(size, 80).convert("RGB")
        assert np.array_equal(preprocess(image), exported(images=image, return_tensors="np")["pixel_values"][0])


def test_padding_without_image_mean_is_refused(tmp_path: Path) -> None:
    assert save_small_model("clip_vision_model", tmp_path)
    settings = {"image_processor_type": "CLIPImageProcessor", "do_normalize": False, "image_mean": None}
    settings |= {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="image_mean"):
        registry().create("vision", {"name": "clip", "model": str(tmp_path)}).shape()
    square = registry().create("vision", {"name": "clip", "model": str(tmp_path), "image": "square"})
    assert square.shape().patches == 16
