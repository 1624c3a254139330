"""The answers of evaluations, joined with their questions."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from llavactl_web import rendering
from llavactl_web.gallery import Gallery

from llavactl import DataError


@pytest.fixture
def run_dir(tmp_path: Path, photos: Sequence[Path]) -> Path:
    """A run with an evaluation of POPE: one right and one wrong answer."""
    labels = {1: "yes", 2: "no"}
    rows = [
        {"question_id": n, "image": photos[n].name, "text": f"Question {n}?", "category": "random", "label": label}
        for n, label in labels.items()
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    answers = tmp_path / "run" / "eval" / "answers" / "pope-1.jsonl"
    answers.parent.mkdir(parents=True)
    answers.write_text("".join(json.dumps({"id": f"{n}", "text": "Yes <b>!</b>"}) + "\n" for n in labels))
    result = {"task": "pope", "protocol": "llava", "answers": str(answers)}
    (answers.parent.parent / "pope.json").write_text(json.dumps(result))
    return tmp_path / "run"


@pytest.fixture
def gallery(run_dir: Path, photos: Sequence[Path]) -> Gallery:
    spec = {"questions": str(run_dir.parent / "questions.jsonl"), "images": str(photos[0].parent)}
    return Gallery(run_dir, [{"name": "pope", **spec}, {"name": "scienceqa"}])


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
