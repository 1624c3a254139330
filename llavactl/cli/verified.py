"""Prints exports with the results of their verification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llavactl.cli import output

if TYPE_CHECKING:
    from llavactl.verbs.export import ExportReport


def verdict(report: ExportReport) -> str:
    """The verdict on an export in one line, or why it wasn't verified."""
    from llavactl.evaluation.verification.table import summary

    return f"not verified: {report.not_verified}" if report.verified is None else summary(report.verified)


def tables(reports: Sequence[ExportReport]) -> None:
    """Prints one table of all figures, after what is known to differ in the programs."""
    from llavactl.evaluation.verification.table import COLUMNS, table

    verified = [(report.format, report.verified) for report in reports if report.verified is not None]
    notes = [(form, sentence) for form, result in verified for sentence in (*result.known_differences, *result.faults)]
    if notes:
        output.line()
        output.labeled(notes)
    if rows := [(form, *row) for form, result in verified for row in table(result)]:
        output.line()
        output.table(rows, ("format", *COLUMNS), titles_in_pipes=True)
