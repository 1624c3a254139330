"""Messages to a teacher: a system prompt, few-shot examples, and the image as captions and boxes.

The prompts are YAML files, one per kind, in ``prompts/`` of this package or in a folder given by the user.
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
from llavactl.core.locations import shown_path
from llavactl.core.schema import Sample
from llavactl.teaching import yaml_files
from llavactl.teaching.replies import Kind, parse_turns

BUILTIN = yaml_files.PACKAGE / "prompts"

T = TypeVar("T")

NonEmpty = Annotated[str, Field(pattern=r"\S", description="a non-empty string")]


# ``Prompts.digest`` hashes the repr of these models: renaming a class or a field changes every stored digest.
class Example(yaml_files.FileModel):
    """A few-shot example: an image as captions and boxes, and the expected reply."""

    picture: NonEmpty
    reply: NonEmpty


class Prompt(yaml_files.FileModel):
    """The prompt of one kind; the question of a ``detail`` record is drawn from ``questions``."""

    system: NonEmpty
    examples: tuple[Example, ...] = ()
    questions: tuple[NonEmpty, ...] = ()


@dataclass(frozen=True)
class Prompts:
    """The prompts by kind."""

    kinds: Mapping[Kind, Prompt]

    @property
    def questions(self) -> tuple[str, ...]:
        """The questions of ``detail`` records."""
        return self.kinds["detail"].questions

    @property
    def digest(self) -> str:
        """A hash of all prompts."""
        return hashlib.sha256(repr(sorted(self.kinds.items())).encode()).hexdigest()

    def messages(self, sample: Sample, kind: Kind, repetition: int = 0) -> tuple[Mapping[str, str], ...]:
        """The system prompt, the examples as user and assistant turns, then captions and boxes of ``sample``.

        A further ``repetition`` of the same request permutes the captions, and after all their permutations the
        examples: identical messages could get identical replies.
        """
        prompt = self.kinds[kind]
        examples = _permutation(prompt.examples, repetition // math.factorial(len(sample.captions)))
        sample = replace(sample, captions=_permutation(sample.captions, repetition))
        turns = [("system", prompt.system.strip())]
        for example in examples:
            turns += [("user", example.picture.strip()), ("assistant", example.reply.strip())]
        turns.append(("user", symbolic_representation(sample, kind)))
        return tuple({"role": role, "content": text} for role, text in turns)


def _permutation(items: Sequence[T], number: int) -> tuple[T, ...]:
    """Permutation ``number`` (modulo their count) of ``items``; 0 is the given order."""
    rest, permuted = list(items), []
    while rest:
        number, index = divmod(number, len(rest))
        permuted.append(rest.pop(index))
    return tuple(permuted)


def symbolic_representation(sample: Sample, kind: Kind) -> str:
    """Captions and, except for conversations, boxes, in the format that LLaVA sends to GPT-4."""
    boxes = [] if kind == "conversation" else [f"{box.category}: [{_coordinates(box.xyxy)}]" for box in sample.boxes]
    return "\n\n".join("\n".join(lines) for lines in (sample.captions, boxes) if lines)


def _coordinates(xyxy: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in xyxy)


def load_prompts(folder: Path | None = None) -> Prompts:
    """The prompts in ``folder`` (``conversation.yaml``, …), with built-in prompts for kinds without a file.

    Raises:
        RecipeError: a file is not a valid prompt, or the reply of an example does not have the required form.
    """
    if folder is None:
        return _builtin()
    kinds = get_args(Kind)
    if not any((folder / f"{kind}.yaml").is_file() for kind in kinds):
        raise RecipeError(
            f"generate.prompts: no prompt files in {folder}",
            hint=f"expected {', '.join(f'{kind}.yaml' for kind in kinds)}; the built-in ones are in {BUILTIN}",
        )
    prompts = dict(_builtin().kinds)
    for kind in kinds:
        if (file := folder / f"{kind}.yaml").is_file():
            prompts[kind] = _load_prompt(file, kind)
    if not prompts["detail"].questions:
        prompts["detail"] = prompts["detail"].model_copy(update={"questions": _builtin().questions})
    return Prompts(prompts)


@cache
def _builtin() -> Prompts:
    return Prompts({kind: _load_prompt(BUILTIN / f"{kind}.yaml", kind) for kind in get_args(Kind)})


def _load_prompt(file: Path, kind: Kind) -> Prompt:
    prompt = yaml_files.load(file, Prompt)
    problems = []
    for index, example in enumerate(prompt.examples):
        try:
            parse_turns(kind, example.reply, "", ("",))
        except DataError as error:
            problems.append(Problem(shown_path(file), f"examples.{index}.reply", error.message))
    if problems:
        raise RecipeError.from_problems(problems)
    return prompt
