"""From an image to the pixels that a backbone takes: read, decode, preprocess; in threads, ahead of the backbone."""

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
    """Why an image has no features; ``permanent`` when that lies in its content and will be the same next time."""

    reason: str
    permanent: bool = False


def prepare(encoder: Encoder, image: ImageRef, key: str | None = None) -> np.ndarray | Failure:
    """The pixels [3, H, W] float32 of ``image``, or why there are none. Safe in any thread.

    With ``key``, content that is no longer the one of that key is a failure too.
    """
    try:
        data = read(image)
    except OSError as error:
        return Failure(error_reason(error))
    if key is not None and content_key(data) != key:
        return Failure("it changed while features were being extracted")
    return pixels_of(encoder, data)


def pixels_of(encoder: Encoder, data: bytes) -> np.ndarray | Failure:
    """The pixels [3, H, W] float32 of the encoded image ``data``, or why there are none."""
    try:
        picture = decode(data)
    except ImageError as error:
        return Failure(error.reason, permanent=True)
    try:
        return encoder.preprocess(picture)
    except MemoryError:
        return Failure(NO_MEMORY, permanent=True)
    except (Exception, SystemExit, GeneratorExit) as error:  # noqa: BLE001 - one image must not end the run
        # The same bytes and backbone would fail again.
        return Failure(f"preprocessing failed: {reason(error)}", permanent=True)


def default_device() -> str:
    """``cuda`` where there is one, then Apple's ``mps``, else ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def map_ordered(
    pool: Executor, work: Callable[[In], Out], items: Iterable[In], ahead: int
) -> Generator[tuple[In, Out]]:
    """Each item with the result of ``work``, in order; at most ``ahead`` are submitted before they are needed."""
    waiting: deque[tuple[In, Future[Out]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > ahead:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
    finally:
        for _, future in waiting:
            future.cancel()
