"""`llavactl data generate` killed, interrupted and started twice; a test endpoint counts the requests it receives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from llavactl.teaching.journal import Journal
from llavactl.testing import Answers, ToyEndpoint, run_cli, toy_endpoint

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


def start(folder: Path, endpoint: ToyEndpoint) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(RECIPE.format(url=endpoint.url))
    return subprocess.Popen(
        [sys.executable, "-m", "llavactl", "data", "generate", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OPENAI_API_KEY": ""},
    )  # fmt: skip


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if condition():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("timed out after 30 s")


@contextmanager
def eight_pending_requests(folder: Path) -> Iterator[tuple[ToyEndpoint, subprocess.Popen[str], threading.Event]]:
    """An endpoint that answers no request before the event, and a process that waits for eight replies."""
    released = threading.Event()

    def behave(number: int, body: Mapping[str, Any]) -> None:
        released.wait()

    try:
        with toy_endpoint(behave) as endpoint:
            process = start(folder, endpoint)
            wait_until(lambda: len(endpoint.bodies) == 8, process)
            yield endpoint, process, released
    finally:
        released.set()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """The standard error of ``process`` up to ``text``."""
    assert process.stderr is not None
    output = ""
    while text not in output:
        character = process.stderr.read(1)
        assert character, output
        output += character
    return output


def stored_replies(folder: Path) -> int:
    with Journal(folder / "instruct.replies.sqlite") as journal:
        return journal.spent().replies


def test_killed_run_resumes_without_repeating_answered_requests(folder: Path) -> None:
    """The endpoint answers 23 requests, and the others only after the process has been killed."""

    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        return None if number < 23 or killed else Answers(wait_s=30)

    killed = False
    with toy_endpoint(behave) as endpoint:
        process = start(folder, endpoint)
        wait_until(lambda: len(endpoint.bodies) == 23 + 8, process)
        wait_until(lambda: stored_replies(folder) == 23, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        killed = True
        resumed = start(folder, endpoint)
        out, err = resumed.communicate()
        assert resumed.returncode == 0, err
        report = json.loads(out)
        assert report["samples"] + report["refused"] == IMAGES
        assert report["requests"]["sent"] == IMAGES - 23
        assert len(endpoint.answered) == IMAGES
        assert set(endpoint.answered.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_stored_replies_are_never_requested_again(folder: Path, seed: int) -> None:
    """Only requests in flight are repeated, at most eight per kill."""
    with toy_endpoint(lambda number, body: Answers(wait_s=0.05)) as endpoint:
        before = 0
        for kill in range(3):
            process = start(folder, endpoint)
            goal = before + 5 + Random(seed * 10 + kill).randrange(10)
            wait_until(lambda goal=goal: len(endpoint.bodies) >= goal, process)
            time.sleep(Random(seed).random() * 0.05)
            process.send_signal(signal.SIGKILL)
            process.wait()
            before = len(endpoint.bodies)
        stored = stored_replies(folder)
        sent = len(endpoint.bodies)
        out, err = start(folder, endpoint).communicate()
        assert json.loads(out)["requests"]["sent"] == IMAGES - stored == len(endpoint.bodies) - sent, err
        assert len(endpoint.answered) == IMAGES
        assert sum(endpoint.answered.values()) - IMAGES <= 3 * 8


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_waits_for_replies_in_flight_and_stores_them(folder: Path, end: signal.Signals) -> None:
    with eight_pending_requests(folder) as (endpoint, process, released):
        process.send_signal(end)
        err = read_until(process, "waiting for 8 ")
        released.set()
        err += process.communicate()[1]
        assert process.returncode == 128 + end
        assert "8 replies" in err
        assert "instruct.replies.sqlite" in err
        assert "run the same command to resume" in err
        assert "Traceback" not in err
        assert len(endpoint.bodies) == 8 == stored_replies(folder)
        assert json.loads(start(folder, endpoint).communicate()[0])["requests"]["sent"] == IMAGES - 8
        assert set(endpoint.answered.values()) == {1}


def test_second_interrupt_does_not_wait(folder: Path) -> None:
    with eight_pending_requests(folder) as (endpoint, process, _):
        process.send_signal(signal.SIGINT)
        read_until(process, "waiting for 8 ")
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 130
        assert "Traceback" not in err, err
        assert len(endpoint.bodies) == 8
        assert not endpoint.answered


def test_second_process_on_the_same_file_is_refused(folder: Path) -> None:
    with eight_pending_requests(folder) as (_, first, released):
        second = run_cli("data", "generate", cwd=folder)
        assert second.exit_code == 1
        assert "another process" in second.stderr
        assert "instruct.jsonl" in second.stderr
        released.set()
        out, err = first.communicate()
        assert json.loads(out)["requests"]["sent"] == IMAGES, err
