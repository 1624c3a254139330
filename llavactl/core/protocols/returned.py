"""What is wrong with a value that a method of a component returned: one rule at run time and in conformance checks."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from numbers import Integral, Real
from types import SimpleNamespace
from typing import Any, get_args, get_origin, get_type_hints

from llavactl.core.protocols import ALTERNATIVES, CAPABILITIES, KINDS
from llavactl.core.protocols.members import members, missing_members
from llavactl.core.protocols.tasks import Scores
from llavactl.core.schema import ImageSlot, Question, Sample, Segment, Turn
from llavactl.core.typed import Predicate, predicate

_LIBRARY_TYPES = {
    "PreTrainedModel": "transformers",
    "PreTrainedTokenizerBase": "transformers",
    "nn": "torch",
    "Optimizer": "torch.optim",
}
"""Modules of the types that Protocols import for type checking only; whoever returns such a value has imported them."""

_NUMBERS: Mapping[Any, type] = {int: Integral, float: Real}


@cache
def methods(kind: str) -> Mapping[str, type]:
    """The methods of components of ``kind``, with the Protocol that declares each."""
    protocols = (KINDS[kind], ALTERNATIVES.get(KINDS[kind], KINDS[kind]), *CAPABILITIES[kind])
    return {
        name: each
        for each in reversed(protocols)
        for name in members(each)
        if inspect.isfunction(inspect.getattr_static(each, name, None))
    }


def returned_fault(kind: str, method: str, value: Any, *arguments: Any, **keywords: Any) -> str:
    """Why a component of ``kind`` may not return ``value`` from ``method`` for the arguments; "" if it may.

    Items of an iterator are not read: see ``item_fault``.
    """
    text, hint = _declared(kind, method)
    if _items(hint) is None:
        if not _predicate(kind, method)(value):
            return f"returned {_shown(value)}, expected {text}{_missing(value, hint)}"
    elif not isinstance(value, Iterator if method == "__iter__" else Iterable) or isinstance(value, str | bytes):
        return f"returned {_shown(value)}, expected {text}"
    rule = _RULES.get((kind, method)) or _RULES.get(("", method))
    return rule(value, *arguments, **keywords) if rule else ""


def item_fault(kind: str, method: str, item: Any) -> str:
    """Why ``item`` can't be one of those that ``method`` yields; "" if it can."""
    if not _predicate(kind, method)(item):
        expected = _declared(kind, method)[0].removeprefix("Iterator[").removesuffix("]")
        return f"yielded {_shown(item)}, expected {expected}"
    rule = _ITEM_RULES.get((kind, method))
    return rule(item) if rule else ""


def is_lazy(kind: str, method: str) -> bool:
    """Whether ``method`` returns an iterator, whose items are checked when they are read."""
    return _items(_declared(kind, method)[1]) is not None


def is_collection(kind: str, method: str) -> bool:
    """Whether ``method`` may return an iterator, which its callers read at once."""
    return get_origin(_declared(kind, method)[1]) is Iterable


@cache
def _declared(kind: str, method: str) -> tuple[str, Any]:
    """The declared return type of ``method``, as text and as a type."""
    function: Any = inspect.getattr_static(methods(kind)[method], method)
    text = function.__annotations__["return"]
    names = {name: _library_type(name) for name in _LIBRARY_TYPES if re.search(rf"\b{name}\b", text)}
    # Of the return type only: arguments may have types that nobody has imported.
    only_return: Any = SimpleNamespace(__annotations__={"return": text})
    hint = get_type_hints(only_return, {**vars(sys.modules[function.__module__]), **names})["return"]
    return text, None if hint is type(None) else hint


def _library_type(name: str) -> Any:
    return getattr(importlib.import_module(_LIBRARY_TYPES[name]), name)


def _items(hint: Any) -> Any:
    """The type of the items of an iterator; None for another type."""
    return get_args(hint)[0] if get_origin(hint) is Iterator else None


@cache
def _predicate(kind: str, method: str) -> Predicate:
    """The check of the returned value; of its items if it is an iterator."""
    hint = _declared(kind, method)[1]
    item = _items(hint)
    if method == "whole":  # "of transformers, or with the same interface"
        return lambda value: callable(getattr(value, "save_pretrained", None))
    if hint is None:
        return lambda _value: True
    if number := _NUMBERS.get(hint):
        return lambda value: isinstance(value, number) and not isinstance(value, bool)
    return predicate(hint if item is None else item)


def _shown(value: Any) -> str:
    """``value`` in messages: scalars as they are, others by type; of a list, the types of its items."""
    if value is None or isinstance(value, bool | int | float | str):
        return f"{value!r:.60}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {', '.join(sorted({type(item).__name__ for item in value})) or 'nothing'}"
    return type(value).__name__


def _missing(value: Any, hint: Any) -> str:
    """The members of the Protocol ``hint`` that ``value`` lacks."""
    missing = missing_members(value, hint) if getattr(hint, "_is_protocol", False) and value is not None else ()
    return f" (no {', '.join(missing)})" if missing else ""


