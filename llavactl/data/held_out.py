"""Chooses which images are held out for validation, in groups that are connected through common samples."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

from llavactl.core.quantities import quantity


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


def images_to_hold_out(images: int, fraction: float) -> int:
    """The number of ``images`` to hold out for validation: at least one of ten or more if ``fraction`` > 0."""
    target = round(images * fraction)
    return 1 if fraction and not target and images >= 10 else target


def choose_held_out(
    groups: Iterable[str], fraction: float, seed: int, sizes: Mapping[str, int] | None = None
) -> set[str]:
    """The groups held out for validation: ``fraction`` of all images (``sizes``: images per group, default 1).

    A group is held out completely or not at all; one with more images than are still to be held out is skipped. With
    ten images or more and a fraction above 0, at least one group is held out, unless the smallest has more than a tenth
    of all images and more than twice the number to hold out. At least one group remains for training. Groups are chosen
    by hash, so few images change sets when records are added.
    """
    distinct = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    size = {group: (sizes or {}).get(group, 1) for group in distinct}
    total = sum(size.values())
    target = images_to_hold_out(total, fraction)
    held_out: set[str] = set()
    remaining = target
    for group in distinct:
        if size[group] <= remaining and len(held_out) + 1 < len(distinct):
            held_out.add(group)
            remaining -= size[group]
    if target and not held_out and len(distinct) > 1:
        smallest = min(distinct, key=size.__getitem__)
        held_out = {smallest} if size[smallest] <= max(total / 10, 2 * target) else set()
    return held_out


def describe_held_out(
    samples: int, validation_groups: Collection[str], sizes: Mapping[str, int], texts: Mapping[str, int]
) -> str:
    """The size of the validation set for the log, or why nothing is held out.

    ``sizes`` are as in ``choose_held_out``; of these, ``texts`` are records without images.
    """
    total = sum(sizes.values())
    held_out = sum(sizes[group] for group in validation_groups)
    text_only = sum(texts.values())
    held_out_texts = sum(texts.get(group, 0) for group in validation_groups)
    counts = [
        (held_out - held_out_texts, total - text_only, "images"),
        (held_out_texts, text_only, "text-only records"),
    ]
    if samples:
        shares = [f"{part} of {whole} {what}" for part, whole, what in counts if whole]
        return f"{quantity(samples, 'sample')} with {' and '.join(shares)}"
    largest, wholes = max(sizes.values()), [f"{whole} {what}" for _, whole, what in counts if whole]
    why = f"; samples with several images connect {largest} of them, which stay together" if largest > 1 else ""
    return f"none of {' and '.join(wholes)}{why}"
