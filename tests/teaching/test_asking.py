"""Asking over a network that fails in every way: each reply is paid for once, and no limit is overshot."""

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
from llavactl.teaching import asking
from llavactl.teaching.asking import ask, keys
from llavactl.teaching.budget import Budget
from llavactl.teaching.journal import Journal
from llavactl.teaching.prices import Price
from llavactl.testing import Answers, completion, run_cli, toy_endpoint

Folder = Callable[..., Path]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "FIRST_WAIT_S", 0.05)


def generate(folder: Path, *options: str) -> Any:
    result = run_cli("data", "generate", "--json", *options, cwd=folder)
    assert result.exit_code == 0, result.stderr
    return result.json()


def records(folder: Path) -> list[Any]:
    return [json.loads(line) for line in (folder / "data/made.jsonl").read_text().splitlines()]


def test_every_kind_becomes_records_and_nothing_is_asked_twice(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 6, "conversation: 1, detail: 1, reasoning: 1")
        made = generate(folder)
        assert made["kinds"] == {"conversation": 6, "detail": 6, "reasoning": 6}, made["reasons"]
        assert [row["id"] for row in records(folder)][:3] == ["p000-conversation", "p000-detail", "p000-reasoning"]
        before = (folder / "data/made.jsonl").read_bytes()
        assert generate(folder)["finished_before"] is True
        (folder / "data/made.report.json").unlink()
        again = generate(folder, "-o", "generate.teacher.concurrency=2")
        assert again["asking"]["sent"] == 0
        assert (folder / "data/made.jsonl").read_bytes() == before
        assert len(endpoint.bodies) == 18
        assert set(endpoint.answered.values()) == {1}
        assert generate(folder, "-o", "generate.teacher.temperature=0.1")["asking"]["sent"] == 18


