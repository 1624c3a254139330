"""A durable journal (SQLite) of the requests for an output file and their replies.

With a write-ahead log and ``synchronous=FULL``, a committed row survives a killed process and a power failure, and an
incomplete write is rolled back when the file is opened again.

A row is an attempt. It is committed before the request is sent, with its maximum cost, so the budget also counts
requests that were in flight when a process was killed. Nothing is deleted: the latest reply to a request counts.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from llavactl.core.errors import DataError
from llavactl.core.paths import exclusive_lock, has_locks
from llavactl.core.protocols import Reply

State = Literal["sent", "reply", "refused", "failed", "lost"]
"""In flight (or the process was killed); answered; permanently refused; to be retried, free or possibly charged."""

_TABLE = """
create table if not exists attempts (
  number integer primary key, key text not null, id text not null, kind text not null, state text not null,
  sent real not null, seconds real, most real, cost real, text text, tokens_in integer, tokens_out integer,
  finish text, reason text
);
create index if not exists attempts_by_key on attempts (key, number);
"""
_ANSWERED = "select distinct key from attempts where state in ('reply', 'refused')"
_LATEST = """
select state, text, tokens_in, tokens_out, finish, reason from attempts
where key = ? and state in ('reply', 'refused') order by number desc limit 1
"""
_SPENT = """
select count(*), coalesce(sum(state = 'reply'), 0), coalesce(sum(tokens_in), 0), coalesce(sum(tokens_out), 0),
  coalesce(sum(coalesce(cost, most, 0)), 0.0)
from attempts
"""


@dataclass(frozen=True)
class Outcome:
    """The ``reply`` to a request, or the ``reason`` of its refusal."""

    reply: Reply | None
    reason: str = ""


@dataclass(frozen=True)
class Spent:
    """Requests, tokens and money used for an output file; ``cost`` is 0 without a known price.

    ``cost`` includes requests that may have been charged without an answer, with their maximum cost.
    """

    requests: int = 0
    replies: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class AverageReply:
    """Averages over the ``replies`` to requests of one kind."""

    replies: int
    tokens_in: float | None
    tokens_out: float | None
    seconds: float | None


class Journal:
    """The attempts in one SQLite file; not thread-safe."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            # On a file system without locks, the lock of ``exclusive_output`` suffices.
            locks = has_locks(path.parent, posix=True)
            name = path.absolute().as_uri() + ("" if locks else "?vfs=unix-none")
            self._database = sqlite3.connect(name, uri=True, isolation_level=None, timeout=10)
            if not locks:
                self._database.execute("pragma locking_mode=exclusive")
            self._database.execute("pragma journal_mode=wal")
            self._database.execute("pragma synchronous=full")
            self._database.executescript(_TABLE)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        with self._guarded():
            self._database.close()

    def start(self, key: str, request_id: str, kind: str, max_cost: float | None) -> int:
        """Records an attempt before it is sent; returns its number."""
        return self._insert(key=key, id=request_id, kind=kind, state="sent", most=max_cost, sent=time.time())

    def fail(
        self, number: int, state: State, *, reason: str = "", charged: bool = False, seconds: float | None = None
    ) -> None:
        """Records that an attempt got no reply; ``charged``: it may have been charged."""
        self._run(
            "update attempts set state = ?, reason = ?, seconds = ?, cost = ? where number = ?",
            state, reason, seconds, None if charged else 0.0, number,
        )  # fmt: skip

    def save(self, number: int, reply: Reply, cost: float | None, seconds: float | None = None) -> None:
        """Stores a reply; without a ``cost`` the attempt counts with its maximum cost."""
        self._run(
            "update attempts set state = 'reply', text = ?, tokens_in = ?, tokens_out = ?, finish = ?, cost = ?, "
            "seconds = ? where number = ?",
            reply.text, reply.tokens_in, reply.tokens_out, reply.finish, cost, seconds, number,
        )  # fmt: skip

    def reopen(self, numbers: Iterable[int]) -> None:
        """Marks refused attempts as failed, so that their requests are sent again."""
        for number in numbers:
            self._run("update attempts set state = 'failed' where number = ?", number)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commits all changes of the block at once, or none of them after an error: one sync for many rows."""
        self._run("begin")
        try:
            yield
            self._run("commit")
        except BaseException:
            if self._database.in_transaction:
                self._run("rollback")
            raise

    def answered_keys(self) -> set[str]:
        """The keys of requests with a reply or a permanent refusal."""
        return {key for (key,) in self._run(_ANSWERED)}

    def outcome(self, key: str) -> Outcome | None:
        """The latest outcome of the request ``key``."""
        rows = self._run(_LATEST, key)
        for state, text, tokens_in, tokens_out, finish, reason in rows:
            return Outcome(Reply(text, tokens_in, tokens_out, finish) if state == "reply" else None, reason or "")
        return None

    def spent(self) -> Spent:
        """The totals over all attempts."""
        (row,) = self._run(_SPENT)
        requests, replies, tokens_in, tokens_out, cost = row
        return Spent(requests, replies, tokens_in, tokens_out, round(cost, 9))

    def average(self, kind: str) -> AverageReply:
        """Averages over the replies of ``kind``."""
        (row,) = self._run(
            "select count(*), avg(tokens_in), avg(tokens_out), avg(seconds) from attempts "
            "where state = 'reply' and kind = ?",
            kind,
        )
        return AverageReply(*row)

    def _insert(self, **row: Any) -> int:
        names = ", ".join(row)
        self._run(f"insert into attempts ({names}) values ({', '.join('?' * len(row))})", *row.values())  # noqa: S608
        ((number,),) = self._run("select last_insert_rowid()")
        return int(number)

    def _run(self, statement: str, *values: Any) -> Sequence[tuple[Any, ...]]:
        with self._guarded():
            return self._database.execute(statement, values).fetchall()

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise DataError(
                f"{self.path}: {error}",
                hint="it stores the replies: free disk space or fix its permissions, then run the same command again",
            ) from error


def exclusive_output(out: Path) -> AbstractContextManager[None]:
    """An exclusive lock on ``out`` and the files beside it.

    Raises:
        DataError: another process holds the lock.
    """
    busy = DataError(
        f"another process is writing {out}", hint="wait until it has finished, or set another `generate.out`"
    )
    return exclusive_lock(out.with_name(f".{out.name}.lock"), busy)
