"""The data commands work for any source that implements RecordSource, and name a source that doesn't."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from llavactl import (
    DataError,
    Finding,
    ImageFile,
    ImageRef,
    Options,
    RawRecord,
    RecipePath,
    RecordSource,
    RepairingSource,
    Sample,
    Turn,
)
from llavactl.core.registry import Registration, registry
from llavactl.testing import check_source, run_cli


class PairsOptions(Options):
    path: RecipePath
    images: RecipePath


class Pairs:
    """A text file with ``photo|question|answer`` in each line."""

    def __init__(self, options: PairsOptions) -> None:
        self.path: Path = options.path
        self.images = options.images

    def __iter__(self) -> Iterator[Sample]:
        return map(self.sample, self.records())

    def records(self) -> Iterator[RawRecord]:
        position = 0
        for index, line in enumerate(self.path.read_text(encoding="utf-8").split("\n")[:-1]):
            position += len(line) + 1
            cells = line.split("|")
            problem = "" if len(cells) == 3 else f"expected 3 cells, got {len(cells)}"
            value = dict(zip(("photo", "question", "answer"), cells, strict=False))
            yield RawRecord(f"{self.path}:{index + 1}", value, index, problem, position)

    def examine(self, record: RawRecord) -> tuple[list[Finding], list[ImageRef]]:
        findings = []
        if not record.value["answer"].strip():
            findings.append(Finding("no-answer"))
        if not record.value["question"].strip():
            findings.append(Finding("empty-question"))
        return findings, [self._image(record)]

    def sample(self, record: RawRecord) -> Sample:
        answer = record.value["answer"].strip()
        if not answer:
            raise DataError(f"{record.where}: no answer")
        turns = (Turn("user", (self._image(record), f"\n{record.value['question']}")), Turn("assistant", (answer,)))
        return Sample(f"pair-{record.index}", turns, record.where, captions=(answer,))

    def _image(self, record: RawRecord) -> ImageRef:
        return ImageFile(str(self.images), record.value["photo"])


class RepairingPairs(Pairs):
    """Repairs a missing answer by a line that names the photo."""

    def repair(self, record: RawRecord) -> tuple[Mapping[str, Any] | None, list[str]]:
        if record.value["answer"].strip():
            return record.value, []
        if not record.value["question"].strip():
            return None, ["dropped: neither question nor answer"]
        return {**record.value, "answer": record.value["photo"]}, ["answer replaced by the photo's name"]


LINES = (
    "photo-000.jpg|What?|a red dog",
    "photo-001.jpg|What?| ",
    "photo-002.jpg",
    "gone.jpg|What?|a red dog",
    "photo-003.jpg|What?|a red dog",
    "photo-004.jpg||",
)


@pytest.fixture
def project(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy recipe with the sources ``pairs`` and ``repairing-pairs``, as a plugin would register them."""
    monkeypatch.setitem(sys.modules, "pairs_plugin", sys.modules[__name__])
    for name, target in (("pairs", "Pairs"), ("repairing-pairs", "RepairingPairs")):
        options = "pairs_plugin:PairsOptions"
        entry = Registration("sources", name, f"pairs_plugin:{target}", options, "", "pairs-plugin")
        monkeypatch.setitem(registry().entries["sources"], name, entry)
    (toy / "pairs.txt").write_text("".join(f"{line}\n" for line in LINES))
    return toy


def source_options(name: str = "pairs") -> tuple[str, ...]:
    spec = f"[{{name: {name}, path: pairs.txt, images: images}}]"
    return ("-o", f"data.stage1={spec}", "-o", "data.stage2=[]")


def data(*words: str, cwd: Path) -> tuple[int, Any, str]:
    result = run_cli("data", *words, "--json", cwd=cwd)
    return result.exit_code, json.loads(result.stdout) if result.stdout else None, result.stderr


def test_sources_pass_the_conformance_check(project: Path) -> None:
    options = PairsOptions(path=project / "pairs.txt", images=project / "images")
    assert isinstance(Pairs(options), RecordSource)
    assert not isinstance(Pairs(options), RepairingSource)
    assert isinstance(RepairingPairs(options), RepairingSource)
    (project / "pairs.txt").write_text("\n".join(LINES[3:5]) + "\n")
    assert check_source(Pairs(options)) == []
    assert check_source(RepairingPairs(options)) == []


def test_the_conformance_check_detects_inconsistent_records(project: Path) -> None:
    class Careless(RepairingPairs):
        def examine(self, record: RawRecord) -> tuple[list[Finding], list[ImageRef]]:
            return [Finding("no-answer")] if record.index else [], []

        def repair(self, record: RawRecord) -> tuple[Mapping[str, Any] | None, list[str]]:
            record.value["answer"] = ""
            return record.value, []

    (project / "pairs.txt").write_text("\n".join(LINES[3:5]) + "\n")
    problems = "\n".join(check_source(Careless(PairsOptions(path=project / "pairs.txt", images=project / "images"))))
    assert "pairs.txt:1: the images of examine()" in problems
    assert "pairs.txt:2: examine()" in problems
    assert "pairs.txt:1: sample()" in problems
    assert "pairs.txt:1: the record" in problems


