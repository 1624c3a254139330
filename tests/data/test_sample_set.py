"""How a sample is encoded in each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llavactl.core.schema import IMAGE_TOKEN, Sample, Turn
from llavactl.data.plan import BatchPlan
from llavactl.data.sample_set import arranged
from llavactl.images.image_file import ImageFile

COUNT, EPOCHS = 2000, 6


def sample(number: int, question: str = "What is it?", answer: str = "A dog.") -> Sample:
    photo = ImageFile("/photos", f"{number}.jpg")
    return Sample(
        f"s{number}", (Turn("user", (photo, "\n", question)), Turn("assistant", (answer,))), f"record {number}"
    )


def image_last(sample: Sample, seed: int, epoch: int) -> bool:
    return not isinstance(arranged(sample, "random", seed, epoch)[0].content[-1], str)


def near_half(hits: int, total: int) -> bool:
    """Within four standard deviations of a fair coin: 1 in 16,000 fair coins fails; the test is deterministic."""
    return abs(hits - total / 2) < 4 * math.sqrt(total) / 2


def test_random_order_is_fair_and_independent_over_samples_epochs_and_seeds() -> None:
    draws = {
        (seed, epoch): [image_last(sample(number), seed, epoch) for number in range(COUNT)]
        for seed in range(3)
        for epoch in range(EPOCHS)
    }
    assert all(near_half(sum(drawn), COUNT) for drawn in draws.values())
    for one in draws:
        for other in draws:
            if one < other:
                agree = sum(a == b for a, b in zip(draws[one], draws[other], strict=True))
                assert near_half(agree, COUNT), f"{one} and {other} are not independent"


def test_a_samples_order_changes_between_epochs() -> None:
    """Over six epochs, 1 of 32 samples with fair coins always has the same order."""
    orders = [len({image_last(sample(number), 0, epoch) for epoch in range(EPOCHS)}) for number in range(COUNT)]
    expected = COUNT / 2 ** (EPOCHS - 1)
    assert abs(orders.count(1) - expected) < 4 * math.sqrt(expected)


def test_samples_with_the_same_id_are_drawn_independently() -> None:
    pairs = [(sample(number), sample(number, "And now?")) for number in range(COUNT)]
    agree = sum(image_last(one, 0, 0) == image_last(other, 0, 0) for one, other in pairs)
    assert near_half(agree, COUNT)


def test_other_samples_do_not_change_a_samples_order(load_samples: Callable[..., Any]) -> None:
    """`data show`, which skips no samples, shows the same tokens as training."""
    samples = [sample(number) for number in range(60)]
    complete = load_samples(samples).train
    unreadable = {each.images[0]: "broken" for each in samples[:20]}
    rest = load_samples(samples, unreadable).train
    for epoch in range(3):
        assert [rest.encoded(epoch, at) for at in range(40)] == [complete.encoded(epoch, at + 20) for at in range(40)]


def test_the_order_changes_between_the_epochs_of_a_plan(load_samples: Callable[..., Any], tokenizer: Any) -> None:
    """Encoding depends only on the (epoch, index) of the plan, not on the process or on resuming."""
    data = load_samples([sample(number) for number in range(64)]).train
    plan = BatchPlan(data.weights, epochs=3, batch_size=8, seed=0)
    indices = [index for step in range(plan.steps) for index in plan.batch(step)]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    orders: dict[int, list[bool]] = {}
    for epoch, index in sorted(indices):
        ids = data.encoded(epoch, index).ids
        orders.setdefault(index, []).append(ids[ids.index(IMAGE_TOKEN) - 1] == newline[-1])
    assert all(len(drawn) == 3 for drawn in orders.values())
    assert sum(len(set(drawn)) == 2 for drawn in orders.values()) > 32, "expected for three in four samples"
    halves = [indices[rank::2] for rank in (0, 1)]
    assert {i: data.encoded(*i) for half in halves for i in half} == {i: data.encoded(*i) for i in indices}
