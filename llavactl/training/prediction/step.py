"""Traces a training step on fake tensors, for the memory that it needs besides weights and optimizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.model.cpu.rms_norm import fused_rms_norms
from llavactl.model.cuda import varlen_attention
from llavactl.model.decoder import decoder_layers
from llavactl.model.packed import ATTENTION, packed_attention
from llavactl.training.prediction.storage import Part, StorageMeter

if TYPE_CHECKING:
    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel
    from llavactl.model.packed import PackedLayout

GRADIENTS = "gradients"
_STATIC = "static"


TRACED_LAYERS = (4, 5)
"""Numbers of decoder layers from which those of more layers are extrapolated."""

Bytes = Mapping[Part, float]


@dataclass(frozen=True)
class StepMemory:
    """Bytes by part at the peak of the forward and backward pass of a micro-batch, without weights and optimizer.

    ``whole``: with the gradients of the micro-batch, which are kept until they are added to those of the step.
    ``without_gradients``: if each gradient is removed as soon as it is computed, as with sharding.
    """

    whole: Bytes
    without_gradients: Bytes


@dataclass(frozen=True)
class _Phases:
    """The peaks before and after the gradient leaves the layers above the second one."""

    upper: StepMemory
    lower: StepMemory


def step_memory(model: LlavaModel, batch: Batch, *, cuda: bool, master_gradients: bool) -> StepMemory:
    """The memory of the forward and backward pass of ``batch`` through the fake ``model``, within ``fake_tensors``.

    ``cuda``: with the attention and norms that are used on CUDA. ``master_gradients``: parameters that are their own
    master weights keep their gradient from the preceding micro-batches.

    If all decoder layers between the first and the last are alike, a few layers are traced. While the gradient is in
    the upper layers, each further layer adds its activations to the peak; while it is in the lower ones, its gradients.
    So the peak of both phases is linear in the number of layers, and the extrapolation exact.
    """
    layers = list(decoder_layers(model.language))
    if len(layers) <= max(TRACED_LAYERS) or not _alike(model, layers[1:-1]):
        phases = _trace(model, batch, cuda=cuda, master_gradients=master_gradients)
        return _larger(phases.upper, phases.lower)
    traces = []
    for count in TRACED_LAYERS:
        with _only_layers(model, [*layers[: count - 1], layers[-1]]):
            traces.append(_trace(model, batch, cuda=cuda, master_gradients=master_gradients))
    small, large = traces
    further = len(layers) - TRACED_LAYERS[0]
    return _larger(_extrapolated(small.upper, large.upper, further), _extrapolated(small.lower, large.lower, further))


def _alike(model: LlavaModel, layers: Sequence[nn.Module]) -> bool:
    """Whether ``layers`` have the same computation and the same parameters."""
    types = set(getattr(model.language.config.get_text_config(), "layer_types", None) or ())

    def shapes(layer: nn.Module) -> list[tuple[str, torch.Size, bool]]:
        return [(name, weight.shape, weight.requires_grad) for name, weight in layer.named_parameters()]

    return len(types) < 2 and all(shapes(layer) == shapes(layers[0]) for layer in layers)


@contextmanager
def _only_layers(model: LlavaModel, layers: Sequence[nn.Module]) -> Iterator[None]:
    """In this context ``model`` has only these decoder ``layers``."""
    whole = decoder_layers(model.language)
    previous, whole._modules = whole._modules, {str(index): layer for index, layer in enumerate(layers)}
    try:
        yield
    finally:
        whole._modules = previous


def _extrapolated(small: StepMemory, large: StepMemory, further: int) -> StepMemory:
    """The memory with ``further`` more layers than ``small``, if ``large`` has one more."""

    def each(small: Bytes, large: Bytes) -> Bytes:
        parts = small.keys() | large.keys()
        return {
            part: small.get(part, 0) + further * (large.get(part, 0) - small.get(part, 0)) for part in sorted(parts)
        }

    return StepMemory(each(small.whole, large.whole), each(small.without_gradients, large.without_gradients))


def _larger(*memories: StepMemory) -> StepMemory:
    def total(parts: Bytes) -> float:
        return sum(parts.values())

    return StepMemory(
        max((memory.whole for memory in memories), key=total),
        max((memory.without_gradients for memory in memories), key=total),
    )


def _trace(model: LlavaModel, batch: Batch, *, cuda: bool, master_gradients: bool) -> _Phases:
    vocabulary = model.language.get_input_embeddings().weight.shape[0]

    def part_of(tensor: torch.Tensor) -> Part:
        logits = tensor.is_floating_point() and tensor.ndim == 2 and tensor.shape[1] == vocabulary
        return "logits" if logits else "activations"

    def memory() -> StepMemory:
        return StepMemory(meter.peak(_STATIC), meter.peak(GRADIENTS, _STATIC))

    phases: list[StepMemory] = []

    def on_forward(_module: nn.Module, _args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if isinstance(hidden, torch.Tensor) and hidden.requires_grad:
            hidden.register_hook(on_gradient)

    def on_gradient(_gradient: torch.Tensor) -> None:
        phases.append(memory())
        meter.restart()

    meter = StorageMeter(part_of)
    meter.leave_out(_STATIC)
    meter.leave_out(GRADIENTS, _STATIC)
    with ExitStack() as stack:
        stack.enter_context(_attention_and_norms(model, batch, cuda=cuda))
        batch = replace(batch, features=_fake(batch.features), scales=_fake(batch.scales))
        meter.add(_static(model, batch, cuda=cuda, master_gradients=master_gradients), _STATIC)
        for weight in model.parameters():
            if weight.requires_grad and weight.grad is None:
                hook = weight.register_post_accumulate_grad_hook(lambda weight: meter.add([weight.grad], GRADIENTS))
                stack.callback(hook.remove)
        for second in list(decoder_layers(model.language))[:2][-1:]:
            stack.callback(second.register_forward_hook(on_forward).remove)
        stack.enter_context(meter)
        model.train()
        loss = model(batch)
        if loss.requires_grad:
            loss.backward()
    for weight in model.parameters():
        weight.grad = None
    return _Phases(phases[0] if phases else memory(), memory())


def _static(model: LlavaModel, batch: Batch, *, cuda: bool, master_gradients: bool) -> list[torch.Tensor]:
    """The tensors before the forward pass: weights, kept gradients and, on a CPU, the features of the batch."""
    static: list[torch.Tensor] = [*model.parameters(), *model.buffers()]
    if not cuda:
        static += [tensor for tensor in (batch.features, batch.scales) if tensor is not None]
    for weight in model.parameters():
        weight.grad = None
        if weight.requires_grad and weight.dtype == torch.float32 and master_gradients:
            weight.grad = torch.zeros_like(weight)
            static.append(weight.grad)
    return static


@contextmanager
def _attention_and_norms(model: LlavaModel, batch: Batch, *, cuda: bool) -> Iterator[None]:
    """In this context ``model`` is computed as ``training.loop`` does on a CPU, or on CUDA."""
    with ExitStack() as stack:
        if batch.spans:
            stack.enter_context(packed_attention(model.language))
        if not cuda:
            stack.enter_context(fused_rms_norms(model.language))
        elif batch.spans:
            from transformers import AttentionInterface

            AttentionInterface.register(ATTENTION, _varlen)
        yield


def _varlen(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    scaling: float,
    *,
    packed_layout: PackedLayout,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """``model.packed.attend`` on CUDA."""
    return varlen_attention.attention(query[0], key[0], value[0], packed_layout.varlen, scaling)[None], None


def _fake(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return (
        None
        if tensor is None
        else torch.zeros_like(tensor)
        if not tensor.is_floating_point()
        else torch.empty(tensor.shape, dtype=tensor.dtype)
    )
