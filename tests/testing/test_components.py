"""Every built-in component passes the kit, with the fewest options that it needs; every plugin is tested with it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.protocols import KINDS, Request
from llavactl.core.registry import registry
from llavactl.core.schema import Sample, Turn
from llavactl.testing import CHECKS, check_teacher, toy_endpoint, toy_photos, toy_requests

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"

COMPONENTS = [(entry.kind, entry.name) for entry in registry() if entry.plugin == "llavactl" and entry.kind in KINDS]

Options = Callable[[Path, Path], Mapping[str, Any]]
"""The options of a component, for an empty folder and the folder of the toys."""


def _json(file: Path, value: Any) -> Path:
    file.write_text(json.dumps(value), encoding="utf-8")
    return file


def _jsonl(file: Path, records: list[Any]) -> Path:
    file.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return file


def _image_folder(folder: Path, _toys: Path) -> Mapping[str, Any]:
    for photo in toy_photos(folder, 2):
        photo.with_suffix(".txt").write_text("A photo.", encoding="utf-8")
    return {"path": folder}


def _replies(folder: Path, _toys: Path) -> Mapping[str, Any]:
    replies = [{"id": request.id, "reply": f"About {request.id}."} for request in toy_requests()]
    return {"path": _jsonl(folder / "replies.jsonl", replies)}


def _problems(key: str, folder: Path, _toys: Path) -> Mapping[str, Any]:
    problem = {"question": "?", "choices": ["a", "b"], "answer": 0, "image": None, "split": "train", "hint": ""}
    about = {"subject": "natural science", "grade": "grade2", "lecture": "", "solution": ""}
    return {key: _json(folder / "problems.json", {"1": {**problem, **about}}), "split": "train"}


def _choices(folder: Path, toys: Path) -> Mapping[str, Any]:
    question = {"index": 1, "question": "?", "A": "a", "B": "b", "answer": "A", "image": "photo-000.jpg"}
    return {"questions": _jsonl(folder / "questions.jsonl", [question]), "images": toys / "images"}


def _questions(folder: Path, toys: Path, **fields: Any) -> Mapping[str, Any]:
    question = {"question_id": 1, "image": "photo-000.jpg", "text": "?", **fields}
    return {"questions": _jsonl(folder / "questions.jsonl", [question]), "images": toys / "images"}


def _judged(folder: Path, toys: Path) -> Mapping[str, Any]:
    questions = _questions(folder, toys, category="conv")
    answer = {"question_id": 1, "text": "yes"}
    return {**questions, "reference": _jsonl(folder / "reference.jsonl", [answer])}


def _pairs(folder: Path, toys: Path) -> Mapping[str, Any]:
    against = _jsonl(folder / "answers.jsonl", [{"question_id": 1, "text": "no"}])
    return {**_questions(folder, toys), "against": against, "judge": {"name": "rules"}}


def _mme(folder: Path, _toys: Path) -> Mapping[str, Any]:
    (folder / "OCR.txt").write_text("image.jpg\tIs it?\tYes\nimage.jpg\tIsn't it?\tNo\n", encoding="utf-8")
    return {"questions": folder}


def _vqa(folder: Path, _toys: Path) -> Mapping[str, Any]:
    question, people = {"question_id": 1, "image_id": 7, "question": "?"}, [{"answer": "yes"}] * 10
    annotations = {"annotations": [{"question_id": 1, "image_id": 7, "answers": people}]}
    return {
        "questions": _json(folder / "questions.json", {"questions": [question]}),
        "annotations": _json(folder / "annotations.json", annotations),
    }


def _textvqa(folder: Path, _toys: Path) -> Mapping[str, Any]:
    record = {"question_id": 1, "image_id": "a", "question": "?", "answers": ["yes"] * 10}
    return {"questions": _json(folder / "questions.json", {"data": [record]})}


EXAMPLES: Mapping[tuple[str, str], Options] = {
    ("sources", "caps-boxes"): lambda _folder, _toys: {"path": FIXTURES / "caps_boxes.jsonl"},
    ("sources", "coco"): lambda _folder, _toys: {"captions": FIXTURES / "coco_captions.json"},
    ("sources", "image-folder"): _image_folder,
    ("sources", "llava-json"): lambda _folder, toys: {"path": toys / "records.json", "images": toys / "images"},
    ("sources", "scenes"): lambda _folder, _toys: {"scenes": 4},
    ("sources", "scienceqa"): partial(_problems, "path"),
    ("vision", "clip"): lambda _folder, toys: {"model": str(toys / "clip")},
    ("languages", "hf"): lambda _folder, toys: {"model": str(toys / "language")},
    ("teachers", "replay"): _replies,
    ("tasks", "chair"): lambda _folder, _toys: {"instances": FIXTURES / "coco_instances.json"},
    ("tasks", "judge-pairs"): _pairs,
    ("tasks", "llava-bench"): _judged,
    ("tasks", "llava-bench-coco"): _judged,
    ("tasks", "mme"): _mme,
    ("tasks", "multiple-choice"): _choices,
    ("tasks", "pope"): partial(_questions, label="yes"),
    ("tasks", "scienceqa"): partial(_problems, "questions"),
    ("tasks", "textvqa"): _textvqa,
    ("tasks", "vqa"): _vqa,
}

APART = {("teachers", "openai"), ("teachers", "transformers")}
"""Components with tests of their own: their replies need an endpoint or short requests."""


@pytest.mark.parametrize(("kind", "name"), sorted({*COMPONENTS} - APART))
def test_a_built_in_component_conforms(kind: str, name: str, toys: Path, tmp_path: Path) -> None:
    folder = tmp_path / "example"
    folder.mkdir()
    options = EXAMPLES.get((kind, name), lambda _folder, _toys: {})(folder, toys)
    assert CHECKS[kind](registry().create(kind, {"name": name, **options})) == []


def test_examples_belong_to_components() -> None:
    assert {*EXAMPLES, *APART} <= {*COMPONENTS}


def _short_requests() -> Iterator[Request]:
    sample = Sample("a", (Turn("user", ("?",)),))
    for index in range(2):
        yield Request(f"a-{index}", "detail", ({"role": "user", "content": f"Describe {index}."},), sample)


def test_the_teacher_openai_conforms() -> None:
    with toy_endpoint() as endpoint:
        spec = {"name": "openai", "model": "m", "base_url": endpoint.url}
        assert check_teacher(registry().create("teachers", spec)) == []
        assert len(endpoint.bodies) == len(list(toy_requests()))


def test_the_teacher_transformers_conforms(toys: Path) -> None:
    spec = {"name": "transformers", "model": str(toys / "language"), "dtype": "float32", "max_tokens": 8}
    assert check_teacher(registry().create("teachers", spec), list(_short_requests())) == []


@pytest.mark.parametrize(
    "plugin", sorted((ROOT / "plugins").glob("*/pyproject.toml")), ids=lambda file: file.parent.name
)
def test_a_plugin_is_tested_with_the_kit(plugin: Path) -> None:
    tests = "".join(file.read_text(encoding="utf-8") for file in (plugin.parent / "tests").glob("test_*.py"))
    assert "check_plugin(" in tests


def test_toys_are_written_without_messages_of_libraries(tmp_path: Path) -> None:
    program = "import sys; from pathlib import Path; from llavactl.testing import toy_clip, toy_language\n"
    program += "toy_clip(Path('clip')); toy_language(Path('language'))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    written = json.loads((tmp_path / "clip" / "preprocessor_config.json").read_text())
    assert written["image_processor_type"] == "CLIPImageProcessor", "loads with torchvision and without"
