"""Which samples are trained, and how each of them looks in an epoch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import DataError
from llavactl.core.registry import registry
from llavactl.core.schema import IMAGE_TOKEN, ImageContents, Sample, Turn
from llavactl.data.encode import Encoding
from llavactl.data.plan import BatchPlan
from llavactl.data.records import samples, split_turns
from llavactl.data.split import DataSplit, load_split
from llavactl.data.training_set import arranged
from llavactl.images.image_file import ImageFile
from llavactl.recipe.specs import SourceSpec
from llavactl.recipe.stages import Stage

COUNT, EPOCHS = 2000, 6


def sample(number: int, question: str = "What is it?", answer: str = "A dog.") -> Sample:
    photo = ImageFile("/photos", f"{number}.jpg")
    return Sample(
        f"s{number}", (Turn("user", (photo, "\n", question)), Turn("assistant", (answer,))), f"record {number}"
    )


def image_last(each: Sample, seed: int, epoch: int) -> bool:
    return not isinstance(arranged(each, "random", seed, epoch)[0].content[-1], str)


def near_half(hits: int, of: int) -> bool:
    """Within four standard deviations of a fair coin: deterministic here, and one in 16,000 where it isn't."""
    return abs(hits - of / 2) < 4 * math.sqrt(of) / 2


def test_the_coin_is_fair_over_samples_epochs_and_seeds() -> None:
    coins = {
        (seed, epoch): [image_last(sample(number), seed, epoch) for number in range(COUNT)]
        for seed in range(3)
        for epoch in range(EPOCHS)
    }
    assert all(near_half(sum(tossed), COUNT) for tossed in coins.values())
    for one in coins:
        for other in coins:
            if one < other:
                agree = sum(a == b for a, b in zip(coins[one], coins[other], strict=True))
                assert near_half(agree, COUNT), f"{one} and {other} are not independent"


def test_a_sample_is_not_on_one_side_for_good() -> None:
    """Over six epochs 1 of 32 samples is; that is what fair coins do."""
    sides = [len({image_last(sample(number), 0, epoch) for epoch in range(EPOCHS)}) for number in range(COUNT)]
    expected = COUNT / 2 ** (EPOCHS - 1)
    assert abs(sides.count(1) - expected) < 4 * math.sqrt(expected)


def test_samples_of_one_id_have_their_own_coins() -> None:
    pairs = [(sample(number), sample(number, "And now?")) for number in range(COUNT)]
    agree = sum(image_last(one, 0, 0) == image_last(other, 0, 0) for one, other in pairs)
    assert near_half(agree, COUNT)


@pytest.fixture(scope="module")
def tokenizer(toys: Path) -> Any:
    return registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()


def made(
    samples: Sequence[Sample],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    unreadable: Mapping[Any, str] | None = None,
    contents: Mapping[Any, str] | None = None,
    split_turns: bool = False,
    **stage: Any,
) -> DataSplit:
    monkeypatch.setattr("llavactl.data.split.samples", lambda specs: iter(samples))
    settings = Stage(**{"validation": 0.0, "image_order": "random", **stage})
    template = registry().create("templates", {"name": "vicuna-v1"})
    encoding = Encoding(template, tokenizer, 4, settings.max_length)
    features: Any = None
    keys = dict(contents or {})
    looked_at = ImageContents(keys, unreadable or {})
    spec = SourceSpec(name="any", split_turns=split_turns)
    return load_split([spec], settings, encoding, features, lambda _images: looked_at, 0)


