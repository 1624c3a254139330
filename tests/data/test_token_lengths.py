"""Counted lengths equal those of encoded samples, for any tokenizer, text and number of processes."""

from __future__ import annotations

import copy
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavactl.core.errors import LlavactlError
from llavactl.core.registry import registry
from llavactl.core.schema import Sample, Turn
from llavactl.data import array_cache, token_lengths
from llavactl.data.encode import Encoding
from llavactl.data.image_order import ImageOrder, arrangements
from llavactl.data.packing import prefix_length
from llavactl.data.sample_set import untrainable
from llavactl.data.sample_table import SampleTable
from llavactl.data.token_counts import TokenCounter
from llavactl.data.token_lengths import Counting, TokenLengths, lengths
from llavactl.images.image_file import ImageFile

from ..components.languages.test_image_token import ALL, TOKENIZERS

FRAGMENTS = (
    "A dog and a cat", " ", "  ", "\n", ".", ", ", "What is it?", "3 apples", "don't", "naïve café", "一只狗",
    "</s>", "<s>", "<image>", "é", "a", "ASSISTANT:", "\t", "1.", " b", "USER: x", "\0", "x y", "!",
)  # fmt: skip
"""Texts with words, spaces in all places, names of special tokens and other scripts."""


def random_samples(count: int, seed: int = 0) -> list[Sample]:
    rng = random.Random(seed)

    def text() -> str:
        return "".join(rng.choice(FRAGMENTS) for _ in range(rng.randint(0, 8)))

    def sample(index: int) -> Sample:
        photos = [ImageFile("/photos", f"{rng.randrange(4)}.jpg") for _ in range(rng.choice([0, 1, 1, 1, 2]))]
        question = [part for photo in photos for part in rng.sample([photo, "\n", text()], 3)]
        turns = [Turn("user", (*question, text())), Turn("assistant", (text() + "yes",))]
        for _ in range(rng.randint(0, 2)):
            turns += [Turn("user", (text(),)), Turn("assistant", (text(),))]
        return Sample(f"s{index}", tuple(turns), f"record {index}")

    return [sample(index) for index in range(count)]


def expected(samples: list[Sample], encoding: Encoding, order: ImageOrder) -> TokenLengths:
    """Lengths of encoded samples; of skipped ones only the reason."""
    reasons = {row: reason for row, each in enumerate(samples) if (reason := untrainable(each, encoding, order))}
    items = [
        [None if row in reasons else encoding.encode(turns) for turns in arrangements(each.turns, order)]
        for row, each in enumerate(samples)
    ]
    columns = np.array(
        [
            [
                (0, 0, 0, 0)
                if item is None
                else (len(item), item.target_tokens, len(item.images), prefix_length(item, encoding.image_tokens))
                for item in row
            ]
            for row in items
        ]
    )
    tokens, targets, images, prefixes = columns.transpose(2, 1, 0)
    return TokenLengths(tokens, targets, images, prefixes, prefixes, reasons)


def assert_equal(found: TokenLengths, wanted: TokenLengths) -> None:
    assert dict(found.reasons) == dict(wanted.reasons)
    kept = np.array([row not in wanted.reasons for row in range(len(wanted))], bool)
    for name in ("tokens", "targets", "images", "prefix_tokens"):
        np.testing.assert_array_equal(getattr(found, name)[:, kept], getattr(wanted, name)[:, kept], name)


@pytest.mark.parametrize("name", ALL)
def test_lengths_are_those_of_encoded_samples(name: str, tmp_path: Path) -> None:
    samples = random_samples(120)
    table = SampleTable.of(samples)
    tokenizer = TOKENIZERS[name](tmp_path)
    assert TokenCounter(tokenizer).by_words == (name != "gemma"), "this vocabulary has tokens that span words"
    for template, order, most in (("vicuna-v1", "first", None), ("llama-2", "random", 60), ("plain", "as-data", 30)):
        encoding = Encoding(registry().create("templates", {"name": template}), tokenizer, 5, most)
        assert_equal(lengths(table, encoding, order), expected(samples, encoding, order))


