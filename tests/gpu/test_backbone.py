"""Encoding on a GPU: overlapping batches give the same features as batches run one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llavactl import FeatureShape
from llavactl.features.backbone import Backbone


class SlowBackbone:
    """A backbone slow enough that a batch is still being computed when the next one is sent."""

    shape = FeatureShape((16, 16), 512)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 512, 14, 14), *[nn.Conv2d(512, 512, 3, padding=1) for _ in range(8)])
        self.model.cuda().requires_grad_(False)

    def preprocess(self, image: object) -> np.ndarray:
        raise NotImplementedError

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        features: torch.Tensor = self.model(pixels).flatten(2).transpose(1, 2)
        return features


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
def test_overlapping_batches_equal_separate_batches(device: torch.device) -> None:
    encoder = SlowBackbone()
    pixels = list(np.random.default_rng(0).normal(size=(150, 3, 224, 224)).astype(np.float32))
    pixels[70][0, 0, 0] = np.inf
    backbone = Backbone(encoder, "cuda", 32)
    batches = [pixels[start : start + 32] for start in range(0, 150, 32)]
    separate = [backbone.encode_async(batch)() for batch in batches]
    overlapping = [wait() for wait in [backbone.encode_async(batch) for batch in batches]]
    for (features, finite), (expected_features, expected_finite) in zip(overlapping, separate, strict=True):
        assert np.array_equal(features, expected_features, equal_nan=True)
        assert np.array_equal(finite, expected_finite)
    assert [int(index) for index in np.flatnonzero(~np.concatenate([finite for _, finite in overlapping]))] == [70]
    with torch.inference_mode():
        expected = encoder.encode(torch.from_numpy(np.stack(batches[0])).cuda()).half().cpu().numpy()
    assert np.array_equal(overlapping[0][0], expected)
