"""Testing tools for plugins, also used by llavactl's tests: toy models and data, a CLI runner, conformance checks.

Toy models are instances of real transformers classes with random weights, created in a second without network access.
"""

from __future__ import annotations

from llavactl.testing.conformance import (
    CHECKS,
    check_connector,
    check_format,
    check_language,
    check_optimizer,
    check_schedule,
    check_source,
    check_task,
    check_teacher,
    check_template,
    check_vision,
)
from llavactl.testing.conformance.teachers import toy_requests
from llavactl.testing.endpoint import Answers, ToyEndpoint, completion, good_reply, toy_endpoint
from llavactl.testing.plugin_check import check_plugin
from llavactl.testing.runner import Result, run_cli
from llavactl.testing.toys import (
    toy_clip,
    toy_language,
    toy_model,
    toy_photos,
    toy_recipe,
    toy_records,
    toy_tokenizer,
)

__all__ = [
    "CHECKS",
    "Answers",
    "Result",
    "ToyEndpoint",
    "check_connector",
    "check_format",
    "check_language",
    "check_optimizer",
    "check_plugin",
    "check_schedule",
    "check_source",
    "check_task",
    "check_teacher",
    "check_template",
    "check_vision",
    "completion",
    "good_reply",
    "run_cli",
    "toy_clip",
    "toy_endpoint",
    "toy_language",
    "toy_model",
    "toy_photos",
    "toy_recipe",
    "toy_records",
    "toy_requests",
    "toy_tokenizer",
]
