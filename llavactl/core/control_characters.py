"""Control characters are shown, not executed: answers, records and file names come from others."""

from __future__ import annotations

import re

_CONTROLS = r"\x7f-\x9f\u2028-\u202e\u2066-\u2069"
"""DEL, C1, line and paragraph separators, and overrides of the writing direction, which can disguise text."""

# Undecodable bytes of file names (U+DC80 to U+DCFF) are written unchanged, except those of which C1 consists in UTF-8.
_EXECUTED = re.compile(rf"[\x00-\x08\x0b-\x1f{_CONTROLS}\ud800-\udc9f\udd00-\udfff]")

IN_JSON = re.compile(rf"[{_CONTROLS}\ud800-\udfff]")
"""What JSON permits in strings, but a terminal, or a program that splits lines, might interpret."""


def visible(text: str) -> str:
    r"""``text`` with control characters, except newline and tab, as ``\x1b`` or ``\u202e``."""
    return _EXECUTED.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
