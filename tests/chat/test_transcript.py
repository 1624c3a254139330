"""Conversations as JSON files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavactl.chat import transcript
from llavactl.chat.inputs import open_image
from llavactl.chat.transcript import load_turns, save_turns
from llavactl.core.errors import DataError
from llavactl.core.schema import Turn
from llavactl.images.references import image_in_memory


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    file = tmp_path / "photo of 'ä'.png"
    Image.new("RGB", (8, 6), "red").save(file)
    return file


def test_saved_turns_are_loaded_with_their_images(photo: Path, tmp_path: Path) -> None:
    pasted = image_in_memory(Image.new("RGB", (5, 5), "blue"))
    turns = [
        Turn("system", ("Be brief.",)),
        Turn("user", (open_image(str(photo)), "\n", pasted, "What\x1b is it? \u202e")),
        Turn("assistant", ("Red.",)),
    ]
    file = tmp_path / "chat.json"
    save_turns(file, turns, "model")
    photo_bytes = photo.read_bytes()
    loaded = load_turns(file)
    assert [(turn.role, turn.text) for turn in loaded] == [(turn.role, turn.text) for turn in turns]
    assert loaded[1].images[0] == turns[1].images[0]
    assert loaded[1].images[0].read() == photo_bytes
    assert loaded[1].images[1].read() == pasted.read()
    save_turns(file, loaded, "model")
    assert load_turns(file) == loaded


USER, ASSISTANT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "c"}


@pytest.mark.parametrize("messages", [[], [USER, ASSISTANT], [SYSTEM, USER, ASSISTANT], [SYSTEM]])
def test_a_list_of_messages_is_accepted(tmp_path: Path, messages: list[Any]) -> None:
    file = tmp_path / "chat.json"
    file.write_text(json.dumps(messages), encoding="utf-8")
    assert [turn.role for turn in load_turns(file)] == [message["role"] for message in messages]


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "3", "{}", "[" * 100_000, '{"messages": 3}', '{"messages": [3]}',
        json.dumps([USER]), json.dumps([ASSISTANT]), json.dumps([USER, USER]), json.dumps([USER, ASSISTANT, SYSTEM]),
        json.dumps([{"role": "tool", "content": ""}]), json.dumps([{"role": "user"}]),
        json.dumps([{"role": "user", "content": [3]}]),
        json.dumps([{"role": "user", "content": [{"type": "image", "image": "missing.png"}]}, ASSISTANT]),
        json.dumps([{"role": "user", "content": [{"type": "image", "image": "HTTP://127.0.0.1:9/a.png"}]}, ASSISTANT]),
        json.dumps([{"role": "user", "content": [{"type": "video", "video": "x.mp4"}]}, ASSISTANT]),
        '[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": ""}]',
    ],
)  # fmt: skip
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "chat.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as error:
        load_turns(file)
    assert str(file) in error.value.message


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "binary", "."):
        with pytest.raises(DataError):
            load_turns(tmp_path / name)


def test_pipes_devices_and_huge_files_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    for file in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        with pytest.raises(DataError, match="not a file"):
            load_turns(file)
    (tmp_path / "large.json").write_text(" " * 20)
    monkeypatch.setattr(transcript, "MAX_BYTES", 10)
    with pytest.raises(DataError, match="more than"):
        load_turns(tmp_path / "large.json")
