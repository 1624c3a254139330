"""ScienceQA: the nine published columns, all file layouts, and parsing of answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.sources.scienceqa import ScienceqaOptions, scienceqa
from llavactl.components.tasks.scienceqa import (
    COLUMNS,
    Scienceqa,
    ScienceqaTaskOptions,
    parse_llava,
    parse_official,
    parse_strict,
)
from llavactl.core.errors import DataError
from llavactl.core.schema import Answer
from llavactl.testing import check_source

PUBLISHED = {
    "NAT": 74.73,
    "SOC": 75.59,
    "LAN": 72.73,
    "TXT": 74.05,
    "IMG": 71.64,
    "NO": 73.52,
    "G1-6": 78.01,
    "G7-12": 67.90,
    "Avg": 74.39,
}


@pytest.fixture
def files(real: Path) -> dict[str, Path]:
    folder = real / "scienceqa"
    return {"questions": folder / "llava_test_CQM-A.json", "meta": folder / "id_grade_subject.csv"}


class TestPublished:
    @pytest.mark.parametrize(
        ("answers", "protocol", "failed"),
        [
            ("llava-v1.5-13b_output.jsonl", "llava", 5),
            ("llava-v1.5-13b_result.json", "llava", 5),
            ("llava-v1.5-13b_result.json", "official", 38),
        ],
    )
    def test_llava_13b(
        self, real: Path, scored: Any, files: dict[str, Path], answers: str, protocol: str, failed: int
    ) -> None:
        report = scored("scienceqa", "--answers", real / "scienceqa" / answers, "--protocol", protocol, **files)
        assert list(report["scores"]) == list(COLUMNS) == list(PUBLISHED)
        assert {name: round(score, 2) for name, score in report["scores"].items()} == PUBLISHED
        assert report["scores"]["Avg"] == pytest.approx(100 * 3155 / 4241, abs=1e-9)
        assert (report["protocol"], report["n"], report["failed"]) == (protocol, 4241, failed)
        assert set(report["interval"]) == set(PUBLISHED)

    def test_strict_refuses_letters_with_text(self, real: Path, scored: Any, files: dict[str, Path]) -> None:
        answers = real / "scienceqa/llava-v1.5-13b_output.jsonl"
        report = scored("scienceqa", "--answers", answers, "--protocol", "strict", **files)
        assert report["failed"] > 500
        assert report["scores"]["Avg"] < PUBLISHED["Avg"]

    def test_answers_to_other_questions_are_refused(
        self, real: Path, scored: Any, files: dict[str, Path], lines: Any
    ) -> None:
        document = json.loads((real / "scienceqa/llava-v1.5-13b_output.jsonl").read_text())
        rows = [
            {"question_id": each["question_id"], "prompt": each["question"], "text": each["pred"]}
            for each in document["correct"] + document["incorrect"]
        ]
        rows[5]["prompt"] = "Unknown"  # stored by LLaVA's script for a missing answer
        assert round(scored("scienceqa", "--answers", lines("a.jsonl", rows), **files)["scores"]["Avg"], 2) == 74.39
        rows[1]["prompt"], rows[2]["prompt"] = rows[2]["prompt"], rows[1]["prompt"]
        assert "2 of 4241 answers" in scored("scienceqa", "--answers", lines("a.jsonl", rows), **files)

    def test_prompts_in_other_formats_match(self, real: Path, scored: Any, lines: Any, tmp_path: Path) -> None:
        problem = {
            "question": "Which  is it?", "choices": ["red fox", "blue whale"], "answer": 1, "hint": "Look at n.",
            "image": None, "subject": "natural science", "grade": "grade2", "split": "test",
        }  # fmt: skip
        (tmp_path / "p.json").write_text(json.dumps({"7": problem, "8": problem | {"hint": ""}}))
        short = "Which is it?\nA. red fox\nB. blue whale"
        prompts = (f"Context: Look at n.\n{short}", short)
        rows = [{"question_id": name, "prompt": each, "text": "B"} for name, each in zip("78", prompts, strict=True)]
        assert scored("scienceqa", "--answers", lines("a.jsonl", rows), questions="p.json")["scores"]["Avg"] == 100
        rows[0]["prompt"] = prompts[1]
        assert "1 of 2 answers" in scored("scienceqa", "--answers", lines("a.jsonl", rows), questions="p.json")

    def test_llavas_own_lines(self, real: Path, scored: Any, files: dict[str, Path], lines: Any) -> None:
        document = json.loads((real / "scienceqa/llava-v1.5-13b_result.json").read_text())
        rows = [{"question_id": name, "text": text} for name, text in document["outputs"].items()]
        report = scored("scienceqa", "--answers", lines("a.jsonl", reversed(rows)), **files)
        assert round(report["scores"]["Avg"], 2) == 74.39

    def test_guessed_options_count_under_official_only(
        self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path
    ) -> None:
        document = json.loads((real / "scienceqa/llava-v1.5-13b_result.json").read_text())
        references = {
            each["id"]: each["conversations"][1]["value"] for each in json.loads(files["questions"].read_text())
        }
        unparsed = [name for name, index in document["results"].items() if index == -1]
        document["results"].update({name: "ABCDE".index(references[name]) for name in unparsed})
        (tmp_path / "guessed.json").write_text(json.dumps(document))
        right = {}
        for protocol in ("llava", "official"):
            report = scored("scienceqa", "--answers", tmp_path / "guessed.json", "--protocol", protocol, **files)
            right[protocol] = round(report["scores"]["Avg"] * 42.41)
        assert right == {"llava": 3155, "official": 3155 + 38}


class TestInvalidFiles:
    def test_without_meta(self, real: Path, scored: Any, files: dict[str, Path]) -> None:
        answers = real / "scienceqa/llava-v1.5-13b_output.jsonl"
        assert "hint: -t meta=FILE" in scored("scienceqa", "--answers", answers, questions=files["questions"])

    def test_invalid_meta(self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path) -> None:
        rows = files["meta"].read_text().splitlines()
        cases = {
            "meta: ": rows[:100],
            "duplicate ": [*rows, rows[5]],
            "column 'grade'": ["question_id,subject", "4,x"],
            "`grade`: ": [*rows[:4], rows[4].replace(",11,", ",13,"), *rows[5:]],
            "`subject`: ": [*rows[:4], rows[4].replace("language science", "art"), *rows[5:]],
            "cells": [*rows[:-1], "21208,21208"],
        }
        for expected, content in cases.items():
            (tmp_path / "meta.csv").write_text("\ufeff" + "\r\n".join(content), encoding="utf-8", newline="")
            answers = real / "scienceqa/llava-v1.5-13b_output.jsonl"
            assert expected in scored(
                "scienceqa", "--answers", answers, questions=files["questions"], meta=tmp_path / "meta.csv"
            )

    def test_a_duplicate_key(self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path) -> None:
        text = (real / "scienceqa/llava-v1.5-13b_result.json").read_text()
        (tmp_path / "r.json").write_text(text.replace('"5": 1,', '"4": 1,', 1))
        assert "duplicate key '4'" in scored("scienceqa", "--answers", tmp_path / "r.json", **files)

    @pytest.mark.parametrize("keep", [0.5, 0.999])
    def test_truncated_files(
        self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path, keep: float
    ) -> None:
        for name in ("llava-v1.5-13b_result.json", "llava-v1.5-13b_output.jsonl"):
            text = (real / "scienceqa" / name).read_text()
            (tmp_path / name).write_text(text[: int(len(text) * keep)])
            assert "not JSON" in scored("scienceqa", "--answers", tmp_path / name, **files)
        text = files["questions"].read_text()
        (tmp_path / "q.json").write_text(text[: int(len(text) * keep)])
        answers = real / "scienceqa/llava-v1.5-13b_output.jsonl"
        error = scored("scienceqa", "--answers", answers, questions=tmp_path / "q.json", meta=files["meta"])
        assert "q.json:" in error
        assert "not JSON" in error

    def test_missing_answers(self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path) -> None:
        document = json.loads((real / "scienceqa/llava-v1.5-13b_output.jsonl").read_text())
        document["incorrect"] = document["incorrect"][3:]
        (tmp_path / "a.json").write_text(json.dumps(document))
        error = scored("scienceqa", "--answers", tmp_path / "a.json", **files)
        assert "3 of 4241 questions have no answer, the first is '11'" in error


PROBLEMS = {
    "1": {
        "question": "Which is  a metal?",
        "choices": ["iron", "wood", "glass"],
        "answer": 0,
        "hint": "",
        "image": None,
        "grade": "grade7",
        "subject": "natural science",
        "lecture": "Metals are shiny.",
        "solution": "Iron is one.",
        "split": "train",
    },
    "2": {
        "question": "What is shown?",
        "choices": ["a map", "a plan"],
        "answer": 1,
        "hint": "Look.",
        "image": "image.png",
        "grade": "grade2",
        "subject": "social science",
        "lecture": "",
        "solution": "",
        "split": "test",
    },
    "3": {
        "question": "Which word?",
        "choices": ["no", "yes"],
        "answer": 1,
        "hint": "",
        "image": None,
        "grade": "grade12",
        "subject": "language science",
        "lecture": "",
        "solution": "",
        "split": "test",
    },
}


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "problems.json"
    path.write_text(json.dumps(PROBLEMS))
    return path


class TestProblems:
    def test_questions(self, problems: Path) -> None:
        first, second = Scienceqa(ScienceqaTaskOptions(questions=problems, prompt="qcm-lea")).questions()
        (image,) = first.turns[0].images
        assert image.name == "test/2/image.png"
        assert first.turns[0].content[0] == image
        assert first.turns[0].text == "\nWhat is shown?\nContext: Look.\nOptions: (A) a map (B) a plan"
        assert second.turns[0].content == ("Which word?\nContext: N/A\nOptions: (A) no (B) yes",)
        assert (first.reference, second.reference) == ("B", "B")
        text_only = Scienceqa(ScienceqaTaskOptions(questions=problems, pictures=False))
        assert [each.turns[0].images for each in text_only.questions()] == [(), ()]
        (text,) = next(iter(text_only.questions())).turns[0].content
        assert str(text).endswith("\nAnswer with the option's letter from the given choices directly.")

    def test_scores(self, problems: Path, scored: Any, lines: Any) -> None:
        answers = lines("a.jsonl", [{"id": "2", "text": "The answer is B."}, {"id": 3, "text": "Yes."}])
        report = scored("scienceqa", "--answers", answers, questions=problems)
        assert report["scores"] == {
            "NAT": None,
            "SOC": 100,
            "LAN": 0,
            "TXT": 100,
            "IMG": 100,
            "NO": 0,
            "G1-6": 100,
            "G7-12": 0,
            "Avg": 50,
        }
        assert report["failed"] == 1

    def test_splits(self, problems: Path, tmp_path: Path) -> None:
        splits = tmp_path / "pid_splits.json"
        splits.write_text(json.dumps({"test": ["3", "2"], "minitest": ["2"], "val": ["9"]}))

        def ids(split: str) -> list[str]:
            options = ScienceqaTaskOptions(questions=problems, splits=splits, split=split)
            return [each.id for each in Scienceqa(options).questions()]

        assert (ids("test"), ids("minitest")) == (["3", "2"], ["2"])
        with pytest.raises(DataError, match="the first is '9'"):
            ids("val")
        with pytest.raises(DataError, match="split 'x'") as caught:
            ids("x")
        assert caught.value.hint == "available: minitest, test, val"

    def test_without_splits_all_problems_are_used(self, problems: Path) -> None:
        problems.write_text(json.dumps({name: {**each, "split": None} for name, each in PROBLEMS.items()}))
        assert len(list(Scienceqa(ScienceqaTaskOptions(questions=problems)).questions())) == 3

    @pytest.mark.parametrize(
        ("change", "expected"),
        [
            ({"answer": 2}, "problem 2: `answer`"),
            ({"answer": "B"}, "problem 2: `answer`"),
            ({"choices": "AB"}, "problem 2: `choices`"),
            ({"question": None}, "missing `question`"),
            ({"image": "../../../etc/passwd/../../.."}, "outside its root"),
            ({"grade": "eight"}, "problem 2: `grade`"),
        ],
    )
    def test_an_invalid_problem(
        self, problems: Path, scored: Any, lines: Any, change: dict[str, Any], expected: str
    ) -> None:
        problems.write_text(json.dumps({**PROBLEMS, "2": {**PROBLEMS["2"], **change}}))
        error = scored("scienceqa", "--answers", lines("a.jsonl", []), questions=problems)
        assert expected in error
        assert "problem 2" in error

    def test_the_source_makes_training_data(self, problems: Path) -> None:
        options = ScienceqaOptions(path=problems)
        assert check_source(scienceqa(options)) == []
        (sample,) = scienceqa(options)
        question, answer = (turn.text for turn in sample.turns)
        assert question == "Which is a metal?\nContext: N/A\nOptions: (A) iron (B) wood (C) glass"
        assert answer == "Metals are shiny. Iron is one. The answer is A."
        first = next(iter(scienceqa(ScienceqaOptions(path=problems, split="test", answer="a"))))
        assert first.turns[1].text == "The answer is B."
        assert [image.name for image in first.images] == ["test/2/image.png"]


def test_questions_of_the_converted_file(real: Path, files: dict[str, Path]) -> None:
    task = Scienceqa(ScienceqaTaskOptions(**files, images=real / "scienceqa/images/test"))
    questions = {each.id: each for each in task.questions()}
    assert len(questions) == 4241
    (image,) = questions["5"].turns[0].images
    assert image.read()[:4] == b"\x89PNG"
    assert "<image>" not in "".join(each.turns[0].text for each in questions.values())
    assert (
        questions["4"]
        .turns[0]
        .text.endswith("B. apostrophe\nAnswer with the option's letter from the given choices directly.")
    )


@pytest.mark.parametrize(
    ("text", "llava", "strict"),
    [
        ("B", 1, 1),
        ("B. apostrophe", 1, None),
        ("b", None, None),
        ("(B)", None, 1),
        ("B.", None, 1),
        ("The answer is B.", 1, 1),
        ("The answer is B", None, 1),
        ("It rhymes. The answer is B. BECAUSE: it does", 1, 1),
        ("The answer is A. No: The answer is B.", None, None),
        ("The answer is B. Yes, the answer is B.", 1, 1),
        ("E", 4, None),
        ("B is the run-on sentence.", None, None),
        ("", None, None),
        ("Β", None, None),  # a Greek letter
        ("The correct option is B", None, None),
    ],
)
def test_parsing(text: str, llava: int | None, strict: int | None) -> None:
    answer = Answer("1", text)
    assert parse_llava(answer, 3) == parse_official(answer, 3) == llava
    assert parse_strict(answer, 3) == strict


class TestJoint:
    """5 problems; the reference is B in each."""

    @pytest.fixture
    def evaluated(self, lines: Any, tmp_path: Path) -> Any:
        problem = {
            "question": "Which?", "choices": ["x", "y", "z"], "answer": 1, "hint": "", "image": None,
            "subject": "natural science", "grade": "grade2", "lecture": "", "solution": "", "split": "test",
        }  # fmt: skip
        (tmp_path / "problems.json").write_text(json.dumps({str(at): problem for at in range(5)}))
        answers = lines("a.jsonl", [{"id": str(at), "text": text} for at, text in enumerate("BBA?B")])
        teacher = ("The answer is B.", "I can't tell.", "The answer is B.", "Nor can I.", "The answer is C.")

        def run(scored: Any, joint: str, *more: tuple[str, str]) -> Any:
            rows = [{"id": str(at), "reply": text} for at, text in enumerate(teacher)]
            replies = lines("replies.jsonl", rows + [{"id": name, "reply": text} for name, text in more])
            if joint == "complement":  # as in the files of ScienceQA's scripts
                replies = tmp_path / "gpt4.json"
                outputs = {str(at): text for at, text in enumerate(teacher)}
                replies.write_text(json.dumps({"acc": 0, "results": {}, "outputs": outputs}, indent=2))
            options = {"judge.name": "replay", "judge.path": replies}
            return scored(
                "scienceqa", "--answers", answers, questions=tmp_path / "problems.json", joint=joint, **options
            )

        return run

    def test_complement(self, scored: Any, evaluated: Any) -> None:
        """The teacher's B, B and C; the model's B and nothing where the teacher gives no option."""
        report = evaluated(scored, "complement")
        assert report["scores"]["Avg"] == 60
        assert report["scores"]["model"]["Avg"] == 60
        assert report["scores"]["teacher"]["Avg"] == 40
        assert (report["failed"], report["judge"]) == (1, "replay")

    def test_judge(self, scored: Any, evaluated: Any) -> None:
        """They differ in 1, 2 and 4: the judge decides only those, and 2 remains as under ``complement``."""
        more = [("1-judge", "The answer is B."), ("2-judge", "Hard to say."), ("4-judge", "The answer is B.")]
        report = evaluated(scored, "judge", *more)
        assert report["scores"]["Avg"] == 80
        assert "no reply for 2-judge" in evaluated(scored, "judge", more[0])

    def test_joint_requires_a_judge(self, scored: Any, tmp_path: Path) -> None:
        error = scored("scienceqa", "--answers", tmp_path / "a.jsonl", questions=tmp_path / "p.json", joint="judge")
        assert "judge.name=TEACHER" in error
