"""Every request that was ever sent for one ``out``, and its reply: on disk before anybody reads it.

SQLite, because its guarantees are what is needed here and were tested for longer than anything we could write: with a
write-ahead log and ``synchronous=FULL`` a committed row has been synced to the disk, so neither a killed process nor a
power cut loses it, and a torn write is rolled back at the next opening. A JSONL with fsync would need the same care
for its last line, an index of its own and a second file for what is in flight.

A row is an attempt. It is there before the request is sent, with the most that it can cost, so that money spent on
what a killed process never heard of is counted too. Nothing is deleted: of several replies to one request the latest
counts.
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
"""In flight (or its process died); answered; never to be answered; to be asked again, free or perhaps charged for."""

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
    """What a request came to: a ``reply``, or the ``reason`` why there will never be one."""

    reply: Reply | None
    reason: str = ""


@dataclass(frozen=True)
class Spent:
    """All that an ``out`` has cost: requests sent, tokens, and money where the price is known.

    ``cost`` counts a request without an answer with the most that it can have cost.
    """

    requests: int = 0
    replies: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0


@dataclass(frozen=True)
class Usual:
    """What one reply of a kind takes on average; ``replies`` is how many that was measured on."""

    replies: int
    tokens_in: float | None
    tokens_out: float | None
    seconds: float | None


class Journal:
    """The attempts in one file. Used from one thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._guarded():
            path.parent.mkdir(parents=True, exist_ok=True)
            # If the file system has no locks, the lock of ``alone`` suffices.
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

    def begin(self, key: str, name: str, kind: str, most: float | None) -> int:
        """Writes down that a request is about to be sent and the ``most`` it can cost; its number."""
        return self._insert(key=key, id=name, kind=kind, state="sent", most=most, sent=time.time())

    def end(
        self, number: int, state: State, *, reason: str = "", paid: bool = False, seconds: float | None = None
    ) -> None:
        """Writes down that an attempt brought no reply; ``paid``: it may have been charged for."""
        self._run(
            "update attempts set state = ?, reason = ?, seconds = ?, cost = ? where number = ?",
            state, reason, seconds, None if paid else 0.0, number,
        )  # fmt: skip

    def keep(self, number: int, reply: Reply, cost: float | None, seconds: float | None = None) -> None:
        """Writes down a reply; without a ``cost`` the attempt counts with the most it can have cost."""
        self._run(
            "update attempts set state = 'reply', text = ?, tokens_in = ?, tokens_out = ?, finish = ?, cost = ?, "
            "seconds = ? where number = ?",
            reply.text, reply.tokens_in, reply.tokens_out, reply.finish, cost, seconds, number,
        )  # fmt: skip

    def forget_refusals(self, numbers: Iterable[int]) -> None:
        """Refusals that turned out to mean something else: their requests may be asked again."""
        for number in numbers:
            self._run("update attempts set state = 'failed' where number = ?", number)

    @contextmanager
    def together(self) -> Iterator[None]:
        """All that is written inside goes to disk at once, or after an error none of it: one sync for many."""
        self._run("begin")
        try:
            yield
            self._run("commit")
        except BaseException:
            if self._database.in_transaction:
                self._run("rollback")
            raise

    def answered(self) -> set[str]:
        """The keys of requests that have a reply or never will."""
        return {key for (key,) in self._run(_ANSWERED)}

    def get(self, key: str) -> Outcome | None:
        """The latest answer to the request ``key``."""
        rows = self._run(_LATEST, key)
        for state, text, tokens_in, tokens_out, finish, reason in rows:
            return Outcome(Reply(text, tokens_in, tokens_out, finish) if state == "reply" else None, reason or "")
        return None

    def spent(self) -> Spent:
        """What all attempts together took."""
        (row,) = self._run(_SPENT)
        requests, replies, tokens_in, tokens_out, cost = row
        return Spent(requests, replies, tokens_in, tokens_out, round(cost, 9))

    def usual(self, kind: str) -> Usual:
        """What a reply of ``kind`` took on average."""
        (row,) = self._run(
            "select count(*), avg(tokens_in), avg(tokens_out), avg(seconds) from attempts "
            "where state = 'reply' and kind = ?",
            kind,
        )
        return Usual(*row)

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
                hint="it holds the replies: free some disk, or mend its permissions, then run the same command again",
            ) from error


def alone(out: Path) -> AbstractContextManager[None]:
    """The right to write ``out`` and what lies beside it.

    Raises:
        DataError: another process has it.
    """
    hint = "wait until it has finished, or give `generate.out` another name"
    return exclusive_lock(out.with_name(f".{out.name}.lock"), DataError(f"another process is making {out}", hint=hint))
