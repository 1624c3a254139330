"""A loaded backbone that gives an image the same features whatever is encoded beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch

    from llavactl.core.protocols import Encoder

_CPU_GROUP = 4

OVERFLOW = "its features are not finite in float16"

Result = tuple[np.ndarray, np.ndarray]
"""Features [n, P, Dv] float16, and which of the n are finite throughout, bool [n]."""


class Backbone:
    """``encoder``, loaded on ``device``; ``group`` images go through it at once, ``ahead`` groups besides the oldest.

    The same image must get the same bits in any company, or cached features would not be live ones. But
    products of matrices with another number of rows may be summed in another order. On the CPU several threads
    do so with tiny backbones, not with real ones (CLIP S to L): so the first group is encoded both
    together and one by one, and where a bit differs all images are encoded one by one, as incomplete groups
    always are. Other devices see groups of one size only, the last one filled up.
    """

    def __init__(self, encoder: Encoder, device: str, batch_size: int) -> None:
        self.encoder = encoder
        self.device = device
        on_cpu = device == "cpu"
        self.group = min(batch_size, _CPU_GROUP) if on_cpu else batch_size
        self.ahead = 0 if on_cpu else 1
        self._compared = False
        self._transfer = _CudaTransfer(device) if device.startswith("cuda") else _Transfer(device)

    def encode(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """The features [n, P, Dv] float16 of ``pixels``, n times [3, H, W]; those beyond float16 are infinite.

        Raises:
            ModelError: as ``start``.
        """
        return self.start(pixels)()[0]

    def start(self, pixels: Sequence[np.ndarray]) -> Callable[[], Result]:
        """Begins to encode ``pixels``, n times [3, H, W]; what it returns waits for the result.

        A GPU works on while the next pixels are read, copied to it and begun; the CPU is done when this returns.

        Raises:
            ModelError: the device has not enough memory.
        """
        begun: list[Callable[[], Result]] = []
        rest = list(pixels)
        while rest:
            some, rest = rest[: self.group], rest[self.group :]
            begun.append(self._transfer.fetch(self._alike(some) if self.device == "cpu" else self._filled(some)))
        return begun[0] if len(begun) == 1 else lambda: _joined([wait() for wait in begun])

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
                features = self.encoder.encode(self._transfer.send(pixels))
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"{len(pixels)} images at once are too many for the memory of {self.device}",
                hint="lower features.batch_size",
            ) from error
        return features


class _Transfer:
    """To a device and back, in turn with its work."""

    def __init__(self, device: str) -> None:
        self.device = device

    def send(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """``pixels``, n times [3, H, W], as [n, 3, H, W] on the device."""
        import torch

        return torch.from_numpy(np.stack(pixels)).to(self.device)

    def fetch(self, features: torch.Tensor) -> Callable[[], Result]:
        """What waits for ``features`` [n, P, Dv] in the computer's own memory."""
        rounded, fine = _rounded(features)
        return lambda: (rounded.cpu().numpy(), fine.cpu().numpy())


class _CudaTransfer(_Transfer):
    """Both ways beside the device's work: through page-locked memory, in a stream for each way."""

    def __init__(self, device: str) -> None:
        import torch

        super().__init__(device)
        self._there, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, pixels: list[np.ndarray]) -> torch.Tensor:
        import torch

        host = torch.empty((len(pixels), *pixels[0].shape), dtype=torch.float32, pin_memory=True)
        np.stack(pixels, out=host.numpy())
        working = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._there):
            sent = host.to(self.device, non_blocking=True)
        working.wait_stream(self._there)
        # Or its memory could be given to the next group, which the other stream doesn't know to be too early.
        sent.record_stream(working)
        return sent

    def fetch(self, features: torch.Tensor) -> Callable[[], Result]:
        import torch

        made = _rounded(features)
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._back):
            features, fine = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in made]
            for x, host in zip(made, (features, fine), strict=True):
                host.copy_(x, non_blocking=True)
                x.record_stream(self._back)
            arrived = self._back.record_event()

        def wait() -> Result:
            arrived.synchronize()
            return features.numpy(), fine.numpy()

        return wait


def _rounded(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``features`` [n, P, Dv] in float16, and which are finite: asked where they were made, it costs nothing."""
    import torch

    rounded = features.to(torch.float16)
    return rounded, torch.isfinite(rounded).flatten(1).all(dim=1)


def _joined(results: Sequence[Result]) -> Result:
    features, fine = zip(*results, strict=True)
    return np.concatenate(features), np.concatenate(fine)
