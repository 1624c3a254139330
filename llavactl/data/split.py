"""Reads a stage's samples, skips those that can't be trained on, and splits the rest by image for validation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llavactl.components.templates.stop_criteria import fallback_template
from llavactl.core.errors import ConversationError, DataError
from llavactl.core.paths import json_text, write_atomic
from llavactl.core.schema import ImageContents, ImageRef, Sample
from llavactl.data.batches import FeatureLookup
from llavactl.data.encode import Encoding
from llavactl.data.held_out import choose_held_out, connected_components, describe_held_out
from llavactl.data.image_order import ImageOrder
from llavactl.data.records import samples
from llavactl.data.sample_set import SampleSet, refusal, untrainable

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

    train: SampleSet
    validation: SampleSet
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
    _check_max_skipped(image_contents.unreadable, max_skipped)
    kept, skipped = _skip_untrainable(candidates, image_contents.unreadable, encoding, stage.image_order)
    groups, sizes = _image_groups(kept, image_contents.keys)
    validation_groups = choose_held_out(groups, stage.validation, seed, sizes)
    in_validation = [group in validation_groups for group in groups]

    def sample_set(members: Sequence[WeightedSample]) -> SampleSet:
        return SampleSet(
            [member.sample for member in members],
            [member.weight for member in members],
            [member.phase for member in members],
            encoding,
            features,
            stage.image_order,
            seed,
        )

    train = [member for member, held_out in zip(kept, in_validation, strict=True) if not held_out]
    validation = [member._replace(weight=1.0) for member, held_out in zip(kept, in_validation, strict=True) if held_out]
    if not train:
        raise DataError(
            f"no sample to train on: {len(skipped)} of {len(candidates)} records are skipped"
            + (f", the first ({skipped[0].where or skipped[0].id}): {skipped[0].reason}" if skipped else ""),
            hint="check the sources in `data.stage1` and `data.stage2` with `llavactl data check`",
        )
    return DataSplit(
        train=sample_set(train),
        validation=sample_set(validation),
        skipped=skipped,
        digest=_digest(kept, image_contents.keys, in_validation),
        held_out=describe_held_out(len(validation), validation_groups, sizes) if stage.validation else "",
    )


def log_held_out(data: DataSplit) -> None:
    """Logs the size of the validation set; a warning if it is empty although the recipe requests one."""
    if data.held_out:
        log.log(logging.INFO if len(data.validation) else logging.WARNING, "held out for validation: %s", data.held_out)


def write_skipped(file: Path, data: DataSplit) -> None:
    """Writes the skipped samples to ``file`` as JSON lines, and logs their number."""
    if data.skipped:
        log.warning("%d samples are skipped; reasons are in %s", len(data.skipped), file)
    lines = (json_text(sample._asdict()) for sample in data.skipped)
    write_atomic(file, "".join(f"{line}\n" for line in lines))


def _check_max_skipped(unreadable: Mapping[ImageRef, str], max_skipped: int | None) -> None:
    """Raises DataError if more than ``max_skipped`` images are unreadable."""
    if max_skipped is not None and len(unreadable) > max_skipped:
        image, reason = next(iter(unreadable.items()))
        raise DataError(
            f"{len(unreadable)} images can't be read, more than --max-skipped {max_skipped}; the first is "
            f"{image.name}: {reason}",
            hint="list them with `llavactl data check`",
        )


def _skip_untrainable(
    candidates: Sequence[WeightedSample], unreadable: Mapping[ImageRef, str], encoding: Encoding, order: ImageOrder
) -> tuple[list[WeightedSample], list[SkippedSample]]:
    """The ``candidates`` that can be trained on, and those that can't with the reasons.

    Raises:
        ModelError: the template refuses every sample, or doesn't work with this tokenizer.
    """
    kept, skipped = [], []
    for candidate in candidates:
        sample = candidate.sample
        if reason := _unreadable_image(sample, unreadable) or untrainable(sample, encoding, order):
            skipped.append(SkippedSample(sample.id, sample.where, reason))
        else:
            kept.append(candidate)
    if not kept:
        _raise_if_all_refused([candidate.sample for candidate in candidates], encoding, order)
    return kept, skipped


def _raise_if_all_refused(all_samples: Sequence[Sample], encoding: Encoding, order: ImageOrder) -> None:
    """Raises ConversationError if the template refuses every sample, which is a fault of the template, not the data."""
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
    """The id of the record that ``sample`` comes from."""
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


def _digest(members: Sequence[WeightedSample], keys: Mapping[ImageRef, str], in_validation: Sequence[bool]) -> str:
    """A hash of all texts, images (by content), weights and phases, and of which samples are held out."""
    digest = hashlib.sha256()
    for (sample, weight, phase, _), held_out in zip(members, in_validation, strict=True):
        digest.update(f"{sample.id}\0{weight}\0{phase}\0{held_out}".encode())
        for turn in sample.turns:
            parts = [part if isinstance(part, str) else f"\0{keys.get(part, part.name)}" for part in turn.content]
            digest.update("\0".join([turn.role, *parts]).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()
