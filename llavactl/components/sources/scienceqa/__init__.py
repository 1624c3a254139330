"""The source ``scienceqa``: training samples with the reasoning before the answer, as in LLaVA (order QCM-LEA)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from llavactl.components.sources.scienceqa.problems import ScienceqaProblem, read_problems
from llavactl.core.options import FollowLinks, RecipePath, RecipePlace
from llavactl.core.registry import Options
from llavactl.core.schema import Content, Sample, Turn


class ScienceqaOptions(Options):
    """Options of the source ``scienceqa``."""

    path: RecipePath = Field(description="ScienceQA's problems.json")
    splits: RecipePath | None = Field(None, description="pid_splits.json; null: each problem's own `split`")
    split: str = Field("train", description="train, val, trainval, minitrain, …")
    images: RecipePlace | None = Field(
        None, description="folder, .zip, .tar or URL with train/1/image.png; null: images/ beside `path`"
    )
    follow_links: FollowLinks = False
    answer: Literal["lea", "a"] = Field(
        "lea", description="lea: lecture and explanation, then the answer; a: the answer"
    )


def scienceqa(options: ScienceqaOptions) -> Iterator[Sample]:
    """One sample per problem, in the split's order.

    Raises:
        DataError: a file or problem can't be read.
    """
    problems = read_problems(
        options.path, options.split, options.splits, None, options.images, follow_links=options.follow_links
    )
    for problem in problems:
        content: tuple[Content, ...] = (problem.prompt,)
        if problem.image is not None:
            content = (problem.image, f"\n{problem.prompt}")
        turns = (Turn("user", content), Turn("assistant", (answer_text(problem, options.answer),)))
        yield Sample(problem.id, turns, f"{options.path} problem {problem.id}")


def answer_text(problem: ScienceqaProblem, answer: Literal["lea", "a"]) -> str:
    """The answer's text; with ``lea``, after the lecture and the solution of the problem, if any."""
    reasoning = (problem.lecture, problem.solution) if answer == "lea" else ()
    return " ".join([*(text.strip() for text in reasoning if text.strip()), f"The answer is {problem.letter}."])