def json_fault(value: Mapping[str, Any]) -> str:
    """Why the mapping ``value`` isn't JSON; "" if it is."""
    try:
        json.dumps(dict(value), allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"returned what is not JSON: {error}"
    return ""


def question_faults(questions: Sequence[Question]) -> Iterator[str]:
    """Duplicate ids, and questions that don't end with a user turn."""
    counts = Counter(question.id for question in questions)
    yield from (f"returned the duplicate question id {name!r}" for name, count in counts.items() if count > 1)
    unasked = (question.id for question in questions if not question.turns or question.turns[-1].role != "user")
    yield from (f"returned the question {name!r}, which does not end with a user turn" for name in unasked)


def score_faults(scores: Scores, ids: Iterable[str]) -> Iterator[str]:
    """Scores that aren't JSON, and grades of other questions than ``ids`` or out of range."""
    if why := json_fault(scores.scores):
        yield why
    known = set(ids)
    for field in ("right", "grades"):
        if unknown := next((name for name in getattr(scores, field) if name not in known), None):
            yield f"returned `{field}` for the unknown question {unknown!r}"
    wrong = [name for name, right in scores.right.items() if not isinstance(right, bool | Integral)]
    wrong += [name for name, grade in scores.grades.items() if not isinstance(grade, Real) or not 0 <= grade <= 1]
    if wrong:
        field = "right" if wrong[0] in scores.right else "grades"
        expected = "True or False" if field == "right" else "a number from 0 to 1"
        yield f"returned {getattr(scores, field)[wrong[0]]!r:.40} in `{field}` of {wrong[0]!r}, expected {expected}"


def sample_fault(sample: Sample) -> str:
    """Why the turns of ``sample`` don't alternate from the user's on, after a system turn; "" if they do.

    A source of images or captions may yield samples without turns.
    """
    roles = [turn.role for turn in sample.turns]
    first = roles[:1] == ["system"]
    if roles[first::2].count("user") + roles[first + 1 :: 2].count("assistant") == len(roles) - first:
        return ""
    where = f"{sample.where}: " if sample.where else ""
    return f"{where}sample {sample.id!r}: expected turns user, assistant, …, got {', '.join(roles)}"


def _segments_fault(segments: Sequence[Segment], turns: Sequence[Turn], *_: Any, **__: Any) -> str:
    images, slots = sum(len(turn.images) for turn in turns), sum(isinstance(each, ImageSlot) for each in segments)
    return "" if slots == images else f"returned {slots} image slots for {images} images"


def _module_fault(module: Any, *_: Any, **__: Any) -> str:
    """A module, or one inside it, whose class doesn't initialize ``nn.Module``; torch fails later, in its own code."""
    pending = [module]
    for each in pending:
        if not hasattr(each, "_modules"):
            return f"returned a module with a {type(each).__name__} whose `__init__` doesn't call `super().__init__()`"
        pending += [inner for inner in each._modules.values() if inner is not None]
    return ""


def _fraction_fault(value: Any, step: int, steps: int) -> str:
    if 0 <= value < math.inf:
        return ""
    return f"returned {value!r} at step {step} of {steps} after the warm-up, expected a finite number of at least 0"


def _groups_fault(optimizer: Any, groups: Sequence[Mapping[str, Any]]) -> str:
    """llavactl sets the learning rate of each group, and knows its weights by the groups it gave."""
    own = getattr(optimizer, "param_groups", None)
    if own is None:
        return f"returned a {type(optimizer).__name__} whose `__init__` doesn't call `super().__init__(groups, {{…}})`"
    same = len(own) == len(groups) and all(
        [*map(id, given["params"])] == [*map(id, group["params"])] for given, group in zip(groups, own, strict=True)
    )
    return "" if same else "returned an optimizer with other parameter groups than it was given"


def _reviewed(reviews: Sequence[Mapping[str, str]]) -> Iterator[str]:
    return (name for run in reviews for name in run)


_RULES: Mapping[tuple[str, str], Callable[..., str]] = {
    ("", "identity"): lambda value: json_fault(value),
    ("teachers", "content"): lambda value, _request: json_fault(value),
    ("templates", "render"): _segments_fault,
    ("templates", "stop"): lambda value, _tokenizer: "returned an empty string" if "" in value else "",
    ("schedules", "fraction"): _fraction_fault,
    ("connectors", "build"): _module_fault,
    ("languages", "load"): _module_fault,
    ("languages", "load_quantized"): _module_fault,
    ("languages", "skeleton"): _module_fault,
    ("optimizers", "build"): _groups_fault,
    ("connectors", "tokens"): lambda value, _shape: "" if value >= 1 else f"returned {value!r}, expected 1 or more",
    ("tasks", "questions"): lambda value: next(question_faults(value), ""),
    ("tasks", "score"): lambda value, answers, _protocol: next(score_faults(value, answers), ""),
    ("tasks", "score_with_teacher"): lambda value, answers, *_: next(score_faults(value, answers), ""),
    ("tasks", "judge"): lambda value, reviews, _protocol: next(score_faults(value, _reviewed(reviews)), ""),
    ("sources", "sample"): lambda value, _record: sample_fault(value),
}
"""Rules beyond the declared type, by kind ("": any) and method; they are called with the value and the arguments."""

_ITEM_RULES: Mapping[tuple[str, str], Callable[..., str]] = {("sources", "__iter__"): sample_fault}
