"""MME: points by category, and images with a wrong number of questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.components.tasks.mme import GROUPS, Mme, MmeOptions, parse_yes_no


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mme").mkdir()
    for category, end in (("existence", "\n"), ("code_reasoning", "\r\n")):
        rows = [
            f"{at}.jpg\tIs it {word}? Please answer yes or no.\t{word}" for at in range(2) for word in ("Yes", "No")
        ]
        (tmp_path / f"mme/{category}.txt").write_text("\ufeff" + end.join(rows) + end, encoding="utf-8", newline="")
    return tmp_path / "mme"


def test_points(scored: Any, folder: Path, lines: Any) -> None:
    texts = {
        "existence/0.jpg/1": "Yes",
        "existence/0.jpg/2": "No.",
        "existence/1.jpg/1": "yes",
        "existence/1.jpg/2": "hm",
    }
    texts |= {f"code_reasoning/{at}.jpg/{turn}": "Yes, it is" for at in range(2) for turn in (1, 2)}
    answers = lines("a.jsonl", [{"id": name, "text": text} for name, text in texts.items()])
    report = scored("mme", "--answers", answers, questions=folder, images=folder)
    assert report["scores"] == {"perception": 125, "cognition": 50, "code_reasoning": 50, "existence": 125}
    assert (report["n"], report["failed"]) == (8, 1)


def test_questions(folder: Path) -> None:
    first, *_, last = Mme(MmeOptions(questions=folder, images=folder)).questions()
    assert (first.id, first.reference, first.category) == ("code_reasoning/0.jpg/1", "yes", "code_reasoning")
    assert [image.name for image in last.turns[0].images] == ["existence/1.jpg"]
    assert sum(map(len, GROUPS.values())) == 14


@pytest.mark.parametrize(
    ("text", "expected"), [("Yes", "yes"), ("NO", "no"), ("Not", "no"), ("I know", None), ("", None), ("is yes", None)]
)
def test_parsing(text: str, expected: str | None) -> None:
    assert parse_yes_no(text) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("2.jpg\tIs it?\tYes", "existence.txt: 2.jpg has 1 questions"),
        ("2.jpg\tIs it?\tMaybe", "existence.txt:5: expected"),
        ("2.jpg Is it? Yes", "existence.txt:5: expected"),
    ],
)
def test_an_invalid_line(scored: Any, folder: Path, lines: Any, row: str, expected: str) -> None:
    with (folder / "existence.txt").open("a") as file:
        file.write(row)
    assert expected in scored("mme", "--answers", lines("a.jsonl", []), questions=folder, images=folder)


def test_an_empty_folder(scored: Any, tmp_path: Path, lines: Any) -> None:
    (tmp_path / "none").mkdir()
    answers = lines("a.jsonl", [])
    assert "CATEGORY.txt" in scored("mme", "--answers", answers, questions=tmp_path / "none", images=tmp_path)


def test_llavas_answers_are_joined_by_image_and_prompt(scored: Any, folder: Path, lines: Any) -> None:
    rows = [
        {
            "question_id": f"{category}/{at}.jpg",
            "prompt": f"Is it {word}?\nAnswer the question using a single word or phrase.",
            "text": word,
        }
        for category in ("existence", "code_reasoning")
        for at in range(2)
        for word in ("No", "Yes")
    ]
    report = scored("mme", "--answers", lines("a.jsonl", rows), questions=folder, images=folder)
    assert report["scores"]["perception"] == report["scores"]["cognition"] == 200


def test_llavas_image_folders_and_unmatched_answers(scored: Any, folder: Path, lines: Any) -> None:
    """LLaVA's ids contain ``images/``; two answers about an unknown image are not duplicates."""
    rows = [
        {"question_id": f"{category}/images/{name}.png", "prompt": f"Is it {word}?", "text": word}
        for category, names in (("existence", "019"), ("code_reasoning", "01"))
        for name in names
        for word in ("No", "Yes")
    ]
    report = scored("mme", "--answers", lines("a.jsonl", rows), questions=folder)
    assert (report["scores"]["perception"], report["ignored"]) == (200, 2)
    rows[0]["prompt"] = "Is it Noah?"
    assert "1 of 8 questions have no answer" in scored("mme", "--answers", lines("a.jsonl", rows), questions=folder)


def test_a_folder_of_results(scored: Any, folder: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    results.mkdir()
    for file in folder.glob("*.txt"):
        questions = [line.split("\t") for line in file.read_text(encoding="utf-8-sig").splitlines()]
        rows = (
            f"{cells[0][:-3]}txt\t{cells[1]}\t{cells[2]}\t{cells[2].lower()}, it is\n" for cells in reversed(questions)
        )
        (results / file.name).write_text("".join(rows))
    assert scored("mme", "--answers", results, questions=folder)["scores"]["perception"] == 200
    assert scored("mme", "--answers", results, questions=results)["scores"]["cognition"] == 200
    with (results / "existence.txt").open("a") as file:
        file.write("1.txt\tIs it cut?\tYes\n")
    assert "existence.txt:5: expected" in scored("mme", "--answers", results, questions=folder)


def test_answers_to_other_questions(scored: Any, folder: Path, lines: Any) -> None:
    names = [f"{c}/{at}.jpg/{turn}" for c in ("existence", "code_reasoning") for at in range(2) for turn in (1, 2)]
    rows = [{"id": name, "text": "yes", "prompt": "Is it Yes? Please answer yes or no."} for name in names]
    assert "4 of 8 answers" in scored("mme", "--answers", lines("a.jsonl", rows), questions=folder)
