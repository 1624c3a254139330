"""Features as 8-bit integers with two scales, one of its token and one of its channel.

One scale a token is poor for CLIP: a few channels are a hundred times as large as the others and take all of the
range. One a channel is poor where a few tokens are many times as large as the others, as in CLIP and DINOv2 they
are. So tokens are brought to one size first, as seen from channels of one size, and channels then fill the
range of ±127. Measured in ``benchmarks/int8.py``.
"""

from __future__ import annotations

import numpy as np

LEVELS = 127
"""Symmetric: -128 is not used."""

_TOKENS_AT_ONCE = 128
_HALF_MAX = 65504.0
_ROUNDS_TO_INFINITY = 65520.0


def quantize(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finite ``features`` [P, Dv] float16 as int8 [P, Dv] and ``scales`` [P + Dv] float32, tokens' before channels'.

    NumPy on one thread and one image at a time: the sums are added in the same order whatever is made beside it.
    """
    values = features.astype(np.float32)
    squares = values * values
    channels = _no_zeros(squares.mean(axis=0))
    tokens = _no_zeros(np.sqrt((squares / channels).mean(axis=1)))
    even = values / tokens[:, None]
    steps = _no_zeros(np.abs(even).max(axis=0)) / np.float32(LEVELS)
    integers = np.rint(even / steps)
    if np.abs(values).max(initial=0) > _HALF_MAX * LEVELS / (LEVELS + 1):
        # Rounded up, the largest numbers of float16 would be infinite when they are read.
        beyond = np.abs(integers * tokens[:, None] * steps) >= _ROUNDS_TO_INFINITY
        integers -= np.sign(integers) * beyond
    return integers.astype(np.int8), np.concatenate([tokens, steps])


def dequantize(integers: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The features [P, Dv] float16 that ``integers`` [P, Dv] int8 stand for: integer x token's x channel's scale.

    The products are float32, in that order, then rounded: any library on any device gives the same bits. Torch
    is five times as fast as NumPy at it, and some tokens at a time stay within the processor's cache.
    """
    import torch

    patches, width = integers.shape
    tokens, channels = torch.from_numpy(np.array(scales)).split([patches, width])
    features = torch.empty(patches, width, dtype=torch.float16)
    for at in range(0, patches, _TOKENS_AT_ONCE):
        some = slice(at, at + _TOKENS_AT_ONCE)
        # A copy, because torch warns of memory that can't be written, as a map is.
        values = torch.from_numpy(np.array(integers[some])) * tokens[some, None]
        torch.mul(values, channels, out=features[some])
    found: np.ndarray = features.numpy()
    return found


def as_stored(features: np.ndarray, dtype: str) -> np.ndarray:
    """What a store of ``dtype`` gives back of ``features`` [P, Dv] float16."""
    return dequantize(*quantize(features)) if dtype == "int8" else features


def _no_zeros(values: np.ndarray) -> np.ndarray:
    """``values`` with 1 for 0: what is all 0 may have any scale."""
    return np.where(values == 0, np.float32(1), values)
