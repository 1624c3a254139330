"""What flows through llavactl, from a record to a loss. Frozen, plain, picklable; no torch, no PIL.

Shape letters used everywhere: B batch, T tokens, I images, P patches, Q connector tokens an image,
Dv width of the vision features, Dl width of the language model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args, runtime_checkable

from llavactl.core.errors import DataError
from llavactl.core.typed import Typed, check_fields, has_methods

if TYPE_CHECKING:
    import torch

Json = None | bool | int | float | str | list[Any] | dict[str, Any]

Role = Literal["system", "user", "assistant"]
_ROLES = get_args(Role)

IMAGE_TOKEN = -200
"""Stands for one connector token of an image in ``Encoded.ids`` and ``Batch.ids`` (LLaVA's value)."""

IGNORE = -100
"""The label of a position that is not trained (torch's ``ignore_index``)."""


@runtime_checkable
class ImageRef(Protocol):
    """An image where it lies: a file, a member of an archive, or one that is drawn when it is read.

    Hashable, equal when it is the same image, and picklable: a frozen dataclass is all three.
    """

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str:
        """Its name in messages: a path relative to its root, shortened if necessary."""

    def read(self) -> bytes:
        """The encoded image (JPEG, PNG, …).

        Raises:
            OSError: it can't be read; the image is then skipped and listed with this reason.
            DataError: the user must allow it first (such as ``follow_links``); the run stops.
        """

    def stamp(self) -> str | None:
        """Changes whenever the content may have changed, at little cost; None if only reading can tell.

        Raises as ``read``.
        """


Content = str | ImageRef


_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Turn:
    """One message: text and images in the order they are said. A literal ``<image>`` in text is text."""

    role: Role
    content: tuple[Content, ...]

    def __post_init__(self) -> None:
        if isinstance(self.content, str):  # else each character would be a part
            raise TypeError(f'content must be a tuple of texts and images: Turn("{self.role}", ("text",))')
        # Checked inline for speed: there may be millions of turns.
        if self.role not in _ROLES or not isinstance(self.content, tuple):
            check_fields(self)
        for part in self.content:
            if not isinstance(part, str):
                if not has_methods(type(part), "read", "stamp"):
                    check_fields(self)
            elif not part.isascii() and _SURROGATE.search(part):
                raise DataError(f"not text: {part!r:.60} has bytes that are not UTF-8", hint="save or type it as UTF-8")

    @property
    def text(self) -> str:
        """The text alone, images left out."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def images(self) -> tuple[ImageRef, ...]:
        return tuple(part for part in self.content if not isinstance(part, str))


@dataclass(frozen=True)
class Box(Typed):
    """A labelled box: ``xyxy`` are (left, top, right, bottom) as shares of width and height, 0 to 1."""

    category: str
    xyxy: tuple[float, float, float, float]
    crowd: bool = False


@dataclass(frozen=True)
class Sample(Typed):
    """One record: a conversation about images, and what is known of the image for a teacher.

    ``where`` names the record for messages (``file.json:12 (record 3)``).
    """

    id: str
    turns: tuple[Turn, ...]
    where: str = ""
    captions: tuple[str, ...] = ()
    boxes: tuple[Box, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> tuple[ImageRef, ...]:
        return tuple(image for turn in self.turns for image in turn.images)


@dataclass(frozen=True)
class Text(Typed):
    """A piece of a rendered conversation; ``trained`` text is a target of the loss."""

    text: str
    trained: bool = False


@dataclass(frozen=True)
class ImageSlot:
    """Where the next image of the conversation goes."""


Segment = Text | ImageSlot


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens: ``ids`` [T] with IMAGE_TOKEN where images go, ``labels`` [T] with IGNORE.

    Built together from one tokenisation. ``images`` are the conversation's images in order, each
    owning as many consecutive IMAGE_TOKENs as the connector makes of it.
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
    """The features of one image: ``prefix`` tokens (CLS, registers), then ``grid`` (h, w) patches in reading order.

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
        """P, the rows of one image's features."""
        return self.prefix + self.grid[0] * self.grid[1]


class Span(NamedTuple):
    """``length`` tokens of a packed row that see each other alone, each what is before it.

    With ``after``, the number of an earlier span of the row, they go on from that one: they see all of it, and
    their positions count on from its last. What has no ``after`` starts at position 0.
    """

    length: int
    after: int | None = None


@dataclass(frozen=True)
class Batch:
    """What the model sees: ``ids``, ``labels`` and ``mask`` (False: padding) [B, T], ``features`` [I, P, Dv].

    The IMAGE_TOKENs of ``ids``, in reading order, belong to the images of ``features`` in order. Where these are
    int8, they have ``scales`` [I, P + Dv] float32, and ``llavactl.model.inputs.image_features`` gives their values.
    ``names`` says whose tokens these are, for messages. ``spans`` are empty where every row is one conversation;
    else the batch is one packed row [1, T], and they tile it: padding, if any, ends one of them.
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
    """The contents of images: ``keys`` has the sha256 of their bytes, ``unreadable`` the reason why there is none."""

    keys: Mapping[ImageRef, str]
    unreadable: Mapping[ImageRef, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Question(Typed):
    """One thing a task asks: a conversation that ends with the user's turn, and what a right answer is."""

    id: str
    turns: tuple[Turn, ...]
    reference: str = ""
    category: str = ""


@dataclass(frozen=True)
class Answer(Typed):
    """What a model said to ``Question`` ``id``; ``extra``: whatever else a file of answers says of it."""

    id: str
    text: str
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)
