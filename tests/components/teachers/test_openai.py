"""Requests to faulty endpoints: bounded time and size, and every response is classified correctly."""

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


def send(answers: Answers | None, **options: Any) -> tuple[Reply, ToyEndpoint]:
    with toy_endpoint(lambda number, body: answers) as endpoint:
        teacher = OpenAI(OpenAIOptions(model="m", base_url=endpoint.url, **options))
        try:
            return teacher.reply(request()), endpoint
        finally:
            teacher.close()


def failure(answers: Answers, **options: Any) -> TeacherError:
    with pytest.raises(TeacherError) as caught:
        send(answers, **options)
    return caught.value


def test_openai_implements_all_teacher_protocols() -> None:
    teacher = OpenAI(OpenAIOptions(model="m"))
    assert isinstance(teacher, Teacher)
    assert isinstance(teacher, LanguageTeacher)
    assert isinstance(teacher, BatchTeacher)


def test_a_reply_has_token_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    reply, endpoint = send(
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
    assert "Authorization" not in send(None)[1].headers[0]


@pytest.mark.parametrize(
    ("answers", "then", "paid", "expected"),
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
        (Answers(200, completion("cut")[:40], promise=200), "again", True, "interrupted"),
        (Answers(200, b"x" * 3_000_000), "apart", True, "larger than 50000 bytes"),
        (Answers(500, b"x" * 3_000_000), "again", False, "500: xxx"),
    ],
)  # fmt: skip
def test_every_response_is_classified(answers: Answers, then: str, paid: bool, expected: str) -> None:
    error = failure(answers, max_bytes=50_000)
    assert (error.then, expected in error.message) == (then, True), error.message
    assert error.paid is paid
    assert len(error.message) < 500
    assert error.message.isprintable()


def test_the_timeout_is_for_the_entire_request() -> None:
    """Also if every read is fast: one byte per 20 ms would take a minute."""
    for answers in (Answers(wait_s=60), Answers(body=completion("x" * 3000), trickle_s=0.02)):
        error = failure(answers, timeout_s=0.3)
        assert (error.then, error.paid) == ("again", True)
        assert "0.3 s" in error.message


def test_compressed_responses_are_not_decompressed() -> None:
    import gzip

    error = failure(Answers(200, gzip.compress(b"0" * 50_000_000), {"Content-Encoding": "gzip"}))
    assert error.then == "again"


def test_connection_refused() -> None:
    teacher = OpenAI(OpenAIOptions(model="m", base_url="http://127.0.0.1:9/v1"))
    with pytest.raises(TeacherError, match="no connection") as caught:
        teacher.reply(request())
    assert (caught.value.then, caught.value.paid) == ("again", False)
    assert "127.0.0.1:9" in caught.value.hint
    teacher.close()


def test_null_and_lone_surrogates_are_replies() -> None:
    assert send(Answers(body=completion(None, finish="content_filter")))[0] == Reply("", 100, 50, "content_filter")
    body = completion("x").replace(b'"x"', b'"\\ud800 x"')
    assert send(Answers(body=body))[0].text.encode() == b"? x"
    parts = {"choices": [{"message": {"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}}]}
    assert send(Answers(body=json.dumps(parts).encode()))[0] == Reply("ab")
    invalid_usage = {
        "choices": [{"message": {"content": "a"}}],
        "usage": {"prompt_tokens": -1, "completion_tokens": "9"},
    }
    assert send(Answers(body=json.dumps(invalid_usage).encode()))[0] == Reply("a")


def test_the_key_is_never_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    error = failure(Answers(401, json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()))
    assert KEY not in error.message + error.hint
    assert "***" in error.message
    assert KEY not in send(Answers(body=completion(f"your key is {KEY}")))[0].text
    assert KEY not in caplog.text
    monkeypatch.setenv("OPENAI_API_KEY", "two\nlines")
    with pytest.raises(TeacherError, match="OPENAI_API_KEY") as caught:
        send(None)
    assert "lines" not in caught.value.message


def test_options_must_not_contain_credentials_or_reserved_keys() -> None:
    for url in ("ftp://x", "http://me:pw@host/v1", "https://host/v1?api-key=x"):
        with pytest.raises(ValidationError):
            OpenAIOptions(model="m", base_url=url)
    with pytest.raises(ValidationError):
        OpenAIOptions(model="m", extra={"messages": []})
    for name in ("api_key", "Authorization", "token"):
        with pytest.raises(ValidationError, match="key_env"):
            OpenAIOptions(model="m", extra={name: "sk-very-secret"})
    assert OpenAIOptions(model="m", extra={"max_completion_tokens": 9, "logit_bias": {}}).extra
    assert OpenAIOptions(model="m", base_url="http://x/v1/chat/completions").base_url == "http://x/v1"


def test_zero_token_counts_are_unknown() -> None:
    def counts(text: str) -> tuple[int | None, int | None]:
        reply = completions.read(200, completion(text, tokens_in=0, tokens_out=0))
        return reply.tokens_in, reply.tokens_out

    assert counts("A dog.") == (None, None)
    assert counts("") == (None, 0)


def test_retry_after_in_seconds_or_as_a_date() -> None:
    assert completions.retry_after_s("7") == 7
    assert completions.retry_after_s("1.5") == 1.5
    assert completions.retry_after_s("-3") == 0
    in_a_minute = completions.retry_after_s(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True))
    assert in_a_minute is not None
    assert 50 < in_a_minute <= 60
    for invalid in (None, "", "soon", "Mon, 99 Foo 2026"):
        assert completions.retry_after_s(invalid) is None
    assert failure(Answers(429, b"", {"Retry-After": "3"})).wait_s == 3


def test_closing_cancels_requests_in_flight() -> None:
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
