"""ScienceQA: the nine published columns, all forms of its files, and sentences for answers."""

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
    as_llava,
    as_stored,
    strictly,
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

    def test_strictly_a_letter_with_words_is_no_answer(self, real: Path, scored: Any, files: dict[str, Path]) -> None:
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
        rows[5]["prompt"] = "Unknown"  # what LLaVA's script notes where there is no answer
        assert round(scored("scienceqa", "--answers", lines("a.jsonl", rows), **files)["scores"]["Avg"], 2) == 74.39
        rows[1]["prompt"], rows[2]["prompt"] = rows[2]["prompt"], rows[1]["prompt"]
        said = scored("scienceqa", "--answers", lines("a.jsonl", rows), **files)
        assert "2 of 4241 answers are to other questions" in said

    def test_the_same_question_in_another_form_is_the_same(
        self, real: Path, scored: Any, lines: Any, tmp_path: Path
    ) -> None:
        problem = {
            "question": "Which  is it?", "choices": ["red fox", "blue whale"], "answer": 1, "hint": "Look at n.",
            "image": None, "subject": "natural science", "grade": "grade2", "split": "test",
        }  # fmt: skip
        (tmp_path / "p.json").write_text(json.dumps({"7": problem, "8": problem | {"hint": ""}}))
        short = "Which is it?\nA. red fox\nB. blue whale"
        asked = (f"Context: Look at n.\n{short}", short)
        rows = [{"question_id": name, "prompt": each, "text": "B"} for name, each in zip("78", asked, strict=True)]
        assert scored("scienceqa", "--answers", lines("a.jsonl", rows), questions="p.json")["scores"]["Avg"] == 100
        rows[0]["prompt"] = asked[1]
        assert "1 of 2 answers are to other" in scored(
            "scienceqa", "--answers", lines("a.jsonl", rows), questions="p.json"
        )

    def test_llavas_own_lines(self, real: Path, scored: Any, files: dict[str, Path], lines: Any) -> None:
        document = json.loads((real / "scienceqa/llava-v1.5-13b_result.json").read_text())
        rows = [{"question_id": name, "text": text} for name, text in document["outputs"].items()]
        report = scored("scienceqa", "--answers", lines("a.jsonl", reversed(rows)), **files)
        assert round(report["scores"]["Avg"], 2) == 74.39

    def test_a_lucky_guess_counts_under_official_alone(
        self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path
    ) -> None:
        document = json.loads((real / "scienceqa/llava-v1.5-13b_result.json").read_text())
        gold = {each["id"]: each["conversations"][1]["value"] for each in json.loads(files["questions"].read_text())}
        unread = [name for name, index in document["results"].items() if index == -1]
        document["results"].update({name: "ABCDE".index(gold[name]) for name in unread})
        (tmp_path / "lucky.json").write_text(json.dumps(document))
        right = {}
        for protocol in ("llava", "official"):
            report = scored("scienceqa", "--answers", tmp_path / "lucky.json", "--protocol", protocol, **files)
            right[protocol] = round(report["scores"]["Avg"] * 42.41)
        assert right == {"llava": 3155, "official": 3155 + 38}


