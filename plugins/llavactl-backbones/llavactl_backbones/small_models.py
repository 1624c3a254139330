"""Small models of the real classes with random weights, saved as their libraries save them: for checks and tests."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}


def save_siglip(folder: Path, *, image_size: int = 28, patch_size: int = 14) -> Path:
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    config = SiglipVisionConfig(**SMALL, image_size=image_size, patch_size=patch_size)
    SiglipVisionModel(config).save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": image_size, "width": image_size}).save_pretrained(folder)
    return folder


def save_naflex(folder: Path, *, patch_size: int = 8) -> Path:
    """Position embeddings for 4×4 patches."""
    from transformers import Siglip2ImageProcessorPil, Siglip2VisionConfig, Siglip2VisionModel

    torch.manual_seed(1)
    Siglip2VisionModel(Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=patch_size)).save_pretrained(folder)
    Siglip2ImageProcessorPil(patch_size=patch_size, max_num_patches=16).save_pretrained(folder)
    return folder


def save_dinov2(folder: Path, *, registers: int = 0) -> Path:
    """As the checkpoints on the hub: position embeddings for 70 pixels, a processor for 28."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model
    from transformers import Dinov2WithRegistersConfig as RegistersConfig
    from transformers import Dinov2WithRegistersModel as RegistersModel

    torch.manual_seed(2)
    settings = {key: value for key, value in SMALL.items() if key != "intermediate_size"} | {"image_size": 70}
    if registers:
        model: Any = RegistersModel(RegistersConfig(**settings, patch_size=14, num_register_tokens=registers))
    else:
        model = Dinov2Model(Dinov2Config(**settings, patch_size=14))
    model.save_pretrained(folder)
    BitImageProcessorPil(
        size={"shortest_edge": 32},
        crop_size={"height": 28, "width": 28},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(folder)
    return folder


def save_dinov3(folder: Path) -> Path:
    from transformers import DINOv3ViTConfig, DINOv3ViTModel

    torch.manual_seed(3)
    config = DINOv3ViTConfig(**SMALL, image_size=32, patch_size=8, num_register_tokens=4)
    DINOv3ViTModel(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV3_PROCESSOR), encoding="utf-8")
    return folder


DINOV3_PROCESSOR = {
    "image_processor_type": "DINOv3ViTImageProcessorFast",
    "do_resize": True,
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}
"""The settings of DINOv3 checkpoints on the hub, at 32 pixels."""


WRITERS: dict[str, Callable[[Path], Path]] = {
    "siglip": save_siglip,
    "siglip2": partial(save_siglip, image_size=32, patch_size=8),
    "dinov2": save_dinov2,
    "dinov2-registers": partial(save_dinov2, registers=4),
    "dinov3": save_dinov3,
    "siglip2-naflex": save_naflex,
}
"""What saves the model of a family to a folder."""

VIT = {"embed_dim": 32, "depth": 4, "num_heads": 4}


def save_timm(folder: Path, architecture: str, *, seed: int = 0, **settings: Any) -> Any:
    """Saves and returns a model of timm; ``settings`` are arguments of ``timm.create_model``."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(seed)
    model = timm.create_model(architecture, pretrained=False, **settings).eval()
    for module in model.modules():  # tiny or zero in some architectures, so that a block would do nothing
        if isinstance(gamma := getattr(module, "gamma", None), torch.nn.Parameter):
            torch.nn.init.normal_(gamma)
    save_for_hf(model, folder, safe_serialization=True)
    return model


def examples(folder: Path) -> Mapping[str, Mapping[str, Any]]:
    """Options of all components with models saved in ``folder``; those of timm only if it is installed."""
    folders = {family: str(write(folder / family)) for family, write in WRITERS.items()}
    siglip, dinov2 = {"model": folders["siglip"]}, {"model": folders["dinov2-registers"], "image_size": 28}
    options: dict[str, Mapping[str, Any]] = {
        "siglip": siglip,
        "siglip2": {"model": folders["siglip2"]},
        "siglip2-naflex": {"model": folders["siglip2-naflex"], "max_num_patches": 16},
        "dinov2": dinov2,
        "dinov3": {"model": folders["dinov3"], "image_size": 32},
        "fused": {"parts": [{"name": "dinov2", **dinov2}, {"name": "siglip", **siglip}]},
    }
    if importlib.util.find_spec("timm"):
        save_timm(folder / "timm", "vit_base_patch16_224", **VIT, img_size=32)
        save_timm(folder / "pe", "vit_pe_lang_large_patch14_448", **VIT, img_size=28, ref_feat_shape=(2, 2))
        options |= {"timm": {"model": str(folder / "timm")}, "perception-encoder": {"model": str(folder / "pe")}}
    return options
