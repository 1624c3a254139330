"""Batch files: requests to upload, and results to read."""

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


def results(requests: Path, *, failed: int = 0) -> str:
    """The result file of a batch; the first ``failed`` requests fail."""
    rows = []
    for number, line in enumerate(requests.read_text().splitlines()):
        row = json.loads(line)
        assert (row["method"], row["url"]) == ("POST", "/v1/chat/completions")
        response: Any = {"status_code": 200, "body": json.loads(completion(good_reply(row["body"])))}
        if number < failed:
            response = {"status_code": 500, "body": {"error": {"message": "server"}}}
        rows.append({"id": f"r{number}", "custom_id": row["custom_id"], "response": response, "error": None})
    return "".join(json.dumps(row) + "\n" for row in reversed(rows))


def test_requests_are_written_and_results_read(recipe: Folder) -> None:
    folder = recipe("http://127.0.0.1:9/v1", 10)
    first = generate(folder, "--batch-requests", "requests.jsonl")
    assert first["requests"]["batch_files"] == ["requests.jsonl"]
    assert first["requests"]["unanswered"] == 10
    text = results(folder / "requests.jsonl", failed=3) + "\n"
    (folder / "results.jsonl").write_text(text, encoding="utf-8-sig")
    back = generate(folder, "--batch-results", "results.jsonl")
    assert back["samples"] == 7
    counts = back["requests"]["batch_results"]
    assert (counts["replies"], counts["failed"], counts["already_answered"]) == (7, 3, 0)
    assert back["requests"]["spent"]["cost"] == pytest.approx(7 * 0.051 / 2), "a batch costs half"
    again = generate(folder, "--batch-results", "results.jsonl")
    assert again["requests"]["batch_results"]["already_answered"] == 7
    assert again["requests"]["spent"]["cost"] == back["requests"]["spent"]["cost"]
    rest = generate(folder, "--batch-requests", "rest.jsonl")
    assert len((folder / "rest.jsonl").read_text().splitlines()) == 3 == rest["requests"]["unanswered"]
    with toy_endpoint() as endpoint:
        done = generate(folder, "-o", f"generate.teacher.base_url={endpoint.url}")
        assert done["samples"] == 10
        assert len(endpoint.bodies) == 3, "the key of a request does not depend on base_url"


def test_a_batch_stays_within_the_budget(recipe: Folder) -> None:
    """At half the price, a request may cost 512 output tokens at 1000 per million, and its input."""
    folder = recipe("http://127.0.0.1:9/v1", 10)
    report = generate(folder, "--batch-requests", "r.jsonl", "--max-cost", "2.2")
    assert len((folder / "r.jsonl").read_text().splitlines()) == 4
    assert "max_cost 2.2" in report["requests"]["stopped"]
    assert generate(folder, "--batch-requests", "r.jsonl", "--max-requests", "3")["requests"]["unanswered"] == 10
    assert len((folder / "r.jsonl").read_text().splitlines()) == 3


def test_large_batches_are_split(recipe: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "MAX_REQUESTS", 4)
    folder = recipe("http://127.0.0.1:9/v1", 10)
    report = generate(folder, "--batch-requests", "r.jsonl")
    assert report["requests"]["batch_files"] == ["r.jsonl", "r-2.jsonl", "r-3.jsonl"]
    assert [len((folder / name).read_text().splitlines()) for name in report["requests"]["batch_files"]] == [4, 4, 2]
    monkeypatch.setattr(batch, "MAX_BYTES", 10)
    assert len(generate(folder, "--batch-requests", "s.jsonl")["requests"]["batch_files"]) == 10


def test_invalid_results_are_reported_and_nothing_is_stored(recipe: Folder) -> None:
    folder = recipe("http://127.0.0.1:9/v1", 3)
    generate(folder, "--batch-requests", "r.jsonl")
    good = results(folder / "r.jsonl")
    (folder / "wrong.jsonl").write_text(good + '{"custom_id": 7}\n<html>\n{"custom_id": "a", "response": []}\n')
    result = run_cli("data", "generate", "--batch-results", "wrong.jsonl", cwd=folder)
    assert result.exit_code == 1
    for line in (4, 5, 6):
        assert f"wrong.jsonl:{line}: " in result.stderr
    (folder / "other.jsonl").write_text(good.replace('"custom_id": "', '"custom_id": "x'))
    assert generate(folder, "--batch-results", "other.jsonl")["requests"]["batch_results"]["unmatched"] == 3
    missing = run_cli("data", "generate", "--batch-results", "none.jsonl", cwd=folder)
    assert missing.exit_code == 1
    assert "none.jsonl" in missing.stderr
