"""Testing tools for plugins, also used by llavactl's tests: toy models and data, a CLI runner, conformance checks.

Toy models are instances of real transformers classes with random weights, created in a second without network access.
"""

from __future__ import annotations

from llavactl.testing.conformance import (
    check_connector,
    check_language,
    check_source,
    check_task,
    check_vision,
)
from llavactl.testing.endpoint import Answers, ToyEndpoint, completion, good_reply, toy_endpoint
from llavactl.testing.plugin_check import check_plugin
from llavactl.testing.runner import Result, run_cli
from llavactl.testing.toys import toy_clip, toy_language, toy_photos, toy_recipe, toy_records

__all__ = [
    "Answers",
    "Result",
    "ToyEndpoint",
    "check_connector",
    "check_language",
    "check_plugin",
    "check_source",
    "check_task",
    "check_vision",
    "completion",
    "good_reply",
    "run_cli",
    "toy_clip",
    "toy_endpoint",
    "toy_language",
    "toy_photos",
    "toy_recipe",
    "toy_records",
]
