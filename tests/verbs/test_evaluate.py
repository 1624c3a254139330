"""``llavactl eval`` with a model: resuming, limits, baselines, pages of cases; and comparisons."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.hashes import hash_json
from llavactl.core.paths import exclusive_lock
from llavactl.evaluation.answers import read_answers
from llavactl.evaluation.identity import result_digest
from llavactl.testing import run_cli

SCENES = ("-t", "scenes=3")


@pytest.fixture(scope="module")
def trained(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy recipe with a model trained for one step."""
    folder = tmp_path_factory.mktemp("trained") / "toy"
    shutil.copytree(toys, folder)
    short = ("-o", "features.mode=live", "-o", "stage1.max_steps=1", "-o", "eval.max_new_tokens=4")
    assert run_cli("train", "--stage", "1", *short, cwd=folder).exit_code == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "toy"
    shutil.copytree(trained, folder)
    return folder


def evaluate(folder: Path, *arguments: str, code: int = 0) -> Any:
    options = ("-o", "eval.max_new_tokens=4", "-o", "eval.blind_baseline=false", "--json")
    result = run_cli("eval", "scenes", *SCENES, *options, *arguments, cwd=folder)
    assert result.exit_code == code, result.stderr
    return result.json() if code == 0 else result.stderr


def answer_lines(folder: Path) -> list[str]:
    (file,) = (folder / "runs/toy/eval/answers").glob("scenes-*.jsonl")
    return file.read_text().splitlines()


def test_sample_answers_have_maps_in_the_report(run: Path) -> None:
    """They are added to a finished evaluation as well, and computed once."""
    file, page = run / "runs/toy/eval/examples/scenes.json", run / "runs/toy/report.html"
    evaluate(run)
    assert not any("maps" in row for row in json.loads(file.read_text()))
    evaluate(run, "-o", "eval.explain=2")
    rows = json.loads(file.read_text())
    answered = [row for row in rows[:2] if row["answer"]]
    assert answered
    for row in answered:
        assert all(each["word"] in row["answer"] for each in row["maps"])
        assert all(each["attention"] and each["occlusion"] for each in row["maps"])
        assert row["maps"][0]["occlusion"] in page.read_text()
    assert not any("maps" in row for row in rows[2:])
    before = file.stat().st_mtime_ns
    evaluate(run, "-o", "eval.explain=2")
    assert file.stat().st_mtime_ns == before


def test_a_limited_evaluation_is_extended_to_all_questions(run: Path) -> None:
    limited = evaluate(run, "--limit", "4")
    assert limited["n"] == 4
    assert len(answer_lines(run)) == 4
    assert not (run / "runs/toy/eval/scenes.json").exists()
    assert json.loads((run / "runs/toy/eval/limited/scenes.json").read_text())["n"] == 4
    before = answer_lines(run)
    complete = evaluate(run)
    assert (complete["n"], complete["ignored"], complete["finished_before"]) == (18, 0, False)
    assert answer_lines(run)[:4] == before
    assert len(answer_lines(run)) == 18
    assert evaluate(run)["finished_before"] is True
    assert evaluate(run, "--limit", "4")["finished_before"] is True
    assert evaluate(run, "--limit", "5")["n"] == 5


def test_the_blind_baseline_does_not_depend_on_the_limit(run: Path) -> None:
    blind = ("-o", "eval.blind_baseline=true")
    evaluate(run, *blind, "--limit", "7")
    limited = {file.name: file.read_text().splitlines() for file in (run / "runs/toy/eval/answers").glob("*.jsonl")}
    assert sorted(map(len, limited.values())) == [7, 7]
    shutil.rmtree(run / "runs/toy/eval")
    evaluate(run, *blind)
    for name, lines in limited.items():
        assert set(lines) <= set((run / "runs/toy/eval/answers" / name).read_text().splitlines())


