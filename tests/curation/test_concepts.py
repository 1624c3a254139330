"""The balance of concepts against a plain counting of the same rule."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.curation.concepts import Concepts, phrase_key
from llavactl.curation.noun_phrases import noun_phrases

REAL = Path(__file__).parents[3] / "shared" / "data" / "llava" / "blip_laion_cc_sbu_2k.json"

CAPTIONS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=4), max_size=40)


def concepts(captions: list[list[str]]) -> Concepts:
    made = Concepts()
    for phrases in captions:
        made.add(map(phrase_key, phrases))
    return made


@settings(max_examples=200)
@given(CAPTIONS, st.integers(1, 4), st.integers(1, 6), st.integers(-3, 3))
def test_the_rule_holds_for_every_phrase(captions: list[list[str]], least: int, most: int, seed: int) -> None:
    counts = Counter(phrase for phrases in captions for phrase in set(phrases))
    kept = concepts(captions).kept(least, most, seed)
    chosen = [set(phrases) for phrases, is_in in zip(captions, kept.chosen, strict=True) if is_in]
    for phrase, count in counts.items():
        here = sum(phrase in phrases for phrases in chosen)
        if count >= least:
            assert here >= min(count, most)
    for phrases in chosen:
        assert any(counts[phrase] >= least for phrase in phrases)
    assert len(chosen) <= sum(min(count, most) for count in counts.values() if count >= least)
    assert (kept.phrases, kept.rare) == (len(counts), sum(count < least for count in counts.values()))
    again = concepts(captions).kept(least, most, seed)
    assert (again.chosen == kept.chosen).all()


def test_a_draw_is_of_the_size_asked_for_and_moves_with_the_seed() -> None:
    captions = [["dog"]] * 1000 + [["rare"]] * 3 + [["once"]] + [[]]
    draws = [concepts(captions).kept(3, 100, seed).chosen for seed in range(3)]
    for chosen in draws:
        assert chosen[:1000].sum() == 100
        assert chosen[1000:].tolist() == [True] * 3 + [False] * 2
    assert (draws[0] != draws[1]).any()
    assert (draws[1] != draws[2]).any()


def test_a_draw_has_no_favourites() -> None:
    """Each of 50 captions is in a draw of 10 a fifth of the time, wherever it stands."""
    captions = [["dog"]] * 50
    often = sum(concepts(captions).kept(1, 10, seed).chosen.astype(int) for seed in range(400))
    assert abs(often - 80).max() < 5 * (400 * 0.2 * 0.8) ** 0.5


@pytest.mark.parametrize(
    ("caption", "phrases"),
    [
        ("a dog and the old cat", ["dog", "old cat"]),
        ("The Red Bus", ["red bus"]),
        ("two children playing in a swimming pool", ["two children", "swimming pool"]),
        ("his clipped beard", ["clipped beard"]),
        ("it is running", []),
        ("", []),
    ],
)
def test_noun_phrases(caption: str, phrases: list[str]) -> None:
    assert noun_phrases([caption]) == [phrases]


@pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")
def test_most_real_captions_have_a_phrase() -> None:
    captions = [each["conversations"][1]["value"] for each in json.loads(REAL.read_text())]
    found = noun_phrases(captions)
    assert sum(map(bool, found)) > 0.98 * len(captions)
    assert 2 < sum(map(len, found)) / len(found) < 5
