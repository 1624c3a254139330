"""llavactl models in lm-evaluation-harness and lmms-eval.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from llavactl import Register, hookimpl


@hookimpl
def register_commands(register: Register) -> None:
    """The command ``llavactl lm-eval``; lmms-eval finds the model itself."""
    register(
        "lm-eval",
        "llavactl_harnesses.command:command",
        summary="Run benchmarks of lm-evaluation-harness on a model.",
    )
