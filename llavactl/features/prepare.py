"""Reads, decodes and preprocesses images into pixels, in threads ahead of the backbone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llavactl.core.library_errors import reason
from llavactl.features.keys import content_key, error_reason
from llavactl.images.decode import ImageError, decode, read
from llavactl.images.sniffing import NO_MEMORY

if TYPE_CHECKING:
    from llavactl.core.protocols import Encoder
    from llavactl.core.schema import ImageRef

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Failure:
    """Why an image has no features; ``permanent`` if the cause is its content, so a retry would fail again."""

    reason: str
    permanent: bool = False


def prepare(encoder: Encoder, image: ImageRef, key: str | None = None) -> np.ndarray | Failure:
    """The pixels [3, H, W] float32 of ``image``, or the reason for the failure. Thread-safe.

    With ``key``, it is also a failure if the content no longer has that key.
    """
    try:
        data = read(image)
    except OSError as error:
        return Failure(error_reason(error))
    if key is not None and content_key(data) != key:
        return Failure("the image changed during extraction")
    return pixels_of(encoder, data)


def pixels_of(encoder: Encoder, data: bytes) -> np.ndarray | Failure:
    """The pixels [3, H, W] float32 of the encoded image ``data``, or the reason for the failure."""
    try:
        image = decode(data)
    except ImageError as error:
        return Failure(error.reason, permanent=True)
    try:
        return encoder.preprocess(image)
    except MemoryError:
        return Failure(NO_MEMORY, permanent=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - one image must not stop the run
        # The same bytes would fail again with the same backbone.
        return Failure(f"preprocessing failed: {reason(error)}", permanent=True)


def map_ordered(
    pool: Executor, work: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Generator[tuple[In, Out]]:
    """Each item with the result of ``work``, in order; at most ``ahead`` items are submitted before they are needed."""
    pending: deque[tuple[In, Future[Out]]] = deque()
    try:
        for item in items:
            pending.append((item, pool.submit(work, item)))
            if len(pending) > ahead:
                first, future = pending.popleft()
                yield first, future.result()
        while pending:
            first, future = pending.popleft()
            yield first, future.result()
    finally:
        for _, future in pending:
            future.cancel()
