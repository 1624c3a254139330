"""Saved small models and images of various sizes."""

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from llavactl_backbones.small_models import WRITERS
from PIL import Image

if importlib.util.find_spec("torchvision") and torch.version.cuda is None:
    # On Linux, the package index has torchvision for CUDA only. Beside a CPU build of torch its operators can't be
    # loaded, and importing it fails where it describes these two. timm and image processors use none of them.
    torchvision_operators = torch.library.Library("torchvision", "DEF")
    torchvision_operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torchvision_operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


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
