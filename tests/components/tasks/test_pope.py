"""POPE: LLaVA-1.5's published scores, and files that don't match."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavactl.components.tasks.pope import is_yes, rates, split_of

PUBLISHED = {"tp": 1182, "fp": 31, "tn": 1379, "fn": 318}


def pope(real: Path, labels: int = 2910) -> dict[str, Path]:
    folder = real / "pope"
    return {"questions": folder / "questions_llava_random.jsonl", "labels": folder / f"coco_pope_random_{labels}.json"}


class TestPublished:
    def test_llava_13b(self, real: Path, scored: Any) -> None:
        report = scored("pope", "--answers", real / "pope/answers_llava-v1.5-13b_random.jsonl", **pope(real))
        scores = report["scores"]
        assert {name: scores[name] for name in PUBLISHED} == PUBLISHED
        assert scores["accuracy"] == pytest.approx(100 * (1182 + 1379) / 2910, abs=1e-9)
        assert scores["precision"] == pytest.approx(100 * 1182 / 1213, abs=1e-9)
        assert scores["recall"] == pytest.approx(78.8, abs=1e-9)
        assert round(scores["f1"], 2) == 87.14
        assert round(scores["yes_ratio"], 2) == 41.68
        assert (report["task"], report["protocol"], report["n"], report["failed"]) == ("pope", "llava", 2910, 0)
        low, high = report["interval"]["accuracy"]
        assert low < scores["accuracy"] < high

    def test_the_order_of_lines_is_irrelevant(self, real: Path, scored: Any, tmp_path: Path) -> None:
        chance = random.Random(0)
        shuffled: dict[str, Path] = {}
        for name, path in {**pope(real), "answers": real / "pope/answers_llava-v1.5-13b_random.jsonl"}.items():
            rows = path.read_text().splitlines()
            chance.shuffle(rows)
            shuffled[name] = tmp_path / path.name
            shuffled[name].write_text("\n".join(rows))
        answers = shuffled.pop("answers")
        scores = scored("pope", "--answers", answers, **shuffled)["scores"]
        assert {name: scores[name] for name in PUBLISHED} == PUBLISHED

    @pytest.mark.parametrize("form", ["list", "bom", "crlf", "indented"])
    def test_the_file_layout_is_irrelevant(self, real: Path, scored: Any, tmp_path: Path, form: str) -> None:
        files: dict[str, Path] = {}
        for name, path in {**pope(real), "answers": real / "pope/answers_llava-v1.5-13b_random.jsonl"}.items():
            rows = path.read_text().splitlines()
            text = {
                "list": "[" + ",".join(rows) + "]",
                "bom": "\ufeff" + "\n".join(rows),
                "crlf": "\r\n".join(rows) + "\r\n\r\n",
                "indented": json.dumps([json.loads(row) for row in rows], indent=2),
            }[form]
            files[name] = tmp_path / path.name
            files[name].write_text(text, encoding="utf-8", newline="")
        answers = files.pop("answers")
        assert round(scored("pope", "--answers", answers, **files)["scores"]["f1"], 2) == 87.14


class TestMismatchedFiles:
    def test_labels_of_the_other_version_are_refused(self, real: Path, scored: Any) -> None:
        error = scored("pope", "--answers", real / "pope/answers_llava-v1.5-13b_random.jsonl", **pope(real, 3000))
        assert "144 of 2910 questions have no label, 234 of 3000 labels have no question" in error
        assert "hint: the random split has 2,910 questions" in error

    @pytest.mark.parametrize("version", [2910, 3000])
    def test_answers_to_the_other_version_are_refused(self, real: Path, scored: Any, lines: Any, version: int) -> None:
        """Both versions have the ids 1 to 2910, with other questions from 11 on: stored prompts detect that."""
        rows = [json.loads(row) for row in (real / "pope/answers_llava-v1.5-13b_random.jsonl").read_text().splitlines()]
        answers = lines("a.jsonl", ({**row, "question_id": row["question_id"] - 10_000_000} for row in rows))
        labels = real / f"pope/coco_pope_random_{version}.json"
        result = scored("pope", "--answers", answers, questions=labels, labels=labels)
        if version == 2910:
            assert round(result["scores"]["f1"], 2) == 87.14
        else:
            assert "90 of 3000 questions have no answer" in result
            first = lines("q.jsonl", map(json.loads, labels.read_text().splitlines()[:2910]))
            assert "2818 of 2910 answers" in scored("pope", "--answers", answers, questions=first)

    def test_a_truncated_answer_file(self, real: Path, scored: Any, tmp_path: Path) -> None:
        complete = (real / "pope/answers_llava-v1.5-13b_random.jsonl").read_bytes()
        (tmp_path / "cut.jsonl").write_bytes(complete[:-40])
        assert "cut.jsonl:2910: not JSON" in scored("pope", "--answers", tmp_path / "cut.jsonl", **pope(real))
        (tmp_path / "cut.jsonl").write_bytes(complete[: complete[:-1].rindex(b"\n") + 1])
        error = scored("pope", "--answers", tmp_path / "cut.jsonl", **pope(real))
        assert "cut.jsonl: 1 of 2910 questions have no answer, the first is '10002910'" in error

    def test_a_duplicate_answer(self, real: Path, scored: Any, tmp_path: Path) -> None:
        complete = (real / "pope/answers_llava-v1.5-13b_random.jsonl").read_text()
        (tmp_path / "a.jsonl").write_text(complete + complete.splitlines()[4] + "\n")
        error = scored("pope", "--answers", tmp_path / "a.jsonl", **pope(real))
        assert "a.jsonl:2911: duplicate answer to question '10000005'" in error

    def test_questions_without_labels(self, real: Path, scored: Any) -> None:
        files = {"questions": pope(real)["questions"]}
        error = scored("pope", "--answers", real / "pope/answers_llava-v1.5-13b_random.jsonl", **files)
        assert "questions_llava_random.jsonl:1: missing `label`" in error
        assert "-t labels=" in error


QUESTIONS = [
    {
        "question_id": split * 10 + at,
        "image": f"{at}.jpg",
        "text": f"Is there a {thing} in the image?",
        "category": name,
    }
    for split, name in enumerate(("random", "popular", "adversarial"))
    for at, thing in enumerate(("dog", "cat", "café ☕", "fork"))
]


def labels_of(split: str, last: str = "no") -> list[dict[str, Any]]:
    references = ["yes", "no", "yes", last]
    own = [each for each in QUESTIONS if each["category"] == split]
    return [
        {"image": each["image"], "text": each["text"], "label": label}
        for each, label in zip(own, references, strict=True)
    ]


class TestSplits:
    @pytest.fixture
    def files(self, lines: Any, tmp_path: Path) -> dict[str, Any]:
        (tmp_path / "coco").mkdir()
        labels = [
            lines(f"coco/coco_pope_{name}.json", labels_of(name)) for name in ("random", "popular", "adversarial")
        ]
        texts = ("Yes, there is.", "No.", "It is not there.", "no")
        answers = ({"question_id": each["question_id"], "text": texts[at % 4]} for at, each in enumerate(QUESTIONS))
        return {
            "questions": lines("q.jsonl", QUESTIONS),
            "labels": labels,
            "answers": lines("a.jsonl", answers),
            "folder": tmp_path / "coco",
        }

    def test_scores_per_split_and_over_all(self, scored: Any, files: dict[str, Any]) -> None:
        for labels in (files["labels"], files["folder"]):
            report = scored("pope", "--answers", files["answers"], questions=files["questions"], labels=labels)
            scores = report["scores"]
            assert report["n"] == 12
            assert (scores["tp"], scores["fp"], scores["tn"], scores["fn"]) == (3, 0, 6, 3)
            for split in ("random", "popular", "adversarial"):
                assert scores[split]["tp"] == scores[split]["fn"] == 1
                assert scores[split]["f1"] == pytest.approx(200 / 3)
            assert scores["mean"]["f1"] == pytest.approx(200 / 3)
            assert set(report["interval"]) == {"accuracy", "random", "popular", "adversarial"}

    def test_answers_to_other_splits_are_ignored(self, scored: Any, files: dict[str, Any]) -> None:
        report = scored("pope", "--answers", files["answers"], questions=files["questions"], labels=files["labels"][1])
        assert (report["n"], report["ignored"]) == (4, 8)
        assert "popular" not in report["scores"]

    def test_a_duplicate_split(self, scored: Any, files: dict[str, Any]) -> None:
        twice = [files["labels"][0], files["labels"][0]]
        assert "duplicate split 'random'" in scored(
            "pope", "--answers", files["answers"], questions=files["questions"], labels=twice
        )

    def test_labels_with_ids_only(self, scored: Any, files: dict[str, Any], lines: Any) -> None:
        own = [each for each in QUESTIONS if each["category"] == "random"]
        rows = [{"question_id": each["question_id"], "label": "Yes"} for each in own]
        report = scored(
            "pope", "--answers", files["answers"], questions=lines("r.jsonl", own), labels=lines("l.json", rows)
        )
        assert report["scores"]["recall"] == 25

    def test_one_question_under_two_ids(self, scored: Any, files: dict[str, Any], lines: Any) -> None:
        """As in POPE's files for A-OKVQA and GQA; the labels must agree, and the ids must differ."""
        repeated = QUESTIONS[2] | {"question_id": 99}
        answers = [json.loads(line) for line in files["answers"].read_text().splitlines()]
        files = {
            "questions": lines("q.jsonl", [*QUESTIONS, repeated]),
            "answers": lines("a.jsonl", [*answers, {"question_id": 99, "text": "yes"}]),
        }

        def report(label: str, name: int) -> Any:
            rows = [row | {"question_id": at} for at, row in enumerate(labels_of("random"))]
            labels = lines("coco_pope_random.json", [*rows, rows[2] | {"label": label, "question_id": name}])
            return scored("pope", "--answers", files["answers"], questions=files["questions"], labels=labels)

        assert (report("yes", 99)["n"], report("yes", 99)["scores"]["tp"]) == (5, 2)
        assert "coco_pope_random.json:5: duplicate" in report("no", 99)
        assert "coco_pope_random.json:5: duplicate" in report("yes", 2)

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"label": "maybe"}, ":3: `label` is 'maybe'"),
            ({"label": None}, "missing `label`"),
            ({"label": 1}, "`label`: expected a string, got 1"),
            ({"image": "0.jpg", "text": QUESTIONS[0]["text"]}, ":3: duplicate question"),
        ],
    )
    def test_an_invalid_label(
        self, scored: Any, files: dict[str, Any], lines: Any, row: dict[str, Any], expected: str
    ) -> None:
        rows = labels_of("random")
        rows[2] |= row
        labels = lines("coco_pope_random.json", rows)
        assert expected in scored("pope", "--answers", files["answers"], questions=files["questions"], labels=labels)

    def test_a_limit_uses_the_first_questions(self, scored: Any, files: dict[str, Any]) -> None:
        options = {"questions": files["questions"], "labels": files["labels"]}
        report = scored("pope", "--answers", files["answers"], "--limit", 2, **options)
        assert report["n"] == 2
        assert report["scores"]["accuracy"] == 100


