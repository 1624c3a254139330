"""Requests by kind and weight, replies parsed into LLaVA records, and true answers of the teacher ``rules``."""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.sources.scenes.things import COLORS, SHAPES, held_out
from llavactl.core.errors import DataError
from llavactl.core.protocols import Request
from llavactl.core.registry import registry
from llavactl.core.schema import Box, Sample
from llavactl.teaching.generate import build_requests, generate_record
from llavactl.teaching.messages import load_prompts, symbolic_representation
from llavactl.teaching.replies import Kind, parse_turns
from llavactl.testing import check_source, run_cli

WEIGHTS: dict[Any, float] = {"conversation": 8, "detail": 1, "reasoning": 1}


def turns(kind: Kind, reply: str, seed: str) -> list[tuple[str, str]]:
    return parse_turns(kind, reply, seed, load_prompts().questions)


def scenes(count: int, split: str = "train") -> list[Sample]:
    return list(
        registry().create("sources", {"name": "scenes", "scenes": count, "content": "captions", "split": split})
    )


def test_replies_are_parsed_and_malformed_ones_refused() -> None:
    blocks = "Question:\nWhat?\n===\nAnswer:\nA dog\non a mat.\n===\nQuestion: Why?\n===\nAnswer: It is.\n"
    assert turns("conversation", blocks, "") == [("What?", "A dog\non a mat."), ("Why?", "It is.")]
    assert turns("detail", " A dog. ", "x")[0][0] in load_prompts().questions
    assert len(set(load_prompts().questions)) == 16
    for reply in (
        "",
        "hello",
        "Question: a\n===\nQuestion: b",
        "Answer: a\n===\nQuestion: b",
        "Question:\n===\nAnswer: b",
    ):
        with pytest.raises(DataError):
            turns("conversation", reply, "")


def test_requests_are_divided_by_weight() -> None:
    images = scenes(7)
    assert Counter(r.kind for r in build_requests(images, WEIGHTS, 50, 0)) == {
        "conversation": 40,
        "detail": 5,
        "reasoning": 5,
    }
    assert len({r.id for r in build_requests(images, WEIGHTS, 50, 0)}) == 50
    every = list(build_requests(images, {**WEIGHTS, "detail": 0}, None, 0))
    assert Counter(r.kind for r in every) == {"conversation": 7, "reasoning": 7}
    assert [r.id for r in build_requests(images, WEIGHTS, 50, 0)] == [
        r.id for r in build_requests(images, WEIGHTS, 50, 0)
    ]


def test_symbolic_representation_has_captions_and_boxes() -> None:
    sample = Sample("a", (), captions=("A dog.",), boxes=(Box("dog", (0.1, 0.25, 0.5, 1)),))
    assert symbolic_representation(sample, "detail") == "A dog.\n\ndog: [0.100, 0.250, 0.500, 1.000]"
    assert symbolic_representation(sample, "conversation") == "A dog."


def test_answers_of_rules_are_true() -> None:
    """Answers are checked against the boxes by an independent parser."""
    teacher = registry().create("teachers", {"name": "rules", "questions": 8})
    counts = Counter[str]()
    for scene in scenes(150):
        names = [box.category for box in scene.boxes]
        positions = {box.category: (box.xyxy[0] + box.xyxy[2], box.xyxy[1] + box.xyxy[3]) for box in scene.boxes}
        request = Request(scene.id, "conversation", (), scene)
        for question, answer in turns("conversation", teacher.reply(request), ""):
            if match := re.fullmatch(r"(?:What color is|Which color does) the (\w+)(?: have)?\?", question):
                assert f"{answer} {match[1]}" in names
                counts["color"] += 1
            elif match := re.fullmatch(r"(?:What shape is|Which shape does) the (\w+) object(?: have)?\?", question):
                assert f"{match[1]} {answer}" in names
                counts["shape"] += 1
            elif match := re.fullmatch(r"(?:Is there|Does the image show) an? (.+)\?", question):
                words = match[1].removesuffix(" object")
                assert any(words == name or words in name.split() for name in names) is (answer == "yes"), question
                counts[f"presence {answer}"] += 1
            elif match := re.fullmatch(r"Is the (\w+ \w+) (?:to the )?(\w+)(?: of)? the (\w+ \w+)\?", question):
                axis = match[2] in ("above", "below")
                first = positions[match[1]][axis] < positions[match[3]][axis]
                assert (first is (match[2] in ("left", "above"))) is (answer == "yes"), question
                counts[f"relation {answer}"] += 1
            elif match := re.fullmatch(r"How many (\w+)(?: objects)? (?:are there|are in the image)\?", question):
                word = match[1].removesuffix("es") if match[1] == "crosses" else match[1].removesuffix("s")
                counted = len(names) if word in ("shape", "object") else sum(word in name.split() for name in names)
                assert counted == int(answer), question
                counts["count"] += 1
            else:
                counts["other"] += 1
    assert (
        min(
            counts[k] for k in ("color", "shape", "count", "presence yes", "presence no", "relation yes", "relation no")
        )
        > 20
    )
    assert abs(counts["presence yes"] - counts["presence no"]) < 0.35 * (counts["presence yes"] + counts["presence no"])


