"""Tests of this folder run on a CUDA device in ``make test-gpu``, and on the CPU in ``make test``."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Batch, Encoded, FeatureShape, ImageRef
from llavactl.data.batches import collate, pack
from llavactl.data.packing import MicroBatchLimits, plan_sequences
from llavactl.images.image_file import ImageFile
from llavactl.testing import toy_language


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Training uses a CUDA device wherever there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device: make test-gpu")
    return torch.device(request.param)


@pytest.fixture
def toy(toys: Path, tmp_path: Path) -> Path:
    """A copy of ``toys`` with heads of 16, because torch's attention kernel for CUDA needs a multiple of 8."""
    folder = tmp_path / "toy"
    shutil.copytree(toys, folder)
    toy_language(folder / "language", width=64)
    return folder


SHAPE = FeatureShape((4, 4), 32)


class FeaturesFromName:
    """Random features that depend only on the image's name."""

    def arrays(self, image: ImageRef) -> tuple[np.ndarray]:
        rng = np.random.default_rng(sum(image.name.encode()))
        return (rng.standard_normal((SHAPE.patches, SHAPE.width)).astype(np.float16),)


@pytest.fixture(scope="session")
def shape() -> FeatureShape:
    """The shape of the features of the images of ``items``."""
    return SHAPE


@pytest.fixture(scope="session")
def items() -> list[Encoded]:
    """Samples of different lengths: five about one image, three about others, one without an image."""
    rng = np.random.default_rng(0)
    encoded = []
    for index, length in enumerate([150, 3, 40, 1, 25, 60, 9, 33, 20]):
        images = () if index == 8 else (ImageFile("/photos", f"{index if index > 4 else 0}.jpg"),)
        prefix = [1, *[IMAGE_TOKEN] * SHAPE.patches] if images else [1]
        text = [int(token) for token in rng.integers(5, 300, length + 1)]
        labels = [*[IGNORE] * (len(prefix) + 1), *text[1:]]
        encoded.append(Encoded((*prefix, *text), tuple(labels), images))
    return encoded


@pytest.fixture(scope="session")
def padded_batch(items: list[Encoded]) -> Batch:
    return collate(items, FeaturesFromName(), names=list(map(str, items)))


@pytest.fixture(scope="session")
def packed_batch(items: list[Encoded]) -> Batch:
    (groups,) = plan_sequences(items, SHAPE.patches, MicroBatchLimits(len(items)))
    batch = pack([(group.prefix_length, [items[i] for i in group.samples]) for group in groups], FeaturesFromName())
    assert sum(span.after is not None for span in batch.spans) == 5
    return batch
