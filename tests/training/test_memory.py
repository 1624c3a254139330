"""``gc_frozen`` excludes existing objects from garbage collection."""

from __future__ import annotations

import gc
import weakref

import pytest

from llavactl.training.memory import gc_frozen

pytestmark = pytest.mark.usefixtures("thawed")


def test_objects_are_unfrozen_after_an_exception() -> None:
    count = gc.get_freeze_count()

    def work() -> None:
        with gc_frozen():
            assert gc.get_freeze_count() > count
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        work()
    assert gc.get_freeze_count() == 0


def test_new_objects_are_still_collected() -> None:
    class Cycle:
        pass

    with gc_frozen():
        cycle = Cycle()
        cycle.self = cycle  # type: ignore[attr-defined]
        alive = weakref.ref(cycle)
        del cycle
        gc.collect()
        assert alive() is None
