"""Small random models of the real classes, saved as their libraries save them, and images of various sizes."""

import importlib.util
import json
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
    # On Linux, the package index has torchvision for CUDA only. Beside a CPU build of torch its operators can't be
    # loaded, and importing it fails where it describes these two. timm and image processors use none of them.
    torchvision_operators = torch.library.Library("torchvision", "DEF")
    torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

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
    (folder / "preprocessor_config.json").write_text(json.dumps(DINOV3_PROCESSOR))
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


@pytest.fixture(scope="session")
def save() -> Callable[[str, Path], Path]:
    """Saves a model of the given family to the given folder."""
    return lambda family, folder: WRITERS[family](folder)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model of the given family, saved once."""
    return cache(lambda family: WRITERS[family](tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Noise: square, wide, tall, smaller and much larger than the models' inputs, of odd sizes."""
    random = np.random.default_rng(0)
    sizes = [(28, 28), (61, 40), (23, 90), (9, 5), (301, 233), (64, 64)]
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
