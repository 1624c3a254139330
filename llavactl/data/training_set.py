"""Samples joined with their features: what the loop asks for by number."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from llavactl.components.templates.stop_criteria import fallback_template
from llavactl.core.errors import ConversationError, DataError
from llavactl.core.schema import Encoded, ImageContents, ImageRef, Sample, Turn
from llavactl.data.batches import Loads
from llavactl.data.encode import Encoding, ImageOrder, arrange, arrangements
from llavactl.data.plan import connected, held_out
from llavactl.data.records import samples

if TYPE_CHECKING:
    from llavactl.recipe.specs import SourceSpec
    from llavactl.recipe.stages import Stage


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
    """The training and validation sets of a stage, and the samples left out of both.

    ``held_out`` describes what is held out for validation, or why nothing is; "" if no validation was requested.
    """

    train: TrainingSet
    validation: TrainingSet
    left_out: Sequence[LeftOut]
    digest: str
    held_out: str = ""


class WeightedSample(NamedTuple):
    """A sample with its source's copies per epoch and phase, and the id of its record."""

    sample: Sample
    weight: float
    phase: int
    record: str


def split(
    specs: Sequence[SourceSpec],
    stage: Stage,
    encoding: Encoding,
    features: Loads,
    contents: Callable[[Sequence[ImageRef]], ImageContents],
    seed: int,
) -> Split:
    """The trainable samples of ``specs``, split so that no image is in both sets.

    Left out are samples with an unreadable image, those that the template refuses, and those without a target token
    within ``max_length``. ``contents`` identifies unreadable images, and images with the same bytes.

    Raises:
        ModelError: the template refuses every sample, or doesn't work with this tokenizer.
        DataError: there is no sample to train on.
        StoreError: images whose features were never extracted.
    """
    found = [
        WeightedSample(sample, spec.weight, spec.phase, _record_of(sample, apart=spec.split_turns))
        for spec in specs
        for sample in samples([spec])
    ]
    looked_at = contents(_images(found))
    kept, left_out = [], []
    for member in found:
        sample = member.sample
        if why := _unreadable(sample, looked_at.unreadable) or untrainable(sample, encoding, stage.image_order):
            left_out.append(LeftOut(sample.id, sample.where, why))
        else:
            kept.append(member)
    if not kept:
        _check_written([member.sample for member in found], encoding, stage.image_order)
    groups, sizes = _groups(kept, looked_at.keys)
    validation = held_out(groups, stage.validation, seed, sizes)

    def subset(members: Sequence[WeightedSample]) -> TrainingSet:
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
    said = _held_out(len(held), validation, sizes) if stage.validation else ""
    digest = _digest(kept, looked_at.keys, [group in validation for group in groups])
    return Split(train, held, left_out, digest, said)


def untrainable(sample: Sample, encoding: Encoding, order: ImageOrder) -> str:
    """Why nothing of ``sample`` would be trained, in some epoch at least; "" where something is in all."""
    try:
        if all(encoding.trains(turns) for turns in arrangements(sample.turns, order)):
            return ""
    except ConversationError as error:
        return error.message
    return f"nothing of its answers is within max_length {encoding.max_length}"


def refusal(sample: Sample, encoding: Encoding, order: ImageOrder) -> ConversationError | None:
    """The error with which the template of ``encoding`` refuses ``sample``, if any; nothing is tokenised."""
    try:
        for turns in arrangements(sample.turns, order):
            encoding.written(turns)
    except ConversationError as error:
        return error
    return None


def _check_written(samples: Sequence[Sample], encoding: Encoding, order: ImageOrder) -> None:
    """Raises the refusal of the first of ``samples`` if the template refuses all of them."""
    refusals = [refusal(sample, encoding, order) for sample in samples]
    if refusals and all(refusals) and (first := refusals[0]) is not None:
        raise ConversationError(
            f"the template refuses all {len(samples)} records; {samples[0].where or samples[0].id}: {first.message}",
            hint=first.hint or f"`template: {fallback_template(encoding.tokenizer)}` renders any conversation",
        ) from first


def _unreadable(sample: Sample, reasons: Mapping[ImageRef, str]) -> str:
    return next((f"{image.name}: {reasons[image]}" for image in sample.images if image in reasons), "")


def _record_of(sample: Sample, *, apart: bool) -> str:
    """The id of the record that ``sample`` comes from."""
    return sample.id.rpartition("#")[0] if apart else sample.id


def _images(members: Sequence[WeightedSample]) -> list[ImageRef]:
    return list(dict.fromkeys(image for member in members for image in member.sample.images))


def _groups(members: Sequence[WeightedSample], contents: Mapping[ImageRef, str]) -> tuple[list[str], dict[str, int]]:
    """The name of each member's group, which must stay on one side of the split, and the images per group.

    Samples that share an image, by name or by content, are in one group; without images, those of the same record, the
    same id or the same text. A group is named after the first of its images' names.
    """
    names = [
        {image.name for image in each.sample.images} if each.sample.images else {f"text {each.record}"}
        for each in members
    ]
    keys: list[list[Hashable]] = [
        [
            *(("name", name) for name in called),
            *(("content", contents[image]) for image in each.sample.images if image in contents),
            *([] if each.sample.images else [("said", each.sample.turns)]),
        ]
        for each, called in zip(members, names, strict=True)
    ]
    numbers = connected(keys)
    together: dict[int, set[str]] = {}
    for number, called in zip(numbers, names, strict=True):
        together.setdefault(number, set()).update(called)
    label = {number: min(called) for number, called in together.items()}
    return [label[number] for number in numbers], {label[n]: len(called) for n, called in together.items()}


def _held_out(samples: int, validation: Collection[str], sizes: Mapping[str, int]) -> str:
    total = sum(sizes.values())
    if samples:
        return f"{samples} samples with {sum(sizes[group] for group in validation)} of {total} images"
    return f"none of {total} images" + (
        f": up to {largest} of them are connected through common samples"
        if (largest := max(sizes.values())) > 1
        else ""
    )


def _digest(members: Sequence[WeightedSample], keys: Mapping[ImageRef, str], held: Sequence[bool]) -> str:
    """A hash of all text, images (by content), weights and phases, and of which members are ``held`` out."""
    total = hashlib.sha256()
    for (sample, weight, phase, _), out in zip(members, held, strict=True):
        total.update(f"{sample.id}\0{weight}\0{phase}\0{out}".encode())
        for turn in sample.turns:
            said = [part if isinstance(part, str) else f"\0{keys.get(part, part.name)}" for part in turn.content]
            total.update("\0".join([turn.role, *said]).encode("utf-8", "surrogatepass"))
    return total.hexdigest()
