"""Connectors that reduce the number of tokens per image, as published.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from llavactl import Register, hookimpl

RESULTS_VERSION = "1"
"""Incremented when the results of a component change: finished steps and features are then not used again."""

_CONNECTORS = {
    "average-pooling": ("AveragePooling", "mean of each block of patches, then an MLP (DeCo)"),
    "pixel-shuffle": ("PixelShuffle", "neighboring patches concatenated, normalized, then an MLP (InternVL)"),
    "c-abstractor": ("CAbstractor", "convolutional blocks around adaptive pooling (Honeybee)"),
    "ldp-v2": ("LdpV2", "an MLP, 2x2 pooling and a depthwise convolution (MobileVLM V2)"),
    "perceiver-resampler": ("PerceiverResampler", "learned latents that attend to all features (Flamingo)"),
    "q-former": ("QFormer", "learned queries and a BERT with cross-attention (BLIP-2), pretrained or new"),
}


@hookimpl
def register_connectors(register: Register) -> None:
    """All connectors of this package; each has its options in a class of the same name."""
    for name, (attribute, summary) in _CONNECTORS.items():
        target = f"llavactl_connectors.components:{attribute}"
        register(name, target, options=f"{target}Options", summary=summary)


@hookimpl
def register_recipes(register: Register) -> None:
    """``connector-comparison``, if llavactl-demo is installed: it extends a recipe of that plugin."""
    if find_spec("llavactl_demo") is not None:
        register(
            "connector-comparison",
            "llavactl_connectors:connector-comparison.yaml",
            summary="for `llavactl sweep`: connectors with 64 tokens per image, with the models and scenes of the demo",
        )


@hookimpl
def check_examples() -> Mapping[str, Any]:
    """Options with which the connectors fit the small features of ``llavactl plugins check``."""
    return {"connectors": {"c-abstractor": {"tokens": 9}}}
