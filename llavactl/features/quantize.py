"""int8 features with one scale per token and one per channel.

One scale per token works poorly for CLIP: a few channels are up to a hundred times as large as the others and use up
the range. One scale per channel works poorly where a few tokens are many times as large as the others, as in CLIP and
DINOv2. Therefore tokens are normalized first, measured in channels of equal size, and then each channel is scaled to
the range ±127. Measured by ``benchmarks/int8.py``.
"""

from __future__ import annotations

import numpy as np

LEVELS = 127
"""Symmetric: -128 is not used."""

_CHUNK_TOKENS = 128
FLOAT16_MAX = 65504.0
_ROUNDS_TO_INFINITY = 65520.0


def quantize(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite ``features`` [P, Dv] float16 as int8 [P, Dv] and ``scales`` [P + Dv] float32, token scales first.

    NumPy, one thread, one image at a time: the order of summation doesn't depend on what else is being encoded.
    """
    values = features.astype(np.float32)
    squares = values * values
    channel_power = _zeros_to_ones(squares.mean(axis=0))
    token_scales = _zeros_to_ones(np.sqrt((squares / channel_power).mean(axis=1)))
    normalized = values / token_scales[:, None]
    channel_scales = _zeros_to_ones(np.abs(normalized).max(axis=0)) / np.float32(LEVELS)
    integers = np.rint(normalized / channel_scales)
    if np.abs(values).max(initial=0) > FLOAT16_MAX * LEVELS / (LEVELS + 1):
        # Rounded up, the largest float16 values would dequantize to infinity.
        overflow = np.abs(integers * token_scales[:, None] * channel_scales) >= _ROUNDS_TO_INFINITY
        integers -= np.sign(integers) * overflow
    return integers.astype(np.int8), np.concatenate([token_scales, channel_scales])


def dequantize(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Features [P, Dv] float16 from ``integers`` [P, Dv] int8: integer x token scale x channel scale.

    The products are float32, computed in that order, then rounded: every library and device gives the same bits. Torch
    is five times as fast as NumPy here, and chunks of tokens stay in the CPU's cache.
    """
    import torch

    patches, width = integers.shape
    token_scales, channel_scales = torch.from_numpy(np.array(scales)).split([patches, width])
    features = torch.empty(patches, width, dtype=torch.float16)
    for start in range(0, patches, _CHUNK_TOKENS):
        chunk = slice(start, start + _CHUNK_TOKENS)
        # Copied because torch warns about read-only memory, such as a memory map.
        values = torch.from_numpy(np.array(integers[chunk])) * token_scales[chunk, None]
        torch.mul(values, channel_scales, out=features[chunk])
    array: np.ndarray = features.numpy()
    return array


def as_stored(features: np.ndarray, dtype: str) -> np.ndarray:
    """``features`` [P, Dv] float16 as they are read back from a store of ``dtype``."""
    return dequantize(*quantize(features)) if dtype == "int8" else features


def _zeros_to_ones(values: np.ndarray) -> np.ndarray:
    """``values`` with 1 in place of 0: all-zero tokens and channels may have any scale."""
    return np.where(values == 0, np.float32(1), values)
