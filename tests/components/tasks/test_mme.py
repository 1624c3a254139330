"""MME: points by category, and pictures with one question or three."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llavactl.components.tasks.mme import GROUPS, Mme, MmeOptions, says


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
    said = {
        "existence/0.jpg/1": "Yes",
        "existence/0.jpg/2": "No.",
        "existence/1.jpg/1": "yes",
        "existence/1.jpg/2": "hm",
    }
    said |= {f"code_reasoning/{at}.jpg/{turn}": "Yes, it is" for at in range(2) for turn in (1, 2)}
    answers = lines("a.jsonl", [{"id": name, "text": text} for name, text in said.items()])
    report = scored("mme", "--answers", answers, questions=folder, images=folder)
    assert report["scores"] == {"perception": 125, "cognition": 50, "code_reasoning": 50, "existence": 125}
    assert (report["n"], report["failed"]) == (8, 1)


def test_questions(folder: Path) -> None:
    first, *_, last = Mme(MmeOptions(questions=folder, images=folder)).questions()
    assert (first.id, first.reference, first.category) == ("code_reasoning/0.jpg/1", "yes", "code_reasoning")
    assert [image.name for image in last.turns[0].images] == ["existence/1.jpg"]
    assert sum(map(len, GROUPS.values())) == 14


@pytest.mark.parametrize(
    ("text", "what"), [("Yes", "yes"), ("NO", "no"), ("Not", "no"), ("I know", None), ("", None), ("is yes", None)]
)
def test_reading(text: str, what: str | None) -> None:
    assert says(text) == what


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("2.jpg\tIs it?\tYes", "2.jpg has 1 questions, not two"),
        ("2.jpg\tIs it?\tMaybe", "existence.txt:5: not picture, question"),
        ("2.jpg Is it? Yes", "existence.txt:5: not picture, question"),
    ],
)
def test_a_wrong_line(scored: Any, folder: Path, lines: Any, row: str, why: str) -> None:
    with (folder / "existence.txt").open("a") as file:
        file.write(row)
    assert why in scored("mme", "--answers", lines("a.jsonl", []), questions=folder, images=folder)


def test_an_empty_folder(scored: Any, tmp_path: Path, lines: Any) -> None:
    (tmp_path / "none").mkdir()
    answers = lines("a.jsonl", [])
    assert "no CATEGORY.txt" in scored("mme", "--answers", answers, questions=tmp_path / "none", images=tmp_path)


def test_llava_s_answers_name_the_picture(scored: Any, folder: Path, lines: Any) -> None:
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


def test_llava_s_own_folders_and_what_it_was_asked_beyond(scored: Any, folder: Path, lines: Any) -> None:
    """LLaVA's ids have ``images/`` in them; of pictures that aren't asked about here it has two answers, too."""
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
        asked = [line.split("\t") for line in file.read_text(encoding="utf-8-sig").splitlines()]
        rows = (f"{cells[0][:-3]}txt\t{cells[1]}\t{cells[2]}\t{cells[2].lower()}, it is\n" for cells in reversed(asked))
        (results / file.name).write_text("".join(rows))
    assert scored("mme", "--answers", results, questions=folder)["scores"]["perception"] == 200
    assert scored("mme", "--answers", results, questions=results)["scores"]["cognition"] == 200
    with (results / "existence.txt").open("a") as file:
        file.write("1.txt\tIs it cut?\tYes\n")
    assert "existence.txt:5: expected" in scored("mme", "--answers", results, questions=folder)


def test_answers_to_other_questions(scored: Any, folder: Path, lines: Any) -> None:
    names = [f"{c}/{at}.jpg/{turn}" for c in ("existence", "code_reasoning") for at in range(2) for turn in (1, 2)]
    rows = [{"id": name, "text": "yes", "prompt": "Is it Yes? Please answer yes or no."} for name in names]
    assert "4 of 8 answers are to other questions" in scored(
        "mme", "--answers", lines("a.jsonl", rows), questions=folder
    )