class TestWrongFiles:
    def test_without_meta(self, real: Path, scored: Any, files: dict[str, Path]) -> None:
        answers = real / "scienceqa/llava-v1.5-13b_output.jsonl"
        assert "hint: -t meta=FILE" in scored("scienceqa", "--answers", answers, questions=files["questions"])

    def test_meta_of_less(self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path) -> None:
        rows = files["meta"].read_text().splitlines()
        cases = {
            "meta: ": rows[:100],
            "duplicate ": [*rows, rows[5]],
            "column 'grade'": ["question_id,subject", "4,x"],
            "`grade`: ": [*rows[:4], rows[4].replace(",11,", ",13,"), *rows[5:]],
            "`subject`: ": [*rows[:4], rows[4].replace("language science", "art"), *rows[5:]],
            "cells": [*rows[:-1], "21208,21208"],
        }
        for why, kept in cases.items():
            (tmp_path / "meta.csv").write_text("\ufeff" + "\r\n".join(kept), encoding="utf-8", newline="")
            answers = real / "scienceqa/llava-v1.5-13b_output.jsonl"
            assert why in scored(
                "scienceqa", "--answers", answers, questions=files["questions"], meta=tmp_path / "meta.csv"
            )

    def test_a_question_twice_in_one_object(
        self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path
    ) -> None:
        text = (real / "scienceqa/llava-v1.5-13b_result.json").read_text()
        (tmp_path / "r.json").write_text(text.replace('"5": 1,', '"4": 1,', 1))
        assert "duplicate key '4'" in scored("scienceqa", "--answers", tmp_path / "r.json", **files)

    @pytest.mark.parametrize("keep", [0.5, 0.999])
    def test_cut(self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path, keep: float) -> None:
        for name in ("llava-v1.5-13b_result.json", "llava-v1.5-13b_output.jsonl"):
            text = (real / "scienceqa" / name).read_text()
            (tmp_path / name).write_text(text[: int(len(text) * keep)])
            assert "not JSON" in scored("scienceqa", "--answers", tmp_path / name, **files)
        text = files["questions"].read_text()
        (tmp_path / "q.json").write_text(text[: int(len(text) * keep)])
        answers = real / "scienceqa/llava-v1.5-13b_output.jsonl"
        said = scored("scienceqa", "--answers", answers, questions=tmp_path / "q.json", meta=files["meta"])
        assert "q.json:" in said
        assert "not JSON" in said

    def test_missing(self, real: Path, scored: Any, files: dict[str, Path], tmp_path: Path) -> None:
        document = json.loads((real / "scienceqa/llava-v1.5-13b_output.jsonl").read_text())
        document["incorrect"] = document["incorrect"][3:]
        (tmp_path / "a.json").write_text(json.dumps(document))
        said = scored("scienceqa", "--answers", tmp_path / "a.json", **files)
        assert "3 of 4241 questions have no answer, the first is '11'" in said


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
    def test_asked(self, problems: Path) -> None:
        first, second = Scienceqa(ScienceqaTaskOptions(questions=problems, prompt="qcm-lea")).questions()
        (image,) = first.turns[0].images
        assert image.name == "test/2/image.png"
        assert first.turns[0].content[0] == image
        assert first.turns[0].text == "\nWhat is shown?\nContext: Look.\nOptions: (A) a map (B) a plan"
        assert second.turns[0].content == ("Which word?\nContext: N/A\nOptions: (A) no (B) yes",)
        assert (first.reference, second.reference) == ("B", "B")
        blind = Scienceqa(ScienceqaTaskOptions(questions=problems, pictures=False))
        assert [each.turns[0].images for each in blind.questions()] == [(), ()]
        (text,) = next(iter(blind.questions())).turns[0].content
        assert str(text).endswith("\nAnswer with the option's letter from the given choices directly.")

    def test_scored(self, problems: Path, scored: Any, lines: Any) -> None:
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

    def test_without_any_split_all_are_asked(self, problems: Path) -> None:
        problems.write_text(json.dumps({name: {**each, "split": None} for name, each in PROBLEMS.items()}))
        assert len(list(Scienceqa(ScienceqaTaskOptions(questions=problems)).questions())) == 3

    @pytest.mark.parametrize(
        ("change", "why"),
        [
            ({"answer": 2}, "problem 2: `answer`"),
            ({"answer": "B"}, "problem 2: `answer`"),
            ({"choices": "AB"}, "problem 2: `choices`"),
            ({"question": None}, "missing `question`"),
            ({"image": "../../../etc/passwd/../../.."}, "outside its root"),
            ({"grade": "eight"}, "problem 2: `grade`"),
        ],
    )
    def test_a_wrong_one(self, problems: Path, scored: Any, lines: Any, change: dict[str, Any], why: str) -> None:
        problems.write_text(json.dumps({**PROBLEMS, "2": {**PROBLEMS["2"], **change}}))
        said = scored("scienceqa", "--answers", lines("a.jsonl", []), questions=problems)
        assert why in said
        assert "problem 2" in said

    def test_to_train_on(self, problems: Path) -> None:
        options = ScienceqaOptions(path=problems)
        assert check_source(scienceqa(options)) == []
        (sample,) = scienceqa(options)
        question, answer = (turn.text for turn in sample.turns)
        assert question == "Which is a metal?\nContext: N/A\nOptions: (A) iron (B) wood (C) glass"
        assert answer == "Metals are shiny. Iron is one. The answer is A."
        first = next(iter(scienceqa(ScienceqaOptions(path=problems, split="test", answer="a"))))
        assert first.turns[1].text == "The answer is B."
        assert [image.name for image in first.images] == ["test/2/image.png"]


