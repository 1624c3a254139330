"""A loaded backbone that gives an image the same features whatever is encoded beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch

    from llavactl.core.protocols import Encoder

_CPU_GROUP = 4

OVERFLOW = "its features are not finite in float16"


class Backbone:
    """``encoder``, loaded on ``device``; ``group`` images go through it at once.

    The same image must get the same bits in any company, or cached features would not be live ones. But
    products of matrices with another number of rows may be summed in another order. On the CPU several threads
    do so with tiny backbones, not with real ones (CLIP S to L): so the first group is encoded both
    together and one by one, and where a bit differs all images are encoded one by one, as incomplete groups
    always are. Other devices see groups of one size only, the last one filled up.
    """

    def __init__(self, encoder: Encoder, device: str, batch_size: int) -> None:
        self.encoder = encoder
        self.device = device
        self.group = min(batch_size, _CPU_GROUP) if device == "cpu" else batch_size
        self._compared = False

    def encode(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """The features [n, P, Dv] float16 of ``pixels``, n times [3, H, W]; those beyond float16 are infinite.

        Raises:
            ModelError: the device has not enough memory, or the features are not of the encoder's shape.
        """
        import torch

        made: list[torch.Tensor] = []
        rest = list(pixels)
        while rest:
            some, rest = rest[: self.group], rest[self.group :]
            made.append(self._alike(some) if self.device == "cpu" else self._filled(some))
        features: np.ndarray = torch.cat(made).to(torch.float16).cpu().numpy()
        return features

    def _alike(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """The features of each as it would have alone."""
        import torch

        whole = 1 < len(pixels) == self.group
        if whole and self._compared:
            return self._run(pixels)
        alone = torch.cat([self._run([each]) for each in pixels])
        if whole:
            self._compared = True
            if not torch.equal(self._run(pixels), alone):
                self.group = 1
        return alone

    def _filled(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """The features of ``pixels`` as part of a whole group."""
        return self._run([*pixels, *[pixels[0]] * (self.group - len(pixels))])[: len(pixels)]

    def _run(self, pixels: list[np.ndarray]) -> torch.Tensor:
        import torch

        try:
            with torch.inference_mode():
                features = self.encoder.encode(torch.from_numpy(np.stack(pixels)).to(self.device))
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{len(pixels)} images at once are too many for the memory of {self.device}",
                hint="lower features.batch_size",
            ) from error
        wanted = (len(pixels), self.encoder.shape.patches, self.encoder.shape.width)
        if tuple(features.shape) != wanted:
            raise ModelError(f"the vision backbone should make features {wanted} and made {tuple(features.shape)}")
        return features


def finite(features: np.ndarray) -> np.ndarray:
    """Which of ``features`` [n, P, Dv] are finite throughout, bool [n]."""
    return np.asarray(np.isfinite(features).all(axis=(1, 2)))
