"""A plan holds every sample as often as its weight says, and no image is on both sides of the split."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from llavactl.data.plan import BatchPlan, order
from llavactl.data.split import choose_held_out, connected_components


@given(st.integers(1, 50), st.integers(1, 9), st.integers(1, 4), st.integers(0, 5))
def test_every_epoch_holds_every_sample_once(count: int, batch: int, epochs: int, seed: int) -> None:
    plan = BatchPlan([1.0] * count, epochs=epochs, batch_size=batch, seed=seed)
    members = [member for step in range(plan.steps) for member in plan.batch(step)]
    assert len(members) == count * epochs
    assert all(len(plan.batch(step)) == batch for step in range(plan.steps - 1))
    assert Counter(members) == {(epoch, index): 1 for epoch in range(epochs) for index in range(count)}


def test_weights_are_copies_an_epoch() -> None:
    plan = BatchPlan([2.0, 0.5] * 500, epochs=1, batch_size=10, seed=0)
    counts = Counter(index % 2 for step in range(plan.steps) for _, index in plan.batch(step))
    assert counts[0] == 1000
    assert 200 < counts[1] < 300


def test_fractions_of_epochs_and_max_steps() -> None:
    assert BatchPlan([1.0] * 100, epochs=1.5, batch_size=10, seed=0).steps == 15
    assert BatchPlan([1.0] * 100, epochs=3, batch_size=10, seed=0, max_steps=7).steps == 7


def test_another_seed_is_another_order() -> None:
    first, second = (BatchPlan([1.0] * 50, epochs=1, batch_size=50, seed=seed).batch(0) for seed in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second)


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1), st.floats(0, 0.9), st.integers(0, 3))
def test_the_split_is_by_group(groups: list[str], share: float, seed: int) -> None:
    held = choose_held_out(groups, share, seed)
    assert held <= set(groups)
    assert abs(len(held) - share * len(set(groups))) <= 1


def test_ten_images_spare_one_for_validation_and_two_do_not() -> None:
    assert len(choose_held_out([str(n) for n in range(10)], 0.01, 0)) == 1
    assert not choose_held_out(["a", "b"], 0.01, 0)
    assert not choose_held_out([str(n) for n in range(100)], 0.0, 0)


SIZES = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 30), min_size=1, max_size=40)


@given(SIZES, st.floats(0, 0.99), st.integers(0, 3))
def test_groups_are_held_out_whole_and_never_all_of_them(sizes: dict[str, int], share: float, seed: int) -> None:
    held = choose_held_out(sizes, share, seed, sizes)
    assert held < sizes.keys()
    total, taken = sum(sizes.values()), sum(sizes[group] for group in held)
    wanted = max(round(total * share), 1 if total >= 10 and share else 0)
    assert taken <= max(wanted, total / 10, 2 * wanted)
    if wanted >= max(sizes.values()) and len(sizes) > 1:
        assert taken


@given(st.sets(st.text("abcdefgh", min_size=1, max_size=3)), st.floats(0, 0.9), st.integers(0, 3))
def test_groups_of_one_image_are_chosen_by_hash_alone(names: set[str], share: float, seed: int) -> None:
    """The choice of earlier releases: their runs must find the same split."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    count = round(len(names) * share) or (1 if share and len(names) >= 10 else 0)
    assert choose_held_out(names, share, seed) == set(ranked[: min(count, len(names) - 1)])


@given(st.lists(st.sets(st.integers(0, 20), max_size=3), max_size=30))
def test_what_has_a_key_in_common_is_of_one_group(keys: list[set[int]]) -> None:
    numbers = connected_components(keys)
    for one, other in itertools.combinations(range(len(keys)), 2):
        if keys[one] & keys[other]:
            assert numbers[one] == numbers[other]
    for number in set(numbers):  # and no others: what is of one group can be reached
        members = [index for index, found in enumerate(numbers) if found == number]
        reached, grown = {members[0]}, True
        while grown:
            known = set().union(*(keys[index] for index in reached))
            grown = bool(more := {index for index in members if keys[index] & known} - reached)
            reached |= more
        assert reached == set(members)


def test_a_lower_phase_comes_first_and_is_shuffled_within() -> None:
    phases = [2] * 20 + [1] * 30
    members = list(order([1.0] * 50, 0, 7, phases))
    assert set(members[:30]) == set(range(20, 50))
    assert members[:30] != sorted(members[:30])
    assert sorted(members) == list(range(50))
    assert list(order([1.0] * 50, 0, 7, [1] * 50)) == list(order([1.0] * 50, 0, 7)), "one phase changes nothing"


def test_groups_stay_together_and_are_shuffled() -> None:
    groups = [index // 3 for index in range(60)]
    plan = [BatchPlan([1.0] * 60, epochs=2, batch_size=6, seed=0, groups=groups) for _ in range(2)]
    steps = [[index for _, index in plan[0].batch(step)] for step in range(20)]
    assert steps == [[index for _, index in plan[1].batch(step)] for step in range(20)]
    assert all(len({groups[index] for index in step}) == 2 for step in steps)
    assert sorted(index for step in steps[:10] for index in step) == list(range(60))
    orders = [[groups[index] for step in half for index in step] for half in (steps[:10], steps[10:])]
    assert orders[0] != orders[1] != sorted(orders[1])


def test_groups_are_within_phases() -> None:
    groups, phases = [0, 1] * 10, [1] * 10 + [2] * 10
    (step,) = [BatchPlan([1.0] * 20, epochs=1, batch_size=20, seed=0, groups=groups, phases=phases).batch(0)]
    order = [(phases[index], groups[index]) for _, index in step]
    assert [phase for phase, _ in order] == phases
    assert len(list(itertools.groupby(order))) == 4
