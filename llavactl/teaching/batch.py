"""Batch files in OpenAI's format: requests to upload, and results to read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavactl.core.errors import DataError, TeacherError
from llavactl.core.paths import open_atomic
from llavactl.core.protocols import BatchTeacher, Limits
from llavactl.files.json_stream import read_stream
from llavactl.teaching.budget import Budget
from llavactl.teaching.journal import Journal
from llavactl.teaching.keyed import KeyedRequest, request_size

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000
"""Per file; OpenAI's limits are 50,000 requests and 200 MB."""


@dataclass(frozen=True)
class BatchResults:
    """Counts of the results in batch files.

    ``replies`` and ``refused`` are new answers, ``failed`` requests will be sent again. ``already_answered`` results
    are ignored, ``unmatched`` ones belong to no request of the recipe.
    """

    replies: int = 0
    refused: int = 0
    failed: int = 0
    already_answered: int = 0
    unmatched: int = 0


def affordable(pending: Sequence[KeyedRequest], budget: Budget, limits: Limits) -> tuple[list[KeyedRequest], str]:
    """The first of ``pending`` whose maximum cost is within the budget, and the limit that excludes the others."""
    selected: list[KeyedRequest] = []
    for keyed in pending:
        max_cost = budget.max_request_cost(request_size(keyed.request), limits)
        if over_budget := budget.exceeded_by(max_cost):
            return selected, over_budget
        budget.sent, budget.reserved = budget.sent + 1, budget.reserved + (max_cost or 0.0)
        selected.append(keyed)
    return selected, ""


def write_requests(teacher: BatchTeacher, pending: Sequence[KeyedRequest], file: Path) -> list[Path]:
    """Writes ``pending`` to files for upload: ``file``, and ``file-2`` … if one would be too large."""
    written: list[Path] = []
    lines = _lines(teacher, pending)
    line = next(lines, None)
    while line is not None:
        part = file if not written else file.with_stem(f"{file.stem}-{len(written) + 1}")
        with open_atomic(part) as opened:
            count = total = 0
            while line is not None and (not count or (count < MAX_REQUESTS and total + len(line) <= MAX_BYTES)):
                opened.write(line)
                count, total = count + 1, total + len(line)
                line = next(lines, None)
        written.append(part)
    return written


def _lines(teacher: BatchTeacher, pending: Sequence[KeyedRequest]) -> Iterator[bytes]:
    for keyed in pending:
        body = dict(teacher.content(keyed.request))
        row = {"custom_id": keyed.key, "method": "POST", "url": teacher.batch_url, "body": body}
        yield json.dumps(row).encode() + b"\n"


def read_results(
    teacher: BatchTeacher, files: Sequence[Path], keyed: Sequence[KeyedRequest], journal: Journal, budget: Budget
) -> BatchResults:
    """Stores the replies in the result ``files``; reading a file twice has no effect.

    Raises:
        DataError: unreadable files and invalid lines, all at once; nothing is stored then.
    """
    rows = [(where, row) for file in files for where, row in _rows(file)]
    invalid = [where for where, row in rows if not _is_result(row)]
    if invalid:
        raise DataError(
            "\n".join(f"{where}: not a batch result" for where in invalid[:20]),
            hint='expected {"custom_id", "response": {"status_code", "body"}, "error"}',
        )
    requests = {each.key: each for each in keyed}
    answered = journal.answered_keys()
    counts = dict.fromkeys(BatchResults.__dataclass_fields__, 0)
    with journal.transaction():
        for _, row in rows:
            key = row["custom_id"]
            if key not in requests:
                counts["unmatched"] += 1
            elif key in answered:
                counts["already_answered"] += 1
            else:
                outcome = _store(teacher, requests[key], row, journal, budget)
                counts[outcome] += 1
                if outcome != "failed":
                    answered.add(key)
    return BatchResults(**counts)


def _store(teacher: BatchTeacher, keyed: KeyedRequest, row: Any, journal: Journal, budget: Budget) -> str:
    """Stores one result; returns the field of BatchResults that counts it."""
    request = keyed.request
    max_cost = budget.max_request_cost(request_size(request), teacher.limits)
    number = journal.start(keyed.key, request.id, request.kind, max_cost)
    response = row.get("response") or {"status_code": 500, "body": {"error": row.get("error") or "no response"}}
    try:
        reply = teacher.read(int(response["status_code"]), json.dumps(response.get("body")).encode())
    except TeacherError as error:
        journal.fail(number, "refused" if error.then == "apart" else "failed", reason=error.message)
        return "refused" if error.then == "apart" else "failed"
    cost = budget.reply_cost(reply.tokens_in, reply.tokens_out)
    journal.save(number, reply, cost)
    return "replies"


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file", hint="download the results of the batch first")
    for entry in read_stream(file):
        yield f"{file}:{entry.location}", entry.value


def _is_result(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
        return False
    response = row.get("response")
    return response is None or (isinstance(response, dict) and type(response.get("status_code")) is int)
