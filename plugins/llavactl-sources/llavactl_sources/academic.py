"""What the academic data sets of LLaVA v1.5's mix have in common (arXiv 2310.03744, appendix A).

Questions about an image are one conversation. The form of answers is stated after its first question only, as
in the published mix.
"""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from llavactl import (
    DataError,
    FollowLinks,
    ImageLocation,
    ImageRoot,
    Json,
    Options,
    RawRecord,
    RecipePlace,
    check_image_root,
)
from llavactl_sources.files import stamps_of
from llavactl_sources.forms import TAG
from llavactl_sources.records import ConversationSource

log = logging.getLogger(__name__)

SHORT_ANSWER = "Answer the question using a single word or phrase."


class AcademicOptions(Options):
    """Options of every academic data set."""

    images: RecipePlace | None = Field(
        None,
        description="folder, .zip, .tar, pattern of these, or URL of the images; null: the folder of the questions",
    )
    follow_links: FollowLinks = False


class Entry(NamedTuple):
    """A question about an image, or the ``problem`` of one. Entries of one ``key`` are one conversation.

    Published files have a few ``unusable`` questions, which are counted and left out; other problems stop a run.
    """

    key: str
    image: str
    question: str
    answer: str
    problem: str = ""
    unusable: bool = False


class UnusableError(ValueError):
    """A question that the data set has, but that can't be trained: an empty text, or a box without area."""


FAULTS = (KeyError, TypeError, ValueError, AttributeError)
"""What reading a record of another form raises."""


def problem_entry(row: Any, key: str, number: int, error: Exception) -> Entry:
    """The problem of ``row``, which is named by its ``key``, or by its number in the file."""
    name = row.get(key, number) if isinstance(row, Mapping) else number
    reason = f"missing `{error.args[0]}`" if isinstance(error, KeyError) else str(error)
    return Entry(f"{key} {name}", "", "", "", f"{reason:.200}", isinstance(error, UnusableError))


class AcademicSource(ConversationSource):
    """One sample per image, in the order of the first question about each; a subclass implements ``entries``."""

    instruction: str = ""
    """The line below the first question of a conversation."""

    turns: int | None = None
    """Questions per conversation at most; more are further conversations. None: any number."""

    def __init__(self, options: Any, *files: Path | None) -> None:
        self.files = [file for file in files if file is not None]
        self.path = self.files[0].parent
        self.root = ImageRoot(str(options.images or self.path), options.follow_links)
        self._images = options.images

    def entries(self) -> Iterator[Entry]:
        """Every question, and the problem of every one that can't be read."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises DataError if a file or the images' location doesn't exist."""
        for file in self.files:
            if not file.is_file():
                raise DataError(f"{file}: no such file")
        if self._images is not None:
            check_image_root(self.root.root)

    def identity(self) -> Mapping[str, Json]:
        """The files with sizes and times; they are too large to hash at every start."""
        return {"files": [stamps_of([file], file.parent) for file in self.files]}

    def location(self, record: RawRecord) -> ImageLocation:  # noqa: ARG002
        return self.root

    def records(self) -> Iterator[RawRecord]:
        self.check()
        by_key: dict[str, list[Entry]] = {}
        problems: list[Entry] = []
        unusable = 0
        for entry in self.entries():
            if entry.unusable:
                unusable += 1
            elif entry.problem:
                problems.append(entry)
            else:
                by_key.setdefault(entry.key, []).append(entry)
        if unusable:
            log.warning("%s: %d questions without a text, an answer or an area are left out", self.files[0], unusable)
        index = 0
        for problem in problems:
            yield RawRecord(f"{self.files[0]} {problem.key}", None, index, problem=problem.problem)
            index += 1
        for key, entries in self.selected(by_key).items():
            step = self.turns or len(entries)
            for start in range(0, len(entries), step):
                name = key if len(entries) <= step else f"{key}-{start // step}"
                value = self._record(name, entries[start : start + step])
                yield RawRecord(f"{self.files[0]} image {name}", value, index)
                index += 1

    def selected(self, by_key: dict[str, list[Entry]]) -> dict[str, list[Entry]]:
        """The conversations that are used; all of them."""
        return by_key

    def _record(self, name: str, entries: list[Entry]) -> dict[str, Any]:
        instruction = f"\n{self.instruction}" if self.instruction else ""
        messages = []
        for number, entry in enumerate(entries):
            question = f"{TAG}\n{entry.question}{instruction}" if number == 0 else entry.question
            messages += [{"from": "human", "value": question}, {"from": "gpt", "value": entry.answer}]
        return {"id": name, "image": entries[0].image, "conversations": messages}


def seeded(seed: int, key: str) -> random.Random:
    """Random numbers that depend on ``seed`` and ``key`` only, not on the order of images."""
    return random.Random(f"{seed} {key}")


def read_json(file: Path) -> Any:
    """The JSON value of ``file``.

    Raises:
        DataError: it can't be read, or isn't JSON; names the line.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}:{error.lineno}: not JSON: {error.msg}", hint="the file may be truncated") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8: byte {error.start}") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error


def list_in(file: Path, key: str | None = None) -> list[Any]:
    """The list of ``file``, or the list under its ``key``.

    Raises:
        DataError: as ``read_json``, or there is no such list.
    """
    value = read_json(file)
    found = value if key is None else value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{file}: expected {'a list' if key is None else f'an object with a list `{key}`'}")
    return found


def named_by_id(pattern: str, image_id: Any) -> str:
    """The file of an image: ``pattern`` with its id; raises ValueError."""
    try:
        return pattern.format(int(image_id))
    except (IndexError, KeyError, TypeError) as error:
        raise ValueError(f"no image {image_id!r:.40} in {pattern!r}") from error


def text_of(value: Any, key: str) -> str:
    """The string ``value``; raises ValueError with its ``key``, UnusableError if it is empty."""
    if not isinstance(value, str):
        raise ValueError(f"`{key}`: expected a string, got {value!r:.60}")
    if not value.strip():
        raise UnusableError(f"`{key}` is empty")
    return value.strip()


def capitalized(text: str) -> str:
    """``text`` with a capital first letter, as answers of the published mix."""
    return text[:1].upper() + text[1:]
