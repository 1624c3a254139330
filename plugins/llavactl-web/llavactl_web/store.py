"""Conversations and votes in a private folder of this user."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from llavactl import Chat, DataError

MAX_TITLE = 80
SIDES = "ab"

Outcome = Literal["a", "b", "tie", "both bad"]


@dataclass(frozen=True)
class Entry:
    """A stored conversation; ``changed`` is the time of its last answer, in nanoseconds."""

    id: str
    title: str
    changed: int


class Conversations:
    """One folder per conversation: ``title`` and one file of ``Chat.save`` per model, ``a.json`` and ``b.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = _private(folder)

    def entries(self) -> list[Entry]:
        """All conversations, newest first."""
        found = [Entry(file.parent.name, self.title(file.parent.name), _changed(file)) for file in self._files()]
        return sorted(found, key=lambda entry: entry.changed, reverse=True)

    def _files(self) -> Iterator[Path]:
        return (file for file in self.folder.glob("*/a.json") if _is_id(file.parent.name))

    def title(self, id: str) -> str:  # noqa: A002
        """The title of a conversation; "" if it doesn't exist."""
        try:
            return (self._at(id) / "title").read_text(encoding="utf-8")
        except OSError:
            return ""

    def file(self, id: str, side: str) -> Path:  # noqa: A002
        """The file of one side of a conversation.

        Raises:
            DataError: it doesn't exist.
        """
        file = self._at(id) / f"{side}.json"
        if side not in SIDES or not file.is_file():
            raise DataError("this conversation doesn't exist")
        return file

    def changed(self, id: str) -> int:  # noqa: A002
        """The time of the last change; 0 if the conversation doesn't exist."""
        return _changed(self._at(id) / "a.json")

    def save(self, id: str, title: str, chats: Sequence[Chat]) -> None:  # noqa: A002
        """Writes a conversation; its files are readable by this user only.

        Raises:
            OSError: it can't be written.
        """
        folder = _private(self._at(id))
        self.rename(id, title)
        for side, chat in reversed([*zip(SIDES, chats, strict=False)]):
            temporary = folder / f".{side}.json"
            chat.save(temporary)
            temporary.chmod(0o600)
            temporary.replace(folder / f"{side}.json")

    def rename(self, id: str, title: str) -> None:  # noqa: A002
        file = self._at(id) / "title"
        _write(file.with_name(".title"), " ".join(title.split())[:MAX_TITLE] or "Untitled")
        file.with_name(".title").replace(file)

    def delete(self, id: str) -> None:  # noqa: A002
        shutil.rmtree(self._at(id), ignore_errors=True)

    def _at(self, id: str) -> Path:  # noqa: A002
        if not _is_id(id):
            raise DataError("this conversation doesn't exist")
        return self.folder / id


def new_id() -> str:
    """A name for a new conversation."""
    return secrets.token_hex(8)


def _is_id(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{16}", text) is not None


@dataclass(frozen=True)
class Vote:
    """A comparison of the answers of models ``a`` and ``b``; ``blind``: their names were hidden."""

    a: str
    b: str
    outcome: Outcome
    blind: bool


@dataclass(frozen=True)
class Wins:
    """The votes on the models ``a`` and ``b``, on either side."""

    a: str
    b: str
    a_wins: int
    b_wins: int
    ties: int
    both_bad: int


class Votes:
    """Votes in a JSONL file, one line per vote."""

    def __init__(self, file: Path) -> None:
        self.file = _private(file.parent) / file.name

    def add(self, vote: Vote) -> None:
        """Appends ``vote``.

        Raises:
            OSError: the file can't be written.
        """
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **asdict(vote)})
        _write(self.file, line + "\n", append=True)

    def wins(self) -> list[Wins]:
        """The votes on each pair of models; lines that are not votes are skipped."""
        counts: dict[tuple[str, str], dict[str, int]] = {}
        for vote in self._votes():
            a, b = sorted((vote.a, vote.b))
            outcome = {"a": vote.a, "b": vote.b}.get(vote.outcome, vote.outcome)
            name = "a" if outcome == a else "b" if outcome == b else outcome
            pair = counts.setdefault((a, b), dict.fromkeys(get_args(Outcome), 0))
            pair[name] += 1
        return [Wins(a, b, n["a"], n["b"], n["tie"], n["both bad"]) for (a, b), n in sorted(counts.items())]

    def _votes(self) -> Iterator[Vote]:
        with contextlib.suppress(FileNotFoundError), self.file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    if record["outcome"] in get_args(Outcome) and record["a"] != record["b"]:
                        yield Vote(str(record["a"]), str(record["b"]), record["outcome"], bool(record.get("blind")))


def _private(folder: Path) -> Path:
    """``folder``, created for this user only."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.chmod(0o700)
    return folder


def _write(file: Path, text: str, *, append: bool = False) -> None:
    flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if append else os.O_TRUNC)
    with os.fdopen(os.open(file, flags, 0o600), "w", encoding="utf-8", errors="replace") as opened:
        opened.write(text)


def _changed(file: Path) -> int:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0
