"""``data stats`` on hand-checked, toy and real records."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.curation.stats import summary
from llavactl.report.plots import MAX_BARS, histogram
from llavactl.testing import run_cli

FIXTURE = Path(__file__).parents[1] / "fixtures" / "instruct.json"
REAL = Path(__file__).parents[3] / "shared" / "data" / "llava" / "llava_instruct_100.json"
needs_real = pytest.mark.skipif(not REAL.is_file(), reason="needs ../shared/data")
COUNTS = st.dictionaries(st.integers(0, 5000), st.integers(1, 50), min_size=1)


def test_hand_checked_counts(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A dog."}]
    more = [{"from": "human", "value": "Where is it, then?"}, {"from": "gpt", "value": "On the well-kept lawn."}]
    records = [
        {"id": 1, "image": "a.jpg", "conversations": talk},
        {"id": 2, "image": "a.jpg", "conversations": talk + more},
        {"id": 3, "conversations": more},
        {"id": 4},
    ]
    path = tmp_path / "records.json"
    path.write_text(json.dumps(records))
    report = run_cli("data", "stats", str(path), "--json").json()
    assert (report["samples"], report["unusable"]) == (3, 1)
    measures = report["measures"]
    assert "tokens" not in measures
    assert (measures["question words"]["n"], measures["question words"]["mean"]) == (4, 3.5)
    assert (measures["answer words"]["min"], measures["answer words"]["max"]) == (2, 4)
    assert measures["turns"]["mean"] == 1.33
    assert measures["images"]["mean"] == 0.67
    assert measures["samples per image"] == {"n": 1, "mean": 2.0, "min": 2, "p5": 2, "median": 2, "p95": 2, "max": 2}
    assert report["openings"] == {"what is": 2, "where is": 2}


@given(COUNTS)
def test_quantiles_of_sorted_values(counts: dict[int, int]) -> None:
    values = sorted(value for value, count in counts.items() for _ in range(count))
    distribution = summary(counts)
    assert (distribution.n, distribution.min, distribution.max) == (len(values), values[0], values[-1])
    for share, value in ((0.05, distribution.p5), (0.5, distribution.median), (0.95, distribution.p95)):
        assert sum(each <= value for each in values) >= share * len(values)
        assert sum(each < value for each in values) < share * len(values)


@given(COUNTS)
def test_histogram_bars_cover_nearly_all_values_once(counts: dict[int, int]) -> None:
    edges, heights = histogram(counts)
    assert len(heights) == len(edges) - 1 <= MAX_BARS + 1
    assert 0.995 * sum(counts.values()) <= sum(heights) <= sum(counts.values())
    for start, end, height in zip(edges, edges[1:], heights, strict=False):
        assert height == sum(count for value, count in counts.items() if start <= value < end)


def test_the_page_is_self_contained(toy: Path, tmp_path: Path) -> None:
    page = tmp_path / "stats.html"
    records = json.loads((toy / "records.json").read_text())
    records[0]["conversations"][0]["value"] = "<image>\n<script>alert(1)</script> & what?"
    (toy / "records.json").write_text(json.dumps(records))
    words = ["data", "stats", "-r", str(toy / "recipe.yaml"), "--stage", "2", "--html", str(page), "--json"]
    report = run_cli(*words).json()
    assert report["samples"] == 12
    assert report["measures"]["tokens"]["n"] == 12
    html = page.read_text()
    assert "<script" not in html
    assert not re.search(r'(?:src|href)="(?!data:)', html)
    assert html.count("data:image/png;base64,") == 2 * sum(
        each["min"] < each["max"] for each in report["measures"].values()
    )


def test_without_matplotlib_the_page_has_tables_only(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = tmp_path / "stats.html"
    result = run_cli("data", "stats", "-r", str(toy / "recipe.yaml"), "--stage", "2", "--html", str(page))
    assert result.exit_code == 0, result.stderr
    html = page.read_text()
    assert "llavactl[plots]" in html
    assert "<picture" not in html
    assert "question words" in html


def test_a_file_without_usable_records_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text("[{}]")
    result = run_cli("data", "stats", str(path))
    assert result.exit_code == 1
    assert "data check" in result.stderr


@pytest.mark.parametrize(
    ("file", "count"), [(FIXTURE, 12), pytest.param(REAL, 100, marks=needs_real)], ids=["fixture", "real"]
)
def test_instruct_records(file: Path, count: int) -> None:
    report = run_cli("data", "stats", str(file), "--json").json()
    records = json.loads(file.read_text(encoding="utf-8"))
    turns = Counter(len(each["conversations"]) // 2 for each in records)
    assert (report["samples"], report["unusable"]) == (count, 0)
    assert report["measures"]["turns"]["mean"] == round(sum(n * number for n, number in turns.items()) / count, 2)
    assert next(iter(report["openings"])).startswith("what")
    assert "question opening" in run_cli("data", "stats", str(file)).stdout
