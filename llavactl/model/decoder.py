"""The decoder layers of a language model of any family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def decoder_layers(language: PreTrainedModel) -> nn.ModuleList:
    """The list of the decoder layers of ``language``, which its forward pass iterates over; empty if it has none.

    Families name it differently (``model.layers``, ``transformer.h``, ``gpt_neox.layers``), but transformers names the
    classes of its layers: those that are kept on one device.
    """
    names: Any = getattr(language, "_no_split_modules", None) or ()
    # A multimodal model has other lists of such layers, in its vision encoder.
    for module in language.get_decoder().modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(type(each).__name__ in names for each in module):
            return module
    return nn.ModuleList()
