"""Suggests names for a misspelled one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(word: str, known: Iterable[str]) -> str:
    """``did you mean 'x'?`` if a similar name exists, and all available names."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + (f"available: {', '.join(names)}" if names else "")
