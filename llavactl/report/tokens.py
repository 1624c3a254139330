"""The page of ``llavactl data show``: samples token by token; it needs neither a network nor a script."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavactl.report.templates import template
from llavactl.report.thumbnails import safe_image


def page(report: Any, pictures: Mapping[str, str]) -> str:
    """The page of a ``ShowReport``; ``pictures`` are data URIs by the name of the image."""
    return template("tokens.html").render(
        report=report, pictures={name: safe_image(uri) for name, uri in pictures.items()}
    )
