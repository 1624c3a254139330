"""The samples of a training or validation set, encoded on demand."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavactl.core.errors import ConversationError
from llavactl.core.schema import Encoded, Sample, Turn
from llavactl.data.batches import FeatureLookup
from llavactl.data.encode import Encoding
from llavactl.data.image_order import ImageOrder, arrange, arrangement, arrangements
from llavactl.data.table_view import TableView

if TYPE_CHECKING:
    from llavactl.data.token_lengths import TokenLengths


@dataclass(frozen=True)
class SampleSet:
    """Samples with weights (copies per epoch) and phases, how they are encoded, and the features of their images.

    ``lengths`` are those of the samples in all arrangements of ``image_order``, if they have been computed.
    """

    samples: Sequence[Sample]
    weights: Sequence[float]
    phases: Sequence[int]
    encoding: Encoding
    features: FeatureLookup
    image_order: ImageOrder
    seed: int
    lengths: TokenLengths | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def encoded(self, epoch: int, index: int) -> Encoded:
        """Sample ``index`` encoded for ``epoch`` (from 0)."""
        return self.encoding.encode(arranged(self.samples[index], self.image_order, self.seed, epoch))

    def arrangement(self, epoch: int, index: int) -> int:
        """The arrangement of sample ``index`` in ``epoch`` (from 0): the first index into the arrays of ``lengths``."""
        if self.image_order != "random":
            return 0
        return arrangement(self.image_order, _seed(self.samples[index], self.seed, epoch))

    def image_groups(self) -> list[int]:
        """For each sample the index of its first image, equal for equal images; a new index without an image."""
        if isinstance(self.samples, TableView):
            firsts: Sequence[Hashable] = [
                None if first < 0 else first for first in self.samples.first_images().tolist()
            ]
        else:
            firsts = [sample.images[0] if sample.images else None for sample in self.samples]
        indices: dict[Hashable, int] = {}
        keys = (("text", index) if first is None else first for index, first in enumerate(firsts))
        return [indices.setdefault(key, len(indices)) for key in keys]


def arranged(sample: Sample, order: ImageOrder, seed: int, epoch: int) -> tuple[Turn, ...]:
    """The turns of ``sample`` in ``epoch`` (from 0) of a run with ``seed``.

    A random order is drawn for each epoch from the sample's id and first question, not from its index: the result is
    the same on every process, in a resumed run, and when other samples are added or removed.
    """
    return arrange(sample.turns, order, _seed(sample, seed, epoch))


def _seed(sample: Sample, seed: int, epoch: int) -> str:
    question = next((turn.text for turn in sample.turns if turn.role == "user"), "")
    return f"{seed}\0{epoch}\0{sample.id}\0{question}"


def untrainable(sample: Sample, encoding: Encoding, order: ImageOrder) -> str:
    """Why ``sample`` would have no target tokens in some epoch; "" if it has some in all."""
    try:
        if all(encoding.has_targets(turns) for turns in arrangements(sample.turns, order)):
            return ""
    except ConversationError as error:
        return error.message
    return no_targets(sample.turns, encoding)


def no_targets(turns: Sequence[Turn], encoding: Encoding) -> str:
    """Why a sample of ``turns`` without target tokens is skipped: no answer, or none within ``max_length``."""
    if not any(turn.role == "assistant" and turn.text for turn in turns):
        return "no answer" if turns else "no turns"
    return f"no target tokens within max_length {encoding.max_length}"


def refusal(sample: Sample, encoding: Encoding, order: ImageOrder) -> ConversationError | None:
    """The error with which the template refuses ``sample``, or None; nothing is tokenized."""
    try:
        for turns in arrangements(sample.turns, order):
            encoding.rendered_text(turns)
    except ConversationError as error:
        return error
    return None