def test_the_blind_baseline_is_omitted_for_a_single_image(run: Path) -> None:
    words = ("eval", "scenes", "-t", "scenes=2", "-o", "eval.max_new_tokens=2", "--json")
    baselines = run_cli(*words, cwd=run).json()["baselines"]
    assert set(baselines["blind baseline"]) >= {"accuracy"}
    one = [{"question_id": at, "image": "images/0.png", "text": f"{at}?", "label": "yes"} for at in range(2)]
    shutil.copy(min((run / "images").iterdir()), run / "images/0.png")
    (run / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in one))
    words = ("eval", "pope", "-t", "questions=q.jsonl", "-o", "eval.max_new_tokens=2", "--json")
    assert run_cli(*words, cwd=run).json()["baselines"] == {}


def test_a_result_of_an_earlier_version_is_recognized(run: Path) -> None:
    """Earlier versions stored the blind baseline as "blind twin" under "beside"."""
    words = ("eval", "scenes", "-t", "scenes=2", "-o", "eval.max_new_tokens=2", "--json")
    report = run_cli(*words, cwd=run).json()
    file = run / "runs/toy/eval/scenes.json"
    stored = json.loads(file.read_text())
    stored["beside"] = {"blind twin": stored.pop("baselines")["blind baseline"]}
    file.write_text(json.dumps(stored))
    again = run_cli(*words, cwd=run).json()
    assert again == {**report, "finished_before": True}


def test_digests_of_the_baselines_keep_their_names() -> None:
    """Digests are stored with results: other names would make every stored result outdated."""
    digests = {"": "a", "blind baseline": "b", "stage 1": "c"}
    assert result_digest(digests, []) == hash_json([{"": "a", "blind twin": "b", "stage 1": "c"}, []])


def test_a_truncated_answer_file_is_resumed(run: Path) -> None:
    complete = evaluate(run)
    (file,) = (run / "runs/toy/eval/answers").glob("scenes-*.jsonl")
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    (run / "runs/toy/eval/scenes.json").unlink()
    assert evaluate(run)["scores"] == complete["scores"]
    assert len(read_answers(file)) == 18


def test_cases_show_the_worst_answers_with_images(run: Path) -> None:
    evaluate(run)
    folder = run / "runs/toy/eval/cases"
    page, markdown = (folder / "scenes.html").read_text(), (folder / "scenes.md").read_text()
    assert markdown.count("\n## ") == 2  # worst and random answers
    assert page.count("data:image/jpeg;base64,") >= 18
    images = [line[5:-2] for line in markdown.splitlines() if line.startswith("![](<")]
    assert len(images) >= 18
    assert all((folder / image).is_file() for image in images)
    assert '<a href="eval/cases/scenes.html">' in (run / "runs/toy/report.html").read_text()
    evaluate(run, "--cases", "elsewhere")
    assert (run / "elsewhere/scenes.md").read_text() == markdown


def test_markup_in_answers_is_escaped_in_cases(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script> ![](http://x) | `x`\n# no title\n</div>"
    rows = [{"question_id": at, "image": f"{at}.jpg", "text": f"Is it {evil}?", "label": "yes"} for at in range(3)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"id": at, "text": f"no {evil}"}) + "\n" for at in range(3)))
    answers = ("--answers", "a.jsonl", "-t", "questions=q.jsonl")
    assert run_cli("eval", "pope", *answers, "--cases", "cases", cwd=tmp_path).exit_code == 0
    page, markdown = ((tmp_path / f"cases/pope.{kind}").read_text() for kind in ("html", "md"))
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    for line in markdown.splitlines():
        assert line.startswith("    ") or not any(mark in line for mark in ("<script", "![](http", "# no"))


def test_a_second_evaluation_at_the_same_time_is_refused(run: Path) -> None:
    evaluate(run, "--limit", "2")
    (lock,) = (run / "runs/toy/eval/answers").glob(".scenes-*.lock")
    with exclusive_lock(lock, ValueError()):
        assert "another process" in evaluate(run, code=1)


