"""The memory of weights, master weights, gradients and optimizer state: arithmetic on the shapes of parameters.

Bytes per weight, with ``s`` the size of the stage's precision (2 for bfloat16):

| | replicated | replicated, optimizer state in host memory | sharded over N processes |
|---|---|---|---|
| frozen | s | s | s / N |
| trainable: weight | s | s | – |
| master weight | 4, none if s is 4 | 4 in host memory | 4 / N |
| gradient of the step | 4 | 4 in host memory | 4 / N |
| moments: two of AdamW (one of Muon) | 8 (4) | 8 (4) in host memory | 8 / N (4 / N) |

The gradients of a micro-batch are in ``training.prediction.step``. With sharding and optimizer state in host memory,
the shares of all weights are in host memory, too. A weight in 4 bits takes half a byte, a byte for the scale of 64
weights, and 4 bytes for that of 256 scales (QLoRA, arXiv 2305.14314).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from llavactl.model.decoder import decoder_layers
from llavactl.training.checkpoints import file_bytes

if TYPE_CHECKING:
    from llavactl.model.llava import LlavaModel
    from llavactl.training.placement import Placement

FLOAT32 = 4
_HEADER_BYTES = 90
"""The header of a tensor in a safetensors file, besides its name: dtype, shape and offsets."""

_4_BIT = 1 / 2 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class WeightMemory:
    """Bytes by part of one process, on its device and in host memory."""

    device: Counter[str]
    host: Counter[str]


@dataclass(frozen=True)
class Weights:
    """The parameters of a stage: ``trainable`` and ``frozen`` numbers of weights; ``size``: bytes of one.

    ``moments``: the keys of the optimizer's state of each trainable parameter, by its name.
    """

    model: LlavaModel
    size: int
    moments: Mapping[str, Sequence[str]]
    in_4_bits: bool = False

    @property
    def trainable(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters() if weight.requires_grad)

    @property
    def frozen(self) -> int:
        return sum(weight.numel() for weight in self.model.parameters() if not weight.requires_grad)

    def memory(self, placement: Placement, processes: int) -> WeightMemory:
        """The memory of each of ``processes``."""
        device: Counter[str] = Counter()
        host: Counter[str] = Counter()
        state = host if placement.optimizer_state == "host" else device
        shares = processes if placement.sharded else 1
        for name, weight in self.model.named_parameters():
            share = -(-weight.numel() // shares)
            if not weight.requires_grad or not placement.sharded:
                weights = state if placement.sharded else device
                weights["weights"] += self._bytes(weight) // shares
            if weight.requires_grad:
                if self.size != FLOAT32 or placement.sharded or placement.optimizer_state == "host":
                    state["masters"] += FLOAT32 * share
                state["gradients"] += FLOAT32 * share
                state["optimizer_state"] += FLOAT32 * share * len(self.moments[name])
        if placement.sharded:
            device["gathered"] += self._gathered()
        device["weights"] += sum(buffer.numel() * buffer.element_size() for buffer in self.model.buffers())
        return WeightMemory(device, host)

    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint: masters, moments and a counter for each, and the connector's untrained state.

        A tensor's entry in the header of its safetensors file has its name twice.
        """
        connector = self.model.connector
        sizes = {
            f"untrained.connector.{name}": tensor.numel() * tensor.element_size()
            for name, tensor in (*connector.named_buffers(), *connector.named_parameters())
            if not tensor.requires_grad
        }
        for name, weight in self.model.named_parameters():
            if weight.requires_grad:
                values = {"step": 1, **dict.fromkeys(("master", *self.moments[name]), weight.numel())}
                sizes |= {f"{key}.{name}": FLOAT32 * count for key, count in values.items()}
        return sum(size + 2 * len(name) + _HEADER_BYTES for name, size in sizes.items())

    def checkpoint_copy_bytes(self) -> int:
        """Host memory for writing a checkpoint: the tensors of one file, and its contents."""
        sizes = [FLOAT32 * weight.numel() for weight in self.model.parameters() if weight.requires_grad]
        total = self.checkpoint_bytes()
        return 2 * min(total, max(file_bytes(total), *sizes))

    def _bytes(self, weight: nn.Parameter) -> int:
        if self.in_4_bits and id(weight) in self._linear:
            return round(_4_BIT * weight.numel())
        return weight.numel() * (self.size if weight.is_floating_point() else weight.element_size())

    @cached_property
    def _linear(self) -> Collection[int]:
        """The frozen weights of linear layers, except the head: those that are quantized."""
        head = self.model.language.get_output_embeddings()
        linear = [part for part in self.model.language.modules() if isinstance(part, nn.Linear) and part is not head]
        return {id(part.weight) for part in linear if not part.weight.requires_grad}

    def _gathered(self) -> int:
        """Bytes that FSDP2 gathers on each device: the root group, the layer that runs, and the next one, prefetched.

        Gradients of a layer and of the root group are unsharded in the precision of the stage, and once more in float32
        while they are reduced.
        """
        layers = [list(layer.parameters()) for layer in decoder_layers(self.model.language)]
        in_layers = {id(weight) for layer in layers for weight in layer}
        root = [weight for weight in self.model.parameters() if id(weight) not in in_layers]
        largest = max(layers, key=_numel, default=[])
        forward_and_backward = self.size * (_numel(root) + 2 * _numel(largest) + _trainable(root))
        reducing_a_layer = (self.size + FLOAT32) * _trainable(largest)
        return forward_and_backward + max(
            reducing_a_layer, FLOAT32 * _trainable(root) - 2 * self.size * _numel(largest)
        )


def _numel(weights: list[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def _trainable(weights: list[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights if weight.requires_grad)
