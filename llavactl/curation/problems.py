"""The kinds of problems in training records, the effect of each on a run, and counts of findings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from llavactl.core.protocols import Finding

Effect = Literal["stops", "lost", "harms", "noted"]


@dataclass(frozen=True)
class ProblemKind:
    """``stops``: the run is refused before any work; ``lost``: the record is left out of training; ``harms``: the
    model learns something wrong; ``noted``: reported only.
    """

    effect: Effect
    description: str


KINDS: Mapping[str, ProblemKind] = {
    "empty": ProblemKind("lost", "a file or source without records"),
    "json": ProblemKind("stops", "a record that can't be parsed: invalid JSON or UTF-8, or a duplicate key"),
    "record": ProblemKind(
        "stops", "unusable; a LLaVA record has no list `conversations`, or an `image` that is no path"
    ),
    "media": ProblemKind("stops", "video, audio, or images under an unsupported key"),
    "message": ProblemKind("stops", "a message whose `value` is not a string, or an answer excluded from training"),
    "role": ProblemKind("stops", "a message with an unknown `from`"),
    "turns": ProblemKind("stops", "user and assistant messages don't alternate"),
    "no-answer": ProblemKind("stops", "no answer with any text, hence no target token"),
    "tags": ProblemKind(
        "stops", "<image> tags that don't match the images: different counts, or one image in several questions"
    ),
    "placeholder": ProblemKind("stops", "another tool's image placeholder instead of <image>"),
    "image-path": ProblemKind("stops", "an image path outside its root, or an invalid path"),
    "image-link": ProblemKind(
        "stops", "a symbolic link to outside the image folder; allow it with `follow_links` (--follow-links)"
    ),
    "image-twice": ProblemKind("stops", "several images of this name in the archives, with different contents"),
    "source": ProblemKind("stops", "a source that can't be read to its end"),
    "image-missing": ProblemKind("lost", "an image that is missing or can't be read"),
    "image-broken": ProblemKind("lost", "an image that can't be decoded"),
    "no-caption": ProblemKind("lost", "an image without a caption, in a folder of images"),
    "no-image": ProblemKind("lost", "a file with captions of an image that doesn't exist"),
    "template": ProblemKind("lost", "a conversation that the stage's template can't render"),
    "untrained": ProblemKind("lost", "no target token within max_length"),
    "empty-answer": ProblemKind("harms", "an empty answer: the model learns to give empty answers"),
    "truncated": ProblemKind("noted", "longer than max_length: its end is truncated"),
    "image-absent": ProblemKind(
        "noted", "an image that is not on this machine; the store has its features, from a pack"
    ),
    "image-cut": ProblemKind("noted", "longer than max_length: an image is truncated with the end"),
    "duplicate-id": ProblemKind("noted", "an id that an earlier record has"),
    "duplicate-caption": ProblemKind("noted", "a caption that the image has twice: used once"),
    "encoding": ProblemKind("noted", "a text file that is not UTF-8: read as Windows-1252"),
    "no-id": ProblemKind("noted", "no string or number as `id`: the record is identified by its index in the file"),
    "unread": ProblemKind("noted", "keys of other formats, which are ignored"),
    "no-tag": ProblemKind("noted", "images without an <image> tag: inserted before the first question"),
    "placeholder-text": ProblemKind(
        "noted", "another tool's image placeholder in a record without images: treated as text"
    ),
    "tag-as-text": ProblemKind("noted", "<image> in a question of a record without an image key: treated as text"),
    "repeated-tag": ProblemKind("noted", "several <image> tags in the question about the only image: treated as one"),
    "tag-in-answer": ProblemKind("noted", "<image> in an answer: trained as text"),
    "assistant-first": ProblemKind("noted", "an assistant message before the first question: left out"),
    "unanswered": ProblemKind("noted", "a last question without an answer"),
    "empty-question": ProblemKind("noted", "a question without text or image"),
}
"""In the order of reports."""

NOT_IN_RECORDS = frozenset({"image-link", "image-twice"})
"""Problems outside the records themselves: ``--fix`` keeps the record, and the hint says what to change instead."""

OF_COMPLETE_SOURCES = frozenset({"empty", "source", "no-caption", "no-image", "duplicate-caption", "encoding"})
"""Problems of a complete file or source, or of what is not in its records, which ``--fix`` can't repair."""

MAX_LOCATIONS = 1000
"""Locations stored per problem, which bounds the memory for a file whose records are all wrong."""


@dataclass
class Tally:
    """The count of each kind of problem, and its first locations."""

    counts: Counter[str] = field(default_factory=Counter)
    locations: dict[str, list[str]] = field(default_factory=dict)

    def add(self, where: str, findings: Iterable[Finding]) -> None:
        """Adds the ``findings`` of the record at ``where``."""
        for finding in findings:
            self.counts[finding.kind] += 1
            first = self.locations.setdefault(finding.kind, [])
            if len(first) < MAX_LOCATIONS:
                first.append(f"{where}: {finding.detail}" if finding.detail else where)

    @property
    def errors(self) -> int:
        """The number of problems that stop a run, lose a record or harm training."""
        return self.counts.total() - self.affected("noted")

    def affected(self, effect: Effect) -> int:
        """The number of problems with this ``effect``."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].effect == effect)

    @property
    def repairable(self) -> int:
        """The number of ``errors`` that ``--fix`` can repair or whose records it drops."""
        outside = OF_COMPLETE_SOURCES | NOT_IN_RECORDS
        return self.errors - sum(self.counts[kind] for kind in outside)