def test_check_locates_the_problems_of_each_record(project: Path) -> None:
    code, report, _ = data("check", *source_options(), cwd=project)
    file = project / "pairs.txt"
    assert code == 1
    assert {each["problem"]: each["locations"] for each in report["problems"]} == {
        "json": [f"{file}:3: expected 3 cells, got 1"],
        "no-answer": [f"{file}:2", f"{file}:6"],
        "image-missing": [f"{file}:4: gone.jpg: No such file or directory"],
        "empty-question": [f"{file}:6"],
    }
    assert (report["records"], report["images"], report["errors"]) == (5, 5, 4)


def test_fix_writes_what_the_source_repaired(project: Path) -> None:
    options = source_options("repairing-pairs")
    code, report, error = data("check", *options, "--fix", "fixed.jsonl", cwd=project)
    assert code == 0, error
    assert {key: report["repaired"][key] for key in ("written", "changed", "dropped")} == {
        "written": 3,
        "changed": 1,
        "dropped": 3,
    }
    written = [json.loads(line) for line in (project / "fixed.jsonl").read_text().splitlines()]
    assert [each["answer"] for each in written] == ["a red dog", "photo-001.jpg", "a red dog"]
    log = [json.loads(line) for line in (project / "fixed.fixes.jsonl").read_text().splitlines()]
    assert [each["where"].rpartition(":")[2] for each in log] == ["2", "3", "4", "6"]


def test_stats_show_filter_and_expand(project: Path) -> None:
    code, report, error = data("stats", *source_options(), cwd=project)
    assert code == 0, error
    assert (report["samples"], report["unusable"], report["measures"]["answer words"]["mean"]) == (3, 3, 3.0)
    (project / "pairs.txt").write_text("\n".join(LINES[3:5]) + "\n")
    code, report, error = data("show", "--sample", "pair-1", *source_options(), cwd=project)
    assert code == 0, error
    assert (report["samples"], report["shown"][0]["where"]) == (2, f"{project / 'pairs.txt'}:2")
    code, report, error = data("filter", *source_options(), "--out", "kept.jsonl", "--at-least", "1", cwd=project)
    assert code == 0, error
    rows = [json.loads(line) for line in (project / "kept.jsonl").read_text().splitlines()]
    assert rows[1] == {"photo": "photo-003.jpg", "question": "What?", "answer": "a red dog"}
    code, report, error = data("expand", *source_options(), "--out", "stage1.json", cwd=project)
    assert code == 0, error
    records = json.loads((project / "stage1.json").read_text())
    assert [(each["image"], each["conversations"][1]["value"]) for each in records] == [
        ("gone.jpg", "a red dog"),
        ("photo-003.jpg", "a red dog"),
    ]
    assert data("check", "stage1.json", cwd=project)[0] == 0


def test_records_without_a_caption_are_located(project: Path) -> None:
    code, _, error = data("expand", *source_options(), "--out", "stage1.json", cwd=project)
    assert code == 1
    assert all(f"pairs.txt:{line}: " in error for line in (2, 3, 6))
    assert not (project / "stage1.json").exists()


@pytest.mark.parametrize(
    "words",
    [("check", "--fix", "out.json"), ("filter", "--out", "out.json"), ("expand", "--out", "out.json")],
    ids=lambda words: words[0],
)
def test_a_source_without_the_protocol_is_named(project: Path, words: tuple[str, ...]) -> None:
    scenes = ("-o", "data.stage1=[{name: scenes, scenes: 3}]", "-o", "data.stage2=[]")
    code, report, error = data(*words, *scenes, cwd=project)
    assert (code, report) == (1, None)
    assert "source 'scenes' of plugin llavactl" in error
    assert not (project / "out.json").exists()


def test_fix_needs_a_source_that_repairs(project: Path) -> None:
    code, _, error = data("check", *source_options(), "--fix", "out.json", cwd=project)
    assert code == 1
    assert "source 'pairs' of plugin pairs-plugin" in error
    assert "RepairingSource" in error


@pytest.mark.parametrize("verb", ["check", "stats", "show"])
@pytest.mark.parametrize("kind", ["coco", "caps-boxes", "scienceqa"])
def test_other_built_in_sources(toy: Path, kind: str, verb: str) -> None:
    photo = "photo-000.jpg"
    if kind == "coco":
        captions = {
            "images": [{"id": 1, "file_name": photo}],
            "annotations": [{"image_id": 1, "caption": "A dog."}],
        }
        (toy / "data.json").write_text(json.dumps(captions))
        spec = "{name: coco, captions: data.json, images: images}"
    elif kind == "caps-boxes":
        (toy / "data.json").write_text(json.dumps([{"id": "a", "image": photo, "captions": ["A dog."]}]))
        spec = "{name: caps-boxes, path: data.json, images: images}"
    else:
        question = {"question": "Which?", "choices": ["a", "b"], "answer": 0, "hint": "", "lecture": "", "solution": ""}
        common = {"image": None, "split": "train", "grade": "grade2", "subject": "natural science"}
        (toy / "data.json").write_text(json.dumps({"1": {**question, **common}}))
        spec = "{name: scienceqa, path: data.json, split: train}"
    code, report, error = data(verb, "-o", f"data.stage1=[{spec}]", "-o", "data.stage2=[]", cwd=toy)
    assert code == 0, error
    assert report["records" if verb == "check" else "samples"] == 1
