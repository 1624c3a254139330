"""``chat --explain``: maps of the image parts that the words of an answer depend on, as grids of characters."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np

    from llavactl.chat.conversation import Conversation
    from llavactl.chat.explain import Explanation

log = logging.getLogger(__name__)

SHADES, ASCII_SHADES = " ░▒▓█", " .:*#"
WORDS = 4
"""Words whose maps are shown: those that depend most on the image."""


def print_maps(conversation: Conversation) -> None:
    """Prints the maps of the last answer to stderr: stdout has the answer only.

    Raises:
        DataError: there is no image.
    """
    from llavactl.chat.explain import explain_last

    explanation = explain_last(conversation)
    encoding = (sys.stderr.encoding or "").lower().replace("-", "")
    for line in map_lines(explanation, SHADES if encoding == "utf8" else ASCII_SHADES):
        click.echo(line, err=True)
    log.info("%s", explanation.limits)


def map_lines(explanation: Explanation, shades: str = SHADES) -> list[str]:
    """The occlusion and attention maps of the last image, side by side for WORDS words of the answer."""
    words = explanation.most_visual(WORDS)
    height, width = words[0].occlusion[-1].shape
    lines = [f"the last of {count} images:"] if (count := len(explanation.images)) > 1 else []
    lines += _row(["", *(word.text for word in words)], 2 * width)
    lines += _grids("occlusion", [word.occlusion[-1] for word in words], shades)
    if all(word.attention is not None for word in words):
        coarse = [_coarse(word.attention[-1], height, width) for word in words if word.attention is not None]
        lines += ["", *_grids("attention", coarse, shades)]
    return lines


def _grids(title: str, maps: Sequence[np.ndarray], shades: str) -> list[str]:
    """``maps`` [h, w] beside each other, two characters per cell; the largest value of a map has the densest shade."""
    import numpy as np

    drawn = []
    for values in maps:
        positive = np.clip(values, 0, None)
        levels = np.ceil(positive / max(float(positive.max()), 1e-12) * (len(shades) - 1)).astype(int)
        drawn.append(["".join(2 * shades[level] for level in row) for row in levels])
    rows = zip(*drawn, strict=True)
    return [line for index, row in enumerate(rows) for line in _row([title if not index else "", *row], len(row[0]))]


def _row(cells: Sequence[str], width: int) -> list[str]:
    """One line: a title, then cells of ``width`` columns between bars."""
    from rich.cells import set_cell_size

    from llavactl.core.control_characters import visible

    title, *rest = cells
    return [f"{title:<10}" + " ".join(f"│{set_cell_size(visible(cell), width)}│" for cell in rest)]


def _coarse(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """``values`` summed over at most ``height`` x ``width`` blocks."""
    import numpy as np

    rows = np.array_split(values, min(height, len(values)))
    return np.array([[block.sum() for block in np.array_split(row, min(width, row.shape[1]), axis=1)] for row in rows])
