"""Images of tasks in a folder, an archive or at a URL, with or without a common top-level folder."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from llavactl.core.registry import registry
from llavactl.core.schema import ImageRef, Turn

IMAGES = {f"{name}.jpg": name.encode() for name in ("cat", "dog", "train/1/image", "COCO_val2014_000000000007")}
PEOPLE = [{"answer": "yes"}] * 10


def in_folder(folder: Path, top: str) -> str:
    for name, data in IMAGES.items():
        file = folder / "images" / top / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    return str(folder / "images" / top)


def in_zip(folder: Path, top: str) -> str:
    with zipfile.ZipFile(folder / "images.zip", "w") as file:
        for name, data in IMAGES.items():
            file.writestr(f"{top}{name}", data)
        file.writestr(f"__MACOSX/{top}._cat.jpg", b"macOS metadata")
    return str(folder / "images.zip")


def in_tar(folder: Path, top: str) -> str:
    with tarfile.open(folder / "images.tar", "w") as file:
        for name, data in IMAGES.items():
            info = tarfile.TarInfo(f"./{top}{name}")
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return str(folder / "images.tar")


def at_url(folder: Path, top: str) -> str:
    packed = Path(in_zip(folder, top))
    fsspec.filesystem("memory").pipe(f"/tasks/{packed.name}", packed.read_bytes())
    return f"memory://tasks/{packed.name}"


def pope(folder: Path) -> dict[str, Any]:
    questions = [
        {"question_id": at, "image": f"{name}.jpg", "text": "?", "label": "yes"}
        for at, name in enumerate(["cat", "dog"])
    ]
    return {"questions": _lines(folder / "questions.jsonl", questions)}


def llava_bench(folder: Path) -> dict[str, Any]:
    questions = [
        {"question_id": at, "image": f"{name}.jpg", "text": "?", "category": "conv"}
        for at, name in enumerate(["cat", "dog"])
    ]
    return {"questions": _lines(folder / "questions.jsonl", questions)}


def multiple_choice(folder: Path) -> dict[str, Any]:
    questions = [{"index": 1, "question": "?", "A": "a", "B": "b", "answer": "A", "image": "cat.jpg"}]
    return {"questions": _lines(folder / "questions.jsonl", questions)}


def vqa(folder: Path) -> dict[str, Any]:
    questions, annotations = folder / "questions.json", folder / "annotations.json"
    questions.write_text(json.dumps({"questions": [{"question_id": 1, "image_id": 7, "question": "?"}]}))
    annotations.write_text(json.dumps({"annotations": [{"question_id": 1, "image_id": 7, "answers": PEOPLE}]}))
    return {"questions": questions, "annotations": annotations}


def chair(folder: Path) -> dict[str, Any]:
    instances = {
        "images": [{"id": 1, "file_name": "cat.jpg"}],
        "categories": [{"id": 1, "name": "cat"}],
        "annotations": [],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return {"instances": folder / "instances.json"}


def scienceqa(folder: Path) -> dict[str, Any]:
    problem = {"question": "?", "choices": ["a", "b"], "answer": 0, "image": "image.jpg", "split": "train"}
    (folder / "problems.json").write_text(
        json.dumps({"1": {**problem, "subject": "natural science", "grade": "grade2"}})
    )
    return {"questions": folder / "problems.json", "split": "train"}


def mme(folder: Path) -> dict[str, Any]:
    (folder / "questions").mkdir()
    (folder / "questions" / "train.txt").write_text("1/image.jpg\tIs it?\tYes\n1/image.jpg\tIsn't it?\tNo\n")
    return {"questions": folder / "questions"}


def _lines(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def images_in(turns: Iterator[Turn]) -> list[ImageRef]:
    return [each for turn in turns for each in turn.content if not isinstance(each, str)]


TASKS: dict[str, tuple[Callable[[Path], dict[str, Any]], list[bytes]]] = {
    "pope": (pope, [b"cat", b"dog"]),
    "llava-bench": (llava_bench, [b"cat", b"dog"]),
    "multiple-choice": (multiple_choice, [b"cat"]),
    "vqa": (vqa, [b"COCO_val2014_000000000007"]),
    "chair": (chair, [b"cat"]),
    "scienceqa": (scienceqa, [b"train/1/image"]),
    "mme": (mme, [b"train/1/image"] * 2),
}


@pytest.mark.parametrize("top", ["", "val2014/"])
@pytest.mark.parametrize("place", [in_folder, in_zip, in_tar, at_url])
@pytest.mark.parametrize("task", TASKS)
def test_images_are_read_from_any_location(
    task: str, place: Callable[[Path, str], str], top: str, tmp_path: Path
) -> None:
    options, expected = TASKS[task]
    component = registry().create("tasks", {"name": task, **options(tmp_path), "images": place(tmp_path, top)})
    images = images_in(turn for question in component.questions() for turn in question.turns)
    assert [image.read() for image in images] == expected


@pytest.mark.parametrize("place", [in_folder, in_zip, in_tar, at_url])
def test_the_source_scienceqa_reads_images_from_any_location(place: Callable[[Path, str], str], tmp_path: Path) -> None:
    path = scienceqa(tmp_path)["questions"]
    records = registry().create("sources", {"name": "scienceqa", "path": path, "images": place(tmp_path, "")})
    (sample,) = records
    assert [image.read() for image in sample.images] == [b"train/1/image"]
