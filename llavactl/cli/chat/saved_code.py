"""``--save-code``: the code blocks of answers as files."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def save_code_of(answer: str, folder: Path) -> None:
    """Saves each code block of ``answer`` to its own file in ``folder``, and logs their names."""
    from llavactl.chat.code_blocks import code_blocks, save_code

    for file in save_code(code_blocks(answer), folder):
        log.info("saved %s", file)
