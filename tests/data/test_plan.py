"""A batch plan contains every sample as often as its weight requires, in an order that depends only on the seed."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llavactl.data.plan import BatchPlan, order


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_every_epoch_contains_every_sample_once(count: int, batch: int, epochs: int, seed: int) -> None:
    plan = BatchPlan([1.0] * count, epochs=epochs, batch_size=batch, seed=seed)
    members = [member for step in range(plan.steps) for member in plan.batch(step)]
    assert len(members) == count * epochs
    assert all(len(plan.batch(step)) == batch for step in range(plan.steps - 1))
    assert Counter(members) == {(epoch, index): 1 for epoch in range(epochs) for index in range(count)}


def test_weights_are_copies_per_epoch() -> None:
    plan = BatchPlan([2.0, 0.5] * 500, epochs=1, batch_size=10, seed=0)
    counts = Counter(index % 2 for step in range(plan.steps) for _, index in plan.batch(step))
    assert counts[0] == 1000
    assert 200 < counts[1] < 300


def test_fractional_epochs_and_max_steps() -> None:
    assert BatchPlan([1.0] * 100, epochs=1.5, batch_size=10, seed=0).steps == 15
    assert BatchPlan([1.0] * 100, epochs=3, batch_size=10, seed=0, max_steps=7).steps == 7


def test_the_order_depends_on_the_seed() -> None:
    first, second = (BatchPlan([1.0] * 50, epochs=1, batch_size=50, seed=seed).batch(0) for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


def test_phases_are_in_order_and_shuffled_within() -> None:
    phases = [2] * 20 + [1] * 30
    indices = list(order([1.0] * 50, 0, 7, phases))
    assert set(indices[:30]) == set(range(20, 50))
    assert indices[:30] != sorted(indices[:30])
    assert sorted(indices) == list(range(50))
    assert list(order([1.0] * 50, 0, 7, [1] * 50)) == list(order([1.0] * 50, 0, 7)), "one phase changes nothing"


def test_groups_are_consecutive_and_shuffled() -> None:
    groups = [index // 3 for index in range(60)]
    plan = [BatchPlan([1.0] * 60, epochs=2, batch_size=6, seed=0, groups=groups) for _ in range(2)]
    steps = [[index for _, index in plan[0].batch(step)] for step in range(20)]
    assert steps == [[index for _, index in plan[1].batch(step)] for step in range(20)]
    assert all(len({groups[index] for index in step}) == 2 for step in steps)
    assert sorted(index for step in steps[:10] for index in step) == list(range(60))
    orders = [[groups[index] for step in half for index in step] for half in (steps[:10], steps[10:])]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_groups_are_consecutive_within_each_phase() -> None:
    groups, phases = [0, 1] * 10, [1] * 10 + [2] * 10
    (step,) = [BatchPlan([1.0] * 20, epochs=1, batch_size=20, seed=0, groups=groups, phases=phases).batch(0)]
    keys = [(phases[index], groups[index]) for _, index in step]
    assert [phase for phase, _ in keys] == phases
    assert len(list(itertools.groupby(keys))) == 4
