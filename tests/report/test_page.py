"""report.html of finished, unfinished, damaged and malicious runs."""

import json
import re
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from llavactl.report.page import write_report
from llavactl.report.thumbnails import data_uri

PIXEL = data_uri(b"\xff\xd8\xff", "jpeg")
HOSTILE = "</pre></td><script>alert(1)</script><img src=x onerror=alert(1)>\" onload='alert(1)"


class Page(HTMLParser):
    """The parsed page: tags, attributes, text; unbalanced tags are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str | None]] = []
        self.text, self._open = "", list[str]()
        self.feed(html)
        assert not self._open, f"unclosed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += attrs
        if tag not in ("meta", "img", "source"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def images(self) -> list[str]:
        return [value or "" for name, value in self.attributes if name in ("src", "srcset")]


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def page(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text())


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "demo"
    vision, language = "{name: clip, model: openai/clip-vit}", "{name: hf, model: /models/vicuna-7b}"
    write(
        folder / "recipe.yaml",
        f"name: my-run\nvision: {vision}\nconnector: {{name: linear}}\nlanguage: {language}\n",
    )
    for stage in ("stage1", "stage2"):
        lines = [{"step": step, "loss": 3.0 / step, "tokens": 9, "learning_rate": 1e-3} for step in range(1, 9)]
        text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 8, "val_loss": 0.4}])
        write(folder / stage / "metrics.jsonl", text)
        report = {"stage": 1, "steps": 8, "samples": 640, "seconds": 95.2, "tokens_per_s": 1234.5, "loss": 0.375}
        write(
            folder / stage / "report.json", {**report, "val_loss": 0.4, "validation_samples": 2, "skipped_samples": 0}
        )
        answers = [("What is it?", "A cat.", "a cat"), ("How many?", "Two.", "Three.")]
        rows = [{"image": "a.jpg", "question": q, "reference": r, "answer": a} for q, r, a in answers]
        write(folder / stage / "samples.json", [{**rows[0], "thumbnail": PIXEL}, {**rows[1], "thumbnail": ""}])
    scores = {"accuracy": 61.25, "unparsed": 1, "chance": {"accuracy": 33.5}}
    write(folder / "eval/scenes.json", {"task": "scenes", "protocol": "exact", "n": 400, "scores": scores, "failed": 3})
    write(
        folder / "skipped.jsonl",
        "".join(json.dumps({"image": f"{i}.jpg", "reason": "empty"}) + "\n" for i in range(25)),
    )
    return folder


def test_a_finished_run_is_on_the_page(run_dir: Path) -> None:
    shown = page(run_dir)
    for text in ("my-run", "clip-vit", "vicuna-7b", "Stage 1", "Stage 2", "finished", "640", "1 min 35 s", "0.375"):
        assert text in shown.text
    for text in ("What is it?", "a cat ✓", "Three.", "61.2", "33.5", "400 questions · 3 failed · protocol exact"):
        assert text in shown.text
    for text in ("25 could not be read", "19.jpg", "and 5 more", "transformers", "Python", "name: linear"):
        assert text in shown.text
    assert "20.jpg" not in shown.text
    assert shown.images.count(PIXEL) == 2


def test_times_and_suggestions_are_on_the_page(run_dir: Path) -> None:
    write(run_dir / "times.json", {"extract": 30.0, "stage 1": 95.0, "odd": "later"})
    recipe = run_dir / "recipe.yaml"
    recipe.write_text(recipe.read_text() + "try_next: [try <this> first]\n")
    shown = page(run_dir)
    for text in ("30 s", "1 min 35 s", "total", "2 min 5 s", "try <this> first"):
        assert text in shown.text
    assert "later" not in shown.text


def test_a_task_shows_sample_answers(run_dir: Path) -> None:
    row = {"image": "b.png", "thumbnail": PIXEL, "question": "Which colour?", "reference": "Red.", "answer": "Blue."}
    write(run_dir / "eval/examples/scenes.json", [row])
    shown = page(run_dir)
    assert "Which colour?" in shown.text
    assert shown.images.count(PIXEL) == 3


def test_maps_of_words_are_shown_beside_the_answer(run_dir: Path) -> None:
    maps = [
        {"word": "<b>Blue", "attention": PIXEL, "occlusion": PIXEL},
        {"word": "sky", "attention": "", "occlusion": "https://example.org/x.png"},
        "no map",
    ]
    row = {"image": "b.png", "thumbnail": PIXEL, "question": "?", "reference": "", "answer": "Blue", "maps": maps}
    write(run_dir / "eval/examples/scenes.json", [row])
    shown = page(run_dir)
    assert "<b>Blue" in shown.text
    assert shown.images.count(PIXEL) == 5
    assert not any("example.org" in image for image in shown.images)


def test_intervals_and_baselines_are_columns(run_dir: Path) -> None:
    report = json.loads((run_dir / "eval/scenes.json").read_text())
    baselines = {"blind baseline": {"accuracy": 34.5, "chance": {"accuracy": 1.0}}, "stage 1": {"accuracy": 20.25}}
    write(run_dir / "eval/scenes.json", {**report, "interval": {"accuracy": [1.4e-15, 65.04]}, "baselines": baselines})
    html = write_report(run_dir).read_text()
    columns = re.findall(r'<th class="number">(.*?)</th>', html)
    cells = re.findall(r'<td class="number">(.*?)</td>', html)
    assert columns == ["score", "95 % interval", "chance", "blind baseline", "stage 1"]
    assert cells[:5] == ["61.2", "0 to 65.0", "33.5", "34.5", "20.2"]


def test_a_task_with_groups_only_has_no_empty_rows(run_dir: Path) -> None:
    groups = {"all": {"relative": 80.0}, "conv": {"relative": 75.0}}
    write(run_dir / "eval/scenes.json", {"task": "llava-bench", "scores": groups, "interval": {}, "baselines": {}})
    assert re.findall(r"<tr><td>(.*?)</td>", write_report(run_dir).read_text())[:3] == ["all", "conv", "0.jpg"]


def test_the_page_is_self_contained(run_dir: Path) -> None:
    html = write_report(run_dir).read_text()
    shown = Page(html)
    assert all(image.startswith("data:image/") for image in shown.images)
    assert shown.tags["script"] == shown.tags["link"] == shown.tags["iframe"] == 0
    assert "http://" not in html
    assert "https://" not in html
    assert "default-src 'none'" in html


def test_both_color_schemes_have_a_loss_curve(run_dir: Path) -> None:
    shown = page(run_dir)
    curves = [image for image in shown.images if image.startswith("data:image/png")]
    assert len(curves) == len(set(curves)) + 2 == 4, "two stages with the same losses, each light and dark"


def test_without_matplotlib_the_page_names_the_extra(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    shown = page(run_dir)
    assert not [image for image in shown.images if image.startswith("data:image/png")]
    assert shown.text.count("llavactl[plots]") == 2
    assert "61.2" in shown.text


def test_malicious_text_is_escaped(run_dir: Path) -> None:
    clean = page(run_dir)
    row = dict.fromkeys(("image", "question", "reference", "answer"), HOSTILE)
    for stage in ("stage1", "stage2"):
        rows = [{**row, "thumbnail": PIXEL}, {**row, "thumbnail": 'data:image/png;base64,A" onerror="alert(1)'}]
        write(run_dir / stage / "samples.json", rows)
        write(run_dir / stage / "report.json", {HOSTILE: HOSTILE, "steps": HOSTILE, "validation_samples": 2})
    write(run_dir / "recipe.yaml", json.dumps({"name": HOSTILE, "connector": {"name": HOSTILE, "model": HOSTILE}}))
    task = {"task": HOSTILE, "protocol": HOSTILE, "n": 1, "scores": {HOSTILE: 1.0, "group": {HOSTILE: HOSTILE}}}
    write(run_dir / "eval/scenes.json", task)
    write(run_dir / "eval/examples/scenes.json", [row])
    write(run_dir / "skipped.jsonl", json.dumps({"image": HOSTILE, "reason": HOSTILE}) + "\n")
    shown = page(run_dir)
    assert shown.tags["script"] == 0
    assert shown.tags["img"] == clean.tags["img"]
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    assert shown.text.count("<script>alert(1)</script>") > 15


def test_an_unfinished_stage_shows_its_step(run_dir: Path) -> None:
    for name in ("report.json", "samples.json"):
        (run_dir / "stage2" / name).unlink()
    (run_dir / "eval/scenes.json").unlink()
    shown = page(run_dir)
    assert "at step 8" in shown.text
    assert "61.2" not in shown.text


def test_before_the_first_step(tmp_path: Path) -> None:
    shown = page(tmp_path / "fresh")
    assert "fresh" in shown.text
    assert "Stage 1" not in shown.text


def test_answers_to_training_samples_are_labeled(run_dir: Path) -> None:
    assert "validation samples" in page(run_dir).text
    write(run_dir / "stage2/report.json", {"steps": 8, "validation_samples": 0})
    assert "training samples" in page(run_dir).text


BROKEN = [
    "",
    "{",
    "null",
    "[]",
    "[[1], 2]",
    '{"scores": 7}',
    '{"scores": {"a": {}}}',
    '{"step": "x"}',
    "\x00\xff",
    "1e999",
]


@pytest.mark.parametrize("text", BROKEN)
def test_damaged_files_are_no_error(run_dir: Path, text: str) -> None:
    for file in [file for file in run_dir.rglob("*") if file.is_file()]:
        file.write_text(text)
    assert page(run_dir).text


def test_evaluations_during_training(run_dir: Path) -> None:
    stage = run_dir / "stage2"
    lines = [{"step": step, "scores": {"pope.f1": 60.0 + step, "pope.<n>": step}} for step in (3, 6)]
    with (stage / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 8, "scores": {}}, {"scores": 7}]))
    for step in (3, 6):
        rows = [{"question": "A dog?", "answer": f"yes <{step}>"}, {"question": "A cat?", "answer": "no"}]
        write(stage / f"samples/step-{step:08d}.json", rows)
    write(stage / "samples/step-00000008.json", "[{broken")
    text = page(run_dir).text
    for shown in ("pope.f1", "pope.<n>", "63.0", "66.0", "step 3", "step 8", "A dog?", "yes <3>", "yes <6>"):
        assert shown in text
