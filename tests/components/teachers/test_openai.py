"""One request to an endpoint that misbehaves: bounded in time and size, and every answer is known for what it is."""

from __future__ import annotations

import json
import logging
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from pydantic import ValidationError

from llavactl.components.teachers import completions
from llavactl.components.teachers.openai_api import OpenAI, OpenAIOptions
from llavactl.core.errors import TeacherError
from llavactl.core.protocols import BatchTeacher, LanguageTeacher, Reply, Request, Teacher
from llavactl.core.schema import Sample
from llavactl.testing import Answers, ToyEndpoint, completion, toy_endpoint

KEY = "sk-very-secret-key"


def request(text: str = "A dog.") -> Request:
    return Request("1-detail", "detail", ({"role": "user", "content": text},), Sample("1", ()))


def ask(answers: Answers | None, **options: Any) -> tuple[Reply, ToyEndpoint]:
    with toy_endpoint(lambda number, body: answers) as endpoint:
        teacher = OpenAI(OpenAIOptions(model="m", base_url=endpoint.url, **options))
        try:
            return teacher.reply(request()), endpoint
        finally:
            teacher.close()


def refused(answers: Answers, **options: Any) -> TeacherError:
    with pytest.raises(TeacherError) as caught:
        ask(answers, **options)
    return caught.value


def test_it_is_a_teacher_of_every_sort() -> None:
    teacher = OpenAI(OpenAIOptions(model="m"))
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, LanguageTeacher)
    assert isinstance(teacher, BatchTeacher)


def test_a_reply_comes_with_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    reply, endpoint = ask(
        Answers(body=completion("Hello.", 12, 3)), key_env="MY_KEY", temperature=0.2, extra={"reasoning_effort": "low"}
    )
    assert reply == Reply("Hello.", 12, 3, "stop")
    assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert endpoint.bodies == [
        {
            "model": "m",
            "messages": [{"role": "user", "content": "A dog."}],
            "temperature": 0.2,
            "max_tokens": 1024,
            "reasoning_effort": "low",
        }
    ]


def test_without_a_key_none_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert "Authorization" not in ask(None)[1].headers[0]


@pytest.mark.parametrize(
    ("answers", "then", "paid", "says"),
    [
        (Answers(500, b"oops"), "again", False, "500: oops"),
        (Answers(503, b"{}"), "again", False, "503"),
        (Answers(429, b'{"error": {"message": "slow down"}}'), "again", False, "slow down"),
        (Answers(429, b'{"error": {"message": "x", "code": "insufficient_quota"}}'), "stop", False, "429: x"),
        (Answers(401, b'{"error": {"message": "bad key"}}'), "stop", False, "bad key"),
        (Answers(404, b'{"detail": "no such model"}'), "stop", False, "no such model"),
        (Answers(302, b"", {"Location": "http://127.0.0.1:9/"}), "stop", False, "302"),
        (Answers(400, b'{"error": {"message": "maximum context length is 4096 tokens"}}'), "apart", False, "too long"),
        (Answers(400, b'{"error": {"message": "content filter"}}'), "apart", False, "content filter"),
        (Answers(200, b'{"error": {"message": "overloaded", "code": 503}}'), "again", True, "overloaded"),
        (Answers(200, b"<html><script>alert(1)</script>"), "again", True, "without a reply: <html>"),
        (Answers(200, b'{"choices": []}'), "again", True, "without a reply"),
        (Answers(200, b'{"choices": [{"message": {"content": 7}}]}'), "again", True, "without a reply"),
        (Answers(200, b'["choices"]'), "again", True, "without a reply"),
        (Answers(200, b"null"), "again", True, "without a reply"),
        (Answers(200, b"[" * 40_000), "again", True, "without a reply"),
        (Answers(200, b'{"choices": ' + b"9" * 6000 + b"}"), "again", True, "without a reply"),
        (Answers(200, bytes(range(256)) * 10), "again", True, "without a reply"),
        (Answers(200, completion("cut")[:40], promise=200), "again", True, "broke off"),
        (Answers(200, b"x" * 3_000_000), "apart", True, "larger than 50000 bytes"),
        (Answers(500, b"x" * 3_000_000), "again", False, "500: xxx"),
    ],
)  # fmt: skip
def test_every_answer_is_known_for_what_it_is(answers: Answers, then: str, paid: bool, says: str) -> None:
    error = refused(answers, max_bytes=50_000)
    assert (error.then, says in error.message) == (then, True), error.message
    assert error.paid is paid
    assert len(error.message) < 500
    assert error.message.isprintable()


