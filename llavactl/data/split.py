"""Reads a stage's samples, skips those that can't be trained on, and splits the rest by image for validation."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

from llavactl.components.templates.stop_criteria import fallback_template
from llavactl.core.errors import ConversationError, DataError
from llavactl.core.paths import json_text, write_atomic
from llavactl.core.quantities import quantity
from llavactl.core.schema import ImageContents, ImageRef, Sample
from llavactl.data.batches import FeatureLookup
from llavactl.data.encode import Encoding
from llavactl.data.held_out import choose_held_out, connected_components, describe_held_out
from llavactl.data.image_order import ImageOrder
from llavactl.data.sample_set import SampleSet, refusal
from llavactl.data.table_view import TableView
from llavactl.data.tables import sample_table
from llavactl.data.token_lengths import Counting, TokenLengths
from llavactl.data.token_lengths import lengths as token_lengths

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


@dataclass(frozen=True)
class _Members:
    """The samples of all sources in order, with the weight and phase of each, and whether its record was split."""

    samples: TableView
    weights: np.ndarray
    phases: np.ndarray
    split: np.ndarray

    def record(self, index: int) -> str:
        """The id of the record that sample ``index`` comes from."""
        name = self.samples.id(index)
        return name.rpartition("#")[0] if self.split[index] else name


def load_split(
    specs: Sequence[SourceSpec],
    stage: Stage,
    encoding: Encoding,
    features: FeatureLookup,
    contents: Callable[[Sequence[ImageRef]], ImageContents],
    seed: int,
    *,
    template: Mapping[str, Any] | None = None,
    max_skipped: int | None = None,
) -> DataSplit:
    """The trainable samples of ``specs``, split so that no image is in both sets.

    Samples are skipped if an image is unreadable, if the template refuses them, or if they have no target token within
    ``max_length``. ``contents`` identifies unreadable images, and images with the same bytes. Token lengths are cached
    for ``template``, the identity of the encoding's template, if given.

    Raises:
        ModelError: the template refuses every sample, or doesn't work with this tokenizer.
        DataError: no sample can be trained on, or more than ``max_skipped`` images can't be read.
        StoreError: images whose features were not extracted.
    """
    with ExitStack() as stack:
        countings = [stack.enter_context(Counting(encoding, stage.image_order)) for _ in specs]
        tables = []
        for spec, counting in zip(specs, countings, strict=True):
            tables.append(sample_table(spec, counting.submit))
            counting.end()  # otherwise every source would keep a process per core
        view = TableView.of(tables)
        image_contents = contents(view.images)
        _check_max_skipped(image_contents.unreadable, max_skipped)
        lengths = TokenLengths.joined(
            [
                token_lengths(table, encoding, stage.image_order, template, counting)
                for table, counting in zip(tables, countings, strict=True)
            ]
        )
    sizes_of_sources = list(map(len, tables))
    members = _Members(
        view,
        np.repeat([spec.weight for spec in specs], sizes_of_sources),
        np.repeat([spec.phase for spec in specs], sizes_of_sources),
        np.repeat([spec.split_turns for spec in specs], sizes_of_sources),
    )
    reasons = _skip_reasons(view, image_contents.unreadable, lengths)
    skipped = [SkippedSample(view.id(row), view.where(row), reason) for row, reason in reasons.items()]
    kept = np.delete(np.arange(len(view)), list(reasons))
    if not len(kept):
        _raise_no_sample(view, skipped, encoding, stage.image_order)
    groups, sizes, texts = _image_groups(members, kept, image_contents.keys)
    validation_groups = choose_held_out(groups, stage.validation, seed, sizes)
    in_validation = np.fromiter((group in validation_groups for group in groups), bool, len(groups))

    def sample_set(rows: np.ndarray, weights: np.ndarray) -> SampleSet:
        return SampleSet(
            view.select(rows),
            weights.tolist(),
            members.phases[rows].tolist(),
            encoding,
            features,
            stage.image_order,
            seed,
            lengths.select(rows),
        )

    train, validation = kept[~in_validation], kept[in_validation]
    return DataSplit(
        train=sample_set(train, members.weights[train]),
        validation=sample_set(validation, np.ones(len(validation))),
        skipped=skipped,
        digest=_digest(members, kept, image_contents.keys, in_validation),
        held_out=describe_held_out(len(validation), validation_groups, sizes, texts) if stage.validation else "",
    )


def log_held_out(data: DataSplit, stage: int) -> None:
    """Logs the size of the validation set of ``stage``; a warning if it is empty although the recipe requests one."""
    if data.held_out:
        level = logging.INFO if len(data.validation) else logging.WARNING
        log.log(level, "stage%d: held out for validation: %s", stage, data.held_out)


def write_skipped(file: Path, data: DataSplit) -> None:
    """Writes the skipped samples to ``file`` as JSON lines, and logs their number."""
    if data.skipped:
        log.warning("skipped %s, listed with reasons in %s", quantity(len(data.skipped), "sample"), file)
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


def _skip_reasons(samples: TableView, unreadable: Mapping[ImageRef, str], lengths: TokenLengths) -> dict[int, str]:
    """Why samples (by index) are skipped, in their order: an unreadable image, or ``lengths.reasons``."""
    flagged = np.array([image in unreadable for image in samples.images], bool)
    positions = np.flatnonzero(flagged[samples.image_indices])
    rows = np.unique(np.searchsorted(samples.image_ends, positions, "right") - 1).tolist()
    reasons = {**lengths.reasons, **{row: _unreadable_image(samples[row], unreadable) for row in rows}}
    return dict(sorted(reasons.items()))


def _raise_no_sample(
    samples: TableView, skipped: Sequence[SkippedSample], encoding: Encoding, order: ImageOrder
) -> NoReturn:
    """Raises the error for samples of which none can be trained on.

    Raises:
        ConversationError: the template refuses every sample, which is a fault of the template, not the data.
        DataError: otherwise.
    """
    refusals = [refusal(sample, encoding, order) for sample in samples]
    if refusals and all(refusals) and (first := refusals[0]) is not None:
        raise ConversationError(
            f"the template refuses all {len(samples)} records; {samples.where(0) or samples.id(0)}: {first.message}",
            hint=first.hint or f"`template: {fallback_template(encoding.tokenizer)}` renders any conversation",
        ) from first
    raise DataError(
        f"no sample to train on: {len(skipped)} of {len(samples)} records are skipped"
        + (f", the first ({skipped[0].where or skipped[0].id}): {skipped[0].reason}" if skipped else ""),
        hint="check the sources in `data.stage1` and `data.stage2` with `llavactl data check`",
    )


def _unreadable_image(sample: Sample, reasons: Mapping[ImageRef, str]) -> str:
    """Name and reason of the first unreadable image of ``sample``."""
    return next(f"{image.name}: {reasons[image]}" for image in sample.images if image in reasons)


def _image_groups(
    members: _Members, kept: np.ndarray, contents: Mapping[ImageRef, str]
) -> tuple[list[str], dict[str, int], dict[str, int]]:
    """The group of each of the samples ``kept``, and the sizes of groups.

    A size is the number of images and of records without images; the second sizes count the latter alone. A group must
    not be split: samples are in the same group if they share an image, by name or content; samples without images if
    they come from the same record or have the same id or text. A group is named after the first of its image names.
    """
    samples = members.samples
    first_images = samples.first_images()[kept]
    several_images = kept[samples.image_counts()[kept] > 1].tolist()
    text_only = kept[first_images < 0].tolist()
    used = np.unique(
        np.concatenate([first_images[first_images >= 0], *map(samples.images_of, several_images)])
    ).tolist()
    # Images with the same name or content are connected, then images of the same sample, then texts.
    names: list[str] = []
    keys: list[list[Hashable]] = []
    for image in map(samples.images.__getitem__, used):
        names.append(image.name)
        keys.append([("name", image.name), *([("content", contents[image])] if image in contents else [])])
    for index in several_images:
        own_names = [samples.images[image].name for image in samples.images_of(index).tolist()]
        names.append(own_names[0])
        keys.append([("name", name) for name in own_names])
    for index in text_only:
        names.append(name := f"text {members.record(index)}")
        keys.append([("name", name), ("text", hashlib.sha256(samples.content(index)).digest())])
    components = np.array(connected_components(keys), np.int64)
    names_by_component: dict[int, set[str]] = {}
    for component, name in zip(components.tolist(), names, strict=True):
        names_by_component.setdefault(component, set()).add(name)
    labels = {component: min(group) for component, group in names_by_component.items()}
    sizes = {labels[component]: len(group) for component, group in names_by_component.items()}
    text_names = set(names[len(names) - len(text_only) :])
    texts = {labels[component]: len(group & text_names) for component, group in names_by_component.items()}
    of_sample = np.empty(len(kept), np.int64)
    of_sample[first_images >= 0] = components[np.searchsorted(used, first_images[first_images >= 0])]
    of_sample[first_images < 0] = components[len(components) - len(text_only) :]
    return [labels[component] for component in of_sample.tolist()], sizes, texts


def _digest(members: _Members, kept: np.ndarray, keys: Mapping[ImageRef, str], in_validation: np.ndarray) -> str:
    """A hash of all texts, images (by content), weights and phases, and of which samples are held out."""
    samples = members.samples
    key_bytes = [keys.get(image, image.name).encode("utf-8", "surrogatepass") for image in samples.images]
    digest = hashlib.sha256()
    columns = kept, members.weights[kept], members.phases[kept], in_validation
    for index, weight, phase, held_out in zip(*(column.tolist() for column in columns), strict=True):
        head = f"{samples.id(index)}\0{weight}\0{phase}\0{held_out}".encode()
        digest.update(b"".join([head, *samples.digest_bytes(index, key_bytes)]))
    return digest.hexdigest()
