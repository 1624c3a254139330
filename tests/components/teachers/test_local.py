"""Teachers without a network: a language model in this process, and recorded replies."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llavactl.components.teachers.local import Transformers, TransformersOptions
from llavactl.components.teachers.replay import Replay, ReplayOptions
from llavactl.core.errors import DataError, ModelError, TeacherError
from llavactl.core.protocols import BatchTeacher, LanguageTeacher, Request
from llavactl.core.schema import Sample
from llavactl.testing import run_cli, toy_endpoint


def request(text: str = "A dog.", name: str = "1-detail") -> Request:
    return Request(name, "detail", ({"role": "user", "content": text},), Sample("1", ()))


def test_a_model_in_this_process(toys: Path, tmp_path: Path) -> None:
    def teacher(model: Path = toys / "language", temperature: float = 0.7) -> Transformers:
        options = {"model": str(model), "dtype": "float32", "max_tokens": 12, "temperature": temperature}
        return Transformers(TransformersOptions.model_validate(options))

    first = teacher()
    assert isinstance(first, LanguageTeacher)
    assert not isinstance(first, BatchTeacher)
    reply = first.reply(request())
    assert reply == teacher().reply(request()), "sampling is seeded by the request"
    assert reply.text != first.reply(request("A cat.")).text
    assert reply.tokens_in is not None
    assert reply.tokens_in > 5
    assert reply.tokens_out == 12
    assert reply.finish == "length"
    assert teacher(temperature=0).reply(request()) == teacher(temperature=0).reply(request())
    with pytest.raises(TeacherError, match="too long for the model") as caught:
        first.reply(request("word " * 3000))
    assert caught.value.then == "apart"
    shutil.copytree(toys / "language", tmp_path / "untemplated")
    (tmp_path / "untemplated" / "chat_template.jinja").unlink()
    with pytest.raises(TeacherError, match="chat template") as caught:
        teacher(tmp_path / "untemplated").reply(request())
    assert caught.value.then == "stop"


def test_a_missing_model_is_an_error(tmp_path: Path) -> None:
    teacher = Transformers(TransformersOptions(model=str(tmp_path / "none")))
    with pytest.raises(ModelError, match=str(tmp_path / "none")):
        teacher.reply(request())


def test_recorded_replies(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    path.write_text('{"id": "1-detail", "reply": "A dog."}\n{"id": 2, "reply": "A cat."}\n')
    teacher = Replay(ReplayOptions(path=path))
    assert teacher.reply(request()).text == "A dog."
    assert teacher.reply(request(name="2")).text == "A cat."
    with pytest.raises(DataError, match=r"replies\.jsonl.* 3$"):
        teacher.reply(request(name="3"))
    path.write_text('{"id": "1-detail", "reply": "A dog."}\n{"id": 2}\n')
    with pytest.raises(DataError, match=r"replies.jsonl:2: "):
        Replay(ReplayOptions(path=path)).reply(request())
    with pytest.raises(DataError, match="none"):
        Replay(ReplayOptions(path=tmp_path / "none")).reply(request())
    (tmp_path / "a.sqlite").write_bytes(b"no database" * 99)
    with pytest.raises(DataError, match=r"a\.sqlite"):
        Replay(ReplayOptions(path=tmp_path / "a.sqlite")).reply(request())


def test_a_journal_replays_to_the_same_records(tmp_path: Path) -> None:
    rows = [{"id": f"p{n}", "image": f"p{n}.jpg", "captions": [f"Picture {n}."]} for n in range(5)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = (
        "name: instruct\nvision: {name: clip, model: clip}\nconnector: {name: linear}\n"
        "language: {name: hf, model: language}\n"
        "generate: {source: {name: caps-boxes, path: captions.jsonl}, teacher: TEACHER, kinds: {detail: 1}, out: OUT}\n"
    )
    with toy_endpoint() as endpoint:
        recipe = text.replace("TEACHER", f'{{name: openai, model: m, base_url: "{endpoint.url}"}}').replace(
            "OUT", "a.jsonl"
        )
        (tmp_path / "recipe.yaml").write_text(recipe)
        assert run_cli("data", "generate", cwd=tmp_path).exit_code == 0
    again = text.replace("TEACHER", "{name: replay, path: a.replies.sqlite}").replace("OUT", "b.json")
    (tmp_path / "recipe.yaml").write_text(again)
    result = run_cli("data", "generate", "--json", cwd=tmp_path)
    assert result.json()["samples"] == 5
    assert result.json()["requests"] is None
    missing = run_cli("data", "generate", "-o", "generate.teacher.path=none.jsonl", cwd=tmp_path)
    assert missing.exit_code == 1
    assert "none.jsonl" in missing.stderr
    first = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert json.loads((tmp_path / "b.json").read_text()) == first