def test_of_the_converted_file(real: Path, files: dict[str, Path]) -> None:
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
def test_reading(text: str, llava: int | None, strict: int | None) -> None:
    answer = Answer("1", text)
    assert as_llava(answer, 3) == as_stored(answer, 3) == llava
    assert strictly(answer, 3) == strict


class TestJoint:
    """Five problems; the right option is B in each."""

    @pytest.fixture
    def asked(self, lines: Any, tmp_path: Path) -> Any:
        problem = {
            "question": "Which?", "choices": ["x", "y", "z"], "answer": 1, "hint": "", "image": None,
            "subject": "natural science", "grade": "grade2", "lecture": "", "solution": "", "split": "test",
        }  # fmt: skip
        (tmp_path / "problems.json").write_text(json.dumps({str(at): problem for at in range(5)}))
        ours = lines("a.jsonl", [{"id": str(at), "text": said} for at, said in enumerate("BBA?B")])
        theirs = ("The answer is B.", "I can't tell.", "The answer is B.", "Nor can I.", "The answer is C.")

        def run(scored: Any, joint: str, *more: tuple[str, str]) -> Any:
            rows = [{"id": str(at), "reply": said} for at, said in enumerate(theirs)]
            replies = lines("replies.jsonl", rows + [{"id": name, "reply": said} for name, said in more])
            if joint == "complement":  # as ScienceQA's own scripts keep what GPT-4 said
                replies = tmp_path / "gpt4.json"
                outputs = {str(at): said for at, said in enumerate(theirs)}
                replies.write_text(json.dumps({"acc": 0, "results": {}, "outputs": outputs}, indent=2))
            options = {"judge.name": "replay", "judge.path": replies}
            return scored("scienceqa", "--answers", ours, questions=tmp_path / "problems.json", joint=joint, **options)

        return run

    def test_complement(self, scored: Any, asked: Any) -> None:
        """The teacher's B, B and C; ours where it says none, B and nothing."""
        report = asked(scored, "complement")
        assert report["scores"]["Avg"] == 60
        assert report["scores"]["model"]["Avg"] == 60
        assert report["scores"]["teacher"]["Avg"] == 40
        assert (report["failed"], report["judge"]) == (1, "replay")

    def test_judge(self, scored: Any, asked: Any) -> None:
        """They differ in 1, 2 and 4; it is asked about those alone, and what it can't decide stays as before."""
        more = [("1-judge", "The answer is B."), ("2-judge", "Hard to say."), ("4-judge", "The answer is B.")]
        report = asked(scored, "judge", *more)
        assert report["scores"]["Avg"] == 80
        assert "request 2-judge" in asked(scored, "judge", more[0])

    def test_both_are_needed(self, scored: Any, tmp_path: Path) -> None:
        said = scored("scienceqa", "--answers", tmp_path / "a.jsonl", questions=tmp_path / "p.json", joint="judge")
        assert "go together" in said
