"""Scores from 0 to 1 of the elements of an answer, compared with the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llavactl_sketches.answers import MAX_TEXT, TEXT_KINDS, Found


@dataclass(frozen=True)
class Grade:
    """The similarity of two pages: of their elements' kinds and places, and of the texts of matched elements.

    ``text`` is None if the reference has no text.
    """

    layout: float
    text: float | None


def compare_boxes(reference: Sequence[Found], answer: Sequence[Found], count: int) -> Grade:
    """Compares boxes; the answer has ``count`` elements, of which there may be fewer in ``answer``.

    Elements of a kind are matched for the largest sum of intersection over union. ``layout`` is twice this sum, divided
    by the number of elements on both pages, so missing and extra elements cost the same. ``text`` is the same ratio for
    the text similarity of matched elements that overlap.
    """
    import numpy as np
    from scipy.optimize import linear_sum_assignment

    pairs: list[tuple[Found, Found]] = []
    overlap = 0.0
    for kind in {item.kind for item in reference}:
        wanted = [item for item in reference if item.kind == kind]
        given = [item for item in answer if item.kind == kind]
        shares = np.array([[intersection_over_union(one.box, other.box) for other in given] for one in wanted])
        if given:
            rows, columns = linear_sum_assignment(shares, maximize=True)
            overlap += float(shares[rows, columns].sum())
            pairs += [
                (wanted[row], given[column]) for row, column in zip(rows, columns, strict=True) if shares[row, column]
            ]
    return Grade(_share(overlap, len(reference), count), text_grade(reference, answer, pairs))


def text_grade(
    reference: Sequence[Found], answer: Sequence[Found], pairs: Sequence[tuple[Found, Found]]
) -> float | None:
    """Twice the sum of the similarities of ``pairs`` over the number of elements with words on both pages."""
    wanted = sum(item.kind in TEXT_KINDS for item in reference)
    given = sum(item.kind in TEXT_KINDS and bool(item.text.strip()) for item in answer)
    similar = sum(similarity(one.text, other.text) for one, other in pairs if one.kind in TEXT_KINDS)
    return _share(similar, wanted, given) if wanted else None


def _share(matched: float, wanted: int, given: int) -> float:
    return 2 * matched / (wanted + given) if wanted + given else 1.0


def intersection_over_union(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> float:
    """Of two boxes (left, top, right, bottom); 0 if both are empty."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(width, 0.0) * max(height, 0.0)
    union = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)) - shared
    return shared / union if union > 0 else 0.0


def similarity(one: str, other: str) -> float:
    """1 minus the edit distance over the length of the longer text; case counts, whitespace doesn't."""
    a, b = ("".join(text.split())[:MAX_TEXT] for text in (one, other))
    return 1 - edit_distance(a, b) / max(len(a), len(b)) if a or b else 1.0


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance: the fewest insertions, deletions and replacements of characters."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]