@pytest.fixture
def encoding(tokenizer: Any) -> Encoding:
    return Encoding(registry().create("templates", {"name": "vicuna-v1"}), tokenizer, 4, 300)


def test_processes_return_the_lengths_of_one_process(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    table = SampleTable.of(random_samples(90))
    serial = lengths(table, encoding, "first")
    monkeypatch.setattr(token_lengths, "CHUNK", 20)
    monkeypatch.setattr(token_lengths, "_cores", lambda: 2)
    parallel = lengths(table, encoding, "first")
    assert_equal(parallel, serial)
    np.testing.assert_array_equal(parallel.prefix_texts, serial.prefix_texts)
    with Counting(encoding, "first") as counting:  # as while records are read
        for start in range(0, 90, 30):
            counting.submit(table.part(start, start + 30))
        monkeypatch.delattr(SampleTable, "part")
        assert_equal(lengths(table, encoding, "first", None, counting), serial)


def test_samples_with_equal_prefixes_have_equal_prefix_texts(encoding: Encoding) -> None:
    photo = ImageFile("/photos", "a.jpg")
    system = Turn("system", ("Answer briefly.",))
    question, answer = Turn("user", (photo, "\nWhat?")), Turn("assistant", ("A dog.",))
    other = replace(question, content=(photo, "\nWhere?"))
    samples = [Sample("a", (question, answer)), Sample("b", (other, answer)), Sample("c", (system, question, answer))]
    first, second, third = lengths(SampleTable.of(samples), encoding, "first").prefix_texts[0].tolist()
    assert first == second != third


def test_wrong_counts_are_noticed_and_all_samples_tokenized(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tokenizer whose tokens span words must not be counted by words, even if that isn't seen in its vocabulary."""
    tokenizer = copy.deepcopy(encoding.tokenizer)
    tokenizer.add_tokens(["green and blue"])
    spanning = replace(encoding, tokenizer=tokenizer)
    samples = [
        Sample(f"s{n}", (Turn("user", ("Which is green and blue?",)), Turn("assistant", ("The green and blue",))))
        for n in range(3)
    ]
    assert not TokenCounter(tokenizer).by_words
    wanted = expected(samples, spanning, "first")
    assert_equal(lengths(SampleTable.of(samples), spanning, "first"), wanted)
    monkeypatch.setattr("llavactl.data.token_counts._tokens_span_words", lambda _backend: False)
    assert_equal(lengths(SampleTable.of(samples), spanning, "first"), wanted)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of samples of each computation that wasn't answered from the cache."""
    counts: list[int] = []
    real = token_lengths._computed

    def counted(table: SampleTable, *arguments: Any) -> TokenLengths:
        counts.append(len(table))
        return real(table, *arguments)

    monkeypatch.setattr(token_lengths, "_computed", counted)
    monkeypatch.setattr(token_lengths, "MIN_CACHED", 1)
    return counts


def test_lengths_are_computed_once_per_content(encoding: Encoding, computed: list[int]) -> None:
    samples, template = random_samples(20), {"name": "vicuna-v1"}
    table = SampleTable.of(samples)
    first = lengths(table, encoding, "first", template)
    assert_equal(lengths(SampleTable.of(samples), encoding, "first", template), first)
    assert computed == [20]

    tokenizer = copy.deepcopy(encoding.tokenizer)
    tokenizer.add_tokens(["dog"])
    changed = [*samples[:-1], replace(samples[-1], turns=(*samples[-1].turns[:-1], Turn("assistant", ("No.",))))]
    changes: list[tuple[Any, ...]] = [
        (SampleTable.of(changed), encoding, "first", template),
        (table, replace(encoding, tokenizer=tokenizer), "first", template),
        (table, replace(encoding, max_length=301), "first", template),
        (table, replace(encoding, image_tokens=5), "first", template),
        (table, encoding, "random", template),
        (table, encoding, "first", {"name": "vicuna-v1", "version": "2"}),
    ]
    for number, change in enumerate(changes, 2):
        lengths(*change)
        assert len(computed) == number, change[1:]
    lengths(table, encoding, "first", template)
    assert len(computed) == 1 + len(changes)


def test_another_version_computes_lengths_again(
    encoding: Encoding, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SampleTable.of(random_samples(5))
    lengths(table, encoding, "first", {})
    monkeypatch.setattr(token_lengths, "version", lambda package: f"another {package}")
    lengths(table, encoding, "first", {})
    assert len(computed) == 2


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: data[:-1] + b"\xff", lambda _data: b"no"])
def test_damaged_lengths_are_computed_again(
    encoding: Encoding, computed: list[int], home: Path, damage: Callable[[bytes], bytes]
) -> None:
    table = SampleTable.of(random_samples(5))
    first = lengths(table, encoding, "first", {})
    (file,) = (home / "cache" / "token-lengths").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert_equal(lengths(table, encoding, "first", {}), first)
    assert_equal(lengths(table, encoding, "first", {}), first)
    assert len(computed) == 2


def test_without_a_writable_cache_lengths_are_computed_every_time(
    encoding: Encoding, computed: list[int], home: Path
) -> None:
    home.mkdir()
    (home / "cache").write_text("not a folder")
    for _ in range(2):
        assert len(lengths(SampleTable.of(random_samples(5)), encoding, "first", {})) == 5
    assert len(computed) == 2


def test_lengths_without_samples(encoding: Encoding) -> None:
    assert lengths(SampleTable.of([]), encoding, "random").tokens.shape == (2, 0)


def test_entries_that_no_run_used_for_long_are_removed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"a": np.arange(3, dtype=np.int32)}
    array_cache.save("kind", "old", arrays)
    monkeypatch.setattr(array_cache, "UNUSED_DAYS", -1)
    array_cache.save("kind", "new", arrays)
    assert array_cache.load("kind", "old") is None
    loaded = array_cache.load("kind", "new")
    assert loaded is not None
    np.testing.assert_array_equal(loaded["a"], arrays["a"])


