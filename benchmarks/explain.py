"""Pointing game: do the maps of ``chat --explain`` point at the object that an answer is about?

    python benchmarks/explain.py --model runs/demo/stage2/model --out explain.json

Drawn scenes with questions about the color or shape of one object ("What color is the circle?"), whose box is known. A
map hits if the center of its largest cell is inside the box, enlarged by half a cell (the pointing game of arXiv
1608.00507 allows 15 pixels). Only words of right answers count. Baselines: a random cell, and the box of another object
of the same scene.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from rounds import Document, Documents, add_options, publish

import llavactl
from llavactl.chat.explain import Word, explain
from llavactl.components.sources.scenes import ScenesOptions, scenes
from llavactl.components.sources.scenes.things import COLORS, SHAPES
from llavactl.core.schema import Box, Sample, Turn
from llavactl.model.generate import Sampling

EVERY = 10
"""Results are published after every EVERY scenes."""


def subject(question: str, boxes: Sequence[Box]) -> Box | None:
    """The only box that ``question`` names by its color or its shape."""
    words = set(question.rstrip("?").split())
    named = [box for box in boxes if words & {*COLORS, *SHAPES} & set(box.category.split())]
    return named[0] if len(named) == 1 else None


def exchanges(sample: Sample) -> Iterator[tuple[Turn, Turn]]:
    """Each question of ``sample`` with its answer; the image is in every question."""
    for question, answer in zip(sample.turns[::2], sample.turns[1::2], strict=True):
        yield Turn("user", (sample.images[0], "\n" + question.text.strip())), answer


def is_hit(values: np.ndarray, box: Box) -> bool:
    """Whether the center of the largest cell of ``values`` [h, w] is inside ``box``, enlarged by half a cell."""
    return bool(_hits(values.shape, box).ravel()[int(values.argmax())])


def _hits(shape: tuple[int, ...], box: Box) -> np.ndarray:
    """For each cell [h, w], whether pointing at it is a hit."""
    left, top, right, bottom = box.xyxy
    height, width = shape
    y, x = (np.arange(height) + 0.5) / height, (np.arange(width) + 0.5) / width
    rows = (y >= top - 0.5 / height) & (y <= bottom + 0.5 / height)
    columns = (x >= left - 0.5 / width) & (x <= right + 0.5 / width)
    return rows[:, None] & columns


def play(word: Word, box: Box, others: Sequence[Box]) -> Iterator[tuple[str, str, float]]:
    """The name of each map of ``word``, the name of a rate, and a hit (0 or 1) or the probability of one."""
    maps = {"occlusion": word.occlusion[0], **({"attention": word.attention[0]} if word.attention else {})}
    for name, values in maps.items():
        yield name, "hits", is_hit(values, box)
        yield name, "random cell", float(_hits(values.shape, box).mean())
        if others:
            yield name, "another object", fmean(is_hit(values, other) for other in others)


def measure(options: argparse.Namespace) -> Documents:
    model = llavactl.load_model(options.model)
    results: dict[tuple[str, str], list[float]] = {}
    asked = right = 0
    start = time.perf_counter()
    samples = scenes(ScenesOptions(split="test", scenes=options.scenes, seed=options.seed, about=("color", "shape")))
    for done, sample in enumerate(samples, 1):
        for question, reference in exchanges(sample):
            box = subject(question.text, sample.boxes)
            if box is None:
                continue
            asked += 1
            answer = model.answer([[question]], Sampling(max_new_tokens=8))[0]
            if answer.lower().strip(" .") != reference.text.lower().strip(" ."):
                continue
            right += 1
            others = [other for other in sample.boxes if other is not box]
            for word in explain(model, (question, Turn("assistant", (answer,)))).words:
                for name, what, value in play(word, box, others):
                    results.setdefault((name, what), []).append(value)
        if done % EVERY == 0 or done == options.scenes:
            yield _document(options, asked, right, results, time.perf_counter() - start)


def _document(
    options: argparse.Namespace, asked: int, right: int, results: dict[tuple[str, str], list[float]], seconds: float
) -> Document:
    rates: dict[str, Any] = {}
    for (name, what), values in results.items():
        rates.setdefault(name, {})[what] = 100 * fmean(values)
        rates[name]["n"] = max(len(values), rates[name].get("n", 0))
    return {
        "model": str(options.model), "seed": options.seed, "questions": asked, "right": right,
        "seconds_per_answer": seconds / max(right, 1), "percent": rates,
    }  # fmt: skip


def as_text(document: Document) -> str:
    lines = [f"{document['right']} of {document['questions']} answers are right"]
    for name, rates in document["percent"].items():
        figures = ", ".join(f"{what} {rate:.0f} %" for what, rate in rates.items() if what != "n")
        lines.append(f"{name} ({rates['n']} words): {figures}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="Model folder of the demo, for example runs/demo/stage2/model."
    )
    parser.add_argument("--scenes", type=int, default=100, metavar="N", help="Default: 100.")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="Seed of the scenes; default: 0.")
    add_options(parser)
    options = parser.parse_args()
    publish(measure(options), options, as_text)


if __name__ == "__main__":
    main()
