"""Whether the features of a shard are finite. ``extract`` stores no others, so these are from elsewhere or damaged."""

from __future__ import annotations

import numpy as np

from llavactl.features.quantize import FLOAT16_MAX, dequantize
from llavactl.features.shards import COPY_BYTES, Shard

_INFINITY = 0x7C00
"""The bits of infinity in float16; without the sign, those of NaN are larger, all others smaller."""


def non_finite_features(shard: Shard) -> str:
    """How many images of ``shard`` have features that are read as NaN or infinity, and one of them; "" if none has."""
    columns = shard.map()
    step = max(1, COPY_BYTES // sum(column.bytes for column in shard.columns))
    rows: list[int] = []
    for start in range(0, len(shard.keys), step):
        invalid = _not_finite(*(column[start : start + step] for column in columns))
        rows += (start + np.flatnonzero(invalid)).tolist()
    if not rows:
        return ""
    first = shard.keys[rows[0]].decode()
    return f"the features of {len(rows)} of {len(shard.keys)} images are not finite, such as those of {first}"


def _not_finite(features: np.ndarray, scales: np.ndarray | None = None) -> np.ndarray:
    """Which of n images have a NaN or infinity in their ``features`` [n, P, Dv] (int8: with ``scales`` [n, P + Dv])."""
    if scales is None:
        # As integers: NumPy converts float16 to float32 to test it, which takes several times as long.
        bits = features.view(np.uint16) & 0x7FFF
        return np.asarray(bits.reshape(len(bits), -1).max(axis=1) >= _INFINITY)
    token_scales, channel_scales = np.split(np.abs(scales), [features.shape[1]], axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        bound = 128 * token_scales.max(axis=1) * channel_scales.max(axis=1)
    invalid = ~(bound < FLOAT16_MAX)  # also if the bound is NaN
    for row in np.flatnonzero(invalid):  # few: large tokens rarely meet large channels
        finite = np.isfinite(scales[row]).all() and np.isfinite(dequantize(features[row], scales[row])).all()
        invalid[row] = not finite
    return np.asarray(invalid)
