"""Requests over an unreliable network: each reply is paid for once, and no limit is exceeded."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from llavactl.core import progress
from llavactl.core.errors import TeacherError
from llavactl.core.protocols import Limits, Reply, Request
from llavactl.core.schema import Sample
from llavactl.teaching import retries
from llavactl.teaching.budget import Budget
from llavactl.teaching.journal import Journal
from llavactl.teaching.keyed import with_keys
from llavactl.teaching.prices import Price
from llavactl.teaching.sender import send_requests
from llavactl.testing import Answers, completion, run_cli, toy_endpoint

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.05)


def generate(folder: Path, *options: str) -> Any:
    result = run_cli("data", "generate", "--json", *options, cwd=folder)
    assert result.exit_code == 0, result.stderr
    return result.json()


def records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "data/instruct.jsonl").read_text().splitlines()]


def test_every_kind_is_generated_and_no_request_is_repeated(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 6, "conversation: 1, detail: 1, reasoning: 1")
        report = generate(folder)
        assert report["kinds"] == {"conversation": 6, "detail": 6, "reasoning": 6}, report["reasons"]
        assert [row["id"] for row in records(folder)][:3] == ["p000-conversation", "p000-detail", "p000-reasoning"]
        before = (folder / "data/instruct.jsonl").read_bytes()
        assert generate(folder)["finished_before"] is True
        (folder / "data/instruct.report.json").unlink()
        again = generate(folder, "-o", "generate.teacher.concurrency=2")
        assert again["requests"]["sent"] == 0
        assert (folder / "data/instruct.jsonl").read_bytes() == before
        assert len(endpoint.bodies) == 18
        assert set(endpoint.answered.values()) == {1}
        assert generate(folder, "-o", "generate.teacher.temperature=0.1")["requests"]["sent"] == 18


def test_messages_have_examples_captions_and_boxes(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        generate(recipe(endpoint.url, 1, "conversation: 1, reasoning: 1"))
        conversation, reasoning = sorted(endpoint.bodies, key=lambda body: "one question" in str(body["messages"][0]))
        roles = [message["role"] for message in reasoning["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
        text = reasoning["messages"][-1]["content"]
        assert text.startswith("A ")
        assert text.count(": [0.100, 0.200, 0.500, 0.600]") == 3
        assert "[" not in conversation["messages"][-1]["content"]


def failing_first(number: int, body: Mapping[str, Any]) -> Answers | None:
    """The first five requests fail, each in another way."""
    failures = [
        Answers(429, b"", {"Retry-After": "0.2"}),
        Answers(500, b"<html>"),
        Answers(200, completion("x")[:30], promise=100),
        Answers(200, b"junk"),
        Answers(wait_s=30),
    ]
    return failures[number] if number < len(failures) else None


def test_failed_requests_are_retried(recipe: Folder) -> None:
    with toy_endpoint(failing_first) as endpoint:
        folder = recipe(endpoint.url, 12, more=", timeout_s: 3, concurrency: 3")
        report = generate(folder)
        assert report["samples"] == 12
        assert report["requests"]["unanswered"] == 0
        assert len(endpoint.bodies) == 17
        assert set(endpoint.answered.values()) == {1}
        assert endpoint.most <= 4, "three concurrent requests, and one whose client has disconnected"


def test_retry_after_delays_all_requests(recipe: Folder) -> None:
    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        return Answers(429, b"", {"Retry-After": "1"}) if number == 0 else None

    with toy_endpoint(behave) as endpoint:
        generate(recipe(endpoint.url, 4, more=", concurrency: 1"))
        assert len(endpoint.bodies) == 5
        assert endpoint.times[1] - endpoint.times[0] >= 1.0


def test_eight_concurrent_requests_by_default(recipe: Folder) -> None:
    eight = threading.Barrier(8)

    def behave(number: int, body: Mapping[str, Any]) -> None:
        eight.wait(60)

    with toy_endpoint(behave) as endpoint:
        generate(recipe(endpoint.url, 16))
        assert endpoint.most == 8


@pytest.mark.parametrize("fails", [0, 2])
def test_max_requests_is_never_exceeded(recipe: Folder, fails: int) -> None:
    with toy_endpoint(lambda n, b: Answers(500) if fails and n % fails == 0 else Answers(wait_s=0.05)) as endpoint:
        folder = recipe(endpoint.url, 30)
        report = generate(folder, "--max-requests", "11")
        assert len(endpoint.bodies) == 11 == report["requests"]["sent"]
        assert "--max-requests" in report["requests"]["stopped"]
        assert report["samples"] + report["requests"]["unanswered"] == 30
        assert report["samples"] == len(records(folder)) == (11 if not fails else 5)


def test_max_cost_is_never_exceeded(recipe: Folder) -> None:
    """A request may cost 1024 output tokens at 1000 per million; it costs 0.051: 50 output and 100 input tokens."""
    with toy_endpoint(lambda number, body: Answers(wait_s=0.02)) as endpoint:
        folder = recipe(endpoint.url, 100)
        report = generate(folder, "--max-cost", "3")
        spent = report["requests"]["spent"]["cost"]
        assert spent == pytest.approx(len(endpoint.bodies) * 0.051)
        assert 1.9 < spent <= 3
        assert "max_cost 3" in report["requests"]["stopped"]
        again = generate(folder, "--max-cost", "3")
        assert again["requests"]["sent"] == 0, "the cost of earlier runs counts"
        more = generate(folder, "-o", "generate.max_cost=5")
        assert more["requests"]["sent"] > 0
        assert more["requests"]["spent"]["cost"] <= 5


def test_a_run_stops_before_training_on_incomplete_data(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 20)
        result = run_cli("run", "-o", "generate.max_cost=2", cwd=folder)
        assert result.exit_code == 1
        assert "max_cost 2" in result.stderr
        assert not (folder / "runs").exists()


def test_requests_that_may_have_been_charged_count_with_their_maximum_cost(recipe: Folder) -> None:
    with toy_endpoint(lambda number, body: Answers(wait_s=2)) as endpoint:
        folder = recipe(endpoint.url, 50, more=", timeout_s: 0.2, retries: 50, concurrency: 2")
        report = generate(folder, "--max-cost", "4.5")
        assert report["samples"] == 0
        assert len(endpoint.bodies) == 4, "each can have cost 1.06"
        assert report["requests"]["spent"]["cost"] <= 4.5


def test_max_cost_needs_a_price_and_max_tokens(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url)
        unknown = run_cli("data", "generate", "--max-cost", "1", "-o", "generate.teacher.model=x", cwd=folder)
        assert unknown.exit_code == 1
        assert "max_cost: " in unknown.stderr
        assert "'x'" in unknown.stderr
        unlimited = run_cli("data", "generate", "--max-cost", "1", "-o", "generate.teacher.max_tokens=null", cwd=folder)
        assert "generate.teacher.max_tokens" in unlimited.stderr
        assert not endpoint.bodies


def test_an_invalid_key_stops_the_run_immediately(recipe: Folder) -> None:
    with toy_endpoint(lambda number, body: Answers(401, b'{"error": {"message": "no"}}', wait_s=0.05)) as endpoint:
        result = run_cli("data", "generate", cwd=recipe(endpoint.url, 100))
        assert result.exit_code == 1
        assert "401: no" in result.stderr
        assert "key_env" in result.stderr
        assert len(endpoint.bodies) <= 8


def test_when_all_requests_are_refused_none_is_stored_as_refused(recipe: Folder) -> None:
    with toy_endpoint(lambda number, body: Answers(400, b'{"error": "unknown key temperature"}')) as endpoint:
        folder = recipe(endpoint.url, 100, more=", concurrency: 1")
        result = run_cli("data", "generate", cwd=folder)
        assert result.exit_code == 1
        assert "unknown key temperature" in result.stderr
        assert len(endpoint.bodies) == 5
        endpoint.behave = lambda number, body: None
        assert generate(folder)["samples"] == 100


def test_a_request_that_is_too_long_is_refused_and_the_others_continue(recipe: Folder) -> None:
    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        long = "number 3." in body["messages"][-1]["content"]
        return Answers(400, b'{"error": {"message": "exceeds the context length"}}') if long else None

    with toy_endpoint(behave) as endpoint:
        folder = recipe(endpoint.url, 10)
        report = generate(folder)
        assert report["samples"] == 9
        assert report["reasons"] == {"refused by the teacher": 1}
        refused = json.loads((folder / "data/instruct.refused.jsonl").read_text())
        assert refused["id"] == "p003-detail"
        assert "context length" in refused["reason"]
        assert len(endpoint.bodies) == 10


def test_an_endpoint_that_goes_down_stops_the_run_and_keeps_all_replies(recipe: Folder) -> None:
    with toy_endpoint(lambda n, body: None if n < 20 else Answers(503)) as endpoint:
        folder = recipe(endpoint.url, 100, more=", retries: 1")
        result = run_cli("data", "generate", cwd=folder)
        assert result.exit_code == 1
        assert "503" in result.stderr
        assert "20 replies" in result.stderr
        assert len(records(folder)) == 20, "paid replies are written, although requests are missing"
        assert len(endpoint.bodies) <= 20 + 3 * 8
        endpoint.behave = lambda number, body: None
        assert generate(folder)["samples"] == 100
        assert set(endpoint.answered.values()) == {1}


def test_requests_that_always_fail_do_not_block_the_others(recipe: Folder) -> None:
    """They are the last ones, so the endpoint may be down: the records so far are written."""

    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        return Answers(500) if any(f"number {bad}." in body["messages"][-1]["content"] for bad in (7, 8, 9)) else None

    with toy_endpoint(behave) as endpoint:
        folder = recipe(endpoint.url, 10, more=", retries: 1, concurrency: 1")
        report = generate(folder)
        assert report["samples"] == len(records(folder)) == 7
        assert report["requests"]["unanswered"] == 3
        assert "500" in report["requests"]["stopped"]
        endpoint.behave = lambda number, body: None
        assert generate(folder)["requests"]["sent"] == 3
        assert set(endpoint.answered.values()) == {1}


def test_a_retry_after_of_an_hour_stops_the_run(recipe: Folder) -> None:
    """It is an error, so that no script continues with incomplete data; the records so far are written."""
    with toy_endpoint(lambda n, body: None if n < 2 else Answers(429, b"", {"Retry-After": "3600"})) as endpoint:
        folder = recipe(endpoint.url, 100)
        result = run_cli("data", "generate", "--json", cwd=folder)
        assert result.exit_code == 1
        assert "60 minutes" in result.stderr
        assert len(endpoint.bodies) <= 10
        assert len((folder / "data/instruct.jsonl").read_text().splitlines()) == 2


def test_malicious_replies_are_refused(recipe: Folder) -> None:
    junk = [
        completion("a\0b"), completion("<script>alert(1)</script>" * 50), completion(" " * 900_000), completion(None),
        completion("\n" * 900_000 + "===\n" * 1000), completion("Question:" * 90_000), completion("<image> of a dog"),
        completion("good", finish="length"), completion("Question:\na\n===\nAnswer:\nb", finish="content_filter"),
        completion("\u202e кошка сидит на столе и смотрит в окно"),
    ]  # fmt: skip
    with toy_endpoint(lambda n, body: Answers(body=junk[n]) if n < len(junk) else None) as endpoint:
        folder = recipe(endpoint.url, len(junk) + 5, "conversation: 1", more=", concurrency: 1")
        report = generate(folder)
        assert report["samples"] == 5
        assert report["refused"] == len(junk)
        assert report["reasons"]["malformed"] == len(junk) - 2
        assert report["reasons"]["truncated at max_tokens"] == report["reasons"]["content filter"] == 1
        assert "<script>" not in (folder / "data/instruct.report.html").read_text()
        endpoint.behave = lambda number, body: None
        assert generate(folder)["finished_before"] is True
        retried = generate(folder, "--retry-refused")
        assert retried["requests"]["sent"] == len(junk)
        assert retried["samples"] == len(junk) + 5
        assert generate(folder, "--retry-refused")["requests"]["sent"] == 0


def test_data_without_a_usable_reply_is_an_error_until_there_is_one(recipe: Folder) -> None:
    with toy_endpoint(lambda number, body: Answers(body=completion("a\0b"))) as endpoint:
        folder = recipe(endpoint.url, 2, "conversation: 1")
        for _ in range(2):
            result = run_cli("data", "generate", cwd=folder)
            assert result.exit_code == 1
            assert "malformed: 2" in result.stderr
            assert "instruct.refused.jsonl" in result.stderr
        assert len(endpoint.bodies) == 2
        endpoint.behave = lambda number, body: None
        assert generate(folder, "--retry-refused")["samples"] == 2


def test_a_dry_run_estimates_and_writes_nothing(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 10)
        first = generate(folder, "--dry-run")["estimate"]
        assert not (folder / "data").exists()
        assert (first["requests"], first["kept"], first["currency"]) == (10, 0, "EUR, prices of 2026-01")
        assert "tokens per second" in first["basis"]
        assert 0 < first["cost"] < first["cost_at_most"]
        generate(folder, "--max-requests", "4")
        then = generate(folder, "--dry-run")["estimate"]
        assert (then["requests"], then["kept"]) == (6, 4)
        assert then["basis"].startswith("4 ")
        assert then["cost"] == pytest.approx(6 * 0.051)
        slow = generate(folder, "--dry-run", "-o", "generate.teacher.requests_per_minute=2")["estimate"]
        assert slow["seconds"] == 120
        assert len(endpoint.bodies) == 4


def test_the_suffix_of_out_selects_the_format(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 2)
        wrong = run_cli("data", "generate", "-o", "generate.out=instruct.txt", cwd=folder)
        assert wrong.exit_code == 1
        assert "generate.out: instruct.txt" in wrong.stderr
        assert not endpoint.bodies
        generate(folder, "-o", "generate.out=instruct.json")
        assert len(json.loads((folder / "instruct.json").read_text())) == 2


def test_budget_options_need_a_language_teacher(recipe: Folder) -> None:
    folder = recipe("http://127.0.0.1:9")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace('openai, model: toy, base_url: "http://127.0.0.1:9"', "rules"))
    result = run_cli("data", "generate", "--max-requests", "3", cwd=folder)
    assert result.exit_code == 1
    assert "'rules'" in result.stderr


def test_the_api_key_is_never_written(recipe: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with toy_endpoint(lambda n, body: Answers(500, b"sk-very-secret") if n == 0 else None) as endpoint:
        folder = recipe(endpoint.url, 3)
        result = run_cli("data", "generate", cwd=folder)
        assert result.exit_code == 0
        assert endpoint.headers[0]["Authorization"] == "Bearer sk-very-secret"
        written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert not any(b"sk-very-secret" in each for each in [*written, result.stdout.encode(), result.stderr.encode()])


def test_the_cost_of_a_killed_process_counts(tmp_path: Path) -> None:
    """Requests in flight when a process was killed may have been charged."""
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.start("k", "1-detail", "detail", 2.5)
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.spent().cost == 2.5
        assert journal.answered_keys() == set()


class LocalTeacher:
    """A language teacher in this process, as in a plugin."""

    limits = Limits(concurrency=2, model="m", max_tokens=10)

    def __init__(self, answer: Callable[[Request], str | Reply]) -> None:
        self.answer = answer

    def content(self, request: Request) -> Mapping[str, Any]:
        return {"messages": [dict(each) for each in request.messages]}

    def reply(self, request: Request) -> str | Reply:
        return self.answer(request)


def requests(count: int, text: str = "") -> list[Request]:
    return [
        Request(f"{n}-detail", "detail", ({"role": "user", "content": text or str(n)},), Sample(str(n), ()))
        for n in range(count)
    ]


def test_the_replies_of_an_earlier_version_are_found(tmp_path: Path) -> None:
    """A journal as earlier versions wrote it: key, columns and states on disk must not change."""
    database = sqlite3.connect(tmp_path / "j.sqlite")
    database.execute(
        "create table attempts (number integer primary key, key text not null, id text not null, kind text not null, "
        "state text not null, sent real not null, seconds real, most real, cost real, text text, tokens_in integer, "
        "tokens_out integer, finish text, reason text)"
    )
    rows = [
        (1, "fa8e73eab7510908c9fc4a03af252edf", "0-detail", "detail", "sent", 1.0, None, 2.5, None, *[None] * 5),
        (
            2,
            "fa8e73eab7510908c9fc4a03af252edf",
            "0-detail",
            "detail",
            "reply",
            1.0,
            0.5,
            2.5,
            0.1,
            "A dog.",
            10,
            5,
            "stop",
            None,
        ),
        (
            3,
            "e59fc1f4d62b2569d2904a5a9fdc52de",
            "1-detail",
            "detail",
            "refused",
            1.0,
            0.5,
            2.5,
            0.0,
            None,
            None,
            None,
            None,
            "too long",
        ),
    ]
    database.executemany(f"insert into attempts values ({', '.join('?' * 14)})", rows)
    database.commit()
    database.close()
    teacher = LocalTeacher(lambda request: "new")
    keyed = list(with_keys(teacher, requests(3)))
    with Journal(tmp_path / "j.sqlite") as journal:
        answered = journal.answered_keys()
        assert [each.key in answered for each in keyed] == [True, True, False]
        assert journal.spent().cost == 2.6
        send_requests(teacher, [each for each in keyed if each.key not in answered], journal, Budget())
        replies = [outcome.reply for each in keyed if (outcome := journal.outcome(each.key))]
        assert [reply and reply.text for reply in replies] == ["A dog.", None, "new"]


def test_requests_with_equal_content_get_different_keys(tmp_path: Path) -> None:
    teacher = LocalTeacher(lambda request: f"reply to {request.id}")
    keyed = list(with_keys(teacher, requests(3, "the same")))
    assert len({each.key for each in keyed}) == 3
    assert [each.key for each in with_keys(teacher, reversed(requests(3, "the same")))] == [each.key for each in keyed]
    with Journal(tmp_path / "j.sqlite") as journal:
        send_requests(teacher, keyed, journal, Budget(Price(**{"in": 1, "out": 1})))
        assert {journal.outcome(each.key).reply.text for each in keyed} == {f"reply to {n}-detail" for n in range(3)}  # type: ignore[union-attr]


def test_a_bug_in_a_teacher_keeps_the_other_replies(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        if request.id == "3-detail":
            raise ZeroDivisionError("a bug")
        time.sleep(0.05)
        return "fine"

    teacher = LocalTeacher(answer)
    with Journal(tmp_path / "j.sqlite") as journal:
        with pytest.raises(ZeroDivisionError):
            send_requests(teacher, list(with_keys(teacher, requests(10))), journal, Budget())
        assert journal.spent().replies >= 3


def test_a_full_disk_is_an_error_with_a_hint(tmp_path: Path) -> None:
    teacher = LocalTeacher(lambda request: Reply("x" * 100_000))
    with Journal(tmp_path / "j.sqlite") as journal:
        journal._run("pragma max_page_count = 60")
        with pytest.raises(Exception, match="database or disk is full") as caught:
            send_requests(teacher, list(with_keys(teacher, requests(40))), journal, Budget())
        assert "disk" in caught.value.hint  # type: ignore[attr-defined]
    with Journal(tmp_path / "j.sqlite") as journal:
        kept = journal.spent().replies
        assert 0 < kept < 5
        send_requests(
            teacher,
            [each for each in with_keys(teacher, requests(40)) if each.key not in journal.answered_keys()],
            journal,
            Budget(),
        )
        assert journal.spent().replies == 40


def test_a_file_that_is_not_a_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Exception, match="not a database"):
        Journal(tmp_path / "j.sqlite")


def test_every_reply_is_synced_to_disk(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal._run("pragma journal_mode") == [("wal",)]
        assert journal._run("pragma synchronous") == [(2,)]
        number = journal.start("k", "1-detail", "detail", None)
        journal.save(number, Reply("kept"), None)
        # As after a power failure: a copy of the files as they are on disk now.
        for name in ("j.sqlite", "j.sqlite-wal"):
            (tmp_path / f"copy-{name}").write_bytes((tmp_path / name).read_bytes())
        rows = sqlite3.connect(tmp_path / "copy-j.sqlite").execute("select text from attempts").fetchall()
        assert rows == [("kept",)]


def test_five_initial_refusals_stop_the_run(tmp_path: Path) -> None:
    def answer(request: Request) -> str:
        raise TeacherError("no", then="apart")

    teacher = LocalTeacher(answer)
    with Journal(tmp_path / "j.sqlite") as journal, pytest.raises(TeacherError, match="5 requests"):
        send_requests(teacher, list(with_keys(teacher, requests(10))), journal, Budget())


def test_custom_prompts_are_sent_and_progress_shows_the_cost(
    recipe: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(progress, "FIRST_LINE_S", 0.0)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    caplog.set_level("INFO")
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 3)
        (folder / "mine").mkdir()
        (folder / "mine/detail.yaml").write_text("system: Say what is there.\nquestions: [Well?]\n")
        generate(folder, "-o", "generate.prompts=mine", "-o", "generate.max_cost=9")
        assert {body["messages"][0]["content"] for body in endpoint.bodies} == {"Say what is there."}
        assert {len(body["messages"]) for body in endpoint.bodies} == {2}
        assert {row["conversations"][0]["value"] for row in records(folder)} == {"<image>\nWell?"}
        assert "generate: 3 of 3 answers" in caplog.text
        assert "cost 0.1530 of 9" in caplog.text
        before = len(endpoint.bodies)
        (folder / "mine/detail.yaml").write_text("system: Say all that is there.\nquestions: [Well?]\n")
        generate(folder, "-o", "generate.prompts=mine")
        assert len(endpoint.bodies) == before + 3, "another prompt is another request"
