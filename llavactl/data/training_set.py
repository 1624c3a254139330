"""Samples joined with their features: what the loop asks for by number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llavactl.components.templates.ends import alternative
from llavactl.core.errors import ConversationError, DataError
from llavactl.core.schema import Encoded, ImageRef, Sample, Turn
from llavactl.data.batches import Loads
from llavactl.data.encode import Encoding, ImageOrder, arrange, arrangements
from llavactl.data.plan import held_out
from llavactl.data.records import samples

if TYPE_CHECKING:
    from llavactl.recipe.frame import SourceSpec, Stage


@dataclass(frozen=True)
class TrainingSet:
    """Samples with their weights (copies an epoch) and phases, and how they become tokens and features."""

    samples: Sequence[Sample]
    weights: Sequence[float]
    phases: Sequence[int]
    encoding: Encoding
    features: Loads
    image_order: ImageOrder
    seed: int

    def __len__(self) -> int:
        return len(self.samples)

    def encoded(self, epoch: int, index: int) -> Encoded:
        """Sample ``index`` as tokens, as it is in ``epoch``."""
        return self.encoding.encode(arranged(self.samples[index], self.image_order, self.seed, epoch))

    def images(self) -> list[int]:
        """For each sample the number of its first image, the same for the same image; its own without one."""
        numbers: dict[Hashable, int] = {}
        firsts = (sample.images[0] if sample.images else index for index, sample in enumerate(self.samples))
        return [numbers.setdefault(first, len(numbers)) for first in firsts]


def arranged(sample: Sample, order: ImageOrder, seed: int, epoch: int) -> tuple[Turn, ...]:
    """The turns of ``sample`` as they are in ``epoch`` (from 0) of a run with ``seed``.

    A random order is drawn anew each epoch, from what the sample says, not from where it stands: the coin is the
    same on any process, in a resumed run, and when other samples come or go.
    """
    first = next((turn.text for turn in sample.turns if turn.role == "user"), "")
    return arrange(sample.turns, order, f"{seed}\0{epoch}\0{sample.id}\0{first}")


class LeftOut(NamedTuple):
    """A sample that is not trained, and why."""

    id: str
    where: str
    reason: str


@dataclass(frozen=True)
class Split:
    """The training and the validation set of a stage, and what is in neither."""

    train: TrainingSet
    validation: TrainingSet
    left_out: Sequence[LeftOut]
    digest: str


class Member(NamedTuple):
    """A sample with its source's copies an epoch and phase."""

    sample: Sample
    weight: float
    phase: int


def split(
    specs: Sequence[SourceSpec],
    stage: Stage,
    encoding: Encoding,
    features: Loads,
    unreadable: Callable[[Sequence[ImageRef]], Mapping[ImageRef, str]],
    seed: int,
) -> Split:
    """The samples of ``specs`` that can be trained, split so that no image is on both sides.

    Left out are those with an ``unreadable`` image, those that the template refuses to write, and those of which
    ``max_length`` leaves nothing to train.

    Raises:
        ModelError: the template refuses every sample, or can't be used with this tokenizer.
        DataError: there is no sample to train on.
        StoreError: images whose features were never extracted.
    """
    found = [Member(sample, spec.weight, spec.phase) for spec in specs for sample in samples([spec])]
    reasons = unreadable(list(dict.fromkeys(image for sample, *_ in found for image in sample.images)))
    kept, left_out = [], []
    for member in found:
        sample = member.sample
        if why := _unreadable(sample, reasons) or untrainable(sample, encoding, stage.image_order):
            left_out.append(LeftOut(sample.id, sample.where, why))
        else:
            kept.append(member)
    if not kept:
        _check_written([member.sample for member in found], encoding, stage.image_order)
    groups = [_group(member.sample) for member in kept]
    validation = held_out(groups, stage.validation, seed)

    def subset(members: Sequence[Member]) -> TrainingSet:
        return TrainingSet(
            [member.sample for member in members],
            [member.weight for member in members],
            [member.phase for member in members],
            encoding,
            features,
            stage.image_order,
            seed,
        )

    train = subset([member for member, group in zip(kept, groups, strict=True) if group not in validation])
    if not train.samples:
        raise DataError(
            f"no sample to train on: {len(left_out)} of {len(found)} records are left out"
            + (f", the first ({left_out[0].where or left_out[0].id}): {left_out[0].reason}" if left_out else ""),
            hint="`data.stage1` and `data.stage2` name the sources",
        )
    held = subset([each._replace(weight=1.0) for each, group in zip(kept, groups, strict=True) if group in validation])
    return Split(train, held, left_out, _digest(kept))


def untrainable(sample: Sample, encoding: Encoding, order: ImageOrder) -> str:
    """Why nothing of ``sample`` would be trained, in some epoch at least; "" where something is in all."""
    try:
        if all(encoding.trains(turns) for turns in arrangements(sample.turns, order)):
            return ""
    except ConversationError as error:
        return error.message
    return f"nothing of its answers is within max_length {encoding.max_length}"


def refusal(sample: Sample, encoding: Encoding, order: ImageOrder) -> ConversationError | None:
    """Why the template of ``encoding`` can't write ``sample``; None where it can. Nothing is tokenised."""
    try:
        for turns in arrangements(sample.turns, order):
            encoding.written(turns)
    except ConversationError as error:
        return error
    return None


def _check_written(samples: Sequence[Sample], encoding: Encoding, order: ImageOrder) -> None:
    """Raises the refusal of the first of ``samples`` where the template refuses them all."""
    refusals = [refusal(sample, encoding, order) for sample in samples]
    if refusals and all(refusals) and (first := refusals[0]) is not None:
        raise ConversationError(
            f"none of {len(samples)} records can be written; {samples[0].where or samples[0].id}: {first.message}",
            hint=first.hint or f"`template: {alternative(encoding.tokenizer)}` writes any conversation",
        ) from first


def _unreadable(sample: Sample, reasons: Mapping[ImageRef, str]) -> str:
    return next((f"{image.name}: {reasons[image]}" for image in sample.images if image in reasons), "")


def _group(sample: Sample) -> str:
    """What a sample must not be split from: its first image, or itself."""
    return sample.images[0].name if sample.images else f"text {sample.id}"


def _digest(members: Sequence[Member]) -> str:
    """Changes with any word, image, weight or phase that is trained on."""
    total = hashlib.sha256()
    for sample, weight, phase in members:
        total.update(f"{sample.id}\0{weight}\0{phase}".encode())
        for turn in sample.turns:
            said = [part if isinstance(part, str) else f"\0{part.name}" for part in turn.content]
            total.update("\0".join([turn.role, *said]).encode("utf-8", "surrogatepass"))
    return total.hexdigest()