def test_time_is_bounded_as_a_whole() -> None:
    """Also where every single read is quick: a byte each 20 ms would take a minute."""
    for answers in (Answers(wait_s=60), Answers(body=completion("x" * 3000), trickle_s=0.02)):
        error = refused(answers, timeout_s=0.3)
        assert (error.then, error.paid, error.message) == ("again", True, "no answer within 0.3 s")


def test_compressed_answers_are_not_unpacked() -> None:
    import gzip

    error = refused(Answers(200, gzip.compress(b"0" * 50_000_000), {"Content-Encoding": "gzip"}))
    assert error.then == "again"


def test_nobody_listening() -> None:
    teacher = OpenAI(OpenAIOptions(model="m", base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(TeacherError, match="no connection") as caught:
        teacher.reply(request())
    assert (caught.value.then, caught.value.paid) == ("again", False)
    assert "127.0.0.1:9" in caught.value.hint
    teacher.close()


def test_a_null_and_a_half_surrogate_are_replies_that_can_be_written() -> None:
    assert ask(Answers(body=completion(None, finish="content_filter")))[0] == Reply("", 100, 50, "content_filter")
    body = completion("x").replace(b'"x"', b'"\\ud800 x"')
    assert ask(Answers(body=body))[0].text.encode() == b"? x"
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}]}
    assert ask(Answers(body=json.dumps(parts).encode()))[0] == Reply("ab")
    wrong_usage = {"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": -1, "completion_tokens": "9"}}
    assert ask(Answers(body=json.dumps(wrong_usage).encode()))[0] == Reply("a")


def test_the_key_is_in_no_message_and_no_log(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    error = refused(Answers(401, json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()))
    assert KEY not in error.message + error.hint
    assert "***" in error.message
    assert KEY not in ask(Answers(body=completion(f"your key is {KEY}")))[0].text
    assert KEY not in caplog.text
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(TeacherError, match="signs that no key has") as caught:
        ask(None)
    assert "lines" not in caught.value.message


def test_an_address_holds_no_secret_and_the_body_is_ours() -> None:
    for url in ("ftp://x", "http://me:pw@host/v1", "https://host/v1?api-key=x"):
        with pytest.raises(ValidationError):
            OpenAIOptions(model="m", base_url=url)
    with pytest.raises(ValidationError):
        OpenAIOptions(model="m", extra={"messages": []})
    for name in ("api_key", "Authorization", "token"):
        with pytest.raises(ValidationError, match="see `key_env`"):
            OpenAIOptions(model="m", extra={name: "sk-very-secret"})
    assert OpenAIOptions(model="m", extra={"max_completion_tokens": 9, "logit_bias": {}}).extra
    assert OpenAIOptions(model="m", base_url="http://x/v1/chat/completions").base_url == "http://x/v1"


def test_an_endpoint_that_counts_nothing_does_not_look_free() -> None:
    def counts(text: str) -> tuple[int | None, int | None]:
        reply = completions.read(200, completion(text, tokens_in=0, tokens_out=0))
        return reply.tokens_in, reply.tokens_out

    assert counts("A dog.") == (None, None)
    assert counts("") == (None, 0)


def test_retry_after_is_seconds_or_a_date() -> None:
    assert completions.seconds("7") == 7
    assert completions.seconds("1.5") == 1.5
    assert completions.seconds("-3") == 0
    in_a_minute = completions.seconds(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 60
    for nothing in (None, "", "soon", "Mon, 99 Foo 2026"):
        assert completions.seconds(nothing) is None
    assert refused(Answers(429, b"", {"Retry-After": "3"})).wait_s == 3


def test_closing_cuts_off_what_is_in_flight() -> None:
    import threading

    with toy_endpoint(lambda number, body: Answers(wait_s=900)) as endpoint:
        teacher = OpenAI(OpenAIOptions(model="m", base_url=endpoint.url, timeout_s=900))
        caught: list[TeacherError] = []

        def run() -> None:
            try:
                teacher.reply(request())
            except TeacherError as error:
                caught.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        while not endpoint.bodies:
            time.sleep(0.01)
        teacher.close()
        thread.join(300)
        assert not thread.is_alive()
        assert caught[0].then == "again"
