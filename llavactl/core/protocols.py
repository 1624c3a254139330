"""What a component of each kind is: one Protocol a kind, all made the same way.

A registered target is called with one argument, its validated options, and gives an object of the
kind's Protocol. Making it is cheap; weights are read by ``load``. A plain function, a class or a
generator function will do: the Protocols are structural.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from llavactl.core.schema import Answer, FeatureShape, Question, Sample, Segment, Turn
from llavactl.core.typed import Typed

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Json = None | bool | int | float | str | list[Any] | dict[str, Any]


class Source(Protocol):
    """Records, in the same order every time it is made. A generator function is a source."""

    def __iter__(self) -> Iterator[Sample]: ...


@runtime_checkable
class Encoder(Protocol):
    """A vision backbone with its weights loaded, frozen."""

    @property
    def shape(self) -> FeatureShape:
        """The shape of one image's features."""

    @property
    def preprocess(self) -> Callable[[Image.Image], np.ndarray]:
        """RGB image to pixels [3, H, W] float32; picklable, free of weights, safe in any thread.

        An image for which it raises any exception is skipped and listed with the reason.
        """

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels [I, 3, H, W] to features [I, P, Dv], on the device it was loaded on.

        An image's features don't depend on the others of its batch. An exception stops the run.
        """


@runtime_checkable
class Vision(Protocol):
    """A frozen vision backbone. One whose output shape is known without its weights is a ``MeasuredVision``, too.

    It may have ``check()``, which ``llavactl run`` calls before its first step: it raises ModelError if ``load``
    would fail, as far as this can be determined without reading weights.
    """

    def identity(self) -> Mapping[str, Json]:
        """All that changes a number of the features, without reading weights into memory.

        At least the backbone's id, a hash of its weights, layer, token selection, image size,
        ``square`` or ``pad`` and the image processor's class. It becomes part of the fingerprint.
        """

    def load(self, device: str, dtype: str) -> Encoder:
        """The backbone on ``device`` computing in ``dtype`` (``float32``, ``bfloat16``, ``float16``)."""


@runtime_checkable
class MeasuredVision(Protocol):
    """A vision backbone that says what its features will be like without reading a weight."""

    def shape(self) -> FeatureShape:
        """The ``shape`` that ``load`` will give; from the configuration alone."""


@runtime_checkable
class Connector(Protocol):
    """What turns vision features into language embeddings.

    Rules for the modules that it builds, tested on random features by ``recipes check`` and ``train``:

    - They map features [I, P, Dv], for any I from 1, to finite embeddings [I, Q, Dl], in training mode as well, and
      don't change the features in place.
    - In evaluation mode, an image's embeddings don't depend on the other images of its batch.
    - The state dict contains only tensors, with constant names and shapes, and all state that the embeddings depend on:
      a module that loads it computes the same. Random numbers come from torch's global generator.
    - The whole state dict is saved. Parameters that don't require a gradient when built are never trained.
    """

    def tokens(self, shape: FeatureShape) -> int:
        """Q, how many embeddings one image becomes."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl]; its state dict is what is saved."""


@runtime_checkable
class Language(Protocol):
    """A causal language model and its tokenizer.

    It may have ``check()``, which ``llavactl run`` calls before its first step: it raises ModelError if ``load``
    would fail, as far as this can be determined without reading weights.
    """

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fast tokenizer (character offsets are needed to place labels)."""

    def load(self, dtype: str) -> PreTrainedModel:
        """The causal language model, on the CPU, weights in ``dtype``."""


@runtime_checkable
class SkeletonLanguage(Protocol):
    """A language model that can be looked at without its weights."""

    def skeleton(self) -> PreTrainedModel:
        """The model on torch's meta device, from the configuration alone: names and shapes, no numbers."""


@runtime_checkable
class Template(Protocol):
    """How a conversation is written for a language model, and which of it is trained."""

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        """The conversation as text and image slots; answers and their end are ``trained``.

        With ``generate`` the last turn is the user's, and the text ends where the answer begins. Names of special
        tokens in ``turns`` are broken up by a noncharacter, so that only the template writes special tokens: the text
        of turns must be passed on unchanged.

        Raises:
            ConversationError: the template can't render these turns; their record is left out of training.
            ModelError: the template doesn't work with this tokenizer.
        """

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Stop strings, in addition to the tokenizer's end-of-sequence token; each added token in them also stops."""


