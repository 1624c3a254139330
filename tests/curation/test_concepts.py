"""The concept balance against a direct count of the same rule."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.curation.concepts import Concepts, phrase_key
from llavactl.curation.noun_phrases import noun_phrases

FIXTURE = Path(__file__).parents[1] / "fixtures" / "pretrain.json"
REAL = Path(__file__).parents[3] / "shared" / "data" / "llava" / "blip_laion_cc_sbu_2k.json"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")

CAPTIONS = st.lists(st.lists(st.sampled_from("abcdef"), max_size=4), max_size=40)


def concepts(captions: list[list[str]]) -> Concepts:
    result = Concepts()
    for phrases in captions:
        result.add(map(phrase_key, phrases))
    return result


@settings(max_examples=200)
@given(CAPTIONS, st.integers(1, 4), st.integers(1, 6), st.integers(-3, 3))
def test_the_limits_hold_for_every_phrase(captions: list[list[str]], least: int, most: int, seed: int) -> None:
    counts = Counter(phrase for phrases in captions for phrase in set(phrases))
    selection = concepts(captions).select(least, most, seed)
    selected = [set(phrases) for phrases, chosen in zip(captions, selection.selected, strict=True) if chosen]
    for phrase, count in counts.items():
        selected_count = sum(phrase in phrases for phrases in selected)
        if count >= least:
            assert selected_count >= min(count, most)
    for phrases in selected:
        assert any(counts[phrase] >= least for phrase in phrases)
    assert len(selected) <= sum(min(count, most) for count in counts.values() if count >= least)
    assert (selection.phrases, selection.rare) == (len(counts), sum(count < least for count in counts.values()))
    again = concepts(captions).select(least, most, seed)
    assert (again.selected == selection.selected).all()


def test_the_sample_of_a_frequent_phrase_has_the_limit_and_depends_on_the_seed() -> None:
    captions = [["dog"]] * 1000 + [["rare"]] * 3 + [["once"]] + [[]]
    samples = [concepts(captions).select(3, 100, seed).selected for seed in range(3)]
    for selected in samples:
        assert selected[:1000].sum() == 100
        assert selected[1000:].tolist() == [True] * 3 + [False] * 2
    assert (samples[0] != samples[1]).any()
    assert (samples[1] != samples[2]).any()


def test_every_caption_is_sampled_equally_often() -> None:
    """Each of 50 captions is in a sample of 10 with probability 0.2, at any position."""
    captions = [["dog"]] * 50
    counts = sum(concepts(captions).select(1, 10, seed).selected.astype(int) for seed in range(400))
    assert abs(counts - 80).max() < 5 * (400 * 0.2 * 0.8) ** 0.5


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


@pytest.mark.parametrize(
    ("file", "least"), [(FIXTURE, 1.5), pytest.param(REAL, 2, marks=needs_real)], ids=["fixture", "real"]
)
def test_most_captions_have_a_phrase(file: Path, least: float) -> None:
    captions = [each["conversations"][1]["value"] for each in json.loads(file.read_text())]
    phrases = noun_phrases(captions)
    assert sum(map(bool, phrases)) > 0.98 * len(captions)
    assert least < sum(map(len, phrases)) / len(phrases) < 5
