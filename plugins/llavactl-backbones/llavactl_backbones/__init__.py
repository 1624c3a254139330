"""Vision backbones for llavactl, each with its preprocessing and defaults, and fused features of several backbones.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl import Register, hookimpl

RESULTS_VERSION = "1"
"""Incremented when the results of a component change: finished steps and features are then not used again."""

_BACKBONES = (
    ("siglip", "sized:Siglip", "sized:SiglipOptions", "SigLIP of transformers, at the image size of its checkpoint"),
    (
        "siglip2",
        "sized:Siglip",
        "sized:Siglip2Options",
        "SigLIP 2 of transformers, at the image size of its checkpoint",
    ),
    (
        "siglip2-naflex",
        "naflex:Naflex",
        "naflex:NaflexOptions",
        "SigLIP 2 NaFlex of transformers, on a fixed square grid",
    ),
    (
        "dinov2",
        "sized:Dinov2",
        "sized:Dinov2Options",
        "DINOv2 of transformers, with or without registers, at any image size",
    ),
    ("dinov3", "sized:Dinov3", "sized:Dinov3Options", "DINOv3 ViT of transformers, at any image size"),
    ("timm", "timm_models:Timm", "timm_models:TimmOptions", "a model of timm with intermediate features (needs timm)"),
    (
        "perception-encoder",
        "timm_models:PerceptionEncoder",
        "timm_models:PerceptionEncoderOptions",
        "Perception Encoder of timm, tuned for language models (needs timm)",
    ),
    (
        "fused",
        "fused:Fused",
        "fused:FusedOptions",
        "features of several backbones with one grid, concatenated in width",
    ),
)


@hookimpl
def register_vision(register: Register) -> None:
    """All backbones of this package."""
    for name, target, options, summary in _BACKBONES:
        register(name, f"llavactl_backbones.{target}", options=f"llavactl_backbones.{options}", summary=summary)


@hookimpl
def check_examples(folder: Path) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Small models with random weights."""
    from llavactl_backbones.small_models import examples

    return {"vision": examples(folder)}
