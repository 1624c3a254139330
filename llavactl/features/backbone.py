"""Batched encoding in which an image's features do not depend on the other images of its batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from llavactl.core.errors import ModelError

if TYPE_CHECKING:
    import torch

    from llavactl.core.protocols import Encoder

_CPU_BATCH_SIZE = 4

OVERFLOW = "its features are not finite in float16"
"""The reason given for an image whose features exceed the range of float16."""

BatchFeatures = tuple[np.ndarray, np.ndarray]
"""Features [n, P, Dv] float16, and a mask [n] bool of the images whose features are all finite."""


class Backbone:
    """``encoder``, loaded on ``device``, applied in batches of ``batch_size``.

    ``batches_ahead`` is the number of further batches to start before waiting for the oldest one.

    An image's features must have the same bits in any batch; otherwise cached and live features would differ. But
    matrix products may be summed in a different order when the number of rows changes. On the CPU this was observed
    only with tiny models and several threads, not with CLIP S to L. Therefore the first full batch is encoded twice,
    as a batch and image by image: if any bit differs, all images are encoded one by one. Incomplete batches always
    are. On other devices every batch has the same size: the last one is padded.
    """

    def __init__(self, encoder: Encoder, device: str, batch_size: int) -> None:
        self.encoder = encoder
        self.device = device
        on_cpu = device == "cpu"
        self.batch_size = min(batch_size, _CPU_BATCH_SIZE) if on_cpu else batch_size
        self.batches_ahead = 0 if on_cpu else 1
        self._compared = False
        self._transfer = _CudaTransfer(device) if device.startswith("cuda") else _Transfer(device)

    def encode(self, pixels: Sequence[np.ndarray]) -> np.ndarray:
        """Encodes n images' ``pixels`` [3, H, W] to features [n, P, Dv] float16; values beyond float16 are infinite.

        Raises:
            ModelError: see ``encode_async``.
        """
        return self.encode_async(pixels)()[0]

    def encode_async(self, pixels: Sequence[np.ndarray]) -> Callable[[], BatchFeatures]:
        """Starts encoding n images' ``pixels`` [3, H, W] and returns a function that waits for the result.

        A GPU keeps computing while the next pixels are read and copied to it. On the CPU the work is complete when
        this method returns.

        Raises:
            ModelError: the device ran out of memory.
        """
        pending: list[Callable[[], BatchFeatures]] = []
        rest = list(pixels)
        while rest:
            batch, rest = rest[: self.batch_size], rest[self.batch_size :]
            features = self._encode_on_cpu(batch) if self.device == "cpu" else self._encode_padded(batch)
            pending.append(self._transfer.fetch(features))
        return pending[0] if len(pending) == 1 else lambda: _concatenate([wait() for wait in pending])

    def _encode_on_cpu(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """Features that are bit-identical to those of each image encoded separately."""
        import torch

        full = 1 < len(pixels) == self.batch_size
        if full and self._compared:
            return self._run(pixels)
        one_by_one = torch.cat([self._run([image]) for image in pixels])
        if full:
            self._compared = True
            if not torch.equal(self._run(pixels), one_by_one):
                self.batch_size = 1
        return one_by_one

    def _encode_padded(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """Features of ``pixels``, encoded as part of a full batch."""
        return self._run([*pixels, *[pixels[0]] * (self.batch_size - len(pixels))])[: len(pixels)]

    def _run(self, pixels: list[np.ndarray]) -> torch.Tensor:
        import torch

        try:
            with torch.inference_mode():
                features = self.encoder.encode(self._transfer.send(pixels))
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of memory on {self.device} with a batch of {len(pixels)} images",
                hint="lower features.batch_size",
            ) from error
        return features


class _Transfer:
    """Synchronous copies to and from a device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def send(self, pixels: list[np.ndarray]) -> torch.Tensor:
        """n images' ``pixels`` [3, H, W] as one tensor [n, 3, H, W] on the device."""
        import torch

        return torch.from_numpy(np.stack(pixels)).to(self.device)

    def fetch(self, features: torch.Tensor) -> Callable[[], BatchFeatures]:
        """A function that waits for ``features`` [n, P, Dv] to arrive in host memory."""
        rounded, finite = _to_float16(features)
        return lambda: (rounded.cpu().numpy(), finite.cpu().numpy())


class _CudaTransfer(_Transfer):
    """Copies that overlap with computation: pinned host memory and one CUDA stream per direction."""

    def __init__(self, device: str) -> None:
        import torch

        super().__init__(device)
        self._to_device, self._to_host = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def send(self, pixels: list[np.ndarray]) -> torch.Tensor:
        import torch

        host = torch.empty((len(pixels), *pixels[0].shape), dtype=torch.float32, pin_memory=True)
        np.stack(pixels, out=host.numpy())
        compute = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self._to_device):
            sent = host.to(self.device, non_blocking=True)
        compute.wait_stream(self._to_device)
        # Otherwise the allocator could reuse this memory for the next batch while the compute stream still reads it.
        sent.record_stream(compute)
        return sent

    def fetch(self, features: torch.Tensor) -> Callable[[], BatchFeatures]:
        import torch

        on_device = _to_float16(features)
        self._to_host.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._to_host):
            features, finite = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True) for x in on_device]
            for x, host in zip(on_device, (features, finite), strict=True):
                host.copy_(x, non_blocking=True)
                x.record_stream(self._to_host)
            arrived = self._to_host.record_event()

        def wait() -> BatchFeatures:
            arrived.synchronize()
            return features.numpy(), finite.numpy()

        return wait


def _to_float16(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``features`` [n, P, Dv] as float16, and which of the n are finite, computed on the device of the features."""
    import torch

    rounded = features.to(torch.float16)
    return rounded, torch.isfinite(rounded).flatten(1).all(dim=1)


def _concatenate(batches: Sequence[BatchFeatures]) -> BatchFeatures:
    features, finite = zip(*batches, strict=True)
    return np.concatenate(features), np.concatenate(finite)
