"""Compares the features of a store, to the bit, with those of its images encoded again.

Features of one fingerprint may differ in their last bits between devices, numbers of threads and versions of
libraries. Therefore images are encoded with the recorded batch size and number of threads, and a small difference
counts as rounding where the other conditions differ from the recorded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llavactl.features.backbone import OVERFLOW, Backbone
from llavactl.features.checked_encoder import unchecked
from llavactl.features.conditions import conditions, threads_of
from llavactl.features.fill import encode_images
from llavactl.features.quantize import dequantize, quantize

if TYPE_CHECKING:
    from llavactl.core.protocols import Encoder
    from llavactl.core.schema import ImageRef
    from llavactl.features.store import FeatureStore
    from llavactl.recipe.sections import Features

Verdict = Literal["equal", "rounding", "different"]

ROUNDING = {
    ("float32", "float16"): 2e-3,
    ("float32", "int8"): 5e-3,
    ("float16", "float16"): 4e-3,
    ("float16", "int8"): 7e-3,
    ("bfloat16", "float16"): 3e-2,
    ("bfloat16", "int8"): 3e-2,
}
"""Largest difference that is rounding, relative to the norm of an image's features, by ``features.compute`` and dtype.

Between the rounding and the wrong inputs measured with one encoder on a CPU (docs/notes/feature-store.md); no GPU was
measured. float32 leaves room for TF32, which PyTorch uses in convolutions on GPUs: emulated, at most 8e-4. int8 needs
more because a value between two steps moves by a whole one. bfloat16 leaves room for deeper encoders, so that it can't
tell small changes of the input from rounding.
"""


@dataclass(frozen=True)
class ImageDifference:
    """Features of ``image`` that differ from the stored ones, in ``values`` values.

    ``largest``: the largest absolute difference; ``last_places``: the largest one in units of the stored type's last
    place (for int8: in steps); ``relative``: the norm of the difference, relative to that of the features.
    """

    image: str
    key: str
    verdict: Verdict
    values: int
    largest: float
    last_places: int
    relative: float


@dataclass(frozen=True)
class RecomputedImages:
    """The content keys of ``equal`` images, the differences of others, and why images ``failed``, by content key.

    ``conditions``: those of this encoding, for each of the recorded ones.
    """

    equal: Sequence[str]
    differences: Sequence[ImageDifference]
    failed: Mapping[str, str]
    conditions: Sequence[Mapping[str, Any]]


def choose(store: FeatureStore, count: int, seed: int) -> list[str]:
    """``count`` content keys of ``store``, or all if it has fewer; the same for the same content and ``seed``."""
    if count >= len(store):
        chosen = np.arange(len(store))
    else:
        chosen = np.sort(np.random.default_rng(seed).choice(len(store), count, replace=False))
    return [key.decode() for key in store.keys[chosen].tolist()]


def compare(
    store: FeatureStore,
    images: Mapping[str, ImageRef],
    encoder: Encoder,
    device: str,
    settings: Features,
    written: Mapping[str, Mapping[str, Any]],
    advance: Callable[[int], object] = lambda _count: None,
) -> RecomputedImages:
    """Encodes ``images`` (by content key) on ``device`` and compares them with ``store``.

    ``written`` are the recorded conditions of each shard.

    Raises:
        StoreError: a shard can't be read.
        ModelError: the device ran out of memory.
    """
    groups: dict[tuple[Any, ...], dict[str, ImageRef]] = {}
    conditions_of: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for key, image in images.items():
        recorded = written.get(store.shard_of(key), {})
        group = tuple(sorted(recorded.items()))
        conditions_of[group] = recorded
        groups.setdefault(group, {})[key] = image
    equal: list[str] = []
    differences: list[ImageDifference] = []
    failed: dict[str, str] = {}
    used: list[Mapping[str, Any]] = []
    for group, members in groups.items():
        recorded = conditions_of[group]
        batch_size = recorded.get("batch_size", settings.batch_size)
        with threads_of(recorded if device == "cpu" else {}):
            used.append(now := conditions(device, batch_size, unchecked(encoder)))
            same = recorded == now
            for batch in encode_images(members, Backbone(encoder, device, batch_size), settings.workers):
                for key, features in zip(batch.keys, batch.features, strict=True):
                    found = _difference(members[key].name, key, store.stored(key), features, settings, same=same)
                    differences += [found] if found else []
                    equal += [] if found else [key]
                for key, failure in batch.failures.items():
                    if failure.reason == OVERFLOW:
                        values = store.shape.patches * store.shape.width
                        differences.append(_overflow(members[key].name, key, values))
                    else:
                        failed[key] = failure.reason
                advance(len(batch.keys) + len(batch.failures))
    return RecomputedImages(equal, differences, failed, used)


def _difference(
    image: str, key: str, stored: tuple[np.ndarray, ...], features: np.ndarray, settings: Features, *, same: bool
) -> ImageDifference | None:
    """How ``features`` [P, Dv] float16, stored as in ``settings``, differ from ``stored``; None: in no bit."""
    computed = quantize(features) if settings.dtype == "int8" else (features,)
    values = sum(int((_bits(ours) != _bits(theirs)).sum()) for ours, theirs in zip(computed, stored, strict=True))
    if not values:
        return None
    expected = dequantize(*stored) if len(stored) == 2 else stored[0]
    actual = dequantize(*computed) if len(computed) == 2 else computed[0]
    delta = actual.astype(np.float32) - expected.astype(np.float32)
    norm = float(np.linalg.norm(expected.astype(np.float32))) or 1.0
    relative = float(np.linalg.norm(delta)) / norm
    rounding = not same and relative <= ROUNDING[settings.compute, settings.dtype]
    return ImageDifference(
        image,
        key,
        "rounding" if rounding else "different",
        values,
        float(np.abs(delta).max()),
        int(np.abs(_places(computed[0]) - _places(stored[0])).max()),
        relative,
    )


def _overflow(image: str, key: str, values: int) -> ImageDifference:
    return ImageDifference(image, key, "different", values, float("inf"), 1 << 15, float("inf"))


def _bits(values: np.ndarray) -> np.ndarray:
    """``values`` as integers of the same size: equal exactly if all bits are."""
    return values.view(f"u{values.itemsize}")


def _places(values: np.ndarray) -> np.ndarray:
    """``values`` (float16 or int8) as integers: neighbors in the type differ by 1."""
    if values.dtype == np.int8:
        return values.astype(np.int32)
    bits = np.ascontiguousarray(values).view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)
