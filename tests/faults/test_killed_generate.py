"""`llavactl data generate` killed, interrupted and started twice: an endpoint counts what it was really asked."""

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
name: made
vision: {{name: clip, model: clip}}
connector: {{name: linear}}
language: {{name: hf, model: language}}
generate:
  source: {{name: caps-boxes, path: pictures.jsonl}}
  teacher: {{name: openai, model: toy, base_url: "{url}", timeout_s: 600}}
  kinds: {{detail: 1}}
  out: made.jsonl
"""
PICTURES = 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [
        {"id": f"p{n}", "image": f"p{n}.jpg", "captions": [f"Picture {Random(n).random()}."]} for n in range(PICTURES)
    ]
    (tmp_path / "pictures.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def start(folder: Path, endpoint: ToyEndpoint) -> subprocess.Popen[str]:
    (folder / "recipe.yaml").write_text(RECIPE.format(url=endpoint.url))
    return subprocess.Popen(
        [sys.executable, "-m", "llavactl", "data", "generate", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder,
        env={**os.environ, "OPENAI_API_KEY": ""},
    )  # fmt: skip


def wait_until(seen: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if seen():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError("it never came to that")


@contextmanager
def eight_held(folder: Path) -> Iterator[tuple[ToyEndpoint, subprocess.Popen[str], threading.Event]]:
    """An endpoint that holds every request until the event, and a process that waits for eight of them."""
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


def read_until(process: subprocess.Popen[str], words: str) -> str:
    assert process.stderr is not None
    read = ""
    while words not in read:
        character = process.stderr.read(1)
        assert character, read
        read += character
    return read


def kept(folder: Path) -> int:
    with Journal(folder / "made.replies.sqlite") as journal:
        return journal.spent().replies


def test_after_a_kill_no_answered_request_is_repeated(folder: Path) -> None:
    """The endpoint answers 23 requests and holds the others until the process is dead."""

    def behave(number: int, body: Mapping[str, Any]) -> Answers | None:
        return None if number < 23 or dead else Answers(wait_s=30)

    dead = False
    with toy_endpoint(behave) as endpoint:
        process = start(folder, endpoint)
        wait_until(lambda: len(endpoint.bodies) == 23 + 8, process)
        wait_until(lambda: kept(folder) == 23, process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        dead = True
        again = start(folder, endpoint)
        out, err = again.communicate()
        assert again.returncode == 0, err
        report = json.loads(out)
        assert report["samples"] + report["refused"] == PICTURES
        assert report["requests"]["sent"] == PICTURES - 23
        assert len(endpoint.answered) == PICTURES
        assert set(endpoint.answered.values()) == {1}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_after_a_kill_at_any_moment_no_stored_reply_is_requested_again(folder: Path, seed: int) -> None:
    """Requests in flight may be repeated, at most eight per kill; requests with a stored reply are not."""
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
        found = kept(folder)
        sent = len(endpoint.bodies)
        out, err = start(folder, endpoint).communicate()
        assert json.loads(out)["requests"]["sent"] == PICTURES - found == len(endpoint.bodies) - sent, err
        assert len(endpoint.answered) == PICTURES
        assert sum(endpoint.answered.values()) - PICTURES <= 3 * 8


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stores_replies_in_flight_and_names_the_way_to_resume(folder: Path, end: signal.Signals) -> None:
    """And so does the signal by which a scheduler ends a job."""
    with eight_held(folder) as (endpoint, process, released):
        process.send_signal(end)
        err = read_until(process, "waiting for 8 ")
        released.set()
        err += process.communicate()[1]
        assert process.returncode == 128 + end
        assert "8 replies" in err
        assert "made.replies.sqlite" in err
        assert "run the same command to resume" in err
        assert "Traceback" not in err
        assert len(endpoint.bodies) == 8 == kept(folder)
        assert json.loads(start(folder, endpoint).communicate()[0])["requests"]["sent"] == PICTURES - 8
        assert set(endpoint.answered.values()) == {1}


def test_a_second_ctrl_c_does_not_wait(folder: Path) -> None:
    with eight_held(folder) as (endpoint, process, _):
        process.send_signal(signal.SIGINT)
        read_until(process, "waiting for 8 ")
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=300)[1]
        assert process.returncode == 130
        assert "Traceback" not in err, err
        assert len(endpoint.bodies) == 8
        assert not endpoint.answered


def test_two_processes_on_one_file_are_refused(folder: Path) -> None:
    with eight_held(folder) as (_, first, released):
        second = run_cli("data", "generate", cwd=folder)
        assert second.exit_code == 1
        assert "another process" in second.stderr
        assert "made.jsonl" in second.stderr
        released.set()
        out, err = first.communicate()
        assert json.loads(out)["requests"]["sent"] == PICTURES, err
