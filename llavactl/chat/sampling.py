"""Validation of sampling options, which are given in Python, on the command line and with ``/set``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from typing_extensions import TypedDict

from llavactl.core.errors import RecipeError
from llavactl.core.suggest import suggest
from llavactl.model.generate import Sampling

MAX_SEED = 2**63 - 1


class SamplingOptions(TypedDict, total=False):
    """The fields of ``Sampling``; absent ones default to the model's."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int


_RULES = {
    "max_new_tokens": ("an integer ≥ 1", lambda value: _is_integer(value) and value >= 1),
    "temperature": ("a finite number ≥ 0", lambda value: _is_number(value) and value >= 0),
    "top_p": ("a number > 0 and ≤ 1", lambda value: _is_number(value) and 0 < value <= 1),
    "seed": (f"an integer from 0 to {MAX_SEED}", lambda value: _is_integer(value) and 0 <= value <= MAX_SEED),
}


def changed(sampling: Sampling, options: Mapping[str, Any]) -> Sampling:
    """``sampling`` with the values of ``options``.

    Raises:
        RecipeError: an unknown option, or an invalid value.
    """
    for name, value in options.items():
        if name not in _RULES:
            known = [field.name for field in fields(Sampling)]
            raise RecipeError(f"unknown sampling option {name}", hint=suggest(name, known))
        expected, is_valid = _RULES[name]
        if not is_valid(value):
            raise RecipeError(f"{name}: expected {expected}, got {value!r:.80}")
    return replace(sampling, **options)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
