"""The result of a verification: figures with their bounds, and the verdict that follows from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from llavactl.evaluation.verification.outputs import Stated

Verdict = Literal["exact", "close", "different"]


@dataclass(frozen=True)
class Bound:
    """The least or the greatest permitted value of a figure."""

    at_least: float | None = None
    at_most: float | None = None

    def permits(self, value: float | None) -> bool:
        """Whether ``value`` is within the bound; None, for what can't be compared, never is."""
        if value is None:
            return False
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)


@dataclass(frozen=True)
class Figure:
    """One figure of a comparison: its value, for a count also the ``total``, and the details of differences.

    ``value`` is None if the outputs can't be compared, because of their shapes for example.
    """

    value: float | None
    total: int | None = None
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComparisonRow:
    """One row of the table: a figure over all prompts, and its bound.

    Without ``at_least`` and ``at_most`` it is reported only.
    """

    value: float | None
    total: int | None
    at_least: float | None
    at_most: float | None
    passed: bool


TITLES: Mapping[str, tuple[str, str]] = {
    "ids": ("token ids", "prompts that differ"),
    "pixels": ("pixels", "largest difference"),
    "embedding_cosine": ("image embeddings", "smallest cosine of a token"),
    "embedding_error": ("image embeddings", "largest relative difference"),
    "unprepared_cosine": ("embeddings of unchanged images", "smallest mean cosine of an image"),
    "logits": ("logits", "largest relative difference"),
    "next_token": ("logits", "positions with another token"),
    "answers": ("greedy answers", "prompts that differ"),
    "batched_answers": ("batched answers", "prompts that differ"),
    "settings": ("settings", "settings that differ"),
    "merging": ("merged adapter", "largest relative difference"),
}
"""What each figure compares, and what it measures. In the order of the table. Relative: to the largest value."""

NONE = Bound(at_most=0)

EXACT: Mapping[str, Bound] = {
    "ids": NONE,
    "pixels": Bound(at_most=1e-3),  # normalized pixels: a tenth of one gray level
    "embedding_cosine": Bound(at_least=1 - 1e-6),
    "embedding_error": Bound(at_most=1e-4),
    "unprepared_cosine": Bound(at_least=1 - 1e-6),
    "logits": Bound(at_most=1e-4),  # two float32 implementations differ by less
    "answers": NONE,
    "batched_answers": NONE,
    "settings": NONE,
    "merging": Bound(at_most=0.2),  # rounding merged weights changes logits by less, a wrong merge by more
}
"""Bounds of the verdict ``exact``."""

ROUNDED: Mapping[str, tuple[float, float]] = {
    "f16-gelu": (0.99999, 0.01),
    "f16": (0.999, 0.01),
    "bf16": (0.999, 0.02),
    "q8_0": (0.999, 0.2),
}
"""Smallest cosine of an image embedding, and largest difference of logits, by the type that values were rounded to.

docs/notes/export.md has the measurements.
"""

RESAMPLED = 0.96, 0.2
"""The same for a program that resamples images in its own way."""

OTHER_TOKENS = 0.2
"""Largest difference of logits for a program with other image tokens (``tokens``); embeddings are compared by token."""

UNPREPARED = 0.93
"""Smallest mean cosine of an image that a program resizes and pads in its own way."""


def close_bounds(stated: Stated) -> dict[str, Bound] | None:
    """Bounds of the verdict ``close``, given what an export's program states; None if it states nothing known."""
    cosines, logits = [], []
    if stated.resampled:
        cosines.append(RESAMPLED[0])
        logits.append(RESAMPLED[1])
    if stated.tokens is not None:
        logits.append(OTHER_TOKENS)
    if stated.rounding is not None:
        if stated.rounding not in ROUNDED:
            return None
        cosine, difference = ROUNDED[stated.rounding]
        cosines.append(cosine)
        logits.append(difference)
    if not logits:
        return None
    bounds = {name: bound for name, bound in EXACT.items() if name not in ("embedding_error", "answers")}
    if stated.resampled:
        del bounds["pixels"]
    if stated.own_padding:
        del bounds["unprepared_cosine"]
    else:
        bounds["unprepared_cosine"] = Bound(at_least=UNPREPARED)
    if cosines:
        bounds["embedding_cosine"] = Bound(at_least=min(cosines))
    bounds["logits"] = Bound(at_most=max(logits))
    return bounds


@dataclass(frozen=True)
class VerificationResult:
    """How far an export's outputs differ from those of its model, over ``prompts`` prompts about ``images`` images.

    ``program`` is the name and version of the program that ran the export, "" if it is unknown. ``rounding`` and
    ``known_differences`` are what its script states (``Stated``). ``compared`` has the rows of the table by the keys of
    ``TITLES``. ``faults`` are the reasons for the verdict ``different``.
    """

    verdict: Verdict
    program: str
    prompts: int
    images: int
    compared: Mapping[str, ComparisonRow]
    rounding: str | None
    known_differences: tuple[str, ...]
    faults: tuple[str, ...]

    @classmethod
    def from_json(cls, document: Any) -> VerificationResult | None:
        """The result stored as ``document``; None for that of a version of llavactl with other fields."""
        if not isinstance(document, dict) or document.keys() != {field.name for field in fields(cls)}:
            return None
        try:
            return TypeAdapter(cls).validate_python(document)
        except ValidationError:
            return None


def judge(figures: Mapping[str, Figure], stated: Stated, *, prompts: int, images: int) -> VerificationResult:
    """The verdict on ``figures``, by the keys of ``TITLES``: exact, close if ``stated`` permits it, else different."""
    verdict: Verdict = "exact"
    faults = _faults(figures, bounds := EXACT)
    if faults and (close := close_bounds(stated)) is not None:
        verdict = "close"
        faults = _faults(figures, bounds := close)
        if images and "embedding_cosine" not in figures:
            faults.append("image embeddings are missing, without which only an exact export can be verified")
    elif faults and stated.rounding is not None:
        faults.append(f"no bounds are known for rounding to {stated.rounding}")
    return VerificationResult(
        verdict="different" if faults else verdict,
        program=stated.program,
        prompts=prompts,
        images=images,
        compared={name: _comparison(figures[name], bounds.get(name)) for name in TITLES if name in figures},
        rounding=stated.rounding,
        known_differences=tuple(stated.known_differences),
        faults=tuple(faults),
    )


def _comparison(figure: Figure, bound: Bound | None) -> ComparisonRow:
    passed = bound is None or bound.permits(figure.value)
    bound = bound or Bound()
    return ComparisonRow(figure.value, figure.total, bound.at_least, bound.at_most, passed)


def _faults(figures: Mapping[str, Figure], bounds: Mapping[str, Bound]) -> list[str]:
    faults = []
    for name, bound in bounds.items():
        if name in figures and not bound.permits(figures[name].value):
            compared, measured = TITLES[name]
            figure = figures[name]
            fault = f"{compared}: {measured}: {figure_text(figure)} ({bound_text(bound)})"
            faults.append("; ".join([fault, *figure.details]))
    return faults


def figure_text(figure: Figure | ComparisonRow) -> str:
    """The value of ``figure``; a count with its total."""
    if figure.value is None:
        return "not comparable"
    return f"{figure.value:.6g}" if figure.total is None else f"{figure.value:.0f} of {figure.total}"


def bound_text(bound: Bound | ComparisonRow) -> str:
    """``bound`` as text."""
    if bound.at_least is not None:
        return f"at least {bound.at_least:g}"
    return "not required" if bound.at_most is None else f"at most {bound.at_most:g}"
