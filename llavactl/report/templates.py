"""Jinja templates of the HTML pages, with autoescape."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template


@cache
def template(name: str) -> Template:
    """The template in the file ``name`` of this package."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("llavactl.report", package_path="")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(name)
