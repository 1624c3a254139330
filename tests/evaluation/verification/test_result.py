"""The verdict that follows from figures and from what a script states."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.paths import json_text
from llavactl.evaluation.verification.outputs import Stated
from llavactl.evaluation.verification.result import (
    EXACT,
    OTHER_TOKENS,
    RESAMPLED,
    ROUNDED,
    TITLES,
    UNPREPARED,
    Figure,
    VerificationResult,
    judge,
)
from llavactl.evaluation.verification.table import COLUMNS, markdown, summary, table

COUNTS = ("ids", "next_token", "answers", "batched_answers", "settings")
EQUAL = {name: Figure(0, 7) if name in COUNTS else Figure(float(name.endswith("_cosine"))) for name in TITLES}
RESAMPLING = ["Images are resampled differently."]


def verdict(stated: Stated = Stated(), **changed: Figure) -> str:  # noqa: B008 - frozen
    return judge(EQUAL | changed, stated, prompts=7, images=3).verdict


def test_equal_outputs_are_exact() -> None:
    for stated in (Stated(), Stated(rounding="f16"), Stated(rounding="q2_k"), Stated(resampled=True)):
        assert verdict(stated) == "exact"


def test_every_bound_has_a_title_and_counts() -> None:
    assert TITLES.keys() >= EXACT.keys()
    for name, bound in EXACT.items():
        beyond = bound.at_least - 1e-3 if bound.at_least is not None else (bound.at_most or 0) + 1
        assert verdict(**{name: Figure(beyond)}) == "different", name
    assert verdict(next_token=Figure(7, 7)) == "exact"  # reported only


@pytest.mark.parametrize(
    ("stated", "cosine", "logits"),
    [
        *((Stated(rounding=name), *limits) for name, limits in ROUNDED.items()),
        (Stated(resampled=True), *RESAMPLED),
        (Stated(rounding="f16", resampled=True), *RESAMPLED),
        (Stated(rounding="f16", tokens=[1, None]), ROUNDED["f16"][0], OTHER_TOKENS),
    ],
)
def test_close_within_the_bounds_of_what_is_stated(stated: Stated, cosine: float, logits: float) -> None:
    inside = {"embedding_cosine": Figure(cosine + 1e-6), "logits": Figure(logits - 1e-4), "answers": Figure(7, 7)}
    assert verdict(stated, **inside) == "close"
    assert verdict(**inside) == "different"
    for beyond in (
        {"embedding_cosine": Figure(cosine - 1e-6)},
        {"logits": Figure(logits + 1e-4)},
        {"ids": Figure(1, 7)},
        {"settings": Figure(1, 7)},
        {"batched_answers": Figure(1, 1)},
        {"logits": Figure(None)},
    ):
        assert verdict(stated, **inside | beyond) == "different", beyond


def test_pixels_may_only_differ_in_a_program_that_resamples() -> None:
    assert verdict(Stated(rounding="f16"), pixels=Figure(0.1)) == "different"
    assert verdict(Stated(resampled=True), pixels=Figure(0.1)) == "close"


@pytest.mark.parametrize(
    "beyond", [{"logits": Figure(1e-3)}, {"embedding_cosine": Figure(0.999)}, {"pixels": Figure(1)}]
)
def test_sentences_loosen_no_bound(beyond: dict[str, Figure]) -> None:
    assert verdict(Stated(known_differences=RESAMPLING), **beyond) == "different"
    assert verdict(Stated(known_differences=RESAMPLING, tokens=[0]), embedding_cosine=Figure(0.999)) == "different"


def test_unchanged_images_have_their_own_bound() -> None:
    for stated in (Stated(rounding="f16-gelu"), Stated(rounding="f16"), Stated(rounding="q8_0", resampled=True)):
        assert verdict(stated, unprepared_cosine=Figure(UNPREPARED + 1e-3)) == "close"
        assert verdict(stated, unprepared_cosine=Figure(UNPREPARED - 1e-3)) == "different"
    assert verdict(unprepared_cosine=Figure(UNPREPARED + 1e-3)) == "different"


def test_a_program_that_pads_as_in_training_may_resize_in_its_own_way() -> None:
    stated = Stated(rounding="f16", own_padding=True)
    assert verdict(stated, unprepared_cosine=Figure(0.5)) == "close"
    assert verdict(stated, unprepared_cosine=Figure(0.5), embedding_cosine=Figure(0.9)) == "different"
    assert verdict(Stated(own_padding=True), unprepared_cosine=Figure(0.5)) == "different"


def test_weights_rounded_to_a_type_without_bounds_are_not_close() -> None:
    assert verdict(Stated(rounding="q2_k", resampled=True), logits=Figure(0.01)) == "different"


def test_close_needs_image_embeddings() -> None:
    figures = {name: figure for name, figure in EQUAL.items() if not name.startswith("embedding")}
    changed = figures | {"logits": Figure(0.01)}
    stated = Stated(rounding="f16")
    assert judge(figures, stated, prompts=7, images=3).verdict == "exact"
    assert judge(changed, stated, prompts=7, images=3).verdict == "different"
    assert judge(changed, stated, prompts=1, images=0).verdict == "close"


def test_faults_name_the_figure_and_its_details() -> None:
    result = judge(EQUAL | {"ids": Figure(2, 7, ("prompt 3: at 4",))}, Stated(), prompts=7, images=3)
    (fault,) = result.faults
    assert "token ids" in fault
    assert "prompt 3: at 4" in fault
    assert not result.compared["ids"].passed


def test_a_row_for_every_figure() -> None:
    rows = table(judge(EQUAL | {"logits": Figure(None)}, Stated(), prompts=7, images=3))
    assert [row[:2] for row in rows] == list(TITLES.values())
    assert all(len(row) == len(COLUMNS) and all(row) for row in rows)


def test_the_card_has_the_verdict_the_table_and_what_differs() -> None:
    stated = Stated(program="p 1.2", rounding="f16", known_differences=RESAMPLING)
    result = judge(EQUAL | {"ids": Figure(1, 7)}, stated, prompts=7, images=1)
    text = markdown("gguf", result)
    assert summary(result) in text
    for part in ("different", "p 1.2", "f16", "gguf", RESAMPLING[0], result.faults[0]):
        assert part in text
    assert [line for line in text.splitlines() if line.startswith("|")][2:] == [
        f"| {' | '.join(row)} |" for row in table(result)
    ]


@pytest.mark.parametrize("changed", [{}, {"logits": Figure(None)}, {"logits": Figure(1.5)}])
def test_a_stored_result_is_read_back(changed: dict[str, Figure]) -> None:
    result = judge(EQUAL | changed, Stated(rounding="f16", known_differences=RESAMPLING), prompts=7, images=3)
    assert VerificationResult.from_json(json.loads(json_text(asdict(result)))) == result


@pytest.mark.parametrize(
    "change",
    [
        lambda _: None,
        lambda _: [],
        lambda stored: {key: value for key, value in stored.items() if key != "verdict"},
        lambda stored: stored | {"tolerance": 1e-4},
        lambda stored: stored | {"verdict": "good"},
        lambda stored: stored | {"compared": {"logits": {"value": 0}}},
        lambda stored: {"prompts": 7, "images": 3, "ids_equal": 7, "logits": 0.0, "faults": []},
    ],
)
def test_a_result_of_another_version_is_not_read(change: Any) -> None:
    stored = json.loads(json_text(asdict(judge(EQUAL, Stated(), prompts=7, images=3))))
    assert VerificationResult.from_json(change(stored)) is None


def test_the_reference_states_the_figures_and_bounds() -> None:
    page = (Path(__file__).parents[3] / "docs" / "reference" / "export.md").read_text(encoding="utf-8")
    assert [name for name in TITLES if f"| `{name}` |" not in page] == []
    rows = {f"rounding to `{name}`": limits for name, limits in ROUNDED.items()}
    for stated, (cosine, logits) in {**rows, "`resampled`": RESAMPLED}.items():
        assert f"| {stated} | {cosine:g} | {logits:g} |" in page
    assert f"| `tokens` | | {OTHER_TOKENS:g} |" in page
    assert f"| `unprepared_cosine` | 1 - 1e-6 | {UNPREPARED:g}; none with `own_padding` |" in page
