"""Two small pretrained models for llavactl that need no model hub, and the recipes that put them together.

Imports nothing but llavactl's marker: the command line imports this module for its ``--help``.
"""

# llavactl's public names are lazy, so a type checker sees Any where they are used.
# mypy: allow-untyped-decorators
from __future__ import annotations

from typing import Any

from llavactl import hookimpl


@hookimpl
def register_vision(register: Any) -> None:
    """``dinov2-demo``."""
    register(
        "dinov2-demo",
        "llavactl_demo.components:Dinov2Demo",
        options="llavactl_demo.components:Dinov2Options",
        summary="DINOv2 ViT-S/14 at 224 pixels, from an installed wheel",
    )


@hookimpl
def register_languages(register: Any) -> None:
    """``smollm2-demo``."""
    register(
        "smollm2-demo",
        "llavactl_demo.components:Smollm2Demo",
        options="llavactl_demo.components:Smollm2Options",
        summary="SmolLM2-135M-Instruct, from an installed wheel",
    )


@hookimpl
def register_recipes(register: Any) -> None:
    """``demo``, and ``demo-captions``: the same without what LLaVA doesn't do."""
    register(
        "demo", "llavactl_demo:demo.yaml", summary="DINOv2 ViT-S/14 and SmolLM2-135M on drawn scenes: minutes on a CPU"
    )
    register("demo-captions", "llavactl_demo:demo-captions.yaml", summary="the demo as LLaVA learns: without boxes")
