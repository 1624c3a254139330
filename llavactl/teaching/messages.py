"""What a teacher is told: the picture in words, behind a system message and a few examples of the wanted reply.

The texts are files, one a kind, in ``prompts/`` of this package or in a folder of the user's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, TypeVar, get_args

from pydantic import Field

from llavactl.core.errors import DataError, Problem, RecipeError
from llavactl.core.schema import Sample
from llavactl.recipe.document import display
from llavactl.teaching import files
from llavactl.teaching.replies import Kind, turns

OURS = files.HERE / "prompts"

T = TypeVar("T")

Filled = Annotated[str, Field(pattern=r"\S", description="text that isn't empty")]


class Example(files.Checked):
    """A picture in words and the reply that is wanted."""

    picture: Filled
    reply: Filled


class Prompt(files.Checked):
    """One kind's file; ``questions`` are those of a detail, drawn by us."""

    system: Filled
    examples: tuple[Example, ...] = ()
    questions: tuple[Filled, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """The prompts of every kind."""

    kinds: Mapping[Kind, Prompt]

    @property
    def questions(self) -> tuple[str, ...]:
        """What a detailed description answers."""
        return self.kinds["detail"].questions

    @property
    def digest(self) -> str:
        """Changes with every text."""
        return hashlib.sha256(repr(sorted(self.kinds.items())).encode()).hexdigest()

    def messages(self, picture: Sample, kind: Kind, again: int = 0) -> tuple[Mapping[str, str], ...]:
        """System, the examples as user and assistant in turn, then the picture.

        Asked ``again`` about the same, the captions are in another order, and when all orders were there the examples
        are: the same words would bring the same reply, or look like a request that was sent twice.
        """
        prompt = self.kinds[kind]
        examples = _order(prompt.examples, again // math.factorial(len(picture.captions)))
        picture = replace(picture, captions=_order(picture.captions, again))
        talk = [("system", prompt.system.strip())]
        for example in examples:
            talk += [("user", example.picture.strip()), ("assistant", example.reply.strip())]
        return tuple({"role": role, "content": text} for role, text in [*talk, ("user", symbols(picture, kind))])


def _order(things: Sequence[T], number: int) -> tuple[T, ...]:
    """One of the orders of ``things``: 0 is their own, and as many numbers as there are orders give each once."""
    left, made = list(things), []
    while left:
        number, place = divmod(number, len(left))
        made.append(left.pop(place))
    return tuple(made)


def symbols(picture: Sample, kind: Kind) -> str:
    """The picture in words: its captions, and but for a conversation its boxes, as LLaVA tells them to GPT-4."""
    boxes = [] if kind == "conversation" else [f"{box.category}: [{_numbers(box.xyxy)}]" for box in picture.boxes]
    return "\n\n".join("\n".join(lines) for lines in (picture.captions, boxes) if lines)


def _numbers(xyxy: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in xyxy)


def prompts(folder: Path | None = None) -> Prompts:
    """Those in ``folder`` (``conversation.yaml``, …), and the package's for kinds that it doesn't have.

    Raises:
        RecipeError: a file isn't a prompt, or an example's reply is not of the form that it asks for.
    """
    if folder is None:
        return _ours()
    kinds = get_args(Kind)
    if not any((folder / f"{kind}.yaml").is_file() for kind in kinds):
        raise RecipeError(
            f"generate.prompts: {folder} holds no prompt",
            hint=f"it may hold {', '.join(f'{kind}.yaml' for kind in kinds)}; the package's are in {OURS}",
        )
    found = dict(_ours().kinds)
    for kind in kinds:
        if (own := folder / f"{kind}.yaml").is_file():
            found[kind] = _prompt(own, kind)
    if not found["detail"].questions:
        found["detail"] = found["detail"].model_copy(update={"questions": _ours().questions})
    return Prompts(found)


@cache
def _ours() -> Prompts:
    return Prompts({kind: _prompt(OURS / f"{kind}.yaml", kind) for kind in get_args(Kind)})


def _prompt(file: Path, kind: Kind) -> Prompt:
    prompt = files.load(file, Prompt)
    problems = []
    for number, example in enumerate(prompt.examples):
        try:
            turns(kind, example.reply, "", ("",))
        except DataError as error:
            problems.append(Problem(display(file), f"examples.{number}.reply", error.message))
    if problems:
        raise RecipeError.from_problems(problems)
    return prompt
