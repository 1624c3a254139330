"""Garbage collection and fsync during the tests, including those of plugins."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator

import pytest

FREEZE, UNFREEZE = gc.freeze, gc.unfreeze

os.fsync = lambda _handle: None  # no test can see what survives a power failure, and a training calls it 45 times


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Excludes modules and tests from garbage collection: it would take half a second, several times per training.

    So that no training includes them again, ``gc.freeze`` and ``gc.unfreeze`` have no effect (but see ``thawed``).
    """
    gc.disable()
    collected = yield
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    return collected


@pytest.fixture
def thawed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``gc.freeze`` and ``gc.unfreeze`` have their effects."""
    monkeypatch.setattr(gc, "freeze", FREEZE)
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    yield
    gc.collect()
    gc.freeze()
