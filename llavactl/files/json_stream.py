"""Lists of JSON values too long for memory: a JSON array or JSONL, read one value at a time with its line; and written.

Our own reader and not ijson, whose C backend is faster (190 MB/s and 112, where checking takes longer than both),
because a reader of data that people wrote must say the line of a mistake and go on after it: a bad line of JSONL is one
problem, and in an array reading goes on at the next value that begins like a record.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from llavactl.core.errors import DataError
from llavactl.core.paths import open_atomic

CHUNK = 1 << 20
"""Characters read at a time."""

MAX_VALUE = 16 << 20
"""Characters that one value of an array may have: an open bracket or quote is not searched for further than that."""

_NEAR_END = 16
"""A decoder that stops so near to the end of its text may only have run out of text."""

_SPACE = re.compile(r"[ \t\n\r]*")
_RECORD = re.compile(r'\{\s*"(?:id|images?|videos?|conversations|messages|caption)"\s*:')
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_NOT_TEXT = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True)
class JsonEntry:
    """The ``value`` at ``line`` (from 1), the ``index``-th of all; ``problem`` says why there is none.

    ``done`` characters of the file are read. Many values of an array may share a line: ``place`` tells them apart.
    """

    line: int
    value: Any
    problem: str = ""
    done: int = 0
    index: int = 0
    in_array: bool = False

    @property
    def place(self) -> str:
        """``12``, or in an array ``12 (record 3)``."""
        return f"{self.line} (record {self.index})" if self.in_array and not self.problem else str(self.line)


def need_file(path: Path) -> None:
    """Raises a DataError unless ``path`` is a file."""
    if path.is_dir():
        raise DataError(f"{path} is a folder", hint="name a file of records, JSON or JSONL")
    if not path.is_file():
        raise DataError(f"{path}: no such file")


def never_onto(source: Path, out: Path) -> None:
    """Raises a DataError where ``out`` is the file ``source`` itself."""
    if out.exists() and source.exists() and out.samefile(source):
        raise DataError(f"{out}: the file that is read is never altered", hint="give what is written another name")


def read_stream(path: Path) -> Iterator[JsonEntry]:
    """Every value of the array or JSONL in ``path``, in order; what is not JSON is an entry with a ``problem``.

    Raises:
        DataError: no such file.
        OSError: it can't be read.
    """
    need_file(path)
    with path.open(encoding="utf-8-sig", errors="surrogateescape") as file:
        start = _SPACE.sub("", file.read(4096), count=1)[:1]
        file.seek(0)
        for index, entry in enumerate(_Array(file).entries() if start == "[" else _lines(file)):
            yield replace(entry, index=index, in_array=start == "[")


def _lines(file: IO[str]) -> Iterator[JsonEntry]:
    done, decoder = 0, _Decoder()
    for number, line in enumerate(file, 1):
        done += len(line)
        if not line.isspace():
            yield _decoded(decoder, line, number, done)


class _Decoder:
    """A JSON decoder that records in ``twice`` a duplicate key of an object, whose first value would be lost."""

    def __init__(self) -> None:
        self.twice = ""
        self._json = json.JSONDecoder(object_pairs_hook=self._made)

    def whole(self, text: str) -> Any:
        self.twice = ""
        return self._json.decode(text)

    def first(self, text: str, at: int) -> tuple[Any, int]:
        """The value at ``at`` and where it ends."""
        self.twice = ""
        return self._json.raw_decode(text, at)

    def _made(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            names = [name for name, _ in pairs]
            self.twice = next(name for name in names if names.count(name) > 1)
        return made


def _decoded(decoder: _Decoder, text: str, line: int, done: int) -> JsonEntry:
    try:
        value = decoder.whole(text)
    except json.JSONDecodeError as error:
        return JsonEntry(line, None, _not_text(text) or f"not JSON: {error.msg} (column {error.colno})", done)
    except (RecursionError, ValueError) as error:
        return JsonEntry(line, None, _beyond(error), done)
    why = _not_text(text, value) or _twice(decoder)
    return JsonEntry(line, None if why else value, why, done)


def _twice(decoder: _Decoder) -> str:
    return f"duplicate key {decoder.twice!r}" if decoder.twice else ""


def _beyond(error: Exception) -> str:
    """JSON, but not for us: of numbers too long to be read Python says so with a ValueError of no other kind."""
    what = "nested too deep" if isinstance(error, RecursionError) else "a number of thousands of digits"
    return f"not JSON that can be read: {what}"


def _not_text(text: str, value: Any = None) -> str:
    """Why ``text``, that is ``value``, could not be written as UTF-8 again: nor could a tokenizer read it."""
    if not text.isascii() and (bad := _NOT_TEXT.search(text)):
        return f"not UTF-8 text: byte 0x{ord(bad[0]) - 0xDC00:02x} (character {bad.start() + 1})"
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            return f"not text: half of a pair of surrogates, \\u{ord(error.object[error.start]):04x}"
    return ""


class _Array:
    """A JSON array in ``file``: a window of its text, and where in it reading is."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file
        self.text = ""
        self.at = 0
        self.line = 1
        self.column = 1
        self.done = 0
        self.ended = False
        self.decoder = _Decoder()

    def entries(self) -> Iterator[JsonEntry]:
        self._skip(1 + _end_of_space(self._more(), 0))  # the bracket
        comma = False
        while (found := self._peek()) not in ("]", ""):
            entry = self._value()
            yield entry
            if entry.problem and self._peek() not in (",", "]") and not self._resume():
                return
            comma = self._peek() == ","
            if comma:
                self._skip(1)
            elif not entry.problem and self._peek() not in ("]", ""):
                yield self._problem("not JSON: a comma is missing", self.at)
        if not found:
            yield self._problem("not JSON: the file ends inside the list", self.at)
            return
        if comma:
            yield self._problem("not JSON: a comma before the end of the list", self.at)
        self._skip(1)
        if self._peek():
            yield self._problem("not JSON: text after the end of the list", self.at)

    def _value(self) -> JsonEntry:
        while True:
            try:
                value, end = self.decoder.first(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._may_go_on(error):
                    self._more()
                    continue
                return self._problem(f"not JSON: {error.msg}", error.pos)
            except (RecursionError, ValueError) as error:
                return self._problem(_beyond(error), self.at)
            if len(self.text) - end < _NEAR_END and not self.ended:
                self._more()  # a number may go on, be it by "e+1"
                continue
            line, why = self.line, _not_text(self.text[self.at : end], value) or _twice(self.decoder)
            self._skip(end - self.at)
            return JsonEntry(line, None if why else value, why, self.done)

    def _may_go_on(self, error: json.JSONDecodeError) -> bool:
        near = error.pos >= len(self.text) - _NEAR_END or error.msg.startswith("Unterminated string")
        return near and not self.ended and len(self.text) - self.at < MAX_VALUE

    def _resume(self) -> bool:
        """Goes to the next thing that begins like a record, after a mistake; False: there is none."""
        self._skip(1 if self.at < len(self.text) else 0)
        while True:
            if match := _RECORD.search(self.text, self.at):
                self._skip(match.start() - self.at)
                return True
            if self.ended:
                return False
            self._skip(max(len(self.text) - self.at - 64, 0))  # what is searched for may be cut through
            self._more()

    def _peek(self) -> str:
        """The next character that is no space; "" at the end of the file."""
        while True:
            self._skip(_end_of_space(self.text, self.at) - self.at)
            if self.at < len(self.text) or self.ended:
                return self.text[self.at : self.at + 1]
            self._more()

    def _skip(self, count: int) -> None:
        end = self.at + count
        if lines := self.text.count("\n", self.at, end):
            self.line += lines
            self.column = end - self.text.rfind("\n", self.at, end)
        else:
            self.column += count
        self.at = end
        self.done += count

    def _more(self) -> str:
        """Reads on; a value longer than a chunk is met with ever larger ones, so it is decoded a few times only."""
        size = max(CHUNK, len(self.text) - self.at)
        chunk = self.file.read(size)
        self.ended = not chunk
        self.text = self.text[self.at :] + chunk
        self.at = 0
        return self.text

    def _problem(self, why: str, position: int) -> JsonEntry:
        """A problem at ``position``; a bracket left open is noticed far from where its record begins."""
        lines = self.text.count("\n", self.at, position)
        if not lines:
            return JsonEntry(self.line, None, f"{why} (column {self.column + position - self.at})", self.done)
        column = position - self.text.rfind("\n", self.at, position)
        why = f"{why} (column {column}; the record begins at line {self.line})"
        return JsonEntry(self.line + lines, None, why, self.done)


def _end_of_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at


@contextmanager
def write_stream(path: Path) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Gives a function that writes one record: a JSON array, or JSONL where ``path`` ends so.

    Written beside ``path``, flushed to disk and renamed over it at the end: an interruption leaves what was there.

    Raises:
        DataError: ``path`` ends in neither .json nor .jsonl.
    """
    if path.suffix not in (".json", ".jsonl"):
        raise DataError(f"{path}: records are written to .json or .jsonl", hint="the suffix says which")
    opening, between, closing = ("[\n", ",\n", "\n]\n") if path.suffix == ".json" else ("", "\n", "\n")
    written = 0
    with open_atomic(path) as file:
        file.write(opening.encode())

        def write(record: Mapping[str, Any]) -> None:
            nonlocal written
            try:
                text = json.dumps(record, ensure_ascii=False).encode()
            except UnicodeEncodeError:  # half of a pair of surrogates: no text, but JSON
                text = json.dumps(record).encode()
            file.write(between.encode() * bool(written) + text)
            written += 1

        yield write
        if written or path.suffix == ".json":
            file.write(closing.encode())
