"""A teacher's replies become LLaVA's records: every kind, its share, and nothing that the picture doesn't have."""

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
from llavactl.teaching.generate import made, requests
from llavactl.teaching.messages import prompts, symbols
from llavactl.teaching.replies import Kind
from llavactl.teaching.replies import turns as turns_of
from llavactl.testing import check_source, run_cli

WEIGHTS: dict[Any, float] = {"conversation": 8, "detail": 1, "reasoning": 1}


def turns(kind: Kind, reply: str, seed: str) -> list[tuple[str, str]]:
    return turns_of(kind, reply, seed, prompts().questions)


def pictures(count: int, split: str = "train") -> list[Sample]:
    return list(
        registry().create("sources", {"name": "scenes", "scenes": count, "content": "captions", "split": split})
    )


def test_replies_are_read_and_malformed_ones_refused() -> None:
    blocks = "Question:\nWhat?\n===\nAnswer:\nA dog\non a mat.\n===\nQuestion: Why?\n===\nAnswer: It is.\n"
    assert turns("conversation", blocks, "") == [("What?", "A dog\non a mat."), ("Why?", "It is.")]
    assert turns("detail", " A dog. ", "x")[0][0] in prompts().questions
    assert len(set(prompts().questions)) == 16
    for wrong in (
        "",
        "hello",
        "Question: a\n===\nQuestion: b",
        "Answer: a\n===\nQuestion: b",
        "Question:\n===\nAnswer: b",
    ):
        with pytest.raises(DataError):
            turns("conversation", wrong, "")


def test_each_kind_has_its_share() -> None:
    seen = pictures(7)
    assert Counter(r.kind for r in requests(seen, WEIGHTS, 50, 0)) == {"conversation": 40, "detail": 5, "reasoning": 5}
    assert len({r.id for r in requests(seen, WEIGHTS, 50, 0)}) == 50
    every = list(requests(seen, {**WEIGHTS, "detail": 0}, None, 0))
    assert Counter(r.kind for r in every) == {"conversation": 7, "reasoning": 7}
    assert [r.id for r in requests(seen, WEIGHTS, 50, 0)] == [r.id for r in requests(seen, WEIGHTS, 50, 0)]


def test_symbols_are_captions_and_boxes() -> None:
    sample = Sample("a", (), captions=("A dog.",), boxes=(Box("dog", (0.1, 0.25, 0.5, 1)),))
    assert symbols(sample, "detail") == "A dog.\n\ndog: [0.100, 0.250, 0.500, 1.000]"
    assert symbols(sample, "conversation") == "A dog."


def test_rules_say_what_is_true() -> None:
    """Answers are checked against the boxes, by a reader written for that."""
    teacher = registry().create("teachers", {"name": "rules", "questions": 8})
    asked = Counter[str]()
    for picture in pictures(150):
        names = [box.category for box in picture.boxes]
        places = {box.category: (box.xyxy[0] + box.xyxy[2], box.xyxy[1] + box.xyxy[3]) for box in picture.boxes}
        request = Request(picture.id, "conversation", (), picture)
        for question, answer in turns("conversation", teacher.reply(request), ""):
            if found := re.fullmatch(r"(?:What color is|Which color does) the (\w+)(?: have)?\?", question):
                assert f"{answer} {found[1]}" in names
                asked["color"] += 1
            elif found := re.fullmatch(r"(?:What shape is|Which shape does) the (\w+) object(?: have)?\?", question):
                assert f"{found[1]} {answer}" in names
                asked["shape"] += 1
            elif found := re.fullmatch(r"(?:Is there|Does the image show) an? (.+)\?", question):
                words = found[1].removesuffix(" object")
                assert any(words == name or words in name.split() for name in names) is (answer == "yes"), question
                asked[f"presence {answer}"] += 1
            elif found := re.fullmatch(r"Is the (\w+ \w+) (?:to the )?(\w+)(?: of)? the (\w+ \w+)\?", question):
                axis = found[2] in ("above", "below")
                first = places[found[1]][axis] < places[found[3]][axis]
                assert (first is (found[2] in ("left", "above"))) is (answer == "yes"), question
                asked[f"relation {answer}"] += 1
            elif found := re.fullmatch(r"How many (\w+)(?: objects)? (?:are there|are in the image)\?", question):
                word = found[1].removesuffix("es") if found[1] == "crosses" else found[1].removesuffix("s")
                counted = len(names) if word in ("shape", "object") else sum(word in name.split() for name in names)
                assert counted == int(answer), question
                asked["count"] += 1
            else:
                asked["other"] += 1
    assert (
        min(asked[k] for k in ("color", "shape", "count", "presence yes", "presence no", "relation yes", "relation no"))
        > 20
    )
    assert abs(asked["presence yes"] - asked["presence no"]) < 0.35 * (asked["presence yes"] + asked["presence no"])


