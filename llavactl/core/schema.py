"""Data classes from records to batches: frozen and picklable, without torch or PIL at import.

Shape letters: B batch, T tokens, I images, P patches, Q connector tokens per image, Dv width of the vision features,
Dl width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.errors import DataError
from llavactl.core.typed import Typed, check_fields, has_methods

if TYPE_CHECKING:
    import torch

Json = None | bool | int | float | str | list[Any] | dict[str, Any]
"""A JSON value."""

Role = Literal["system", "user", "assistant"]
"""The role of a turn."""
_ROLES = get_args(Role)

IMAGE_TOKEN = -200
"""The placeholder id of a connector token in ``Encoded.ids`` and ``Batch.ids`` (LLaVA's value)."""

IGNORE = -100
"""The label of positions that are excluded from the loss (torch's ``ignore_index``)."""


@runtime_checkable
class ImageRef(Protocol):
    """A reference to an image: a file, a member of an archive, or an image that is generated when it is read.

    Must be hashable, picklable, and equal for the same image. A frozen dataclass satisfies all three. Its class
    attribute ``shared_fields``, a tuple of field names such as that of a shard, saves disk space: cached records
    store equal values of these fields once.
    """

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """The name in messages: the path relative to its root, shortened if necessary."""

    def read(self) -> bytes:
        """The bytes of the image file (JPEG, PNG, …).

        Raises:
            OSError: the image can't be read; it is skipped and listed with this reason.
            DataError: an option must allow it first (such as ``follow_links``); the run stops.
        """

    def stamp(self) -> str | None:
        """A string that changes whenever the content may have changed, without reading it; None if unavailable.

        Raises the same errors as ``read``.
        """


Content = str | ImageRef
"""A part of a turn: text or an image."""


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """One message of a conversation: strings and images in order. A literal ``<image>`` in a string is plain text."""

    role: Role
    content: tuple[Content, ...]

    def __post_init__(self) -> None:
        if isinstance(self.content, str):  # otherwise each character would be one part
            raise TypeError(f'content: expected a tuple of strings and images, such as Turn("{self.role}", ("text",))')
        # Checked inline for speed: there may be millions of turns.
        if self.role not in _ROLES or not isinstance(self.content, tuple):
            check_fields(self)
        for part in self.content:
            if not isinstance(part, str):
                if not has_methods(type(part), "read", "stamp"):
                    check_fields(self)
            elif not part.isascii() and _SURROGATE.search(part):
                raise DataError(f"invalid UTF-8 in {part!r:.60}", hint="save or enter the text as UTF-8")

    @property
    def text(self) -> str:
        """The text without images."""
        if len(self.content) == 1 and isinstance(self.content[0], str):
            return self.content[0]
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images, in order."""
        return tuple(part for part in self.content if not isinstance(part, str))


@dataclass(frozen=True)
class Box(Typed):
    """A labeled bounding box: ``xyxy`` is (left, top, right, bottom), normalized to 0–1 by width and height."""

    category: str
    xyxy: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class Sample(Typed):
    """A training sample: a conversation about images. ``captions`` and ``boxes`` describe the image to a teacher.

    ``where`` is the location of the record for messages, such as ``file.json:12 (record 3)``.
    """

    id: str
    turns: tuple[Turn, ...]
    where: str = ""
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # The most frequent case is checked inline for speed: there may be millions.
        valid = isinstance(self.id, str) and isinstance(self.turns, tuple) and isinstance(self.where, str)
        if not valid or self.captions or self.boxes or self.extra or not all(type(turn) is Turn for turn in self.turns):
            check_fields(self)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        """The images of all turns, in order."""
        return tuple(image for turn in self.turns for image in turn.images)


@dataclass(frozen=True)
class Text:
    """Text of a rendered conversation; with ``trained``, its tokens are targets of the loss."""

    text: str
    trained: bool = False

    def __post_init__(self) -> None:
        # Checked inline for speed: every message has several.
        if not isinstance(self.text, str) or not isinstance(self.trained, bool):
            check_fields(self)


@dataclass(frozen=True)
class ImageSlot:
    """The position of the next image of the conversation."""


Segment = Text | ImageSlot
"""A part of a rendered conversation."""


@dataclass(frozen=True)
class Encoded:
    """A tokenized conversation: ``ids`` [T] with IMAGE_TOKEN for images, ``labels`` [T] with IGNORE for other text.

    Both come from the same tokenization. ``images`` are in order; each has Q consecutive IMAGE_TOKENs.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    images: tuple[ImageRef, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def target_tokens(self) -> int:
        """The number of positions that are targets of the loss."""
        return sum(label != IGNORE for label in self.labels)


@dataclass(frozen=True)
class FeatureShape:
    """The feature shape of one image: ``prefix`` tokens (CLS, registers), then ``grid`` (h, w) patches, row by row.

    ``width`` is Dv.
    """

    grid: tuple[int, int]
    width: int
    prefix: int = 0

    def __post_init__(self) -> None:
        check_fields(self)
        if min(*self.grid, self.width) < 1 or self.prefix < 0:
            raise ValueError(f"{self}: grid and width must be at least 1, prefix at least 0")

    @property
    def patches(self) -> int:
        """P, the number of feature vectors per image."""
        return self.prefix + self.grid[0] * self.grid[1]


class Span(NamedTuple):
    """``length`` tokens of a packed sequence that attend causally to each other only.

    With ``after``, the index of an earlier span, they continue that span: they also attend to all of it, and their
    positions follow its last one. Without it, positions start at 0.
    """

    length: int
    after: int | None = None


@dataclass(frozen=True)
class Batch:
    """A batch of the model: ``ids``, ``labels`` and ``mask`` (False: padding) [B, T], ``features`` [I, P, Dv].

    The IMAGE_TOKENs of ``ids``, in row-major order, belong to the images of ``features`` in order. int8 features have
    ``scales`` [I, P + Dv] float32; ``llavactl.model.inputs.image_features`` dequantizes them. ``names`` are the sample
    names for messages. ``spans`` is empty if every sequence is one conversation; otherwise the batch is one packed
    sequence [1, T] that the spans cover; padding belongs to the span that it follows.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor
    features: torch.Tensor | None
    names: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    scales: torch.Tensor | None = None


@dataclass(frozen=True)
class ImageContents:
    """The sha256 of each image's bytes (``keys``), or the reason why it can't be read (``unreadable``)."""

    keys: Mapping[ImageRef, str]
    unreadable: Mapping[ImageRef, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question(Typed):
    """A question of a task: a conversation that ends with a user turn, and the ``reference`` answer."""

    id: str
    turns: tuple[Turn, ...]
    reference: str = ""
    category: str = ""


@dataclass(frozen=True)
class Answer(Typed):
    """A model's answer to the question ``id``; ``extra``: other fields of the record in an answer file."""

    id: str
    text: str
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
