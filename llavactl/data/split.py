"""Reads a stage's samples, skips those that can't be trained on, and splits the rest by image for validation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llavactl.components.templates.stop_criteria import fallback_template
from llavactl.core.errors import ConversationError, DataError
from llavactl.core.paths import json_text, write_atomic
from llavactl.core.schema import ImageContents, ImageRef, Sample
from llavactl.data.batches import FeatureLookup
from llavactl.data.encode import Encoding
from llavactl.data.image_order import ImageOrder
from llavactl.data.records import samples
from llavactl.data.training_set import TrainingSet, refusal, untrainable

if TYPE_CHECKING:
    from llavactl.recipe.specs import SourceSpec
    from llavactl.recipe.stages import Stage

log = logging.getLogger(__name__)


class SkippedSample(NamedTuple):
    """A sample that is not trained on, and the reason."""

    id: str
    where: str
    reason: str


@dataclass(frozen=True)
class DataSplit:
    """The training and validation sets of a stage, and the samples skipped in both.

    ``digest`` is a hash of the data. ``held_out`` describes the validation set, or why it is empty; "" if the recipe
    requests no validation.
    """

    train: TrainingSet
    validation: TrainingSet
    skipped: Sequence[SkippedSample]
    digest: str
    held_out: str = ""


class WeightedSample(NamedTuple):
    """A sample with the weight (copies per epoch) and phase of its source, and the id of its record."""

    sample: Sample
    weight: float
    phase: int
    record: str


def load_split(
    specs: Sequence[SourceSpec],
    stage: Stage,
    encoding: Encoding,
    features: FeatureLookup,
    contents: Callable[[Sequence[ImageRef]], ImageContents],
    seed: int,
    *,
    max_skipped: int | None = None,
) -> DataSplit:
    """The trainable samples of ``specs``, split so that no image is in both sets.

    Samples are skipped if an image is unreadable, if the template refuses them, or if they have no target token within
    ``max_length``. ``contents`` identifies unreadable images, and images with the same bytes.

    Raises:
        ModelError: the template refuses every sample, or doesn't work with this tokenizer.
        DataError: no sample can be trained on, or more than ``max_skipped`` images can't be read.
        StoreError: images whose features were not extracted.
    """
    candidates = [
        WeightedSample(sample, spec.weight, spec.phase, _record_id(sample, split_turns=spec.split_turns))
        for spec in specs
        for sample in samples([spec])
    ]
    image_contents = contents(_distinct_images(candidates))
    _check_skipped(image_contents.unreadable, max_skipped)
    kept, skipped = [], []
    for candidate in candidates:
        sample = candidate.sample
        unreadable = _unreadable_image(sample, image_contents.unreadable)
        if reason := unreadable or untrainable(sample, encoding, stage.image_order):
            skipped.append(SkippedSample(sample.id, sample.where, reason))
        else:
            kept.append(candidate)
    if not kept:
        _raise_if_all_refused([candidate.sample for candidate in candidates], encoding, stage.image_order)
    groups, sizes = _image_groups(kept, image_contents.keys)
    validation_groups = choose_held_out(groups, stage.validation, seed, sizes)
    in_validation = [group in validation_groups for group in groups]

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

    train = subset([member for member, held in zip(kept, in_validation, strict=True) if not held])
    if not train.samples:
        raise DataError(
            f"no sample to train on: {len(skipped)} of {len(candidates)} records are skipped"
            + (f", the first ({skipped[0].where or skipped[0].id}): {skipped[0].reason}" if skipped else ""),
            hint="check the sources in `data.stage1` and `data.stage2` with `llavactl data check`",
        )
    validation = subset([member._replace(weight=1.0) for member, held in zip(kept, in_validation, strict=True) if held])
    held_out = _describe_held_out(len(validation), validation_groups, sizes) if stage.validation else ""
    return DataSplit(train, validation, skipped, _digest(kept, image_contents.keys, in_validation), held_out)


def write_skipped(file: Path, data: DataSplit) -> None:
    """Writes the skipped samples to ``file`` as JSON lines; logs their number and the size of the validation set."""
    if data.held_out:
        log.log(logging.INFO if len(data.validation) else logging.WARNING, "held out for validation: %s", data.held_out)
    if data.skipped:
        log.warning("%d samples are skipped; reasons are in %s", len(data.skipped), file)
    lines = (json_text(sample._asdict()) for sample in data.skipped)
    write_atomic(file, "".join(f"{line}\n" for line in lines))


def _check_skipped(unreadable: Mapping[ImageRef, str], max_skipped: int | None) -> None:
    if max_skipped is not None and len(unreadable) > max_skipped:
        image, reason = next(iter(unreadable.items()))
        raise DataError(
            f"{len(unreadable)} images can't be read, more than --max-skipped {max_skipped}; the first is "
            f"{image.name}: {reason}",
            hint="list them with `llavactl data check`",
        )


def _raise_if_all_refused(all_samples: Sequence[Sample], encoding: Encoding, order: ImageOrder) -> None:
    refusals = [refusal(sample, encoding, order) for sample in all_samples]
    if refusals and all(refusals) and (first := refusals[0]) is not None:
        raise ConversationError(
            f"the template refuses all {len(all_samples)} records; {all_samples[0].where or all_samples[0].id}: "
            f"{first.message}",
            hint=first.hint or f"`template: {fallback_template(encoding.tokenizer)}` renders any conversation",
        ) from first


def _unreadable_image(sample: Sample, reasons: Mapping[ImageRef, str]) -> str:
    """Name and reason of the first unreadable image of ``sample``, or ""."""
    return next((f"{image.name}: {reasons[image]}" for image in sample.images if image in reasons), "")


def _record_id(sample: Sample, *, split_turns: bool) -> str:
    return sample.id.rpartition("#")[0] if split_turns else sample.id


def _distinct_images(members: Sequence[WeightedSample]) -> list[ImageRef]:
    return list(dict.fromkeys(image for member in members for image in member.sample.images))


def _image_groups(
    members: Sequence[WeightedSample], contents: Mapping[ImageRef, str]
) -> tuple[list[str], dict[str, int]]:
    """The group of each member, which must not be split, and the number of images per group.

    Samples are in the same group if they share an image, by name or content; samples without images if they come from
    the same record or have the same id or text. A group is named after the first of its image names.
    """
    names = [
        {image.name for image in member.sample.images} if member.sample.images else {f"text {member.record}"}
        for member in members
    ]
    keys: list[list[Hashable]] = [
        [
            *(("name", name) for name in member_names),
            *(("content", contents[image]) for image in member.sample.images if image in contents),
            *([] if member.sample.images else [("text", member.sample.turns)]),
        ]
        for member, member_names in zip(members, names, strict=True)
    ]
    components = connected_components(keys)
    names_by_component: dict[int, set[str]] = {}
    for component, member_names in zip(components, names, strict=True):
        names_by_component.setdefault(component, set()).update(member_names)
    labels = {component: min(group) for component, group in names_by_component.items()}
    sizes = {labels[component]: len(group) for component, group in names_by_component.items()}
    return [labels[component] for component in components], sizes


def connected_components(keys: Sequence[Iterable[Hashable]]) -> list[int]:
    """A component index for each of ``keys``: those that share a key, directly or through others, are connected."""
    parents = list(range(len(keys)))

    def root(index: int) -> int:
        while parents[index] != index:
            parents[index] = parents[parents[index]]
            index = parents[index]
        return index

    first_with: dict[Hashable, int] = {}
    for index, own_keys in enumerate(keys):
        for key in own_keys:
            one, other = root(index), root(first_with.setdefault(key, index))
            parents[max(one, other)] = min(one, other)
    return [root(index) for index in range(len(keys))]


def choose_held_out(groups: Iterable[str], share: float, seed: int, sizes: Mapping[str, int] | None = None) -> set[str]:
    """The groups held out for validation: ``share`` of all images (``sizes``: images per group, default 1).

    A group is held out completely or not at all; one larger than the remaining share is skipped. With ten images or
    more and a share above 0 at least one group is held out, unless the smallest has more than a tenth of all images and
    more than twice the share. At least one group remains for training. Groups are chosen by hash, so that few images
    change sets when records are added.
    """
    distinct = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    size = dict.fromkeys(distinct, 1) | {group: n for group, n in (sizes or {}).items() if group in set(distinct)}
    total = sum(size.values())
    target = round(total * share)
    if share and not target and total >= 10:
        target = 1
    chosen: set[str] = set()
    remaining = target
    for group in distinct:
        if size[group] <= remaining and len(chosen) + 1 < len(distinct):
            chosen.add(group)
            remaining -= size[group]
    if target and not chosen and len(distinct) > 1:
        smallest = min(distinct, key=size.__getitem__)
        chosen = {smallest} if size[smallest] <= max(total / 10, 2 * target) else set()
    return chosen


def _describe_held_out(samples: int, validation_groups: Collection[str], sizes: Mapping[str, int]) -> str:
    total = sum(sizes.values())
    if samples:
        return f"{samples} samples with {sum(sizes[group] for group in validation_groups)} of {total} images"
    return f"none of {total} images" + (
        f": up to {largest} of them are connected through common samples"
        if (largest := max(sizes.values())) > 1
        else ""
    )


def _digest(members: Sequence[WeightedSample], keys: Mapping[ImageRef, str], in_validation: Sequence[bool]) -> str:
    """A hash of all texts, images (by content), weights and phases, and of which samples are held out."""
    total = hashlib.sha256()
    for (sample, weight, phase, _), held in zip(members, in_validation, strict=True):
        total.update(f"{sample.id}\0{weight}\0{phase}\0{held}".encode())
        for turn in sample.turns:
            parts = [part if isinstance(part, str) else f"\0{keys.get(part, part.name)}" for part in turn.content]
            total.update("\0".join([turn.role, *parts]).encode("utf-8", "surrogatepass"))
    return total.hexdigest()
