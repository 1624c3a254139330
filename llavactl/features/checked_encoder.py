"""Validation of the pixels and features of a loaded vision backbone, which may come from a plugin."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from llavactl.core.component_calls import call_error
from llavactl.core.errors import PluginError
from llavactl.core.protocols import Encoder, ShapedVision
from llavactl.core.protocols.members import missing_members
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


def load_encoder(vision: Vision, device: str, dtype: str) -> Encoder:
    """Loads the encoder of ``vision``; its pixels and features are validated on use.

    Raises:
        PluginError: a method is missing, or the shape is not a FeatureShape or differs from ``vision.shape()``.
        ModelError: see ``Vision.load``.
    """
    log.debug("loading vision backbone %s on %s in %s", type(vision).__name__, device, dtype)
    encoder = vision.load(device, dtype)
    missing = missing_members(encoder, Encoder)
    missing += [
        name for name in ("preprocess", "encode") if name not in missing and not callable(getattr(encoder, name))
    ]
    if missing:
        raise call_error(vision, "load", f"returned an encoder without {' and '.join(missing)}")
    shape: Any = encoder.shape
    if not isinstance(shape, FeatureShape):
        raise call_error(vision, "load", f"returned an encoder of shape {shape!r}, expected a FeatureShape")
    if isinstance(vision, ShapedVision) and (declared := vision.shape()) != shape:
        raise call_error(vision, "shape", f"returned {declared}, but the encoder has {shape}")
    return CheckedEncoder(encoder, shape, CheckedPreprocess(encoder.preprocess, _pixel_shape(encoder)))


def unchecked(encoder: Encoder) -> Encoder:
    """The encoder of the plugin, of which ``load_encoder`` made ``encoder``."""
    return encoder.encoder if isinstance(encoder, CheckedEncoder) else encoder


def _pixel_shape(encoder: Encoder) -> tuple[int, ...]:
    """The shape of a blank image's pixels; () if preprocessing fails for a blank image."""
    from PIL import Image

    try:
        return np.shape(encoder.preprocess(Image.new("RGB", (64, 64))))
    except KeyboardInterrupt:
        raise
    except BaseException:  # noqa: BLE001 - a backbone may refuse blank images
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
            raise self.error(f"returned {actual}, expected {expected}")
        if not self.compared and len(pixels) > 1:
            self.compared = True
            single = self.encode(pixels[-1:])
            if (single - features[-1:]).norm() > BATCH_TOLERANCE * features[-1:].norm():
                reason = "an image's features depend on the other images of its batch, or differ between calls"
                raise self.error(reason)
        return features.detach()

    def error(self, what: str) -> PluginError:
        """The error that the encoder did ``what``."""
        return call_error(self.encoder, "encode", what)
