"""Sources of training samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from llavactl.core.schema import Sample


class Source(Protocol):
    """An iterable of samples, in the same order on every iteration. A generator function is a valid target."""

    def __iter__(self) -> Iterator[Sample]: ...
