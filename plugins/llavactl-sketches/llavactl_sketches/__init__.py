"""Hand-drawn wireframes and the HTML of their pages: data to train on, a benchmark, and a recipe.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from llavactl import Register, hookimpl

RESULTS_VERSION = "1"
"""Incremented when the results of a component change: finished steps and features are then not used again."""


@hookimpl
def register_sources(register: Register) -> None:
    """``sketches``."""
    register(
        "sketches",
        "llavactl_sketches.source:sketches",
        options="llavactl_sketches.source:SketchesOptions",
        summary="hand-drawn wireframes, each with the HTML of its page",
    )


@hookimpl
def register_tasks(register: Register) -> None:
    """``sketch-to-html``."""
    register(
        "sketch-to-html",
        "llavactl_sketches.task:SketchToHtml",
        options="llavactl_sketches.task:SketchToHtmlOptions",
        summary="HTML from hand-drawn wireframes, compared in a browser or as a DOM",
    )


@hookimpl
def register_recipes(register: Register) -> None:
    """``sketch-demo``, if llavactl-demo is installed: it uses the models of that plugin."""
    if find_spec("llavactl_demo") is not None:
        register(
            "sketch-demo",
            "llavactl_sketches:sketch-demo.yaml",
            summary="DINOv2 ViT-S/14 and SmolLM2-135M on hand-drawn wireframes, for a CPU",
        )


@hookimpl
def check_examples() -> Mapping[str, Any]:
    """A few sketches, compared without a browser."""
    return {
        "sources": {"sketches": {"count": 4}},
        "tasks": {"sketch-to-html": {"count": 4, "browser": "none"}},
    }