def test_missing_images_are_reported_before_the_model_is_loaded(run: Path) -> None:
    rows = [{"question_id": at, "image": f"{at}.jpg", "text": "Is it?", "label": "yes"} for at in range(3)]
    (run / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run_cli("eval", "pope", "-t", "questions=q.jsonl", cwd=run)
    assert result.exit_code == 1
    for detail in ("3 of 3", "0.jpg: No such file or directory", "images=FOLDER"):
        assert detail in result.stderr
    assert not list((run / "runs/toy/eval/answers").glob("*.jsonl"))


def test_invalid_images_are_reported_before_the_model_is_loaded(run: Path) -> None:
    (run / "q").mkdir()
    (run / "q/page.jpg").write_text("<!DOCTYPE html>")
    (run / "q/link.jpg").symlink_to(run / "images/photo-000.jpg")
    for name, reason in (("page.jpg", "HTML"), ("link.jpg", "follow_links=true")):
        row = {"question_id": 1, "image": name, "text": "Is it?", "label": "yes"}
        (run / "q/q.jsonl").write_text(json.dumps(row))
        result = run_cli("eval", "pope", "-t", "questions=q/q.jsonl", cwd=run)
        assert result.exit_code == 1
        assert reason in result.stderr
        assert not list((run / "runs/toy/eval/answers").glob("*.jsonl"))
    assert run_cli("eval", "pope", "-t", "questions=q/q.jsonl", "-t", "follow_links=true", cwd=run).exit_code == 0


def test_a_question_beyond_the_context_is_reported_before_the_first_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"question_id": "long", "image": "images/photo-000.jpg", "text": "Is it?", "label": "yes"}
    (run / "q.jsonl").write_text(json.dumps(row))
    monkeypatch.setattr("llavactl.chat.context.context_length", lambda _language: 3)
    result = run_cli("eval", "pope", "-t", "questions=q.jsonl", cwd=run)
    assert result.exit_code == 1
    assert "question long " in result.stderr
    assert not list((run / "runs/toy/eval/answers").glob("*.jsonl"))


class TestCompare:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        """20 questions; `a` answers the first 10 correctly, `b` all but the last two."""
        rows = [{"question_id": at, "image": "x.jpg", "text": f"{at}?", "label": "yes"} for at in range(20)]
        (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        for name, right in (("a", 10), ("b", 18)):
            answers = [{"id": at, "text": "yes" if at < right else "no"} for at in range(20)]
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        return tmp_path

    def compare(self, folder: Path, *candidates: str) -> Any:
        words = [word for each in candidates for word in ("--compare", each)]
        return run_cli("eval", "pope", "-t", "questions=q.jsonl", "--json", *words, cwd=folder)

    def test_files(self, files: Path) -> None:
        report = self.compare(files, "a.jsonl", "b.jsonl").json()
        assert [each["scores"]["accuracy"] for each in report["candidates"]] == [50, 90]
        (pair,) = report["pairs"]
        assert (pair["a"], pair["b"], pair["only_a"], pair["only_b"]) == ("a.jsonl", "b.jsonl", 0, 8)
        assert pair["difference"] == pytest.approx(40)
        assert pair["interval"][0] > 15
        assert pair["p"] == 2 / 2**8

    def test_fewer_than_two_candidates_are_refused(self, files: Path) -> None:
        for candidates in (["a.jsonl"], ["a.jsonl", "a.jsonl"]):
            result = self.compare(files, *candidates)
            assert result.exit_code == 1
            assert "--compare A --compare B" in result.stderr

    def test_runs(self, run: Path) -> None:
        evaluate(run)
        shutil.copytree(run / "runs/toy", run / "runs/other")
        (file,) = (run / "runs/other/eval/answers").glob("*.jsonl")
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**row, "text": "yes"}) + "\n" for row in rows))
        report = evaluate(run, "--compare", "runs/toy", "--compare", "runs/other")
        assert report["n"] == 18
        assert (
            report["candidates"][0]["scores"] == json.loads((run / "runs/toy/eval/scenes.json").read_text())["scores"]
        )
        assert report["pairs"][0]["only_b"] > 0
        refused = evaluate(run, "--compare", "runs/toy", "--compare", ".", code=1)
        assert "llavactl eval scenes -r ./recipe.yaml" in refused

    def test_a_judged_task_is_refused(self, files: Path) -> None:
        (files / "r.jsonl").write_text('{"question_id": 1, "category": "conv", "content": "8 9"}')
        words = ("--compare", "a.jsonl", "--compare", "b.jsonl", "-t", "reviews=r.jsonl")
        result = run_cli("eval", "llava-bench", *words, cwd=files)
        assert result.exit_code == 1
        assert "llava-bench can't be compared" in result.stderr
