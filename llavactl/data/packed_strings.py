"""Strings as flat arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np


class PackedStrings(Sequence[str]):
    """Strings as UTF-8 ``data`` (uint8) and ``lengths`` (int32) in bytes."""

    def __init__(self, data: np.ndarray, lengths: np.ndarray) -> None:
        self.data = data
        self.ends = ends(lengths)
        self._view = np.ascontiguousarray(data).data  # slicing it is faster than slicing an array

    @classmethod
    def of(cls, strings: Iterable[str]) -> PackedStrings:
        encoded = [string.encode("utf-8", "surrogatepass") for string in strings]
        return cls(np.frombuffer(b"".join(encoded), np.uint8), np.fromiter(map(len, encoded), np.int32, len(encoded)))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def bytes(self, index: int) -> bytes:
        return bytes(self._view[self.ends.item(index) : self.ends.item(index + 1)])

    def __getitem__(self, index: Any) -> Any:
        return decoded(self.bytes(index))

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.ends).astype(np.int32)


def ends(lengths: np.ndarray) -> np.ndarray:
    """The offsets [N + 1] of consecutive items with ``lengths`` [N]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def decoded(text: bytes) -> str:
    return text.decode("utf-8", "surrogatepass")


def int32(values: array[int]) -> np.ndarray:
    return np.array(values, np.int32)
