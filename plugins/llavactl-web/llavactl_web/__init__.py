"""Chat with llavactl models in the browser.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from llavactl import Register, hookimpl


@hookimpl
def register_commands(register: Register) -> None:
    """The command ``llavactl web``."""
    register("web", "llavactl_web.command:command", summary="Chat with a model in the browser.")
