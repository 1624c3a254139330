"""`llavactl data generate` killed, interrupted and started twice; a test endpoint counts the requests it receives."""

from __future__ import annotations

import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llavactl.teaching.journal import Journal
from llavactl.testing import Answers, ToyEndpoint, run_cli, toy_endpoint

from ..preloaded import Interpreters, Process

PROGRAM = "from llavactl.cli import main; main()"

RECIPE = """\
name: instruct
vision: {{name: clip, model: clip}}
connector: {{name: linear}}
language: {{name: hf, model: language}}
generate:
  source: {{name: caps-boxes, path: images.jsonl}}
  teacher: {{name: openai, model: toy, base_url: "{url}", timeout_s: 600}}
  kinds: {{detail: 1}}
  out: instruct.jsonl
"""
IMAGES = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"id": f"p{n}", "image": f"p{n}.jpg", "captions": [f"Image {Random(n).random()}."]} for n in range(IMAGES)]
    (tmp_path / "images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@dataclass(frozen=True)
class Generation:
    """A process that runs ``llavactl data generate``, and the files that it writes its output to."""

    process: Process
    out: Path
    err: Path

    def ended(self) -> tuple[int, str, str]:
        """Waits for its end; the exit code and the output."""
        return self.process.wait(), self.out.read_text(), self.err.read_text()


Start = Callable[[ToyEndpoint], Generation]


@pytest.fixture
def start(folder: Path, interpreters: Interpreters) -> Start:
    """Starts a generation in ``folder`` with the teacher ``endpoint``."""
    numbers = itertools.count()

    def start(endpoint: ToyEndpoint) -> Generation:
        (folder / "recipe.yaml").write_text(RECIPE.format(url=endpoint.url))
        number, env = next(numbers), {**os.environ, "OPENAI_API_KEY": ""}
        out, err = folder / f"out-{number}", folder / f"err-{number}"
        words = ("data", "generate", "--json")
        process = interpreters.start(PROGRAM, *words, cwd=folder, env=env, output=out, errors=err)
        return Generation(process, out, err)

    return start


def wait_until(condition: Callable[[], bool], generation: Generation) -> None:
    for _ in range(3000):
        if condition():
            return
        assert generation.process.poll() is None, generation.err.read_text()
        time.sleep(0.01)
    raise AssertionError("timed out after 30 s")


@contextmanager
def eight_pending_requests(start: Start) -> Iterator[tuple[ToyEndpoint, Generation, threading.Event]]:
    """An endpoint that answers no request before the event, and a process that waits for eight replies."""
    released = threading.Event()

    def behave(number: int, body: Mapping[str, Any]) -> None:
        released.wait()

    try:
        with toy_endpoint(behave) as endpoint:
            generation = start(endpoint)
            wait_until(lambda: len(endpoint.bodies) == 8, generation)
            yield endpoint, generation, released
    finally:
        released.set()


def stored_replies(folder: Path) -> int:
    with Journal(folder / "instruct.replies.sqlite") as journal:
        return journal.spent().replies


def test_killed_run_resumes_without_repeating_answered_requests(folder: Path, start: Start) -> None:
    """The endpoint answers 23 requests, and the others only after the process has been killed."""

    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        return None if number < 23 or killed else Answers(wait_s=30)

    killed = False
    with toy_endpoint(behave) as endpoint:
        generation = start(endpoint)
        wait_until(lambda: len(endpoint.bodies) == 23 + 8, generation)
        wait_until(lambda: stored_replies(folder) == 23, generation)
        generation.process.send_signal(signal.SIGKILL)
        generation.process.wait()
        killed = True
        code, out, err = start(endpoint).ended()
        assert code == 0, err
        report = json.loads(out)
        assert report["samples"] + report["refused"] == IMAGES
        assert report["requests"]["sent"] == IMAGES - 23
        assert len(endpoint.answered) == IMAGES
        assert set(endpoint.answered.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_stored_replies_are_never_requested_again(folder: Path, start: Start, seed: int) -> None:
    """Only requests in flight are repeated, at most eight per kill."""
    with toy_endpoint(lambda number, body: Answers(wait_s=0.05)) as endpoint:
        before = 0
        for kill in range(3):
            generation = start(endpoint)
            goal = before + 5 + Random(seed * 10 + kill).randrange(10)
            wait_until(lambda goal=goal: len(endpoint.bodies) >= goal, generation)
            time.sleep(Random(seed).random() * 0.05)
            generation.process.send_signal(signal.SIGKILL)
            generation.process.wait()
            before = len(endpoint.bodies)
        stored = stored_replies(folder)
        sent = len(endpoint.bodies)
        _, out, err = start(endpoint).ended()
        assert json.loads(out)["requests"]["sent"] == IMAGES - stored == len(endpoint.bodies) - sent, err
        assert len(endpoint.answered) == IMAGES
        assert sum(endpoint.answered.values()) - IMAGES <= 3 * 8


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_for_replies_in_flight_and_stores_them(folder: Path, start: Start, end: signal.Signals) -> None:
    with eight_pending_requests(start) as (endpoint, generation, released):
        generation.process.send_signal(end)
        wait_until(lambda: "waiting for 8 " in generation.err.read_text(), generation)
        released.set()
        code, _, err = generation.ended()
        assert code == 128 + end
        assert "8 replies" in err
        assert "instruct.replies.sqlite" in err
        assert "run the same command to resume" in err
        assert "Traceback" not in err
        assert len(endpoint.bodies) == 8 == stored_replies(folder)
        assert json.loads(start(endpoint).ended()[1])["requests"]["sent"] == IMAGES - 8
        assert set(endpoint.answered.values()) == {1}


def test_second_interrupt_does_not_wait(folder: Path, start: Start) -> None:
    with eight_pending_requests(start) as (endpoint, generation, _):
        generation.process.send_signal(signal.SIGINT)
        wait_until(lambda: "waiting for 8 " in generation.err.read_text(), generation)
        generation.process.send_signal(signal.SIGINT)
        code, _, err = generation.ended()
        assert code == 130
        assert "Traceback" not in err, err
        assert len(endpoint.bodies) == 8
        assert not endpoint.answered


def test_second_process_on_the_same_file_is_refused(folder: Path, start: Start) -> None:
    with eight_pending_requests(start) as (_, first, released):
        second = run_cli("data", "generate", cwd=folder)
        assert second.exit_code == 1
        assert "another process" in second.stderr
        assert "instruct.jsonl" in second.stderr
        released.set()
        _, out, err = first.ended()
        assert json.loads(out)["requests"]["sent"] == IMAGES, err