@pytest.mark.parametrize(
    ("text", "yes"),
    [
        ("No", False),
        ("no, there isn't", False),
        ("Yes. No dogs, though", True),
        ("There is not", False),
        ("NO", True),
        ("None", True),
        ("", True),
        ("nothing of the kind", True),
        ("Yes,no", True),
        ("ｎｏ", True),
    ],
)
def test_parsing_as_llava(text: str, yes: bool) -> None:
    assert is_yes(text) is yes


def test_an_empty_answer_counts_as_failed(scored: Any, lines: Any) -> None:
    questions = lines("q.jsonl", [{**QUESTIONS[0], "label": "yes"}, {**QUESTIONS[1], "label": "no"}])
    answers = lines("a.jsonl", [{"question_id": 0, "text": "  "}, {"question_id": 1, "text": ""}])
    report = scored("pope", "--answers", answers, questions=questions)
    assert (report["failed"], report["scores"]["fp"], report["scores"]["tp"]) == (2, 1, 1)


@pytest.mark.parametrize("name", ["coco_pope_popular.json", "popular-9000.jsonl", "gqa_pope_seem_popular.json"])
def test_the_split_of_a_file(name: str) -> None:
    assert split_of(Path(name)) == "popular"


@given(st.lists(st.tuples(st.booleans(), st.booleans())))
def test_rates_are_shares_or_none(pairs: list[tuple[bool, bool]]) -> None:
    found = rates(pairs)
    assert found["tp"] + found["fp"] + found["tn"] + found["fn"] == len(pairs)  # type: ignore[operator]
    for name in ("accuracy", "precision", "recall", "f1", "yes_ratio"):
        assert found[name] is None or 0 <= found[name] <= 100  # type: ignore[operator]
