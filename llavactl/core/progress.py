"""The one progress bar: on stderr, with rate and time left; sparse where stderr is a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Bar:
    """Counts what is done."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def show(self, count: int = 1, **facts: Any) -> None:
        """``count`` more are done; ``facts`` stand behind the bar."""
        if facts:
            self._inner.set_postfix(facts, refresh=False)
        self._inner.update(count)


@contextmanager
def bar(total: int | None, what: str, unit: str, start: int = 0) -> Iterator[Bar]:
    """A bar of ``total`` ``unit``s, of which ``start`` are done already."""
    from tqdm import tqdm

    lively = sys.stderr.isatty()
    with tqdm(
        total=total,
        desc=what,
        unit=unit,
        initial=start,
        file=sys.stderr,
        mininterval=0.1 if lively else 10,
        ascii=not lively,
    ) as inner:
        yield Bar(inner)
