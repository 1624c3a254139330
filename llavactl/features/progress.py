"""How far a long work is: a bar on a terminal's stderr, sparse log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

log = logging.getLogger(__name__)

_LINE_EVERY_S = 30.0


class Progress:
    """Counts images done of ``total``: images a second, GB, time left. A context manager."""

    def __init__(self, what: str, total: int) -> None:
        from tqdm import tqdm

        self.what = what
        self.total = total
        self._done = 0
        self._bytes = 0
        self._began = self._said = time.perf_counter()
        self._tty = sys.stderr.isatty()
        self._bar = tqdm(total=total, desc=what, unit="image", disable=not (self._tty and total), smoothing=0.05)

    def advance(self, images: int, size: int = 0) -> None:
        """Counts ``images`` more, and ``size`` bytes that were made of them."""
        self._done += images
        self._bytes += size
        if self._bytes:
            self._bar.set_postfix_str(f"{self._bytes / 1e9:.2f} GB", refresh=False)
        self._bar.update(images)
        now = time.perf_counter()
        if not self._tty and now - self._said >= _LINE_EVERY_S:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self.total - self._done) / rate if rate else 0.0
            log.info(
                "%s: %d of %d images, %.1f a second, %.2f GB, %.0f s left",
                self.what, self._done, self.total, rate, self._bytes / 1e9, left,
            )  # fmt: skip

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self._bar.close()
