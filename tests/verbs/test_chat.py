"""``llavactl chat``: images named by the user; unreadable ones are reported before a model is loaded."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from llavactl import DataError
from llavactl.chat.inputs import open_images, read_batch, user_content
from llavactl.components.sources.llava_json import llava_sample
from llavactl.components.tasks.image_questions import user_turn
from llavactl.testing import run_cli


@pytest.fixture
def photo(toys: Path) -> Path:
    return toys / "images" / "photo-000.jpg"


class QuietHandler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/photo-000.jpg")
            self.end_headers()
        else:
            super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(photo: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(photo.parent))) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_image_is_a_file_a_link_a_url_or_base64(photo: Path, tmp_path: Path, host: str) -> None:
    (tmp_path / "link.jpg").symlink_to(photo)
    data = photo.read_bytes()
    text = base64.b64encode(data).decode()
    names = [str(photo), str(tmp_path / "link.jpg"), photo.as_uri(), f"{host}/photo-000.jpg", f"{host}/moved"]
    opened = open_images([*names, text, f"data:image/jpeg;base64,{text}"])
    assert [image.read() for image in opened] == [data] * 7
    content = user_content("What?", [opened[0], str(photo)])
    assert content[-1] == "What?"
    assert len(content) == 5


QUESTIONS = ["What?", "<image>", "<image>\nWhat?", "What?\n<image>", "<image>\nTwo <image> tags", " a <image> b "]


@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_read_as_in_training_records(photo: Path, tmp_path: Path, question: str, images: int) -> None:
    """Chat, its batch files and evaluation tasks make the same turn, or refuse it."""
    shown = open_images([str(photo)] * images)
    names = {"image": [str(photo)] * images} if images else {}
    record: dict[str, object] = {
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A."}]
    }
    (file := tmp_path / "batch.jsonl").write_text(json.dumps({**names, "prompt": question}))
    if images == 2 and question.count("<image>") == 1:
        for make_turn in (lambda: user_content(question, shown), lambda: read_batch(file)):
            with pytest.raises(DataError, match=r"1 <image> tag.* 2 images"):
                make_turn()
        return
    if images:
        record["image"] = [photo.name] * images
    turn = llava_sample(record, "here", str(photo.parent)).turns[0]

    def texts(parts: Sequence[object]) -> list[object]:
        return [part if isinstance(part, str) else "(image)" for part in parts]

    assert texts(user_content(question, shown)) == texts(turn.content)
    assert texts(read_batch(file)[0][1]) == texts(turn.content)
    if images < 2:
        assert texts(user_turn(shown[0] if shown else None, question)[0].content) == texts(turn.content)


def test_a_batch_with_a_tag_and_an_empty_image_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "batch.jsonl").write_text(json.dumps({"image": None, "prompt": "<image>\nWhat?"}))
    with pytest.raises(DataError, match="no image"):
        read_batch(file)


def test_a_batch_file_accepts_the_same_image_names(photo: Path, tmp_path: Path, host: str) -> None:
    (tmp_path / "link.jpg").symlink_to(photo)
    names: list[object] = ["link.jpg", str(photo), f"{host}/photo-000.jpg", [photo.as_uri(), "link.jpg"]]
    file = tmp_path / "batch.jsonl"
    file.write_text("".join(json.dumps({"image": name, "prompt": "?"}) + "\n" for name in names))
    assert [len(content) for _, content in read_batch(file)] == [3, 3, 3, 5]


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_an_unreadable_url_is_reported_in_one_short_line(host: str) -> None:
    for name, why in [
        (f"{host}/none.jpg", "404"),
        (f"http://127.0.0.1:{_free_port()}/a.jpg", "can't be read"),
        ("nonsense://bucket/a.jpg", "nonsense"),
        ("http://[", "can't be read"),
        (f"{host}/", "HTML"),
    ]:
        with pytest.raises(DataError, match=why) as caught:
            open_images([name])
        assert name in caught.value.message
        assert "\n" not in caught.value.message
        assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("data", "why"),
    [(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"), (b"<svg/>", "SVG"), (b"%PDF-1.4", "PDF"), (b"", "empty")],
)
def test_an_invalid_image_is_reported_before_a_missing_model(tmp_path: Path, data: bytes, why: str) -> None:
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "batch.jsonl").write_text(json.dumps({"image": "a.jpg", "prompt": "?"}))
    for arguments in (
        ["--image", str(tmp_path / "a.jpg"), "--prompt", "?"],
        ["--batch", str(tmp_path / "batch.jsonl")],
    ):
        result = run_cli("chat", "--model", str(tmp_path / "no-model"), *arguments)
        assert result.exit_code == 1
        assert why in result.stderr
        assert "no-model" not in result.stderr


def test_a_very_long_image_name_is_shortened(tmp_path: Path) -> None:
    result = run_cli("chat", "--model", str(tmp_path), "--image", "x" * 5000, "--prompt", "?")
    assert result.exit_code == 1
    assert len(result.stderr) < 600


@pytest.mark.parametrize("prompt", ["", " \n"])
@pytest.mark.parametrize("more", [(), ("--json",), ("--image", "none.jpg")])
def test_an_empty_prompt_is_refused_before_a_model_is_loaded(prompt: str, more: tuple[str, ...]) -> None:
    result = run_cli("chat", "--model", "no-model", "--prompt", prompt, *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--prompt" in result.stderr
