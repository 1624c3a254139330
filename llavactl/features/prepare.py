"""From an image to its features: read, decode, preprocess, encode, round; the same steps cached and live."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from llavactl.core.errors import ModelError
from llavactl.data.images import ImageError, decode
from llavactl.features.keys import content_key, why

if TYPE_CHECKING:
    from llavactl.core.protocols import Encoder
    from llavactl.core.schema import ImageRef

OVERFLOW = "its features are not finite in float16"

In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Failure:
    """Why an image has no features; ``lasting`` when that lies in its content and will be the same next time."""

    reason: str
    lasting: bool = False


def prepare(encoder: Encoder, image: ImageRef, key: str | None = None) -> np.ndarray | Failure:
    """The pixels [3, H, W] float32 of ``image``, or why there are none. Safe in any thread.

    With ``key``, content that is no longer the one of that key is a failure too.
    """
    try:
        data = image.read()
    except OSError as error:
        return Failure(why(error))
    if key is not None and content_key(data) != key:
        return Failure("it changed while features were being extracted")
    try:
        picture = decode(data)
    except ImageError as error:
        return Failure(error.reason, lasting=True)
    try:
        return encoder.preprocess(picture)
    except Exception as error:  # noqa: BLE001 - a backbone that refuses one image must not end the run
        return Failure(f"it can't be preprocessed: {' '.join(str(error).split()) or type(error).__name__}")


def encode(encoder: Encoder, pixels: Sequence[np.ndarray], device: str) -> np.ndarray:
    """The features [n, P, Dv] float16 of ``pixels``, n times [3, H, W]; those beyond float16 are infinite.

    Raises:
        ModelError: the device has not enough memory, or the features are not of the encoder's shape.
    """
    import torch

    try:
        with torch.inference_mode():
            made = encoder.encode(torch.from_numpy(np.stack(pixels)).to(device))
            features: np.ndarray = made.to(torch.float16).cpu().numpy()
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{len(pixels)} images at once are too many for the memory of {device}",
            hint="lower features.batch_size: it changes no feature",
        ) from error
    wanted = (len(pixels), encoder.shape.patches, encoder.shape.width)
    if features.shape != wanted:
        raise ModelError(f"the vision backbone says it makes features of {wanted} and made {features.shape}")
    return features


def finite(features: np.ndarray) -> np.ndarray:
    """Which of ``features`` [n, P, Dv] are finite throughout, bool [n]."""
    return np.asarray(np.isfinite(features).all(axis=(1, 2)))


def default_device() -> str:
    """``cuda`` where there is one, then Apple's ``mps``, else ``cpu``."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def ordered(pool: Executor, work: Callable[[In], Out], items: Iterable[In], ahead: int) -> Generator[tuple[In, Out]]:
    """Each item with what ``work`` makes of it, in order; at most ``ahead`` are done before they are asked for."""
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
