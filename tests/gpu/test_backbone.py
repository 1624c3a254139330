"""Extraction on a GPU: groups begun before the last is awaited give the features of groups one at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from llavactl import FeatureShape
from llavactl.features.backbone import Backbone


class Patches:
    """A backbone with enough to do that a group is still being computed when the next is sent."""

    shape = FeatureShape((16, 16), 512)

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Conv2d(3, 512, 14, 14), *[nn.Conv2d(512, 512, 3, padding=1) for _ in range(8)])
        self.model.cuda().requires_grad_(False)

    def preprocess(self, image: object) -> np.ndarray:
        raise NotImplementedError

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model(pixels).flatten(2).transpose(1, 2)
        return found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_groups_under_way_together_are_those_one_at_a_time() -> None:
    encoder = Patches()
    pixels = list(np.random.default_rng(0).normal(size=(150, 3, 224, 224)).astype(np.float32))
    pixels[70][0, 0, 0] = np.inf
    backbone = Backbone(encoder, "cuda", 32)
    groups = [pixels[at : at + 32] for at in range(0, 150, 32)]
    apart = [backbone.start(group)() for group in groups]
    together = [wait() for wait in [backbone.start(group) for group in groups]]
    for (ours, fine), (theirs, also) in zip(together, apart, strict=True):
        assert np.array_equal(ours, theirs, equal_nan=True)
        assert np.array_equal(fine, also)
    assert [int(index) for index in np.flatnonzero(~np.concatenate([fine for _, fine in together]))] == [70]
    with torch.inference_mode():
        expected = encoder.encode(torch.from_numpy(np.stack(groups[0])).cuda()).half().cpu().numpy()
    assert np.array_equal(together[0][0], expected)
