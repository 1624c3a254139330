"""Two small pretrained models for llavactl without a model hub, and recipes that train an assistant from them.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from llavactl import Register, hookimpl

RESULTS_VERSION = "1"
"""Incremented when the results of a component change: finished steps and features are then not used again."""


@hookimpl
def register_vision(register: Register) -> None:
    """``dinov2-demo``."""
    register(
        "dinov2-demo",
        "llavactl_demo.components:Dinov2Demo",
        options="llavactl_demo.components:Dinov2Options",
        summary="DINOv2 ViT-S/14 at 224 pixels, from an installed wheel",
    )


@hookimpl
def register_languages(register: Register) -> None:
    """``smollm2-demo``."""
    register(
        "smollm2-demo",
        "llavactl_demo.components:Smollm2Demo",
        options="llavactl_demo.components:Smollm2Options",
        summary="SmolLM2-135M-Instruct, from an installed wheel",
    )


@hookimpl
def register_recipes(register: Register) -> None:
    """``demo``, ``demo-full``, ``demo-captions`` without its additions to LLaVA, and variants of ``demo``."""
    register(
        "demo", "llavactl_demo:demo.yaml", summary="DINOv2 ViT-S/14 and SmolLM2-135M on rendered scenes, for a CPU"
    )
    register(
        "demo-full",
        "llavactl_demo:demo-full.yaml",
        summary="the demo with the MLP connector of LLaVA v1.5 and a longer stage 2",
    )
    register(
        "demo-captions",
        "llavactl_demo:demo-captions.yaml",
        summary="demo-full without box alignment, as in LLaVA",
    )
    register(
        "demo-sweep",
        "llavactl_demo:demo-sweep.yaml",
        summary="for `llavactl sweep`: the demo with three layers and three connectors, and a seventh of its steps",
    )
