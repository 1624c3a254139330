"""Maps of an answer's words drawn over the image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

SIDE = 168
"""Pixels of an overlay's longer side."""
COLOR = (255, 60, 0)
OPACITY = 0.7


def overlay(image: Image.Image, values: np.ndarray) -> Image.Image:
    """``image`` with the map ``values`` [h, w] drawn over it.

    The largest value is the most opaque; values ≤ 0 are transparent. The map covers the image, so ``image`` must be
    as the vision encoder sees it: padded or cropped.
    """
    from PIL import Image

    shown = image.convert("RGB")
    shown.thumbnail((SIDE, SIDE))
    positive = np.clip(values, 0, None)
    scaled = positive / max(float(positive.max()), 1e-12)
    # Cells are drawn as cells: smoothing would suggest a resolution that the map doesn't have.
    mask = Image.fromarray((255 * OPACITY * scaled).astype(np.uint8)).resize(shown.size, Image.Resampling.NEAREST)
    shown.paste(COLOR, mask=mask)
    return shown
