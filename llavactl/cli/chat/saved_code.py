"""``--save-code``: the code blocks of answers as files."""

from __future__ import annotations

import logging
from pathlib import Path

log = logging.getLogger(__name__)


def save_code_of(*answers: str, folder: Path, overwrite: bool) -> None:
    """Saves each code block of ``answers`` to its own file in ``folder``, and logs their names."""
    from llavactl.chat.code_blocks import code_blocks, save_code

    blocks = [block for answer in answers for block in code_blocks(answer)]
    for file in save_code(blocks, folder, overwrite=overwrite):
        log.info("saved %s", file)
