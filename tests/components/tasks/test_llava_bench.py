"""LLaVA-Bench: published relative scores from stored verdicts, and invalid review files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.tasks.judging import parse_lenient, parse_llava
from llavactl.components.tasks.llava_bench import LlavaBench, LlavaBenchOptions
from llavactl.core.protocols import Judged
from llavactl.testing import run_cli

PUBLISHED = (64.8, 65.3, 66.3)


@pytest.fixture
def files(real: Path) -> dict[str, Path]:
    names = {"questions": "questions", "context": "context", "reference": "answers_gpt4"}
    return {option: real / f"llava-bench/{name}.jsonl" for option, name in names.items()}


@pytest.fixture
def runs(real: Path) -> list[Path]:
    return [real / f"llava-bench/llava-v1.5-7b-eval{run}.jsonl" for run in (1, 2, 3)]


class TestPublished:
    @pytest.mark.parametrize("protocol", ["llava", "excluding-failed"])
    def test_each_run(self, scored: Any, files: dict[str, Path], runs: list[Path], protocol: str) -> None:
        for run, published in zip(runs, PUBLISHED, strict=True):
            report = scored("llava-bench", "--protocol", protocol, **files, reviews=run)
            assert list(report["scores"]) == ["all", "conv", "detail", "complex"]
            assert all(set(each) == {"relative", "reference", "candidate", "n"} for each in report["scores"].values())
            assert round(report["scores"]["all"]["relative"], 1) == published
            assert [each["n"] for each in report["scores"].values()] == [60, 17, 15, 28]
            assert (report["n"], report["failed"]) == (60, 0)

    def test_all_runs_and_their_spread(self, scored: Any, runs: list[Path]) -> None:
        """Question files are optional: reviews have the categories."""
        scores = scored("llava-bench", reviews=runs)["scores"]
        assert tuple(round(each, 1) for each in scores["all"]["runs"]) == PUBLISHED
        assert round(scores["all"]["relative"], 2) == 65.47
        assert 0.7 < scores["all"]["spread"] < 0.9
        assert scores["detail"]["n"] == 15

    def test_the_order_of_lines_is_irrelevant(
        self, scored: Any, files: dict[str, Path], runs: list[Path], tmp_path: Path
    ) -> None:
        (tmp_path / "r.jsonl").write_text("\r\n".join(reversed(runs[0].read_text().splitlines())), newline="")
        report = scored("llava-bench", **files, reviews=tmp_path / "r.jsonl")
        assert round(report["scores"]["all"]["relative"], 1) == 64.8


class TestFailed:
    @pytest.fixture
    def reviews(self, lines: Any) -> Path:
        verdicts = {"conv": ("8 4\nfine", "I can not judge this."), "complex": ("5,10\n…", "")}
        rows = [
            {"question_id": f"{kind}{at}", "category": f"llava_bench_{kind}", "content": text}
            for kind, each in verdicts.items()
            for at, text in enumerate(each)
        ]
        return lines("r.jsonl", rows)

    def test_failed_verdicts_count_as_minus_one(self, scored: Any, reviews: Path) -> None:
        report = scored("llava-bench", reviews=reviews)
        assert report["failed"] == 2
        assert report["scores"]["conv"]["relative"] == pytest.approx(100 * (4 - 1) / (8 - 1))
        assert report["scores"]["all"]["relative"] == pytest.approx(100 * (4 + 10 - 2) / (8 + 5 - 2))
        assert report["scores"]["all"]["n"] == 4
        assert "detail" not in report["scores"]

    def test_failed_verdicts_are_excluded(self, scored: Any, reviews: Path) -> None:
        report = scored("llava-bench", "--protocol", "excluding-failed", reviews=reviews)
        assert report["failed"] == 2
        assert report["scores"]["conv"] == {"relative": 50, "reference": 80, "candidate": 40, "n": 1}
        assert report["scores"]["all"]["relative"] == pytest.approx(100 * 14 / 13)

    @pytest.mark.parametrize(("content", "failed"), [(None, 1), ("", 1), ("8 9", 0)])
    def test_an_empty_verdict_has_failed(self, scored: Any, lines: Any, content: Any, failed: int) -> None:
        rows = [{"question_id": 1, "category": "conv", "content": content}]
        assert scored("llava-bench", reviews=lines("r.jsonl", rows))["failed"] == failed
        del rows[0]["content"]
        assert "r.jsonl:1: missing `content`" in scored("llava-bench", reviews=lines("r.jsonl", rows))

    def test_without_valid_verdicts_there_is_no_score(self, scored: Any, lines: Any) -> None:
        reviews = lines("r.jsonl", [{"question_id": 1, "category": "conv", "content": ""}])
        report = scored("llava-bench", "--protocol", "excluding-failed", reviews=reviews)
        assert report["scores"]["all"] == {"relative": None, "reference": None, "candidate": None, "n": 0}
        answers = lines("a.jsonl", [{"question_id": 1, "category": "conv", "text": "A cat on a mat."}])
        assert "a.jsonl: none of 1 lines" in scored("llava-bench", reviews=answers)

    @pytest.mark.parametrize(
        ("verdict", "llava", "lenient"),
        [
            ("8 9", (8, 9), (8, 9)),
            ("8,9\nbecause", (8, 9), (8, 9)),
            ("7.5 10", (7.5, 10), (7.5, 10)),
            ("8 9\r\nbecause", (8, 9), (8, 9)),
            ("8, 9", None, (8, 9)),
            ("\n8 9", None, (8, 9)),
            (" 8 9 ", None, (8, 9)),
            ("Assistant 1: 8", None, None),
            ("8 9 10", None, None),
            ("nan inf", None, None),
            ("8", None, None),
            ("", None, None),
        ],
    )
    def test_parsing(self, verdict: str, llava: Any, lenient: Any) -> None:
        assert parse_llava(verdict) == llava
        assert parse_lenient(verdict) == lenient


class TestInvalidFiles:
    def test_no_verdicts(self, scored: Any, files: dict[str, Path]) -> None:
        error = scored("llava-bench", "--answers", files["reference"], **files)
        assert "hint: -t reviews=FILE" in error

    @pytest.mark.parametrize("name", ["llava-bench", "llava-bench-coco"])
    def test_neither_questions_nor_reviews(self, scored: Any, name: str, lines: Any) -> None:
        assert "questions=FILE or reviews=FILE" in scored(name, "--answers", lines("a.jsonl", []))

    def test_truncated_reviews(self, scored: Any, files: dict[str, Path], runs: list[Path], tmp_path: Path) -> None:
        rows = runs[0].read_text().splitlines()
        (tmp_path / "r.jsonl").write_text("\n".join(rows[:-2]))
        assert "2 of 60 questions have no review, the first is '58'" in scored(
            "llava-bench", **files, reviews=tmp_path / "r.jsonl"
        )
        (tmp_path / "r.jsonl").write_text("\n".join(rows)[:-9])
        assert "r.jsonl:60: not JSON" in scored("llava-bench", **files, reviews=tmp_path / "r.jsonl")

    def test_duplicate_reviews(self, scored: Any, runs: list[Path], tmp_path: Path) -> None:
        assert f"{runs[0]}: duplicate" in scored("llava-bench", reviews=[runs[0], runs[0]])
        (tmp_path / "r.jsonl").write_text(runs[0].read_text() + runs[1].read_text())
        assert "r.jsonl:61: duplicate review '0'" in scored("llava-bench", reviews=tmp_path / "r.jsonl")

    def test_reviews_of_another_category_or_reference(
        self, scored: Any, files: dict[str, Path], runs: list[Path], lines: Any
    ) -> None:
        rows = [json.loads(row) for row in runs[0].read_text().splitlines()]
        shifted = [{**row, "question_id": (row["question_id"] + 1) % 60} for row in rows]
        assert "r.jsonl:60: a review of category 'complex'" in scored(
            "llava-bench", **files, reviews=lines("r.jsonl", shifted)
        )
        rows[7]["answer1_id"] = "other"
        assert "r.jsonl:8: a review of another reference" in scored(
            "llava-bench", **files, reviews=lines("r.jsonl", rows)
        )

    def test_a_missing_image_description(
        self, scored: Any, files: dict[str, Path], runs: list[Path], lines: Any
    ) -> None:
        rows = files["context"].read_text().splitlines()[:-1]
        files["context"] = lines("c.jsonl", map(json.loads, rows))
        assert "c.jsonl: no entry for the image of question" in scored("llava-bench", **files, reviews=runs[0])


def test_the_questions_of_both_benchmarks(real: Path, files: dict[str, Path]) -> None:
    wild = LlavaBench(LlavaBenchOptions(**files))
    assert isinstance(wild, Judged)
    coco = LlavaBench(
        LlavaBenchOptions(
            questions=real / "llava/qa90_questions.jsonl",
            context=real / "llava/caps_boxes_coco2014_val_80.jsonl",
            reference=real / "llava/qa90_gpt4_answer.jsonl",
        )
    )
    for task, count in ((wild, 60), (coco, 90)):
        questions = list(task.questions())
        assert len(questions) == count
        assert all(each.reference and each.turns[0].images for each in questions)
        assert task.reviews() == []
    assert [each.category for each in questions[:3]] == ["conv", "detail", "complex"]


class TestOtherFiles:
    """Vicuna's reviews, categories of other benchmarks, files without the judge's text."""

    def test_reviews_without_categories_or_texts(self, scored: Any, lines: Any) -> None:
        vicuna = [
            {"question_id": at, "text": f"{a} {b}\nAssistant 1 …", "score": [a, b]}
            for at, (a, b) in enumerate([(8, 9), (9.5, 7)])
        ]
        report = scored("llava-bench", reviews=lines("r.jsonl", vicuna))
        assert list(report["scores"]) == ["all"]
        assert report["scores"]["all"]["relative"] == pytest.approx(100 * 16 / 17.5)
        bare = [{"question_id": 1, "category": "conv", "tuple": [8, 4.0]}, {"question_id": 2, "tuple": [-1, -1]}]
        report = scored("llava-bench", reviews=lines("r.jsonl", bare))
        assert report["scores"]["all"]["relative"] == pytest.approx(100 * 3 / 7)
        assert (report["failed"], report["scores"]["conv"]["n"]) == (1, 1)
        assert "r.jsonl:1: missing `content`" in scored(
            "llava-bench", reviews=lines("r.jsonl", [{"question_id": 1, "tuple": [8, "4"]}])
        )

    def test_other_categories(self, scored: Any, lines: Any) -> None:
        rows = [
            {"question_id": at, "category": kind, "content": "8 4"}
            for at, kind in enumerate(("writing", "complex", "generic", "conv"))
        ]
        scores = scored("llava-bench", reviews=lines("r.jsonl", rows))["scores"]
        assert list(scores) == ["all", "conv", "complex", "generic", "writing"]

    def test_the_text_counts_and_different_stored_scores_are_reported(self, lines: Any, tmp_path: Path) -> None:
        row = {"question_id": 1, "category": "conv", "content": "8 4", "tuple": [1, 1]}
        reviews = lines("r.jsonl", [row, row | {"question_id": 2, "tuple": [8, 4]}])
        result = run_cli("eval", "llava-bench", "-t", f"reviews={reviews}", "--json", cwd=tmp_path)
        assert result.json()["scores"]["all"]["relative"] == 50
        for detail in ("r.jsonl", "question '1'", "`stored`"):
            assert detail in result.stderr

    def test_stored_scores(self, scored: Any, lines: Any) -> None:
        """Vicuna's verdicts about mathematics start with a solution: their scores were entered by hand."""
        rows = [
            {"question_id": 1, "text": "First, I will solve it.", "score": [10, 6]},
            {"question_id": 2, "content": "8 4", "tuple": [-1, -1]},
            {"question_id": 3, "content": "9 9"},
        ]
        report = scored("llava-bench", "--protocol", "stored", reviews=lines("r.jsonl", rows))
        assert report["scores"]["all"]["relative"] == pytest.approx(100 * (6 - 1 + 9) / (10 - 1 + 9))
        assert report["failed"] == 1

    def test_reviews_of_other_answers(self, scored: Any, real: Path, runs: list[Path], lines: Any) -> None:
        answers = real / "llava-bench/answers_llava-v1.5-7b.jsonl"
        assert scored("llava-bench", "--answers", answers, reviews=runs)["n"] == 60
        rows = [json.loads(row) for row in answers.read_text().splitlines()]
        rows[7]["answer_id"] = "other"
        error = scored("llava-bench", "--answers", lines("a.jsonl", rows), reviews=runs)
        assert "eval1.jsonl:8: a review of another answer; 1 of 60" in error
        error = scored("llava-bench", "--answers", lines("a.jsonl", rows[:-1]), reviews=runs)
        assert "eval1.jsonl: 1 reviewed answers are missing, the first is to '59'" in error
