"""What exists before long work is left out of the garbage collector's searches, for as long as it lasts."""

from __future__ import annotations

import gc
import weakref

import pytest

from llavactl.training.memory import gc_frozen


def test_it_lasts_as_long_as_the_work_also_when_that_fails() -> None:
    before = gc.get_freeze_count()

    def work() -> None:
        with gc_frozen():
            assert gc.get_freeze_count() > before
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        work()
    assert gc.get_freeze_count() == 0


def test_what_is_made_meanwhile_is_still_collected() -> None:
    class Ring:
        pass

    with gc_frozen():
        ring = Ring()
        ring.self = ring  # type: ignore[attr-defined]
        alive = weakref.ref(ring)
        del ring
        gc.collect()
        assert alive() is None
