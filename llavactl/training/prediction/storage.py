"""Counts the bytes of tensor storages, real or fake."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

Part = str
"""The name of a use of memory, such as ``activations``."""


class StorageMeter(TorchDispatchMode):
    """In this context the storages of all new tensors are counted, from their creation to their release.

    ``part_of`` names the part of the peak that a new tensor belongs to. Like ``torch.cuda.max_memory_allocated``, the
    counts contain neither the allocator's free blocks nor memory inside of a kernel. Views share their storage. With
    fake tensors (``training.prediction.fake``) the counts are those of real ones.
    """

    def __init__(self, part_of: Callable[[torch.Tensor], Part] = lambda _tensor: "activations") -> None:
        super().__init__()
        self.bytes_by_part: Counter[Part] = Counter()
        self.peaks: dict[frozenset[Part], Mapping[Part, int]] = {frozenset(): {}}
        """For each set of parts to leave out, the bytes by part when the sum of the others was largest."""
        self._part_of = part_of
        self._parts: dict[int, tuple[Part, weakref.ref[torch.UntypedStorage]]] = {}

    def leave_out(self, *parts: Part) -> None:
        """Also record the peak without ``parts``."""
        self.peaks[frozenset(parts)] = {}

    def peak(self, *without: Part) -> Mapping[Part, int]:
        """The bytes by part at the peak, or at the peak of all parts but ``without``."""
        return self.peaks[frozenset(without)]

    def restart(self) -> None:
        """Forgets the peaks so far."""
        self.peaks = {without: {} for without in self.peaks}
        self._record_peaks()

    def add(self, tensors: Iterable[torch.Tensor], part: Part) -> None:
        """Counts ``tensors`` as ``part`` from now on, whether or not they are counted already."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._parts:
                self.bytes_by_part[self._parts[key][0]] -= size
            reference = self._parts[key][1] if key in self._parts else weakref.ref(storage, self._release(key, size))
            self._parts[key] = (part, reference)
            self.bytes_by_part[part] += size
        self._record_peaks()

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in tree_iter(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._parts:
                self.add([tensor], self._part_of(tensor))
        return output

    def _release(self, key: int, size: int) -> Callable[[object], None]:
        def release(_reference: object) -> None:
            part, _ = self._parts.pop(key)
            self.bytes_by_part[part] -= size

        return release

    def _record_peaks(self) -> None:
        for without, peak in self.peaks.items():
            counted = {part: size for part, size in self.bytes_by_part.items() if part not in without}
            if sum(counted.values()) > sum(peak.values()):
                self.peaks[without] = counted
