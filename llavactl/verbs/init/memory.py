"""Chooses the method and the lengths of a new recipe, from predictions of its memory and the lengths of its samples."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from llavactl.core.errors import LlavactlError
from llavactl.core.quantities import gigabytes
from llavactl.core.schema import Sample
from llavactl.curation.lengths import stage_lengths
from llavactl.model.build import connector_tokens
from llavactl.recipe.load import load_recipe
from llavactl.recipe.resolve import DEFAULT, RecipeLocation
from llavactl.training.prediction.choose import distinct_choices
from llavactl.training.prediction.model import feature_shape
from llavactl.training.prediction.predict import StagePredictor
from llavactl.training.prediction.published import MODELS, fastest_fit, published_peaks
from llavactl.training.prediction.target import Target
from llavactl.verbs.init.settings import MemorySettings
from llavactl.verbs.init.text import RecipeFacts, recipe_text

_METHODS = {True: ("full", "lora", "qlora"), False: ("full", "lora")}
"""The methods of stage 2 on CUDA devices and on CPUs, from the one that trains most."""

LONGEST = 2048
"""LLaVA's ``max_length``."""

_LENGTH_STEP = 256
_TEXT_TOKENS = 256


class MemoryPlan(NamedTuple):
    """The method of stage 2 and why, the settings of each stage that save memory, and the predicted peaks."""

    method: str
    reason: str
    memory: Mapping[int, MemorySettings]
    peaks: Mapping[int, int | None]
    fits: bool | None


@contextmanager
def recipe_location(text: str, facts: RecipeFacts) -> Iterator[RecipeLocation]:
    """The recipe ``text`` in a temporary file, with its paths relative to the final one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, DEFAULT)
        file.write_text(text, encoding="utf-8")
        yield RecipeLocation(file, facts.folder)


def with_lengths(facts: RecipeFacts) -> RecipeFacts:
    """``facts`` with ``max_length`` of each stage, from the lengths of the first samples."""
    stages = dict(facts.stages)
    with recipe_location(recipe_text(facts), facts) as location:
        for stage, each in facts.stages.items():
            samples = [sample for data in facts.data[stage] for sample in data.first]
            longest = _longest(location, stage, samples) if facts.vision.shape and facts.language.here else None
            if longest is None:
                reason = f"LLaVA's; {facts.vision.tokens} per image"
                length = max(LONGEST, facts.vision.tokens + _TEXT_TOKENS)
            else:
                length = _LENGTH_STEP * -(-max(longest, facts.vision.tokens + 1) // _LENGTH_STEP)
                length = min(length, max(LONGEST, facts.vision.tokens + _TEXT_TOKENS))
                reason = f"tokens; {facts.vision.tokens} per image, {longest:,} in the longest of the first samples"
            if facts.language.positions and length > facts.language.positions:
                length, reason = facts.language.positions, "the longest sequence of the language model"
            stages[stage] = replace(each, max_length=length, length_reason=reason)
    return replace(facts, stages=stages)


def _longest(location: RecipeLocation, stage: int, samples: Sequence[Sample]) -> int | None:
    """The tokens of the longest of ``samples``; None if they can't be counted."""
    try:
        counts = stage_lengths(load_recipe(location), stage).count(samples)
    except LlavactlError:
        return None
    return max((count for count in counts if count), default=None)


def planned(facts: RecipeFacts, target: Target, wanted: str | None) -> MemoryPlan:
    """The first method whose stage 2 fits ``target``, without optimizer state in host memory, which is slow.

    The last method if none fits; ``wanted`` in any case.
    """
    if not (facts.vision.shape and facts.language.here):
        return _published_plan(facts, target, wanted)
    tried: list[str] = []
    methods = (wanted,) if wanted else _METHODS[target.cuda]
    first = _predicted(facts, 1, target)
    for method in methods:
        second = _predicted(replace(facts, method=method), 2, target)
        if second.fits is not False or method == methods[-1]:
            reason = _method_reason(method, second.fits, tried, target, second.peak, wanted)
            fits = None if None in (first.fits, second.fits) else bool(first.fits and second.fits)
            memory = {1: first.memory, 2: second.memory}
            return MemoryPlan(method, reason, memory, {1: first.peak, 2: second.peak}, fits)
        tried.append(f"{method} needs {gigabytes(second.peak or 0)}")
    raise AssertionError("there is a method")


