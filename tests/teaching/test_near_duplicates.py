"""Near-duplicates by MinHash LSH: the threshold is on word 3-grams, and the result is deterministic."""

from __future__ import annotations

import subprocess
import sys
import time
from random import Random

import pytest

from llavactl.teaching.near_duplicates import MAX_CANDIDATES, NearDuplicates

CODE = """
from random import Random
from llavactl.teaching.near_duplicates import NearDuplicates
rng, index = Random(0), NearDuplicates(0.5)
base = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(80)]
for n in range(60):
    words = [word if rng.random() > n / 300 else "other" for word in base]
    print(index.find_or_add(str(n), " ".join(words)))
"""


def words(rng: Random, count: int = 100) -> list[str]:
    return ["".join(rng.choices("abcdefgh", k=6)) for _ in range(count)]


def shingles(text: list[str]) -> set[tuple[str, ...]]:
    return {tuple(text[at : at + 3]) for at in range(len(text) - 2)}


def changed(text: list[str], similarity: float, rng: Random) -> list[str]:
    """``text`` with words replaced until the Jaccard similarity of the 3-grams falls below ``similarity``."""
    result = list(text)
    for position in rng.sample(range(len(text)), len(text)):
        old, new = shingles(text), shingles(result)
        if len(old & new) / len(old | new) < similarity:
            break
        result[position] = f"x{text[position]}"
    return result


@pytest.mark.parametrize("threshold", [0.5, 0.95, *(pytest.param(each, marks=pytest.mark.slow) for each in (0.3, 0.8))])
def test_the_threshold_is_on_word_3_grams(threshold: float) -> None:
    """Pairs 0.15 above the threshold (at most identical ones) are found, pairs 0.15 below are not."""
    rng = Random(1)
    above, below = 0, 0
    for _ in range(40):
        text = words(rng)
        index = NearDuplicates(threshold)
        assert index.find_or_add("first", " ".join(text)) is None
        above += index.find_or_add("a", " ".join(changed(text, min(threshold + 0.15, 1.1), rng))) is not None
        below += index.find_or_add("b", " ".join(changed(text, threshold - 0.15, rng))) is not None
    assert above >= 38
    assert below <= 2


def test_the_earliest_similar_text_is_named() -> None:
    rng = Random(2)
    text = words(rng)
    index = NearDuplicates(0.8)
    assert index.find_or_add("other", " ".join(words(rng))) is None
    assert index.find_or_add("first", " ".join(text)) is None
    assert index.find_or_add("second", " ".join(text)) == ("first", 1.0)
    assert index.find_or_add("third", " ".join(text).upper()) == ("first", 1.0), "case is ignored"


def test_short_texts_are_not_compared() -> None:
    index = NearDuplicates(0.8)
    assert index.find_or_add("a", "It is a dog on a mat.") is None
    assert index.find_or_add("b", "It is a dog on a mat.") is None


def test_a_threshold_of_1_finds_identical_texts() -> None:
    rng = Random(3)
    text = words(rng)
    index = NearDuplicates(1.0)
    assert index.find_or_add("a", " ".join(text)) is None
    assert index.find_or_add("b", " ".join([*text[:-1], "other"])) is None
    assert index.find_or_add("c", " ".join(text)) == ("a", 1.0)


def test_the_result_does_not_depend_on_the_process() -> None:
    """Hash randomization differs between processes; a resumed run must refuse the same records."""
    runs = [subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout
    assert "None" in runs[0].stdout
    assert "('0', " in runs[0].stdout


def test_many_texts_with_a_common_phrase_are_not_quadratic() -> None:
    """Texts below the threshold that share most of their words: each group of candidates is limited."""
    rng = Random(4)
    phrase = words(rng, 60)
    index = NearDuplicates(0.8)
    began = time.perf_counter()
    for n in range(3000):
        index.find_or_add(str(n), " ".join([*phrase, *words(rng, 12)]))
    seconds = time.perf_counter() - began
    largest_bucket = max(len(table.get(key)) for table in index._index.hashtables for key in table.keys())  # noqa: SIM118
    assert largest_bucket <= MAX_CANDIDATES + 1
    assert seconds < 60
