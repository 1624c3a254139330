"""Checks that components conform to their Protocols, for tests of plugins.

Each check returns a list of problems, one line each; an empty list means that the component conforms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llavactl.testing.conformance.formats import check_format
from llavactl.testing.conformance.models import check_connector, check_language, check_vision
from llavactl.testing.conformance.sources import check_source
from llavactl.testing.conformance.tasks import check_task
from llavactl.testing.conformance.teachers import check_teacher
from llavactl.testing.conformance.templates import check_template
from llavactl.testing.conformance.training import check_optimizer, check_schedule

__all__ = [
    "CHECKS",
    "check_connector",
    "check_format",
    "check_language",
    "check_optimizer",
    "check_schedule",
    "check_source",
    "check_task",
    "check_teacher",
    "check_template",
    "check_vision",
]

CHECKS: Mapping[str, Callable[[Any], list[str]]] = {
    "sources": check_source,
    "vision": check_vision,
    "connectors": check_connector,
    "languages": check_language,
    "templates": check_template,
    "teachers": check_teacher,
    "tasks": check_task,
    "formats": check_format,
    "optimizers": check_optimizer,
    "schedules": check_schedule,
}
"""The check of a component of each kind."""
