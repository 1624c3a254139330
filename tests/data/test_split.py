"""Skipped samples, and a validation split in which no image is in both sets."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.core.errors import DataError
from llavactl.core.schema import Sample, Turn
from llavactl.data.held_out import choose_held_out, connected_components
from llavactl.data.split import DataSplit
from llavactl.images.image_file import ImageFile

Load = Callable[..., DataSplit]


def sample(number: int, question: str = "What is it?", answer: str = "A dog.") -> Sample:
    photo = ImageFile("/photos", f"{number}.jpg")
    return Sample(
        f"s{number}", (Turn("user", (photo, "\n", question)), Turn("assistant", (answer,))), f"record {number}"
    )


def with_images(*numbers: int | str, name: str = "") -> Sample:
    """A sample about the images with these numbers."""
    photos = [ImageFile("/photos", f"{number}.jpg") for number in numbers]
    images = tuple(part for photo in photos for part in (photo, "\n"))
    return Sample(
        name or "-".join(map(str, numbers)), (Turn("user", (*images, "What?")), Turn("assistant", ("A dog.",)))
    )


def text_only(name: str, question: str) -> Sample:
    return Sample(name, (Turn("user", (question,)), Turn("assistant", ("Yes.",))))


def test_a_sample_without_a_target_is_skipped_and_listed(load_samples: Load) -> None:
    long_question = sample(1, question="Why? " * 200)
    long_answer = sample(2, answer="Because. " * 200)
    data = load_samples([sample(0), long_question, long_answer], max_length=260)
    assert [each.id for each in data.train.samples] == ["s0", "s2"]
    (skipped,) = data.skipped
    assert (skipped.id, skipped.where) == ("s1", "record 1")
    assert "max_length 260" in skipped.reason
    for epoch in range(4):
        assert all(data.train.encoded(epoch, index).target_tokens for index in range(2))


def test_a_sample_without_an_answer_is_not_called_too_long(load_samples: Load) -> None:
    nothing, question = replace(sample(1), turns=()), replace(sample(2), turns=sample(2).turns[:1])
    data = load_samples([sample(0), nothing, question])
    assert [each.id for each in data.train.samples] == ["s0"]
    assert all("max_length" not in each.reason for each in data.skipped)
    assert [each.id for each in data.skipped] == ["s1", "s2"]


def test_skipped_samples_with_the_same_id_are_listed_separately(load_samples: Load) -> None:
    first, second, good = sample(1), sample(1, "And now?"), sample(2)
    data = load_samples([first, second, good], {first.images[0]: "the file is empty"})
    assert [skipped.reason for skipped in data.skipped] == ["1.jpg: the file is empty"] * 2


def test_an_error_names_the_first_record_if_all_are_skipped(load_samples: Load) -> None:
    with pytest.raises(DataError, match=r"2 of 2 .*\(record 0\).*max_length 3"):
        load_samples([sample(0), sample(1)], max_length=3)


def images_in_both_sets(data: DataSplit) -> set[str]:
    train, validation = (
        {image.name for each in part.samples for image in each.images} for part in (data.train, data.validation)
    )
    return train & validation


@pytest.mark.parametrize("share", [0.01, 0.1, 0.3, 0.9])
def test_no_image_is_in_both_sets(share: float, load_samples: Load) -> None:
    """Pairs of images in chains of five, in an order that hides it, and single images."""
    pairs = [with_images(number, number + 1) for number in range(100) if number % 5]
    samples = [
        *pairs[::-2],
        *pairs[::2],
        *(with_images(number, 3) for number in range(200, 206)),
        *map(with_images, range(300, 340)),
    ]
    data = load_samples(samples, validation=share)
    assert len(data.validation) > 0
    assert len(data.train) + len(data.validation) == len(samples)
    assert not images_in_both_sets(data)


def test_if_all_images_are_connected_none_is_held_out(load_samples: Load) -> None:
    chain = [with_images(number, number + 1) for number in range(40)]
    data = load_samples(chain, validation=0.3)
    assert (len(data.train), len(data.validation)) == (40, 0)
    assert "41" in data.held_out
    data = load_samples([*chain, *map(with_images, range(100, 110))], validation=0.2)
    assert len(data.validation) == 10, "the unconnected images"
    assert "10 of 51" in data.held_out
    assert not load_samples(chain).held_out, "no validation requested"


def test_records_without_images_are_not_counted_as_images(load_samples: Load) -> None:
    texts = [text_only(f"t{number}", f"Why {number}?") for number in range(30)]
    data = load_samples([*map(with_images, range(20)), *texts], validation=0.3)
    held_out = [bool(each.images) for each in data.validation.samples]
    images, others = held_out.count(True), held_out.count(False)
    assert images
    assert others
    assert data.held_out == f"15 samples with {images} of 20 images and {others} of 30 text-only records"
    assert data.held_out != load_samples(texts, validation=0.3).held_out == "9 samples with 9 of 30 text-only records"


def test_images_with_the_same_bytes_are_in_the_same_set(load_samples: Load) -> None:
    samples = [with_images(number) for number in range(40)] + [with_images(f"copy-{number}") for number in range(40)]
    contents = {each.images[0]: f"content {index % 40}" for index, each in enumerate(samples)}
    data = load_samples(samples, contents=contents, validation=0.25)
    train, validation = ({contents[each.images[0]] for each in part.samples} for part in (data.train, data.validation))
    assert not train & validation
    assert len(data.validation) == 20
    different = {image: str(image) for image in contents}
    assert load_samples(samples, contents=different, validation=0.25).digest != data.digest


def test_the_digest_depends_on_the_split(load_samples: Load) -> None:
    """Images are held out by name: with the same contents under other names the split differs."""

    def load(prefix: str, validation: float) -> DataSplit:
        samples = [replace(with_images(f"{prefix}{number}"), id=str(number)) for number in range(40)]
        contents = {each.images[0]: f"content {index}" for index, each in enumerate(samples)}
        return load_samples(samples, contents=contents, validation=validation)

    one, other = load("a-", 0.25), load("b-", 0.25)
    assert {each.id for each in one.validation.samples} != {each.id for each in other.validation.samples}
    assert one.digest != other.digest
    assert load("a-", 0.0).digest == load("b-", 0.0).digest


def test_the_split_of_single_images_equals_that_of_earlier_releases(load_samples: Load) -> None:
    samples = [with_images(number % 60, name=f"s{number}") for number in range(120)]
    data = load_samples(samples, validation=0.1)
    held_out = sorted({each.images[0].name for each in data.validation.samples})
    assert held_out == ["2.jpg", "27.jpg", "43.jpg", "54.jpg", "58.jpg", "59.jpg"]
    assert len(data.validation) == 12


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_text_samples_of_a_record_or_with_the_same_id_or_text_stay_together(share: float, load_samples: Load) -> None:
    parts = [text_only(f"r{record}#{part}", f"Question {record} {part}?") for record in range(20) for part in (1, 2)]
    data = load_samples(parts, split_turns=True, validation=share)
    assert not {each.id.split("#")[0] for each in data.train.samples} & {
        each.id.split("#")[0] for each in data.validation.samples
    }
    assert len(data.validation) == 40 * share
    same_ids = [text_only(f"talk {n % 20}", f"Part {n}?") for n in range(40)]
    data = load_samples(same_ids, validation=share)
    assert not {each.id for each in data.train.samples} & {each.id for each in data.validation.samples}
    same_texts = [text_only(f"{n}", f"Question {n % 20}?") for n in range(40)]
    data = load_samples(same_texts, validation=share)
    assert not {each.turns[0].text for each in data.train.samples} & {
        each.turns[0].text for each in data.validation.samples
    }
    assert len(data.validation) == 40 * share


@given(st.lists(st.sampled_from("abcdefghijklmnop"), min_size=1), st.floats(0, 0.9), st.integers(0, 3))
def test_the_requested_share_of_groups_is_held_out(groups: list[str], share: float, seed: int) -> None:
    held_out = choose_held_out(groups, share, seed)
    assert held_out <= set(groups)
    assert abs(len(held_out) - share * len(set(groups))) <= 1


def test_one_of_ten_images_is_held_out_and_none_of_two() -> None:
    assert len(choose_held_out([str(n) for n in range(10)], 0.01, 0)) == 1
    assert not choose_held_out(["a", "b"], 0.01, 0)
    assert not choose_held_out([str(n) for n in range(100)], 0.0, 0)


SIZES = st.dictionaries(st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 30), min_size=1, max_size=40)


@given(SIZES, st.floats(0, 0.99), st.integers(0, 3))
def test_not_all_groups_are_held_out_and_not_too_many_images(sizes: dict[str, int], share: float, seed: int) -> None:
    held_out = choose_held_out(sizes, share, seed, sizes)
    assert held_out < sizes.keys()
    total, images = sum(sizes.values()), sum(sizes[group] for group in held_out)
    target = max(round(total * share), 1 if total >= 10 and share else 0)
    assert images <= max(target, total / 10, 2 * target)
    if target >= max(sizes.values()) and len(sizes) > 1:
        assert images


@given(st.sets(st.text("abcdefgh", min_size=1, max_size=3)), st.floats(0, 0.9), st.integers(0, 3))
def test_single_images_are_chosen_by_hash(names: set[str], share: float, seed: int) -> None:
    """As in earlier releases, so that their runs have the same split."""
    ranked = sorted(names, key=lambda name: hashlib.sha256(f"{seed}\0{name}".encode()).digest())
    count = round(len(names) * share) or (1 if share and len(names) >= 10 else 0)
    assert choose_held_out(names, share, seed) == set(ranked[: min(count, len(names) - 1)])


@given(st.lists(st.sets(st.integers(0, 20), max_size=3), max_size=30))
def test_connected_components(keys: list[set[int]]) -> None:
    components = connected_components(keys)
    for one, other in itertools.combinations(range(len(keys)), 2):
        if keys[one] & keys[other]:
            assert components[one] == components[other]
    for component in set(components):  # all members can be reached from the first
        members = [index for index, each in enumerate(components) if each == component]
        reached, grown = {members[0]}, True
        while grown:
            reached_keys = set().union(*(keys[index] for index in reached))
            grown = bool(more := {index for index in members if keys[index] & reached_keys} - reached)
            reached |= more
        assert reached == set(members)


def test_digests_of_earlier_versions_are_unchanged(load_samples: Load) -> None:
    """The value was computed by the first release: a finished stage must not be trained again by an upgrade."""
    texts = ["What is it?", "é一 a\0b", "", "</s> user"]
    samples = [
        *(
            with_images(number % 17, *([number % 5] if number % 3 == 0 else []), name=f"é{number}")
            for number in range(40)
        ),
        *(replace(text_only(f"t{number % 6}", texts[number % 4]), where=f"record {number}") for number in range(12)),
    ]
    contents = {image: f"content {image.name[0]}" for each in samples for image in each.images if image.name != "3.jpg"}
    data = load_samples(samples, contents=contents, validation=0.2)
    assert data.digest == "c24c5941a729b07e5a347a2c6adcc3ceb972a205650278c69d59dbe5dd40409a"
    assert len(data.validation) == 8
