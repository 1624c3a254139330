"""Asking by files, for half the price and a day's patience: OpenAI's batch format, which others read too."""

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
from llavactl.teaching.asking import Keyed, size
from llavactl.teaching.budget import Budget
from llavactl.teaching.journal import Journal

MOST_REQUESTS, MOST_BYTES = 50_000, 190_000_000
"""Of one file: OpenAI takes 50,000 requests and 200 MB."""


@dataclass(frozen=True)
class Results:
    """What files of results brought: new ``replies`` and ``refused``; ``failed`` are to be asked again.

    ``known`` had an answer already, ``strange`` belong to no request of this recipe.
    """

    replies: int = 0
    refused: int = 0
    failed: int = 0
    known: int = 0
    strange: int = 0


def affordable(todo: Sequence[Keyed], budget: Budget, limits: Limits) -> tuple[list[Keyed], str]:
    """As many of ``todo`` as may be sent when each costs its most, and why no more."""
    some: list[Keyed] = []
    for keyed in todo:
        most = budget.most(size(keyed.request), limits)
        if refused := budget.refuses(most):
            return some, refused
        budget.sent, budget.flying = budget.sent + 1, budget.flying + (most or 0.0)
        some.append(keyed)
    return some, ""


def write_requests(teacher: BatchTeacher, todo: Sequence[Keyed], file: Path) -> list[Path]:
    """``todo`` as files to upload: ``file``, and ``file-2`` … where one would be too large."""
    written: list[Path] = []
    lines = _requests(teacher, todo)
    line = next(lines, None)
    while line is not None:
        part = file if not written else file.with_stem(f"{file.stem}-{len(written) + 1}")
        with open_atomic(part) as opened:
            count = total = 0
            while line is not None and (not count or (count < MOST_REQUESTS and total + len(line) <= MOST_BYTES)):
                opened.write(line)
                count, total = count + 1, total + len(line)
                line = next(lines, None)
        written.append(part)
    return written


def _requests(teacher: BatchTeacher, todo: Sequence[Keyed]) -> Iterator[bytes]:
    for keyed in todo:
        body = dict(teacher.content(keyed.request))
        row = {"custom_id": keyed.key, "method": "POST", "url": teacher.batch_url, "body": body}
        yield json.dumps(row).encode() + b"\n"


def read_results(
    teacher: BatchTeacher, files: Sequence[Path], keyed: Sequence[Keyed], journal: Journal, budget: Budget
) -> Results:
    """Keeps the replies in ``files`` of results; reading one twice changes nothing.

    Raises:
        DataError: a file that can't be read or a line that isn't a result, all of them at once; nothing is kept then.
    """
    rows = [(where, row) for file in files for where, row in _rows(file)]
    wrong = [where for where, row in rows if not _is_result(row)]
    if wrong:
        raise DataError(
            "\n".join(f"{where}: not a result of a batch" for where in wrong[:20]),
            hint='a result is {"custom_id", "response": {"status_code", "body"}, "error"}',
        )
    wanted = {each.key: each for each in keyed}
    answered = journal.answered()
    counts = dict.fromkeys(Results.__dataclass_fields__, 0)
    with journal.together():
        for _, row in rows:
            key = row["custom_id"]
            if key not in wanted:
                counts["strange"] += 1
            elif key in answered:
                counts["known"] += 1
            else:
                outcome = _keep(teacher, wanted[key], row, journal, budget)
                counts[outcome] += 1
                if outcome != "failed":
                    answered.add(key)
    return Results(**counts)


def _keep(teacher: BatchTeacher, keyed: Keyed, row: Any, journal: Journal, budget: Budget) -> str:
    request = keyed.request
    number = journal.begin(keyed.key, request.id, request.kind, budget.most(size(request), teacher.limits))
    response = row.get("response") or {"status_code": 500, "body": {"error": row.get("error") or "no response"}}
    try:
        reply = teacher.read(int(response["status_code"]), json.dumps(response.get("body")).encode())
    except TeacherError as error:
        journal.end(number, "refused" if error.then == "apart" else "failed", reason=error.message)
        return "refused" if error.then == "apart" else "failed"
    cost = budget.cost(reply.tokens_in, reply.tokens_out)
    journal.keep(number, reply, cost)
    return "replies"


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    if not file.is_file():
        raise DataError(f"{file}: no such file", hint="download the batch's results first")
    for entry in read_stream(file):
        yield f"{file}:{entry.location}", entry.value


def _is_result(row: Any) -> bool:
    if not isinstance(row, dict) or not isinstance(row.get("custom_id"), str):
        return False
    response = row.get("response")
    return response is None or (isinstance(response, dict) and type(response.get("status_code")) is int)
