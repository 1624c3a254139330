"""Garbage collection and fsync during the tests, including those of plugins."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator

import pytest

COLLECT, FREEZE, UNFREEZE = gc.collect, gc.freeze, gc.unfreeze

os.fsync = lambda _handle: None  # no test can see what survives a power failure, and a training calls it 45 times


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Excludes modules and tests from garbage collection: it would take half a second, several times per training.

    So that no training includes them again, ``gc.freeze`` and ``gc.unfreeze`` have no effect, and ``gc.collect``
    collects young objects only: a training calls it five times (but see ``thawed``).
    """
    gc.disable()
    collected = yield
    gc.enable()
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None
    gc.collect = lambda generation=1: COLLECT(min(generation, 1))
    return collected


@pytest.fixture
def thawed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``gc.collect``, ``gc.freeze`` and ``gc.unfreeze`` have their effects."""
    monkeypatch.setattr(gc, "collect", COLLECT)
    monkeypatch.setattr(gc, "freeze", FREEZE)
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    yield
    gc.collect()
    gc.freeze()
