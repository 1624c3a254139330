"""Asking by files: requests to upload, results to read, each once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.teaching import batch
from llavactl.testing import completion, good_reply, run_cli, toy_endpoint

Folder = Callable[..., Path]


def generate(folder: Path, *options: str) -> Any:
    result = run_cli("data", "generate", "--json", *options, cwd=folder)
    assert result.exit_code == 0, result.stderr
    return result.json()


def results(requests: Path, *, wrong: int = 0) -> str:
    """What a batch makes of a file of requests; the first ``wrong`` of them fail."""
    rows = []
    for number, line in enumerate(requests.read_text().splitlines()):
        row = json.loads(line)
        assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
        response: Any = {"status_code": 200, "body": json.loads(completion(good_reply(row["body"])))}
        if number < wrong:
            response = {"status_code": 500, "body": {"error": {"message": "server"}}}
        rows.append({"id": f"r{number}", "custom_id": row["custom_id"], "response": response, "error": None})
    return "".join(json.dumps(row) + "\n" for row in reversed(rows))


def test_there_and_back(recipe: Folder) -> None:
    folder = recipe("http://127.0.0.1:9/v1", 10)
    first = generate(folder, "--batch-requests", "requests.jsonl")
    assert first["asking"]["batch_files"] == ["requests.jsonl"]
    assert first["asking"]["unanswered"] == 10
    said = results(folder / "requests.jsonl", wrong=3) + "\n"
    (folder / "results.jsonl").write_text(said, encoding="utf-8-sig")
    back = generate(folder, "--batch-results", "results.jsonl")
    assert back["samples"] == 7
    found = back["asking"]["batch_results"]
    assert (found["replies"], found["failed"], found["known"]) == (7, 3, 0)
    assert back["asking"]["spent"]["cost"] == pytest.approx(7 * 0.051 / 2), "a batch costs half"
    again = generate(folder, "--batch-results", "results.jsonl")
    assert again["asking"]["batch_results"]["known"] == 7
    assert again["asking"]["spent"]["cost"] == back["asking"]["spent"]["cost"]
    rest = generate(folder, "--batch-requests", "rest.jsonl")
    assert len((folder / "rest.jsonl").read_text().splitlines()) == 3 == rest["asking"]["unanswered"]
    with toy_endpoint() as endpoint:
        done = generate(folder, "-o", f"generate.teacher.base_url={endpoint.url}")
        assert done["samples"] == 10
        assert len(endpoint.bodies) == 3, "the address is no part of what is asked"


def test_a_batch_keeps_to_the_budget(recipe: Folder) -> None:
    """At half the price a request can cost 512 tokens' worth out at 1000 a million, and a little for what it reads."""
    folder = recipe("http://127.0.0.1:9/v1", 10)
    made = generate(folder, "--batch-requests", "r.jsonl", "--max-cost", "2.2")
    assert len((folder / "r.jsonl").read_text().splitlines()) == 4
    assert "left of 2.2" in made["asking"]["stopped"]
    assert generate(folder, "--batch-requests", "r.jsonl", "--max-requests", "3")["asking"]["unanswered"] == 10
    assert len((folder / "r.jsonl").read_text().splitlines()) == 3


def test_large_batches_are_cut(recipe: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MOST_REQUESTS", 4)
    folder = recipe("http://127.0.0.1:9/v1", 10)
    made = generate(folder, "--batch-requests", "r.jsonl")
    assert made["asking"]["batch_files"] == ["r.jsonl", "r-2.jsonl", "r-3.jsonl"]
    assert [len((folder / name).read_text().splitlines()) for name in made["asking"]["batch_files"]] == [4, 4, 2]
    monkeypatch.setattr(batch, "MOST_BYTES", 10)
    assert len(generate(folder, "--batch-requests", "s.jsonl")["asking"]["batch_files"]) == 10


def test_wrong_results_are_named_and_nothing_is_kept(recipe: Folder) -> None:
    folder = recipe("http://127.0.0.1:9/v1", 3)
    generate(folder, "--batch-requests", "r.jsonl")
    good = results(folder / "r.jsonl")
    (folder / "wrong.jsonl").write_text(good + '{"custom_id": 7}\n<html>\n{"custom_id": "a", "response": []}\n')
    result = run_cli("data", "generate", "--batch-results", "wrong.jsonl", cwd=folder)
    assert result.exit_code == 1
    for line in (4, 5, 6):
        assert f"wrong.jsonl:{line}: not a result of a batch" in result.stderr
    (folder / "strange.jsonl").write_text(good.replace('"custom_id": "', '"custom_id": "x'))
    assert generate(folder, "--batch-results", "strange.jsonl")["asking"]["batch_results"]["strange"] == 3
    nothing = run_cli("data", "generate", "--batch-results", "none.jsonl", cwd=folder)
    assert "none.jsonl: no such file" in nothing.stderr