def test_what_stands_beside_a_sample_does_not_change_its_coins(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`data show`, which leaves nothing out, shows what training sees."""
    many = [sample(number) for number in range(60)]
    whole = made(many, tokenizer, monkeypatch).train
    bad = {each.images[0]: "broken" for each in many[:20]}
    rest = made(many, tokenizer, monkeypatch, bad).train
    for epoch in range(3):
        assert [rest.encoded(epoch, at) for at in range(40)] == [whole.encoded(epoch, at + 20) for at in range(40)]


def test_the_plan_shows_another_side_in_another_epoch(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the loop asks: by the (epoch, index) of the plan, whichever process it is and wherever it goes on."""
    data = made([sample(number) for number in range(64)], tokenizer, monkeypatch).train
    plan = BatchPlan(data.weights, epochs=3, batch_size=8, seed=0)
    members = [member for step in range(plan.steps) for member in plan.batch(step)]
    seen: dict[int, list[bool]] = {}
    for epoch, index in sorted(members):
        ids = data.encoded(epoch, index).ids
        newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
        seen.setdefault(index, []).append(ids[ids.index(IMAGE_TOKEN) - 1] == newline[-1])
    assert all(len(sides) == 3 for sides in seen.values())
    assert sum(len(set(sides)) == 2 for sides in seen.values()) > 32, "three in four change sides"
    halves = [members[rank::2] for rank in (0, 1)]
    assert {m: data.encoded(*m) for half in halves for m in half} == {m: data.encoded(*m) for m in members}


def test_a_sample_without_a_target_is_left_out_and_listed(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    long = sample(1, question="Why? " * 200)
    late = sample(2, answer="Because. " * 200)
    data = made([sample(0), long, late], tokenizer, monkeypatch, max_length=260)
    assert [each.id for each in data.train.samples] == ["s0", "s2"]
    (out,) = data.skipped
    assert (out.id, out.where) == ("s1", "record 1")
    assert "max_length 260" in out.reason
    for epoch in range(4):
        assert all(data.train.encoded(epoch, index).target_tokens for index in range(2))


def test_left_out_is_a_line_a_sample_even_of_one_id(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, good = sample(1), sample(1, "And now?"), sample(2)
    data = made([first, second, good], tokenizer, monkeypatch, {first.images[0]: "the file is empty"})
    assert [out.reason for out in data.skipped] == ["1.jpg: the file is empty"] * 2


def test_nothing_left_says_why(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"2 of 2 .*\(record 0\).*max_length 3"):
        made([sample(0), sample(1)], tokenizer, monkeypatch, max_length=3)


def test_questions_apart_know_no_other_answer_and_every_image_so_far() -> None:
    one, two = ImageFile("/photos", "1.jpg"), ImageFile("/photos", "2.jpg")
    turns = (
        Turn("system", ("Be brief.",)),
        Turn("user", (one, "\n", "What is it?")), Turn("assistant", ("A dog.",)),
        Turn("user", ("And this? ", two)), Turn("assistant", ("A cat.",)),
        Turn("user", ("Which is larger?",)), Turn("assistant", ("The dog.",)),
    )  # fmt: skip
    found = list(split_turns(Sample("a", turns, "record 3", captions=("A dog and a cat.",))))
    assert [each.id for each in found] == ["a#1", "a#2", "a#3"]
    assert {(each.where, each.captions) for each in found} == {("record 3", ("A dog and a cat.",))}
    assert [each.turns[0] for each in found] == [turns[0]] * 3
    assert [each.turns[2] for each in found] == [turns[2], turns[4], turns[6]]
    assert [each.turns[1].content for each in found] == [
        (one, "\n", "What is it?"),
        (one, "\n", "And this? ", two),
        (one, "\n", two, "\n", "Which is larger?"),
    ]


def test_a_source_may_be_taken_apart(tmp_path: Path) -> None:
    talk = [
        {"from": who, "value": what} for who, what in [("human", "A?"), ("gpt", "a"), ("human", "B?"), ("gpt", "b")]
    ]
    (tmp_path / "records.json").write_text(json.dumps([{"id": "x", "image": "x.jpg", "conversations": talk}]))
    spec = {"name": "llava-json", "path": str(tmp_path / "records.json")}
    assert [each.id for each in samples([SourceSpec.model_validate(spec)])] == ["x"]
    apart_too = SourceSpec.model_validate({**spec, "split_turns": True})
    assert [each.turns[0].text.strip() for each in samples([apart_too])] == ["A?", "B?"]


def shows(*numbers: int | str, name: str = "") -> Sample:
    """A sample about the images of these numbers."""
    photos = [ImageFile("/photos", f"{number}.jpg") for number in numbers]
    front = tuple(part for photo in photos for part in (photo, "\n"))
    called = name or "-".join(map(str, numbers))
    return Sample(called, (Turn("user", (*front, "What?")), Turn("assistant", ("A dog.",))))


def says(name: str, question: str, **extra: Any) -> Sample:
    return Sample(name, (Turn("user", (question,)), Turn("assistant", ("Yes.",))), extra=extra)


def apart_on_both_sides(data: DataSplit) -> set[str]:
    sides = [{image.name for each in side.samples for image in each.images} for side in (data.train, data.validation)]
    return sides[0] & sides[1]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.9])
def test_no_image_of_a_sample_is_on_both_sides(share: float, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs in chains of five, in an order that hides it, and single images."""
    pairs = [shows(number, number + 1) for number in range(100) if number % 5]
    samples = [
        *pairs[::-2],
        *pairs[::2],
        *(shows(number, 3) for number in range(200, 206)),
        *map(shows, range(300, 340)),
    ]
    data = made(samples, tokenizer, monkeypatch, validation=share)
    assert len(data.validation) > 0
    assert len(data.train) + len(data.validation) == len(samples)
    assert not apart_on_both_sides(data)


def test_where_all_images_hang_together_none_is_held_out(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    chain = [shows(number, number + 1) for number in range(40)]
    data = made(chain, tokenizer, monkeypatch, validation=0.3)
    assert (len(data.train), len(data.validation)) == (40, 0)
    assert "41" in data.held_out
    data = made([*chain, *map(shows, range(100, 110))], tokenizer, monkeypatch, validation=0.2)
    assert len(data.validation) == 10, "those that stand alone are, as far as they reach"
    assert "10 of 51" in data.held_out
    assert not made(chain, tokenizer, monkeypatch).held_out, "nothing was asked for"


def test_one_image_under_two_names_is_on_one_side(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = [shows(number) for number in range(40)] + [shows(f"copy-{number}") for number in range(40)]
    contents = {each.images[0]: f"content {index % 40}" for index, each in enumerate(samples)}
    data = made(samples, tokenizer, monkeypatch, contents=contents, validation=0.25)
    sides = [{contents[each.images[0]] for each in side.samples} for side in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    assert len(data.validation) == 20
    other = {image: str(image) for image in contents}
    assert made(samples, tokenizer, monkeypatch, contents=other, validation=0.25).digest != data.digest


def test_another_split_is_another_digest(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of the same contents under other names, by which images are held out, are split in another way."""

    def under(prefix: str, validation: float) -> DataSplit:
        samples = [replace(shows(f"{prefix}{number}"), id=str(number)) for number in range(40)]
        contents = {each.images[0]: f"content {index}" for index, each in enumerate(samples)}
        return made(samples, tokenizer, monkeypatch, contents=contents, validation=validation)

    one, other = under("a-", 0.25), under("b-", 0.25)
    assert {each.id for each in one.validation.samples} != {each.id for each in other.validation.samples}
    assert one.digest != other.digest
    assert under("a-", 0.0).digest == under("b-", 0.0).digest


def test_single_images_are_split_as_ever(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The names were written down when only first images counted."""
    samples = [shows(number % 60, name=f"s{number}") for number in range(120)]
    data = made(samples, tokenizer, monkeypatch, validation=0.1)
    held = sorted({each.images[0].name for each in data.validation.samples})
    assert held == ["2.jpg", "27.jpg", "43.jpg", "54.jpg", "58.jpg", "59.jpg"]
    assert len(data.validation) == 12


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_texts_of_one_record_or_id_or_alike_stay_together(
    share: float, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [says(f"r{record}#{part}", f"Question {record} {part}?") for record in range(20) for part in (1, 2)]
    data = made(parts, tokenizer, monkeypatch, split_turns=True, validation=share)
    sides = [{each.id.split("#")[0] for each in side.samples} for side in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    assert len(data.validation) == 40 * share
    named = [says(f"talk {n % 20}", f"Part {n}?") for n in range(40)]
    data = made(named, tokenizer, monkeypatch, validation=share)
    sides = [{each.id for each in side.samples} for side in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    alike = [says(f"{n}", f"Question {n % 20}?") for n in range(40)]
    data = made(alike, tokenizer, monkeypatch, validation=share)
    sides = [{each.turns[0].text for each in side.samples} for side in (data.train, data.validation)]
    assert not sides[0] & sides[1]
    assert len(data.validation) == 40 * share