def test_no_number_answers_most_counting_questions() -> None:
    """A model that always answers "1" must not be right much more often than by chance."""
    teacher = registry().create("teachers", {"name": "rules"})
    counts = Counter[str]()
    for scene in scenes(300):
        pairs = turns("conversation", teacher.reply(Request(scene.id, "conversation", (), scene)), "")
        counts.update(a for q, a in pairs if q.startswith("How many") and not re.search("many (shapes|objects)", q))
    assert set(counts) == {"1", "2", "3"}
    assert max(counts.values()) < 0.5 * counts.total(), counts


def test_a_description_names_all_objects_in_order() -> None:
    teacher = registry().create("teachers", {"name": "rules"})
    for scene in scenes(60):
        description = teacher.reply(Request(scene.id, "detail", (), scene))
        for start, axis in (("From left to right", 0), ("From top to bottom", 1)):
            positions = {box.category: box.xyxy[axis] + box.xyxy[axis + 2] for box in scene.boxes}
            if match := re.search(rf"{start}: (.+?)\.", description):
                assert re.findall(r"an? (\w+ \w+)", match[1]) == sorted(positions, key=positions.__getitem__)
            else:
                assert all(name in description for name in positions), "each object has its position instead"


def test_training_never_mentions_a_held_out_pair() -> None:
    teacher = registry().create("teachers", {"name": "rules"})
    unseen = [f"{color} {shape}" for color in COLORS for shape in SHAPES if held_out(color, shape)]
    for request in build_requests(scenes(60), {"conversation": 1, "detail": 1, "reasoning": 1}, None, 3):
        reply = teacher.reply(request)
        assert not any(name in reply for name in unseen), reply


def test_rules_need_boxes() -> None:
    teacher = registry().create("teachers", {"name": "rules"})
    result = generate_record(
        teacher, Request("a", "detail", (), Sample("a", (), where="records.json:3", captions=("A dog.",)))
    )
    assert result.record is None
    assert "records.json:3: no boxes" in result.reason


RECIPE = """\
name: instruct
vision: {name: clip, model: clip}
connector: {name: linear}
language: {name: hf, model: language}
generate:
  source: {name: scenes, content: captions, scenes: 6}
  teacher: {name: rules}
  kinds: {conversation: 1, detail: 1}
  out: data/instruct.jsonl
"""


def test_generate_writes_records_and_their_images(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    dry = run_cli("data", "generate", "--dry-run", "--json", cwd=tmp_path)
    assert dry.json()["samples"] == 12
    assert not (tmp_path / "data").exists()
    result = run_cli("data", "generate", "--json", cwd=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert result.json()["kinds"] == {"conversation": 6, "detail": 6}
    records = [json.loads(line) for line in (tmp_path / "data/instruct.jsonl").read_text().splitlines()]
    assert all((tmp_path / "data" / record["image"]).is_file() for record in records)
    source = registry().create("sources", {"name": "llava-json", "path": str(tmp_path / "data/instruct.jsonl")})
    assert check_source(source) == []
    again = run_cli("data", "generate", "--json", cwd=tmp_path)
    assert again.json()["finished_before"] is True
    other = run_cli("data", "generate", "-o", "seed=1", "--json", cwd=tmp_path)
    assert other.json()["finished_before"] is False


def test_data_of_an_earlier_version_is_not_generated_again(tmp_path: Path) -> None:
    """Its report has ``pictures`` instead of ``images``, and ``asking`` instead of ``requests``."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    assert run_cli("data", "generate", cwd=tmp_path).exit_code == 0
    file = tmp_path / "data/instruct.report.json"
    report = json.loads(file.read_text())
    old = {"pictures" if key == "images" else key: value for key, value in report.items() if key != "requests"}
    file.write_text(json.dumps(old | {"asking": None}))
    again = run_cli("data", "generate", "--json", cwd=tmp_path).json()
    assert (again["finished_before"], again["images"], again["digest"]) == (True, 6, report["digest"])


def test_images_in_an_archive_stay_in_it(tmp_path: Path) -> None:
    rows = []
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as file:
        for each in scenes(3):
            file.writestr(f"{each.id}.png", each.images[0].read())
            boxes = [{"category": box.category, "bbox": box.xyxy} for box in each.boxes]
            rows.append({"image": f"{each.id}.png", "captions": list(each.captions), "instances": boxes})
    (tmp_path / "scenes.json").write_text(json.dumps(rows))
    spec = "{name: caps-boxes, path: scenes.json, images: scenes.zip}"
    text = RECIPE.replace("{name: scenes, content: captions, scenes: 6}", spec)
    (tmp_path / "recipe.yaml").write_text(text)
    result = run_cli("data", "generate", "--json", cwd=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert not list((tmp_path / "data").rglob("*.png"))
    source = registry().create(
        "sources", {"name": "llava-json", "path": tmp_path / "data/instruct.jsonl", "images": tmp_path / "scenes.zip"}
    )
    assert check_source(source) == []


def test_malicious_replies_are_refused_and_thinking_is_removed() -> None:
    for reply in (" " * 2_000_000, "\n" * 2_000_000, "=" * 2_000_000, "===\n" * 500_000, "Question: " * 200_000):
        with pytest.raises(DataError):
            turns("conversation", reply, "")
    for reply in ("a\0b", "\ud800", "\x1b[31mred", "see <image> here"):
        with pytest.raises(DataError, match=r"character|<image>"):
            turns("detail", reply, "")
    assert turns("detail", "<think>\nThe user wants…\n</think>\n\nA dog.", "x")[0][1] == "A dog."
    assert turns("detail", "Tabs\tand\r\nlines are fine – “so” are these 🐕", "x")