def test_no_count_is_the_answer_to_most_questions() -> None:
    """Who says "1" whenever a kind or a color is counted must not be right much more often than by chance."""
    teacher = registry().create("teachers", {"name": "rules"})
    counts = Counter[str]()
    for picture in pictures(300):
        said = turns("conversation", teacher.reply(Request(picture.id, "conversation", (), picture)), "")
        counts.update(a for q, a in said if q.startswith("How many") and not re.search("many (shapes|objects)", q))
    assert set(counts) == {"1", "2", "3"}
    assert max(counts.values()) < 0.5 * counts.total(), counts


def test_a_description_has_all_things_in_order() -> None:
    teacher = registry().create("teachers", {"name": "rules"})
    for picture in pictures(60):
        told = teacher.reply(Request(picture.id, "detail", (), picture))
        for start, axis in (("From left to right", 0), ("From top to bottom", 1)):
            places = {box.category: box.xyxy[axis] + box.xyxy[axis + 2] for box in picture.boxes}
            if found := re.search(rf"{start}: (.+?)\.", told):
                assert re.findall(r"an? (\w+ \w+)", found[1]) == sorted(places, key=places.__getitem__)
            else:
                assert all(name in told for name in places), "then each has its place"


def test_training_never_mentions_a_held_out_pair() -> None:
    teacher = registry().create("teachers", {"name": "rules"})
    unseen = [f"{color} {shape}" for color in COLORS for shape in SHAPES if held_out(color, shape)]
    for request in requests(pictures(60), {"conversation": 1, "detail": 1, "reasoning": 1}, None, 3):
        reply = teacher.reply(request)
        assert not any(name in reply for name in unseen), reply


def test_without_boxes_rules_refuse_and_the_reason_is_kept() -> None:
    teacher = registry().create("teachers", {"name": "rules"})
    found = made(teacher, Request("a", "detail", (), Sample("a", (), where="records.json:3", captions=("A dog.",))))
    assert found.record is None
    assert "records.json:3: no boxes" in found.reason


RECIPE = """\
name: made
vision: {name: clip, model: clip}
connector: {name: linear}
language: {name: hf, model: language}
generate:
  source: {name: scenes, content: captions, scenes: 6}
  teacher: {name: rules}
  kinds: {conversation: 1, detail: 1}
  out: data/instruct.jsonl
"""


def test_generate_writes_records_that_are_whole_in_themselves(tmp_path: Path) -> None:
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


def test_pictures_in_an_archive_stay_in_it(tmp_path: Path) -> None:
    rows = []
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as file:
        for each in pictures(3):
            file.writestr(f"{each.id}.png", each.images[0].read())
            boxes = [{"category": box.category, "bbox": box.xyxy} for box in each.boxes]
            rows.append({"image": f"{each.id}.png", "captions": list(each.captions), "instances": boxes})
    (tmp_path / "scenes.json").write_text(json.dumps(rows))
    source = "{name: caps-boxes, path: scenes.json, images: scenes.zip}"
    text = RECIPE.replace("{name: scenes, content: captions, scenes: 6}", source)
    (tmp_path / "recipe.yaml").write_text(text)
    result = run_cli("data", "generate", "--json", cwd=tmp_path)
    assert result.exit_code == 0, result.stderr
    assert not list((tmp_path / "data").rglob("*.png"))
    made_of = registry().create(
        "sources", {"name": "llava-json", "path": tmp_path / "data/instruct.jsonl", "images": tmp_path / "scenes.zip"}
    )
    assert check_source(made_of) == []


def test_a_hostile_reply_is_refused_and_a_thought_is_no_reply() -> None:
    for wrong in (" " * 2_000_000, "\n" * 2_000_000, "=" * 2_000_000, "===\n" * 500_000, "Question: " * 200_000):
        with pytest.raises(DataError):
            turns("conversation", wrong, "")
    for wrong in ("a\0b", "\ud800", "\x1b[31mred", "see <image> here"):
        with pytest.raises(DataError, match="holds"):
            turns("detail", wrong, "")
    assert turns("detail", "<think>\nThe user wants…\n</think>\n\nA dog.", "x")[0][1] == "A dog."
    assert turns("detail", "Tabs\tand\r\nlines are fine – “so” are these 🐕", "x")
