"""Validation of the pixels and features of a loaded vision backbone, which may come from a plugin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llavactl.core.errors import PluginError
from llavactl.core.protocols import Encoder, ShapedVision
from llavactl.core.protocols.members import missing_members
from llavactl.core.registry import plugin_of
from llavactl.core.schema import FeatureShape

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from llavactl.core.protocols import Vision

log = logging.getLogger(__name__)

BATCH_TOLERANCE = 5e-2
"""Largest difference between batched and single encoding, relative to the norm of an image's features.

Half precision with another batch size differs by less.
"""

_HINT = "`llavactl.testing.check_vision` tests a backbone separately"


def load_encoder(vision: Vision, device: str, dtype: str) -> Encoder:
    """Loads the encoder of ``vision``; its pixels and features are validated on use.

    Raises:
        PluginError: a method is missing, or the shape is not a FeatureShape or differs from ``vision.shape()``.
        ModelError: see ``Vision.load``.
    """
    log.debug("loading vision backbone %s on %s in %s", type(vision).__name__, device, dtype)
    encoder = vision.load(device, dtype)
    label = f"vision backbone {type(vision).__name__} of plugin {plugin_of(vision)}"
    if missing := missing_members(encoder, Encoder):
        raise PluginError(f"{label}: the encoder has no {' and no '.join(missing)}", hint=_HINT)
    methods = {"preprocess": encoder.preprocess, "encode": encoder.encode}
    if others := [name for name, method in methods.items() if not callable(method)]:
        raise PluginError(f"{label}: {' and '.join(others)} of the encoder can't be called", hint=_HINT)
    shape: Any = encoder.shape
    if not isinstance(shape, FeatureShape):
        raise PluginError(f"{label}: the encoder's shape is {shape!r}, expected a FeatureShape", hint=_HINT)
    if isinstance(vision, ShapedVision) and (declared := vision.shape()) != shape:
        raise PluginError(f"{label}: shape() returned {declared}, but the encoder has {shape}", hint=_HINT)
    return CheckedEncoder(encoder, label, shape, CheckedPreprocess(encoder.preprocess, _pixel_shape(encoder)))


def unchecked(encoder: Encoder) -> Encoder:
    """The encoder of the plugin, of which ``load_encoder`` made ``encoder``."""
    return encoder.encoder if isinstance(encoder, CheckedEncoder) else encoder


def _pixel_shape(encoder: Encoder) -> tuple[int, ...]:
    """The shape of a blank image's pixels; () if preprocessing fails for a blank image."""
    from PIL import Image

    try:
        return np.shape(encoder.preprocess(Image.new("RGB", (64, 64))))
    except (Exception, SystemExit, GeneratorExit):  # noqa: BLE001 - a backbone may refuse blank images
        return ()


@dataclass(frozen=True)
class CheckedPreprocess:
    """``preprocess`` with its output validated: pixels [3, H, W] float32 of the shape ``size``, unless that is ()."""

    preprocess: Callable[[Image.Image], Any]
    size: tuple[int, ...]

    def __call__(self, image: Image.Image) -> np.ndarray:
        pixels = np.asarray(self.preprocess(image), dtype=np.float32)
        if pixels.ndim != 3 or len(pixels) != 3 or (self.size and pixels.shape != self.size):
            expected = self.size if self.size[:1] == (3,) else "[3, H, W]"
            raise ValueError(f"preprocess returned pixels {pixels.shape}, expected {expected}")
        return pixels


@dataclass
class CheckedEncoder:
    """``encoder`` with its output validated: features [I, P, Dv] of ``shape``, on the same device as the pixels.

    For the first batch of several images, the features of its last image are compared with those of a batch of one.
    """

    encoder: Encoder
    label: str
    shape: FeatureShape
    preprocess: CheckedPreprocess
    compared: bool = False

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [I, 3, H, W] to features [I, P, Dv].

        Raises:
            PluginError: the encoder returned something else.
        """
        import torch

        features: Any = self.encoder.encode(pixels)
        expected = f"{(len(pixels), self.shape.patches, self.shape.width)} on {pixels.device}"
        actual = type(features).__name__
        if isinstance(features, torch.Tensor):
            actual = f"{tuple(features.shape)} on {features.device}"
        if not isinstance(features, torch.Tensor) or actual != expected:
            raise PluginError(f"{self.label}: encode() returned {actual}, expected {expected}", hint=_HINT)
        if not self.compared and len(pixels) > 1:
            self.compared = True
            single = self.encode(pixels[-1:])
            if (single - features[-1:]).norm() > BATCH_TOLERANCE * features[-1:].norm():
                reason = "an image's features depend on the other images of its batch, or differ between calls"
                raise PluginError(f"{self.label}: {reason}", hint=_HINT)
        return features.detach()
