"""What can be wrong with training records, what each does to a run, and counts of what was found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Effect = Literal["stops", "lost", "harms", "noted"]


@dataclass(frozen=True)
class Kind:
    """A problem's ``effect``: it ``stops`` the run before any work, the record is ``lost`` to training, what is
    trained ``harms``, or it is only ``noted``; and what it means.
    """

    effect: Effect
    what: str


KINDS: Mapping[str, Kind] = {
    "empty": Kind("lost", "a file or source without any record"),
    "json": Kind("stops", "not JSON, not UTF-8, or a duplicate key"),
    "record": Kind("stops", "not a LLaVA record: no list `conversations`, or an `image` that is no path"),
    "media": Kind("stops", "video, audio, or images under an unsupported key"),
    "message": Kind("stops", "a message without a text `value`, or an answer excluded from training"),
    "role": Kind("stops", "a message `from` somebody unknown"),
    "turns": Kind("stops", "user and assistant don't take turns"),
    "no-answer": Kind("stops", "no answer with any text: nothing could be trained"),
    "tags": Kind("stops", "<image> tags that don't match the images: other numbers, or one image in several questions"),
    "placeholder": Kind("stops", "another tool's image placeholder instead of <image>"),
    "image-path": Kind("stops", "an image path outside its root, or not a path"),
    "image-link": Kind("stops", "a link to outside the images' folder: allow it with `follow_links` (--follow-links)"),
    "image-twice": Kind("stops", "the archives have this image name several times, with different contents"),
    "source": Kind("stops", "a source that can't be read to its end"),
    "image-missing": Kind("lost", "an image that is missing or can't be read"),
    "image-broken": Kind("lost", "an image that can't be decoded"),
    "template": Kind("lost", "a conversation that the stage's template can't render"),
    "untrained": Kind("lost", "no token is trained within max_length"),
    "empty-answer": Kind("harms", "an empty answer: the model learns to say nothing"),
    "truncated": Kind("noted", "longer than max_length: its end is not trained"),
    "image-cut": Kind("noted", "longer than max_length: an image is left out with the end"),
    "duplicate-id": Kind("noted", "an id that was there before"),
    "no-id": Kind("noted", "no string or number as id: the record is identified by its number in the file"),
    "unread": Kind("noted", "keys of other formats, which are ignored"),
    "no-tag": Kind("noted", "images without an <image> tag: they go before the first question"),
    "placeholder-text": Kind("noted", "another tool's image placeholder in a record without images: treated as text"),
    "tag-as-text": Kind("noted", "<image> in a question of a record without an image key: treated as text"),
    "repeated-tag": Kind("noted", "several <image> tags in the question about the only image: treated as one"),
    "tag-in-answer": Kind("noted", "<image> in an answer: it is trained as text"),
    "assistant-first": Kind("noted", "an assistant who speaks before any question: left out"),
    "unanswered": Kind("noted", "a last question without an answer"),
    "empty-question": Kind("noted", "a question without text or image"),
}
"""In the order that they are shown."""

REFUSED = frozenset({"record", "media", "message", "role", "turns", "no-answer", "tags", "placeholder", "image-path"})
"""The problems of one record for which the source `llava-json` refuses it."""

NOT_IN_RECORDS = frozenset({"image-link", "image-twice"})
"""Problems outside the records themselves: `--fix` keeps the record, and the hint says what to change instead."""

KEPT = 1000
"""Places of a problem that are kept: a file of which every record is wrong must not fill the memory."""


@dataclass(frozen=True)
class Finding:
    """One problem of one record; ``detail`` says what exactly."""

    kind: str
    detail: str = ""


@dataclass
class Tally:
    """How often each kind of problem was found, and the first places."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)

    def add(self, where: str, findings: Iterable[Finding]) -> None:
        """``findings`` of the record at ``where``."""
        for finding in findings:
            self.counts[finding.kind] += 1
            shown = self.places.setdefault(finding.kind, [])
            if len(shown) < KEPT:
                shown.append(f"{where}: {finding.detail}" if finding.detail else where)

    @property
    def hurts(self) -> int:
        """Problems that would stop a run, lose records or harm what is trained."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].effect != "noted")
