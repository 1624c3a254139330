"""The result of a verification for people: a table, in the terminal and in the model card."""

from __future__ import annotations

from llavactl.core.quantities import quantity
from llavactl.evaluation.verification.result import TITLES, VerificationResult, bound_text, figure_text

COLUMNS = ("compared", "measured", "figure", "bound")


def table(result: VerificationResult) -> list[tuple[str, str, str, str]]:
    """The rows of ``result``, with the columns ``COLUMNS``."""
    return [(*TITLES[name], figure_text(row), bound_text(row)) for name, row in result.compared.items()]


def summary(result: VerificationResult) -> str:
    """The verdict and what it is based on, in one line."""
    program = f" in {result.program}" if result.program else ""
    rounding = f", rounded to {result.rounding}" if result.rounding else ""
    prompts, images = quantity(result.prompts, "prompt"), quantity(result.images, "image")
    return f"{result.verdict}{program}: {prompts}, {images}{rounding}"


def markdown(form: str, result: VerificationResult) -> str:
    """``result`` for an export in format ``form``, for its model card."""
    sentences = [f"- {sentence}" for sentence in (*result.known_differences, *result.faults)]
    lines = [
        f"Format `{form}` compared with the model that it was exported from: {summary(result)}.",
        *(["", *sentences] if sentences else []),
        "",
        *("| " + " | ".join(cells) + " |" for cells in (COLUMNS, ["---"] * len(COLUMNS), *table(result))),
    ]
    return "\n".join(lines)
