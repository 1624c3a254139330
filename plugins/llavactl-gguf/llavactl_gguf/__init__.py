"""llavactl models as GGUF files for llama.cpp.

The command line imports this module even for ``--help``: it imports nothing heavy.
"""

from __future__ import annotations

from llavactl import Register, hookimpl


@hookimpl
def register_formats(register: Register) -> None:
    """The format ``gguf``."""
    register(
        "gguf",
        "llavactl_gguf.format:Gguf",
        options="llavactl_gguf.format:GgufOptions",
        summary="GGUF files for llama.cpp: a language model and a multimodal projector",
    )