@dataclass(frozen=True)
class Scores(Typed):
    """``scores`` by their published names, rates as percentages; ``failed`` answers that could not be read as one.

    ``right`` says of each question whether its answer is right, where that can be said: intervals need it.
    ``about`` names the questions of each share in ``scores``, where those are not the question's categories.
    ``grades`` are for answers that are more or less right, 0 to 1.
    """

    scores: Mapping[str, Json]
    failed: int = 0
    right: Mapping[str, bool] = field(default_factory=dict)
    about: Mapping[str, Sequence[str]] = field(default_factory=dict)
    grades: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A benchmark: what it asks and how answers become scores.

    One that needs a judge is a ``Judged`` instead; one whose questions others name otherwise is a ``Finds``, too.
    """

    protocols: tuple[str, ...]
    """Names of its ways of scoring, the default first."""

    def questions(self) -> Iterable[Question]: ...

    def score(self, answers: Mapping[str, Answer], protocol: str) -> Scores:
        """Scores of the ``answers`` by question id: one to each question that was asked, be it all or the first few."""


@runtime_checkable
class Finds(Protocol):
    """A task with published files of answers that name its questions otherwise than by their ids."""

    def id_of(self, answer: Answer) -> str:
        """The id of the question that a stored ``answer`` is to; its own id where nothing says otherwise."""


@runtime_checkable
class Judged(Protocol):
    """A task whose answers a judge compares with reference answers; its scores come from the verdicts."""

    protocols: tuple[str, ...]

    def questions(self) -> Iterable[Question]: ...

    def reviews(self) -> Sequence[Mapping[str, str]]:
        """Stored verdicts by question id, one mapping for each time that all was judged; () when there are none."""

    def judge(self, reviews: Sequence[Mapping[str, str]], protocol: str) -> Scores:
        """Scores of such verdicts."""


@runtime_checkable
class Pairs(Protocol):
    """A judged task whose stored verdicts may say which answers they are about."""

    def check_answers(self, answers: Mapping[str, Answer]) -> None:
        """Raises DataError where the verdicts are about other answers."""


@dataclass(frozen=True)
class Request(Typed):
    """What a teacher is asked: chat ``messages`` ({"role", "content"}), and the sample it is about."""

    id: str
    kind: str
    messages: tuple[Mapping[str, str], ...]
    sample: Sample
    seed: int = 0


@dataclass(frozen=True)
class Reply(Typed):
    """What a teacher said, the tokens it read and wrote (None: it doesn't say) and why it ended.

    ``finish`` is ``stop``, or ``length`` for a reply that was cut at the limit of tokens.
    """

    text: str
    tokens_in: int | None = None
    tokens_out: int | None = None
    finish: str = "stop"


@dataclass(frozen=True)
class Limits(Typed):
    """How a language teacher may be asked: how many at a time, how many and how many tokens a minute (None: any).

    A request that fails for a while is asked ``retries`` times more. ``model`` names its price; ``max_tokens`` bounds
    a reply, which a budget needs.
    """

    concurrency: int = 8
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    retries: int = 5
    model: str = ""
    max_tokens: int | None = None


@runtime_checkable
class Teacher(Protocol):
    """What writes instruction data or judges answers; one that costs money or hours is a ``LanguageTeacher``.

    Replies pass the recipe's ``gates``, unless the teacher has ``exact = True``: a program that can't say too much.
    """

    def reply(self, request: Request) -> str | Reply:
        """Raises DataError for a request that it can't answer; a LanguageTeacher is called from several threads."""


@runtime_checkable
class LanguageTeacher(Teacher, Protocol):
    """A language model as a teacher: every reply is kept before it is read, and none is asked for twice.

    Its ``reply`` raises TeacherError. It may have ``close()``, which ends what is still in flight.
    """

    limits: Limits

    def content(self, request: Request) -> Mapping[str, Json]:
        """All that decides the reply, and nothing else: its hash is the name under which the reply is kept."""


@runtime_checkable
class BatchTeacher(LanguageTeacher, Protocol):
    """A language teacher that can be asked by files: ``content`` is the body of a request to ``batch_url``."""

    batch_url: str

    def read(self, status: int, body: bytes) -> Reply:
        """The reply in the ``body`` that came with an HTTP ``status``; raises TeacherError."""


Ask = Callable[[Sequence[Request]], Mapping[str, str]]
"""Puts requests to a teacher: what it said by their ids, nothing ("") where it will never say anything."""


@dataclass(frozen=True)
class Consultant:
    """Who is asked about a model's answers: the ``teacher`` ({"name", options}), and what that may ever cost."""

    teacher: Mapping[str, Any]
    max_cost: float | None = None
    prices: Path | None = None


@runtime_checkable
class Consults(Protocol):
    """A task that asks a teacher about a model's answers, be it as a judge of them; a ``Task`` or ``Judged``, too."""

    consultant: Consultant | None
    """None: nobody is asked, and the task is scored without."""

    def consulted(self, answers: Mapping[str, Answer], ask: Ask, protocol: str) -> Scores:
        """Scores of the ``answers`` with what the teacher says; ``ask`` may be called several times.

        Requests of one call have ids of their own; the same request is never paid for twice.
        """


@runtime_checkable
class Format(Protocol):
    """A layout of a finished model on disk. One that can be checked before training is a ``CheckedFormat``, too."""

    reload: Path | None
    """A script that reloads the layout without llavactl to verify exports (see ``components/formats/hf_outputs.py``);
    None: exports in this layout are not verified."""

    def recognise(self, folder: Path) -> bool:
        """True when ``folder`` is in this layout; looks at files, never at the folder's name."""

    def read(self, folder: Path, model: Path) -> None:
        """Converts the checkpoint in ``folder`` to the model folder ``model`` (llavactl's own layout).

        Small weights are copied, large ones are referenced in place. ``sources`` in its ``llavactl.json`` lists ids
        and folders outside ``folder`` that it depends on: when their contents change, ``folder`` is read again.
        """

    def write(self, model: Path, to: Path) -> None:
        """Writes the model folder ``model`` (llavactl's own layout) to ``to`` in this one.

        ``to`` is renamed once it is complete; paths into it in its ``config.json`` are adjusted.
        """


@runtime_checkable
class CheckedFormat(Protocol):
    """A layout that can be checked against a recipe's components before training."""

    def check(
        self,
        vision: Mapping[str, Any],
        connector: Mapping[str, Any],
        language: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Raises ModelError if the layout can't represent a model of these components, as far as configurations show.

        ``vision`` and ``connector`` are specs ({"name", options}), ``language`` is a ``skeleton`` without weights.
        """


KINDS: Mapping[str, type] = {
    "sources": Source,
    "vision": Vision,
    "connectors": Connector,
    "languages": Language,
    "templates": Template,
    "teachers": Teacher,
    "tasks": Task,
    "formats": Format,
}
"""The kinds, by the name they carry everywhere: folder, hook, command line."""