class _Predicted(NamedTuple):
    """The prediction of a stage: whether it fits (None: unknown), its peak, and the settings that lead to it."""

    fits: bool | None
    peak: int | None
    memory: MemorySettings


def _predicted(facts: RecipeFacts, stage: int, target: Target) -> _Predicted:
    """The fastest choice that fits, or the one with the lowest peak. On CUDA, training makes it itself (``auto``)."""
    lowest: _Predicted | None = None
    try:
        with recipe_location(recipe_text(facts), facts) as location:
            recipe = load_recipe(location)
            shape = feature_shape(recipe, stage)
            tokens = connector_tokens(recipe.connector.spec(), shape)
            predictor = StagePredictor(recipe, stage, shape, tokens, None, 1, cuda=target.cuda)
            for choice in distinct_choices(predictor, recipe, target):
                if choice.placement.optimizer_state == "host":
                    continue
                prediction = predictor.predict(choice)
                peak, fits = target.peak_bytes(prediction), target.holds(prediction)
                memory = MemorySettings(choice.gradient_checkpointing, choice.micro_batch_tokens)
                found = _Predicted(fits, peak, MemorySettings() if target.cuda else memory)
                if fits:
                    return found
                if lowest is None or peak < (lowest.peak or 0):
                    lowest = found
    except LlavactlError:  # a plugin's model that can't be predicted; recipes check warns of it
        pass
    return lowest or _Predicted(None, None, MemorySettings() if target.cuda else MemorySettings(False, None))


def _published_plan(facts: RecipeFacts, target: Target, wanted: str | None) -> MemoryPlan:
    """As ``planned``, from stored predictions of models that aren't on this machine."""
    auto = MemorySettings() if target.cuda else MemorySettings(False, None)
    memory: dict[int, MemorySettings] = {1: auto, 2: auto}
    model = MODELS.get(str(facts.language.spec.get("model")))
    if model is None:
        method = wanted or "lora"
        why = "its memory isn't known before the language model is downloaded: `llavactl train --stage 2 --dry-run`"
        return MemoryPlan(method, "requested" if wanted else why, memory, {1: None, 2: None}, None)
    connector = fastest_fit(model, "connector", target)
    for method in (wanted,) if wanted else _METHODS[target.cuda]:
        peak = fastest_fit(model, method, target)
        if peak is not None and peak.optimizer_state == "device":
            peaks = {1: connector.bytes if connector else None, 2: peak.bytes}
            reason = _method_reason(method, True, [], target, peak.bytes, wanted)
            return MemoryPlan(method, reason, memory, peaks, connector is not None)
    method = wanted or _METHODS[target.cuda][-1]
    fits = False if published_peaks(model, method, target) else None
    reason = _method_reason(method, fits, [], target, None, wanted)
    return MemoryPlan(method, reason, memory, {1: None, 2: None}, fits)


def _method_reason(
    method: str, fits: bool | None, tried: Sequence[str], target: Target, peak: int | None, wanted: str | None
) -> str:
    """The comment beside ``method``."""
    what = {"full": "all weights", "lora": "adapters", "qlora": "adapters on a language model in 4 bits"}[method]
    why = f"{what}; predicted peak {gigabytes(peak)} of {gigabytes(target.memory_bytes)}" if peak else what
    if fits is None:
        why += "; its memory can't be predicted"
    elif not fits:
        why += ": this doesn't fit; use a smaller language model, or a device with more memory"
    if method == "qlora":
        why += "; needs `pip install 'llavactl[qlora]'`"
    return why + "".join(f"; {each}" for each in tried) + ("; requested" if wanted else "")
