"""Optional outputs: if one can't be written, the work itself doesn't fail."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llavactl.core.plugin_faults import described

log = logging.getLogger(__name__)


@contextmanager
def optional_output(file: Path) -> Iterator[None]:
    """Logs any exception of the block, which writes ``file``, as a warning.

    For plots, pages and sample answers, which are written after the result that they show: a full disk or a broken
    plugin must not fail hours of training.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a plugin may call sys.exit
        log.warning("%s could not be written (%s); the result is saved", file, described(error))
