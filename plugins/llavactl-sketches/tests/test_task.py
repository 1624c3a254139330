"""The task: its questions, scores of good, bad and hostile answers, and which comparison is used."""

import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from llavactl_sketches import browser as browsers
from llavactl_sketches import task as tasks
from llavactl_sketches.answers import MAX_ANSWER, Found
from llavactl_sketches.browser import Browser, Measured
from llavactl_sketches.layout import place
from llavactl_sketches.pages import Page
from llavactl_sketches.source import SketchesOptions, sketches
from llavactl_sketches.task import NAMES, SketchToHtml, SketchToHtmlOptions

from llavactl import Answer, LlavactlError, RecipeError, Scores


def create(**options: Any) -> SketchToHtml:
    return SketchToHtml(SketchToHtmlOptions(**{"count": 10, "browser": "none", **options}))


def score(task: SketchToHtml, texts: dict[str, str], protocol: str | None = None) -> Scores:
    answers = {name: Answer(name, text) for name, text in texts.items()}
    return task.score(answers, protocol or task.protocols[0])


class DrawnBrowser(Browser):
    """Answers with the positions of ``layout``, for pages of the task only."""

    def __init__(self, pages: list[Page]) -> None:
        super().__init__("none", 1)
        object.__setattr__(self, "pages", {page.html: page for page in pages})

    def measure(self, pages):
        measured = []
        for body in pages:
            page = self.pages.get(body.strip())
            found = tasks._reference(page) if page else []
            measured.append(Measured(tuple(found), len(found)))
        return measured


@pytest.fixture
def rendered() -> SketchToHtml:
    task = create()
    task.browser = DrawnBrowser([page for page, _ in task._sketches()])
    task.protocols = ("rendered", "dom")
    return task


def test_questions_are_those_of_the_test_split():
    task = create(prompt="HTML?", language="de")
    questions = list(task.questions())
    samples = list(sketches(SketchesOptions(count=10, split="test", prompt="HTML?", language="de")))
    assert [question.turns[0] for question in questions] == [sample.turns[0] for sample in samples]
    assert [question.reference for question in questions] == [sample.turns[1].text for sample in samples]
    assert {question.category for question in questions} == {"column", "columns", "sidebar", "cards", "form"}


@pytest.mark.parametrize("protocol", NAMES)
def test_references_score_100(rendered: SketchToHtml, protocol: str):
    questions = list(rendered.questions())
    result = score(rendered, {question.id: question.reference for question in questions}, protocol)
    assert [result.scores[name] for name in NAMES[protocol]] == [pytest.approx(100)] * 4
    assert result.scores["n"] == 10
    assert result.scores["form"] == {NAMES[protocol][0]: 100, NAMES[protocol][1]: 100, "n": 2}
    assert result.failed == 0
    assert set(result.grades.values()) == {1.0}
    assert all(result.right.values())
    assert result.about == {NAMES[protocol][2]: [question.id for question in questions]}


@pytest.mark.parametrize("protocol", NAMES)
@pytest.mark.parametrize("answer", ["", "no idea", "<p>" + "x" * MAX_ANSWER, "<div></div>", "<!doctype html>"])
def test_answers_without_elements_score_0(rendered: SketchToHtml, protocol: str, answer: str):
    result = score(rendered, {question.id: answer for question in rendered.questions()}, protocol)
    assert [result.scores[name] for name in NAMES[protocol]] == [0, 0, 0, 0]
    assert result.failed == (0 if answer.startswith(("<d", "<!")) else 10)
    assert set(result.grades.values()) == {0.0}


def test_scores_cover_the_answers_that_are_given():
    task = create()
    first = next(iter(task.questions()))
    result = score(task, {first.id: first.reference})
    assert (result.scores["n"], result.scores["structure"]) == (1, 100)
    assert [name for name in ("column", "form") if name in result.scores] == ["column"]


def test_hostile_answers_are_compared_without_a_browser():
    answers = [
        "<div>" * 19_000,
        "<p>" * 33_000,
        "<ul><li>" * 12_000,
        "<script>" * 9000,
        "<!--" * 20_000,
        "<p " + "a " * 49_000,
    ]
    task = create(count=len(answers))
    result = score(task, {question.id: text for question, text in zip(task.questions(), answers, strict=True)})
    assert 0 <= result.scores["structure"] < 1


def test_the_names_of_the_two_comparisons_differ():
    assert not set(NAMES["rendered"]) & set(NAMES["dom"])


def program(folder: Path, name: str, output: str) -> str:
    """A program that prints ``output`` and ignores its arguments."""
    file = folder / name
    file.write_text(f"#!{sys.executable}\nprint({output!r})\n", encoding="utf-8")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return str(file)


def test_the_browser_option_decides_the_protocols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert create().protocols == create(browser="auto").protocols == ("dom",)
    chromium = program(tmp_path, "chromium", "")
    assert create().protocols == ("dom",)
    for task in (create(browser="auto"), create(browser=chromium), create(browser="chromium")):
        assert task.protocols == ("rendered", "dom")
        assert task.browser == Browser(chromium, 30)
    with pytest.raises(RecipeError, match="firefox"):
        create(browser="firefox")


def test_a_browser_that_shows_nothing_is_an_error_not_a_score(tmp_path: Path):
    task = create(browser=program(tmp_path, "chromium", "<html></html>"))
    with pytest.raises(LlavactlError, match="can't show a page"):
        score(task, {question.id: question.reference for question in task.questions()})


def test_a_page_that_fails_is_found_by_halves(monkeypatch: pytest.MonkeyPatch):
    starts: list[int] = []

    def start(_: Browser, pages: list[str]) -> tuple[list[Measured] | None, str]:
        starts.append(len(pages))
        return (None, "crashed") if "bomb" in pages else ([Measured((), len(page)) for page in pages], "")

    monkeypatch.setattr(Browser, "_start", start)
    pages = ["a", "bb", "bomb", *["ccc"] * 20]
    counts = [each and each.count for each in Browser("chromium", 1).measure(pages)]
    assert counts == [None if page == "bomb" else len(page) for page in pages]
    assert sum(starts) < 60


def test_the_document_of_answers_cannot_be_left():
    """Answers are data of a script; no character ends it."""
    hostile = '</script><script>alert(1)</script><!--" \u2028'
    document = browsers._document([hostile])
    assert document.count("<script") == document.count("</script>") == 2
    assert "alert" in document
    assert browsers._document([hostile]) != document, "the nonce is new each time"


def test_references_are_the_elements_with_kinds():
    task = create()
    for page, _ in task._sketches():
        reference = tasks._reference(page)
        assert all(isinstance(item, Found) for item in reference)
        assert len(reference) == sum(item.tag not in ("article", "form") for item in place(page.body))
