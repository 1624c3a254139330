"""Samples joined with their features: what the loop asks for by number."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from llavactl.core.errors import DataError
from llavactl.core.schema import Batch, Encoded, ImageRef, Sample
from llavactl.data.batches import Loads, collate
from llavactl.data.encode import Encoding, arrange
from llavactl.data.plan import held_out
from llavactl.data.records import samples

if TYPE_CHECKING:
    from llavactl.recipe.frame import SourceSpec, Stage

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingSet:
    """Samples with their weights (copies an epoch) and phases, and how they become tokens and features."""

    samples: Sequence[Sample]
    weights: Sequence[float]
    phases: Sequence[int]
    encoding: Encoding
    features: Loads
    image_order: Literal["first", "random", "as-data"]
    seed: int
    _warned: set[str] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return len(self.samples)

    def encoded(self, epoch: int, index: int) -> Encoded:
        """Sample ``index`` as tokens; a random image order is drawn anew each epoch."""
        sample = self.samples[index]
        encoded = self.encoding.encode(arrange(sample.turns, self.image_order, f"{self.seed} {epoch} {index}"))
        if not encoded.trained and sample.id not in self._warned:
            self._warned.add(sample.id)
            log.warning(
                "%s (id %s): nothing of it is trained within max_length %s; it is left out of the loss",
                sample.where, sample.id, self.encoding.max_length,
            )  # fmt: skip
        return encoded

    def batch(self, items: Sequence[tuple[Encoded, tuple[int, int]]]) -> Batch:
        """Encoded samples, each with its (epoch, index), as one batch."""
        names = [self.samples[index].id for _, (_, index) in items]
        return collate([encoded for encoded, _ in items], self.features, names=names)


@dataclass(frozen=True)
class Split:
    """The training and the validation set of a stage; ``left_out`` are samples whose images can't be read."""

    train: TrainingSet
    validation: TrainingSet
    left_out: Mapping[str, str]
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
    """The samples of ``specs``, less those with an ``unreadable`` image, split so that no image is on both sides.

    Raises:
        DataError: there is no sample to train on.
        StoreError: images whose features were never extracted.
    """
    found = [Member(sample, spec.weight, spec.phase) for spec in specs for sample in samples([spec])]
    reasons = unreadable(list(dict.fromkeys(image for sample, *_ in found for image in sample.images)))
    kept, left_out = [], {}
    for member in found:
        sample = member.sample
        bad = [image for image in sample.images if image in reasons]
        if bad:
            left_out[sample.id] = f"{bad[0].name}: {reasons[bad[0]]}"
        else:
            kept.append(member)
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
            f"no sample to train on: {len(found)} records, {len(left_out)} with images that can't be read",
            hint="`data.stage1` and `data.stage2` name the sources",
        )
    held = subset([each._replace(weight=1.0) for each, group in zip(kept, groups, strict=True) if group in validation])
    return Split(train, held, left_out, _digest(kept))


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
