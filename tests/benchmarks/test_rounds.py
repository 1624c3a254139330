"""An interrupted benchmark keeps the results of all finished rounds."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = """
import argparse, sys, time
from rounds import add_options, publish

def documents():
    try:
        for number in range(1, 4):
            yield {"rounds": number}
            print(number, file=sys.stderr, flush=True)
            if number == 2 and options.then != "end":
                if options.then == "fail":
                    raise RuntimeError("a round failed")
                time.sleep(600)
    finally:
        print("cleaned", file=sys.stderr, flush=True)

parser = argparse.ArgumentParser()
parser.add_argument("then", choices=("end", "fail", "wait"))
add_options(parser)
options = parser.parse_args()
publish(documents(), options, lambda document: f"{document['rounds']} rounds")
"""


def start(then: str, *arguments: str) -> subprocess.Popen[str]:
    python = [str(BENCHMARKS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, then, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(python)},
    )  # fmt: skip


def interrupt(number: int, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a benchmark that receives signal ``number`` in its third round."""
    process = start("wait", *arguments)
    assert process.stderr
    while process.stderr.readline() != "2\n":
        assert process.poll() is None
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def rounds(text: str) -> list[tuple[int, bool]]:
    documents: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    return [(document["rounds"], document["complete"]) for document in documents]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_finished_rounds_survive_a_signal(tmp_path: Path, number: int, code: int) -> None:
    out = tmp_path / "out.json"
    exit_code, text, errors = interrupt(number, "--json", "--out", str(out))
    assert exit_code == code
    assert rounds(text) == [(1, False), (2, False)]
    assert json.loads(out.read_text()) == {"rounds": 2, "complete": False}
    assert ("cleaned" in errors) == (number != signal.SIGKILL)
    assert "Traceback" not in errors


def test_finished_rounds_are_printed_when_interrupted() -> None:
    assert interrupt(signal.SIGTERM)[:2] == (143, "2 rounds\n")


def test_finished_rounds_survive_an_error(tmp_path: Path) -> None:
    process = start("fail", "--out", str(tmp_path / "out.json"))
    text, errors = process.communicate(timeout=60)
    assert (process.returncode, text) == (1, "2 rounds\n")
    assert "a round failed" in errors
    assert json.loads((tmp_path / "out.json").read_text()) == {"rounds": 2, "complete": False}


def test_last_document_is_complete(tmp_path: Path) -> None:
    text, _ = start("end", "--json").communicate(timeout=60)
    assert rounds(text) == [(1, False), (2, False), (3, False), (3, True)]
    text, _ = start("end", "--out", str(tmp_path / "out.json")).communicate(timeout=60)
    assert text == "3 rounds\n"
    assert json.loads((tmp_path / "out.json").read_text()) == {"rounds": 3, "complete": True}


def test_every_benchmark_publishes_after_every_round() -> None:
    scripts = [path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")]
    assert len(scripts) >= 5
    for path in scripts:
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert {"publish", "add_options"} <= calls, path.name
