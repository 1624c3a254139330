"""The HTML page of ``llavactl data show``: samples token by token; without scripts or network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavactl.report.templates import template
from llavactl.report.thumbnails import safe_image


def tokens_page(report: Any, thumbnails: Mapping[str, str]) -> str:
    """The HTML of a ``ShowReport``; ``thumbnails`` are data URIs by image name."""
    return template("tokens.html").render(
        report=report, thumbnails={name: safe_image(uri) for name, uri in thumbnails.items()}
    )
