"""Random records with the lengths of LLaVA's data, and random features of their images."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, FeatureShape, ImageRef
from llavactl.images.image_file import ImageFile

RECORD_LENGTHS = {1: (2, 8, 20), 2: (60, 120, 380)}
"""Prompt tokens, and the fewest and most target tokens: captions, and instructions as in LLaVA."""
PER_IMAGE = {1: 5, 2: 2}
"""Records per image with a shared prefix."""


@dataclass(frozen=True)
class RandomFeatures:
    """Features in memory, as from a warm cache."""

    shape: FeatureShape

    def arrays(self, image: ImageRef) -> tuple[np.ndarray]:
        rng = np.random.default_rng(sum(image.name.encode()))
        return (rng.standard_normal((self.shape.patches, self.shape.width)).astype(np.float16),)


def random_records(
    stage: int, count: int, rng: random.Random, shape: FeatureShape, vocabulary: int = 40000
) -> list[Encoded]:
    """``count`` records of random tokens, each with its own image of ``shape``: BOS, image, text, targets."""
    prompt_length, fewest, most = RECORD_LENGTHS[stage]
    encoded = []
    for index in range(count):
        text = [rng.randrange(100, vocabulary) for _ in range(prompt_length + rng.randint(fewest, most))]
        labels = [IGNORE] * prompt_length + text[prompt_length:]
        prefix = [1, *[IMAGE_TOKEN] * shape.patches]
        image = ImageFile("/", f"{index}.jpg")
        encoded.append(Encoded((*prefix, *text), (*[IGNORE] * len(prefix), *labels), (image,)))
    return encoded


def with_shared_images(items: Sequence[Encoded], per_image: int) -> list[Encoded]:
    """``items`` with one image for every ``per_image`` consecutive records."""
    return [Encoded(item.ids, item.labels, items[i - i % per_image].images) for i, item in enumerate(items)]