def test_a_sample_sets_lengths_are_those_of_every_epoch(load_samples: Callable[..., Any]) -> None:
    data = load_samples(random_samples(40), max_length=200, validation=0.2)
    for part in (data.train, data.validation):
        assert part.lengths is not None
        for epoch, index in ((epoch, index) for epoch in range(3) for index in range(len(part))):
            item, column = part.encoded(epoch, index), (part.arrangement(epoch, index), index)
            assert part.lengths.tokens[column] == len(item)
            assert part.lengths.targets[column] == item.target_tokens


def test_a_killed_process_is_reported(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    table = SampleTable.of(random_samples(60))
    monkeypatch.setattr(token_lengths, "CHUNK", 10)
    monkeypatch.setattr(token_lengths, "_cores", lambda: 2)
    monkeypatch.setattr(token_lengths, "_size", lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(LlavactlError, match="killed"):
        lengths(table, encoding, "first")


def test_a_process_killed_while_records_are_read_is_reported(
    encoding: Encoding, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunk = SampleTable.of(random_samples(2))
    monkeypatch.setattr(token_lengths, "_cores", lambda: 2)
    monkeypatch.setattr(token_lengths, "_size", lambda *_arguments: os.kill(os.getpid(), signal.SIGKILL))

    def submit_until_refused(counting: token_lengths.Counting) -> None:
        for _ in range(500):
            counting.submit(chunk)
            time.sleep(0.01)

    with token_lengths.Counting(encoding, "first") as counting, pytest.raises(LlavactlError, match="killed"):
        submit_until_refused(counting)