def test_what_the_teacher_is_told(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        generate(recipe(endpoint.url, 1, "conversation: 1, reasoning: 1"))
        conversation, reasoning = sorted(endpoint.bodies, key=lambda body: "one question" in str(body["messages"][0]))
        roles = [message["role"] for message in reasoning["messages"]]
        assert roles == ["system", "user", "assistant", "user", "assistant", "user"]
        told = reasoning["messages"][-1]["content"]
        assert told.startswith("A ")
        assert told.count(": [0.100, 0.200, 0.500, 0.600]") == 3
        assert "[" not in conversation["messages"][-1]["content"]


def stumbles(number: int, body: Mapping[str, Any]) -> Answers | None:
    """Every request fails five times, each time otherwise."""
    wrong = [
        Answers(429, b"", {"Retry-After": "0.2"}),
        Answers(500, b"<html>"),
        Answers(200, completion("x")[:30], promise=100),
        Answers(200, b"junk"),
        Answers(wait_s=30),
    ]
    return wrong[number] if number < len(wrong) else None


def test_a_bad_day_costs_nothing_but_time(recipe: Folder) -> None:
    with toy_endpoint(stumbles) as endpoint:
        folder = recipe(endpoint.url, 12, more=", timeout_s: 3, concurrency: 3")
        made = generate(folder)
        assert made["samples"] == 12
        assert made["asking"]["unanswered"] == 0
        assert len(endpoint.bodies) == 17
        assert set(endpoint.answered.values()) == {1}
        assert endpoint.most <= 4, "three at a time, and one that the endpoint still holds after its client left"


def test_retry_after_is_honoured_by_all(recipe: Folder) -> None:
    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        return Answers(429, b"", {"Retry-After": "1"}) if number == 0 else None

    with toy_endpoint(behave) as endpoint:
        generate(recipe(endpoint.url, 4, more=", concurrency: 1"))
        assert len(endpoint.bodies) == 5
        assert endpoint.times[1] - endpoint.times[0] >= 1.0


def test_eight_at_a_time(recipe: Folder) -> None:
    eight = threading.Barrier(8)

    def behave(number: int, body: Mapping[str, Any]) -> None:
        eight.wait(60)

    with toy_endpoint(behave) as endpoint:
        generate(recipe(endpoint.url, 16))
        assert endpoint.most == 8


@pytest.mark.parametrize("fails", [0, 2])
def test_requests_are_never_more_than_allowed(recipe: Folder, fails: int) -> None:
    with toy_endpoint(lambda n, b: Answers(500) if fails and n % fails == 0 else Answers(wait_s=0.05)) as endpoint:
        folder = recipe(endpoint.url, 30)
        made = generate(folder, "--max-requests", "11")
        assert len(endpoint.bodies) == 11 == made["asking"]["sent"]
        assert "--max-requests" in made["asking"]["stopped"]
        assert made["samples"] + made["asking"]["unanswered"] == 30
        assert made["samples"] == len(records(folder)) == (11 if not fails else 5)


def test_money_is_never_more_than_allowed(recipe: Folder) -> None:
    """A request may cost 1024 tokens out at 1000 a million, and costs 50: 0.051 in all with its 100 in."""
    with toy_endpoint(lambda number, body: Answers(wait_s=0.02)) as endpoint:
        folder = recipe(endpoint.url, 100)
        made = generate(folder, "--max-cost", "3")
        spent = made["asking"]["spent"]["cost"]
        assert spent == pytest.approx(len(endpoint.bodies) * 0.051)
        assert 1.9 < spent <= 3
        assert "left of 3" in made["asking"]["stopped"]
        again = generate(folder, "--max-cost", "3")
        assert again["asking"]["sent"] == 0, "what was spent before counts"
        more = generate(folder, "-o", "generate.max_cost=5")
        assert more["asking"]["sent"] > 0
        assert more["asking"]["spent"]["cost"] <= 5


def test_a_whole_run_does_not_train_on_a_part(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 20)
        result = run_cli("run", "-o", "generate.max_cost=2", cwd=folder)
        assert result.exit_code == 1
        assert "requests to the teacher are left" in result.stderr
        assert not (folder / "runs").exists()


def test_what_may_have_been_charged_counts_with_its_most(recipe: Folder) -> None:
    with toy_endpoint(lambda number, body: Answers(wait_s=2)) as endpoint:
        folder = recipe(endpoint.url, 50, more=", timeout_s: 0.2, retries: 50, concurrency: 2")
        made = generate(folder, "--max-cost", "4.5")
        assert made["samples"] == 0
        assert len(endpoint.bodies) == 4, "each can have cost 1.06"
        assert made["asking"]["spent"]["cost"] <= 4.5


def test_without_a_price_money_can_not_be_limited(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url)
        unknown = run_cli("data", "generate", "--max-cost", "1", "-o", "generate.teacher.model=x", cwd=folder)
        assert unknown.exit_code == 1
        assert "there is no price of 'x'" in unknown.stderr
        endless = run_cli("data", "generate", "--max-cost", "1", "-o", "generate.teacher.max_tokens=null", cwd=folder)
        assert "a reply could be of any length" in endless.stderr
        assert not endpoint.bodies


def test_a_wrong_key_stops_at_once(recipe: Folder) -> None:
    with toy_endpoint(lambda number, body: Answers(401, b'{"error": {"message": "no"}}', wait_s=0.05)) as endpoint:
        result = run_cli("data", "generate", cwd=recipe(endpoint.url, 100))
        assert result.exit_code == 1
        assert "401: no" in result.stderr
        assert "key_env" in result.stderr
        assert len(endpoint.bodies) <= 8


def test_when_all_is_refused_nothing_is_held_against_the_pictures(recipe: Folder) -> None:
    with toy_endpoint(lambda number, body: Answers(400, b'{"error": "unknown key temperature"}')) as endpoint:
        folder = recipe(endpoint.url, 100, more=", concurrency: 1")
        result = run_cli("data", "generate", cwd=folder)
        assert result.exit_code == 1
        assert "all 5 requests so far were refused" in result.stderr
        assert len(endpoint.bodies) == 5
        endpoint.behave = lambda number, body: None
        assert generate(folder)["samples"] == 100


def test_one_that_is_too_long_is_set_apart(recipe: Folder) -> None:
    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        long = "number 3." in body["messages"][-1]["content"]
        return Answers(400, b'{"error": {"message": "exceeds the context length"}}') if long else None

    with toy_endpoint(behave) as endpoint:
        folder = recipe(endpoint.url, 10)
        made = generate(folder)
        assert made["samples"] == 9
        assert made["reasons"] == {"refused by the teacher": 1}
        refused = json.loads((folder / "data/made.refused.jsonl").read_text())
        assert refused["id"] == "p003-detail"
        assert "too long for the model" in refused["reason"]
        assert len(endpoint.bodies) == 10


def test_an_endpoint_that_is_gone_ends_the_run_and_loses_nothing(recipe: Folder) -> None:
    with toy_endpoint(lambda n, body: None if n < 20 else Answers(503)) as endpoint:
        folder = recipe(endpoint.url, 100, more=", retries: 1")
        result = run_cli("data", "generate", cwd=folder)
        assert result.exit_code == 1
        assert "3 requests in a row had no answer in 2 attempts each" in result.stderr
        assert "20 replies are kept" in result.stderr
        assert len(records(folder)) == 20, "what was paid for is written, though not all was asked"
        assert len(endpoint.bodies) <= 20 + 3 * 8
        endpoint.behave = lambda number, body: None
        assert generate(folder)["samples"] == 100
        assert set(endpoint.answered.values()) == {1}


def test_pictures_that_an_endpoint_chokes_on_do_not_hold_up_the_others(recipe: Folder) -> None:
    """They are the last, so nobody knows whether the endpoint has gone: what there is is written."""

    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        return Answers(500) if any(f"number {bad}." in body["messages"][-1]["content"] for bad in (7, 8, 9)) else None

    with toy_endpoint(behave) as endpoint:
        folder = recipe(endpoint.url, 10, more=", retries: 1, concurrency: 1")
        made = generate(folder)
        assert made["samples"] == len(records(folder)) == 7
        assert made["asking"]["unanswered"] == 3
        assert "3 requests in a row had no answer" in made["asking"]["stopped"]
        endpoint.behave = lambda number, body: None
        assert generate(folder)["asking"]["sent"] == 3
        assert set(endpoint.answered.values()) == {1}


def test_an_endpoint_that_asks_for_an_hour_is_left_alone(recipe: Folder) -> None:
    """It is a failure, so that no script goes on with a part; what was answered is written all the same."""
    with toy_endpoint(lambda n, body: None if n < 2 else Answers(429, b"", {"Retry-After": "3600"})) as endpoint:
        folder = recipe(endpoint.url, 100)
        result = run_cli("data", "generate", "--json", cwd=folder)
        assert result.exit_code == 1
        assert "come back in 60 minutes" in result.stderr
        assert "run the same command again" in result.stderr
        assert len(endpoint.bodies) <= 10
        assert len((folder / "data/made.jsonl").read_text().splitlines()) == 2


def test_hostile_replies_hurt_nothing(recipe: Folder) -> None:
    junk = [
        completion("a\0b"), completion("<script>alert(1)</script>" * 50), completion(" " * 900_000), completion(None),
        completion("\n" * 900_000 + "===\n" * 1000), completion("Question:" * 90_000), completion("<image> of a dog"),
        completion("good", finish="length"), completion("Question:\na\n===\nAnswer:\nb", finish="content_filter"),
        completion("\u202e кошка сидит на столе и смотрит в окно"),
    ]  # fmt: skip
    with toy_endpoint(lambda n, body: Answers(body=junk[n]) if n < len(junk) else None) as endpoint:
        folder = recipe(endpoint.url, len(junk) + 5, "conversation: 1", more=", concurrency: 1")
        made = generate(folder)
        assert made["samples"] == 5
        assert made["refused"] == len(junk)
        assert made["reasons"]["malformed"] == len(junk) - 2
        assert made["reasons"]["cut at max_tokens"] == made["reasons"]["left out by the endpoint"] == 1
        assert "<script>" not in (folder / "data/made.report.html").read_text()
        endpoint.behave = lambda number, body: None
        assert generate(folder)["finished_before"] is True
        retried = generate(folder, "--retry-refused")
        assert retried["asking"]["sent"] == len(junk)
        assert retried["samples"] == len(junk) + 5
        assert generate(folder, "--retry-refused")["asking"]["sent"] == 0


def test_a_dry_run_says_what_it_would_take_and_touches_nothing(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 10)
        first = generate(folder, "--dry-run")["estimate"]
        assert not (folder / "data").exists()
        assert (first["requests"], first["kept"], first["currency"]) == (10, 0, "EUR, prices of 2026-01")
        assert "tokens a second" in first["basis"]
        assert 0 < first["cost"] < first["cost_at_most"]
        generate(folder, "--max-requests", "4")
        then = generate(folder, "--dry-run")["estimate"]
        assert (then["requests"], then["kept"]) == (6, 4)
        assert then["basis"] == "4 replies kept from before"
        assert then["cost"] == pytest.approx(6 * 0.051)
        slow = generate(folder, "--dry-run", "-o", "generate.teacher.requests_per_minute=2")["estimate"]
        assert slow["seconds"] == 120
        assert len(endpoint.bodies) == 4


def test_out_says_how_records_are_written(recipe: Folder) -> None:
    with toy_endpoint() as endpoint:
        folder = recipe(endpoint.url, 2)
        wrong = run_cli("data", "generate", "-o", "generate.out=made.txt", cwd=folder)
        assert wrong.exit_code == 1
        assert "generate.out: made.txt must end in .jsonl" in wrong.stderr
        assert not endpoint.bodies
        generate(folder, "-o", "generate.out=made.json")
        assert len(json.loads((folder / "made.json").read_text())) == 2


def test_a_free_teacher_has_no_budget(recipe: Folder) -> None:
    folder = recipe("http://127.0.0.1:9")
    text = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(text.replace('openai, model: toy, base_url: "http://127.0.0.1:9"', "rules"))
    result = run_cli("data", "generate", "--max-requests", "3", cwd=folder)
    assert result.exit_code == 1
    assert "costs nothing" in result.stderr


def test_a_key_in_the_environment_is_written_nowhere(recipe: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with toy_endpoint(lambda n, body: Answers(500, b"sk-very-secret") if n == 0 else None) as endpoint:
        folder = recipe(endpoint.url, 3)
        result = run_cli("data", "generate", cwd=folder)
        assert result.exit_code == 0
        assert endpoint.headers[0]["Authorization"] == "Bearer sk-very-secret"
        written = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
        assert not any(b"sk-very-secret" in each for each in [*written, result.stdout.encode(), result.stderr.encode()])


def test_money_of_a_process_that_died_counts(tmp_path: Path) -> None:
    """What was in flight when a process was killed may have been charged for."""
    with Journal(tmp_path / "j.sqlite") as journal:
        journal.begin("k", "1-detail", "detail", 2.5)
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal.spent().cost == 2.5
        assert journal.answered() == set()


class Plain:
    """A teacher in this process, as a plugin would bring it."""

    limits = Limits(concurrency=2, model="m", max_tokens=10)

    def __init__(self, said: Callable[[Request], str | Reply]) -> None:
        self.said = said

    def content(self, request: Request) -> Mapping[str, Any]:
        return {"messages": [dict(each) for each in request.messages]}

    def reply(self, request: Request) -> str | Reply:
        return self.said(request)


def some(count: int, text: str = "") -> list[Request]:
    return [
        Request(f"{n}-detail", "detail", ({"role": "user", "content": text or str(n)},), Sample(str(n), ()))
        for n in range(count)
    ]


def test_the_same_content_twice_is_two_requests(tmp_path: Path) -> None:
    teacher = Plain(lambda request: f"reply to {request.id}")
    keyed = list(keys(teacher, some(3, "the same")))
    assert len({each.key for each in keyed}) == 3
    assert [each.key for each in keys(teacher, reversed(some(3, "the same")))] == [each.key for each in keyed]
    with Journal(tmp_path / "j.sqlite") as journal:
        ask(teacher, keyed, journal, Budget(Price(**{"in": 1, "out": 1})))
        assert {journal.get(each.key).reply.text for each in keyed} == {f"reply to {n}-detail" for n in range(3)}  # type: ignore[union-attr]


def test_a_defect_of_a_teacher_keeps_the_replies_of_others(tmp_path: Path) -> None:
    def said(request: Request) -> str:
        if request.id == "3-detail":
            raise ZeroDivisionError("a defect")
        time.sleep(0.05)
        return "fine"

    teacher = Plain(said)
    with Journal(tmp_path / "j.sqlite") as journal:
        with pytest.raises(ZeroDivisionError):
            ask(teacher, list(keys(teacher, some(10))), journal, Budget())
        assert journal.spent().replies >= 3


def test_a_full_disk_is_said_in_words(tmp_path: Path) -> None:
    teacher = Plain(lambda request: Reply("x" * 100_000))
    with Journal(tmp_path / "j.sqlite") as journal:
        journal._run("pragma max_page_count = 60")
        with pytest.raises(Exception, match="database or disk is full") as caught:
            ask(teacher, list(keys(teacher, some(40))), journal, Budget())
        assert "free some disk" in caught.value.hint  # type: ignore[attr-defined]
    with Journal(tmp_path / "j.sqlite") as journal:
        kept = journal.spent().replies
        assert 0 < kept < 5
        ask(
            teacher, [each for each in keys(teacher, some(40)) if each.key not in journal.answered()], journal, Budget()
        )
        assert journal.spent().replies == 40


def test_a_file_that_holds_no_replies(tmp_path: Path) -> None:
    (tmp_path / "j.sqlite").write_bytes(b"not a database at all" * 100)
    with pytest.raises(Exception, match="not a database"):
        Journal(tmp_path / "j.sqlite")


def test_every_reply_is_synced_before_it_is_read(tmp_path: Path) -> None:
    with Journal(tmp_path / "j.sqlite") as journal:
        assert journal._run("pragma journal_mode") == [("wal",)]
        assert journal._run("pragma synchronous") == [(2,)]
        number = journal.begin("k", "1-detail", "detail", None)
        journal.keep(number, Reply("kept"), None)
        # As after a power cut: another copy of the files as they are on disk now, opened anew.
        for name in ("j.sqlite", "j.sqlite-wal"):
            (tmp_path / f"copy-{name}").write_bytes((tmp_path / name).read_bytes())
        rows = sqlite3.connect(tmp_path / "copy-j.sqlite").execute("select text from attempts").fetchall()
        assert rows == [("kept",)]


def test_refusals_stop(tmp_path: Path) -> None:
    def said(request: Request) -> str:
        raise TeacherError("no", then="apart")

    teacher = Plain(said)
    with Journal(tmp_path / "j.sqlite") as journal, pytest.raises(TeacherError, match="all 5"):
        ask(teacher, list(keys(teacher, some(10))), journal, Budget())


def test_prompts_of_ones_own_are_what_is_sent_and_the_cost_is_told(
    recipe: Folder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
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
        assert len(endpoint.bodies) == before + 3, "another prompt is another question"
