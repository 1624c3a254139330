"""Words in messages and texts."""

from __future__ import annotations


def article(noun: str) -> str:
    """``noun`` with "a" or "an"."""
    return f"{'an' if noun[:1].lower() in 'aeiou' else 'a'} {noun}"
