"""Operations that all processes of a distributed run carry out together; each works with a single process as well.

An error in one process is raised in all of them: otherwise the others would wait for it in the next operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed

from llavactl.core.errors import LlavactlError
from llavactl.core.library_errors import reason
from llavactl.core.plugin_faults import plugin_error

if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")

BUCKET_BYTES = 64 * 2**20
"""The size of a reduction of gradients. Fewer and larger ones use the network better but need more memory."""


def process_index() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def process_count() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def together(action: Callable[[], T]) -> list[T]:
    """Runs ``action`` in all processes; returns the results by process.

    Raises:
        Exception: an ``action`` failed, in this process or in another one.
    """
    error: BaseException | None = None
    result: Any = None
    try:
        result = action()
    except KeyboardInterrupt:
        raise
    except BaseException as raised:  # a plugin may raise anything
        if process_count() == 1:
            raise
        error = raised
    if process_count() == 1:
        return [result]
    outcomes: list[Any] = [None] * process_count()
    distributed.all_gather_object(outcomes, (result, picklable(error)))
    if error is not None:
        raise error
    if failed := next((other for _, other in outcomes if other is not None), None):
        raise failed
    return [each for each, _ in outcomes]


def on_main(action: Callable[[], T]) -> T:
    """The result of ``action``, which only the main process runs; raises like ``together``."""
    return together(lambda: action() if process_index() == 0 else None)[0]  # type: ignore[return-value]


def in_any_process(accelerator: Accelerator, condition: bool) -> bool:
    """Whether ``condition`` is true in any process; all of them must call this together."""
    return bool(sum_over_processes(accelerator, torch.tensor(float(condition))))


def picklable(error: BaseException | None) -> Exception | None:
    """``error`` itself if it can be sent to other processes, else one with its text.

    OSErrors can: callers convert them in all processes. Subclasses of libraries may need other arguments.
    """
    if error is None or isinstance(error, LlavactlError):
        return error
    if fault := plugin_error(error):
        return fault
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        return error
    return RuntimeError(f"{error!r} in another process")


def sum_over_processes(accelerator: Accelerator, tensor: torch.Tensor) -> torch.Tensor:
    """The sum of ``tensor`` over all processes."""
    if accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), reduction="sum").to(tensor.device)


def sum_in_buckets(accelerator: Accelerator, tensors: Sequence[torch.Tensor]) -> None:
    """Replaces each of ``tensors``, of one dtype, by its sum over all processes; few large reductions."""
    for bucket in _buckets(tensors):
        total = sum_over_processes(accelerator, torch.cat([tensor.flatten() for tensor in bucket]))
        for tensor, part in zip(bucket, total.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """``tensors`` in order, in lists of up to ``BUCKET_BYTES``; a larger tensor is a list by itself."""
    bucket: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        if bucket and size + tensor.nbytes > BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.nbytes
    if bucket:
        yield bucket


@contextmanager
def lost_processes_reported(hint: str) -> Iterator[None]:
    """Raises LlavactlError, with ``hint``, if an operation in this context fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:
        if process_count() == 1 or not _is_communication_error(error):
            raise
        raise LlavactlError(
            f"another process of this run has ended or can't be reached ({reason(error)})", hint=hint
        ) from error


def _is_communication_error(error: RuntimeError) -> bool:
    """Whether ``error`` is from gloo or NCCL; gloo raises RuntimeError itself."""
    signs = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, distributed.DistError) or any(sign in str(error) for sign in signs)
