"""The answers of evaluations, joined with their questions."""

from pathlib import Path

import pytest
from llavactl_web import rendering
from llavactl_web.gallery import Gallery

from llavactl import DataError


def test_answers_are_filtered_by_whether_they_are_right(gallery: Gallery) -> None:
    assert gallery.tasks() == ["pope"]
    right, wrong = gallery.rows("pope", "right"), gallery.rows("pope", "wrong")
    assert [*right, *wrong] == sorted(gallery.rows("pope", "all"), key=lambda row: not row["right"])
    assert ([row["right"] for row in right], [row["right"] for row in wrong]) == ([True], [False])
    page = rendering.cases(right)
    assert page.count('src="data:image/jpeg') == 1
    assert "&lt;b&gt;" in page


def test_missing_results_and_answers(gallery: Gallery, run_dir: Path) -> None:
    for task in ("scienceqa", "../pope", "unknown"):
        with pytest.raises(DataError):
            gallery.rows(task, "all")
    (run_dir / "eval" / "answers" / "pope-1.jsonl").write_text("not JSON\n")
    with pytest.raises(DataError):
        gallery.rows("pope", "all")
