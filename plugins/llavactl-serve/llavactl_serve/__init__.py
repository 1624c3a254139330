"""An OpenAI-compatible endpoint for llavactl models.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from llavactl import Register, hookimpl


@hookimpl
def register_commands(register: Register) -> None:
    """The command ``llavactl serve``."""
    register(
        "serve",
        "llavactl_serve.command:command",
        summary="Serve a model through an OpenAI-compatible endpoint.",
    )
