"""The source llava-json: variants of LLaVA records, and errors that name the location."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import DataError
from llavactl.core.registry import registry
from llavactl.core.schema import Sample
from llavactl.images.image_file import ImageFile
from llavactl.testing import check_source, run_cli

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A dog."}]


def read(folder: Path, records: Any, name: str = "records.json") -> list[Sample]:
    path = folder / name
    path.write_text(records if isinstance(records, str) else json.dumps(records))
    return list(registry().create("sources", {"name": "llava-json", "path": str(path), "images": str(folder)}))


def test_images_replace_their_tags(tmp_path: Path) -> None:
    a, b = ImageFile(str(tmp_path), "a.jpg"), ImageFile(str(tmp_path), "sub/b.jpg")
    answer = {"from": "gpt", "value": "An <image> tag in an answer is text."}
    (front,) = read(tmp_path, [{"id": 7, "image": "a.jpg", "conversations": TALK}])
    assert (front.id, front.turns[0].content) == ("7", (a, "\nWhat?"))
    (end,) = read(
        tmp_path,
        [{"id": "x", "image": "a.jpg", "conversations": [{"from": "human", "value": "What?\n<image>"}, answer]}],
    )
    assert end.turns[0].content == ("What?\n", a)
    assert end.turns[1].content == ("An <image> tag in an answer is text.",)
    two = [{"from": "human", "value": "<image> or <image>?"}, answer]
    (both,) = read(tmp_path, [{"image": ["a.jpg", "sub/b.jpg"], "conversations": two, "model": "gpt-4"}])
    assert both.turns[0].content == (a, " or ", b, "?")
    assert both.extra == {"model": "gpt-4"}
    (untagged,) = read(
        tmp_path, [{"id": 1, "image": "a.jpg", "conversations": [{"from": "human", "value": "What?"}, answer]}]
    )
    assert untagged.turns[0].content == (a, "\n", "What?")
    (later,) = read(
        tmp_path, [{"id": 1, "image": "a.jpg", "conversations": [{"from": "human", "value": "Hi"}, answer, *TALK]}]
    )
    assert later.turns[2].content == (a, "\nWhat?")
    (text,) = read(tmp_path, [{"id": 1, "conversations": [{"from": "human", "value": "Hi"}, answer]}])
    assert text.images == ()


def test_tags_without_an_image_key_are_text(tmp_path: Path) -> None:
    (text,) = read(tmp_path, [{"id": 1, "conversations": TALK}])
    assert text.turns[0].content == (TALK[0]["value"],)


@pytest.mark.parametrize("image", ["a.jpg", ["a.jpg"]])
def test_several_tags_in_one_question_stand_for_the_only_image_once(tmp_path: Path, image: Any) -> None:
    talk = [{"from": "human", "value": "Why <image>\nTwo <image> tags?"}, TALK[1]]
    (sample,) = read(tmp_path, [{"id": 1, "image": image, "conversations": talk}])
    assert sample.turns[0].content == ("Why ", ImageFile(str(tmp_path), "a.jpg"), "\nTwo ", " tags?")


def test_json_equals_jsonl(tmp_path: Path) -> None:
    records = [{"id": n, "image": f"{n}.jpg", "conversations": TALK} for n in range(3)]
    lines = "\n".join(map(json.dumps, records)) + "\n\n"
    turns = [sample.turns for sample in read(tmp_path, records)]
    assert turns == [sample.turns for sample in read(tmp_path, lines, "records.jsonl")]
    assert turns == [sample.turns for sample in read(tmp_path, "\ufeff" + json.dumps(records), "bom.json")]
    assert check_source(read(tmp_path, records)) == []


@pytest.mark.parametrize("name", ["null", '""', '" "', "true", "[1]", "{}", "NaN", None])
def test_a_record_without_an_id_is_identified_by_its_index(tmp_path: Path, name: str | None) -> None:
    record = json.dumps({"conversations": [{"from": "human", "value": "Hi"}, TALK[1]]})
    given = record if name is None else f'{{"id": {name}, {record[1:]}'
    assert [each.id for each in read(tmp_path, f"{given}\n" * 3, "r.jsonl")] == ["0", "1", "2"]


def test_other_ids_than_strings_and_numbers_are_replaced_by_the_index(tmp_path: Path) -> None:
    def named(*names: Any) -> list[str]:
        records = [{"id": name, "conversations": [{"from": "human", "value": "Hi"}, TALK[1]]} for name in names]
        return [each.id for each in read(tmp_path, records)]

    assert named(7, "x", 2.5, -1) == ["7", "x", "2.5", "-1"]
    assert named(None, "", True, ["a"], {}) == ["0", "1", "2", "3", "4"]
    assert named("a", "a", None) == ["a", "a", "2"]


def test_a_duplicate_key_is_refused(tmp_path: Path) -> None:
    twice = '{"id": 1, "image": "a.jpg", "image": "b.jpg", "conversations": []}'
    good = json.dumps({"id": 1, "conversations": [{"from": "human", "value": "Hi"}, TALK[1]]})
    for text, where in ((f"{good}\n{twice}\n", "r.jsonl:2"), (f"[{good},\n{twice}]", "r.jsonl:2")):
        with pytest.raises(DataError, match=f"{where}: .*'image'"):
            read(tmp_path, text, "r.jsonl")


def test_records_of_other_formats_are_refused_with_their_keys(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"messages, images") as caught:
        read(tmp_path, [{"messages": [{"role": "user", "content": "Hi"}], "images": ["a.jpg"]}])
    assert "conversations" in caught.value.hint


def test_an_answer_before_the_first_question_is_dropped(tmp_path: Path) -> None:
    (sample,) = read(
        tmp_path, [{"id": 1, "image": "a.jpg", "conversations": [{"from": "gpt", "value": "Hello!"}, *TALK]}]
    )
    assert [turn.role for turn in sample.turns] == ["user", "assistant"]


WRONG: list[tuple[Any, str]] = [
    ('[{"id": 1,\n "conversations": [}]', r"records\.json:2: not JSON"),
    ('{"conversations": []}\n{broken\n', "no answer"),
    ([3], r"json:1 \(record 0\): .*object"),
    ([{"id": 1, "conversations": "hi"}], r"json:1 \(record 0\): .*`conversations`"),
    (
        [{"id": 1, "image": ["a.jpg"] * 2, "conversations": [{"from": "human", "value": "<image>" * 3}, TALK[1]]}],
        "3 <image> tags",
    ),
    ([{"id": 1, "image": "a.jpg", "conversations": [*TALK, *TALK]}], "<image> in 2 questions"),
    ([{"id": 1, "image": None, "conversations": TALK}], "1 <image> tag"),
    ([{"id": 1, "images": [], "conversations": TALK}], "1 <image> tag"),
    ([{"id": 1, "image": "../a.jpg", "conversations": TALK}], "leads outside its root"),
    ([{"id": 1, "image": "/etc/passwd", "conversations": TALK}], "leads outside its root"),
    ([{"id": 1, "image": {"x": 1}, "conversations": TALK}], "`image`"),
    ([{"id": 1, "conversations": [{"from": "human", "value": "Hi"}]}], "no answer"),
    ([{"id": 1, "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": " "}]}], "no answer"),
    ([{"id": 1, "conversations": [{"from": "robot", "value": "Hi"}]}], "`from` 'robot'"),
    ([{"id": 1, "conversations": [{"from": "human", "value": None}]}], "`value`"),
    ([{"id": 1, "image": "a.jpg", "conversations": [TALK[0], TALK[0], TALK[1]]}], "user, user, assistant"),
]


@pytest.mark.parametrize(("records", "message"), WRONG)
def test_errors_name_the_location(tmp_path: Path, records: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, records)
    assert "records.json" in caught.value.message
    command = caught.value.hint.rpartition("`llavactl ")[2].partition("`")[0]
    assert run_cli(*shlex.split(command)).exit_code == 0, "the command of the hint works as it is"
    fixed = tmp_path / "records.fixed.json"
    list(registry().create("sources", {"name": "llava-json", "path": str(fixed), "images": str(tmp_path)}))


def test_missing_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json"):
        list(registry().create("sources", {"name": "llava-json", "path": str(tmp_path / "gone.json")}))
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(DataError, match="/gone"):
        list(registry().create("sources", {"name": "llava-json", "path": str(tmp_path / "r.json"), "images": "/gone"}))


def test_a_link_to_outside_the_root_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    with pytest.raises(DataError, match=r"link\.jpg") as caught:
        ImageFile(str(root), "link.jpg").read()
    assert "follow_links" in caught.value.hint


def test_a_media_file_under_an_unknown_key_is_refused(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "See a.jpg"}, {"from": "gpt", "value": "b.png"}]
    for key, value in (("screenshot", "a.png"), ("media", ["x/a.JPG"]), ("speech", "a.wav")):
        with pytest.raises(DataError, match=key):
            read(tmp_path, [{"id": "1.jpg", key: value, "conversations": talk}])
    assert len(read(tmp_path, [{"id": "1.jpg", "source": "a.jpg", "conversations": talk}])) == 1
