"""``chat --batch``: every image of a record is read, and invalid records are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.chat.inputs import read_batch
from llavactl.core.errors import DataError
from llavactl.testing import run_cli, toy_model


def batch(toys: Path, tmp_path: Path, *records: Any) -> list[list[str]]:
    """The names of the images of each record."""
    file = tmp_path / "batch.jsonl"
    file.write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "a.jpg").write_bytes((toys / "images" / "photo-000.jpg").read_bytes())
    return [[part.name for part in content if not isinstance(part, str)] for _, content in read_batch(file)]


def test_images_are_read_from_either_key(toys: Path, tmp_path: Path) -> None:
    named: list[dict[str, Any]] = [{"image": "a.jpg"}, {"images": ["a.jpg"]}, {"images": "a.jpg"}, {}]
    images = batch(toys, tmp_path, *({**each, "prompt": "What?"} for each in named))
    assert images == [["a.jpg"], ["a.jpg"], ["a.jpg"], []]


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": "What?", "video": "x.mp4"},
        {"prompt": "What?", "image_path": "a.jpg"},
        {"prompt": "What?", "image": [["a.jpg"]]},
        {"prompt": "What?", "image": "none.jpg"},
        {"image": "a.jpg"},
        {"prompt": None},
        {"prompt": " \n"},
        [],
    ],
)
def test_an_invalid_record_is_refused_with_its_line(toys: Path, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(DataError) as caught:
        batch(toys, tmp_path, {"prompt": "What?"}, wrong)
    assert caught.value.message.startswith(f"{tmp_path / 'batch.jsonl'}:2: ")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl"):
        read_batch(tmp_path / "none.jsonl")


def test_a_prompt_beyond_the_context_is_refused_before_any_is_answered(tmp_path: Path) -> None:
    toy_model(tmp_path)
    prompts = ("What?", "What is it? " * 1000)
    (tmp_path / "batch.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
    refused = run_cli("chat", "--model", "model", "--batch", "batch.jsonl", cwd=tmp_path)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "prompt 2" in refused.stderr
    assert "2,048" in refused.stderr
