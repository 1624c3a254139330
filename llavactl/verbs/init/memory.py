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
from llavactl.recipe.load import load_recipe
from llavactl.recipe.resolve import DEFAULT, RecipeLocation
from llavactl.training.prediction.assumption import LongestMicroBatch
from llavactl.training.prediction.choices import choices
from llavactl.training.prediction.choose import choose_from
from llavactl.training.prediction.predict import stage_predictor
from llavactl.training.prediction.process import process_bytes
from llavactl.training.prediction.published import MODELS, fastest_fit, lowest_peak
from llavactl.training.prediction.target import Target
from llavactl.verbs.init.settings import MemorySettings
from llavactl.verbs.init.text import RecipeFacts, recipe_text

_METHODS = {True: ("full", "lora", "qlora"), False: ("full", "lora")}
"""The methods of stage 2 on CUDA devices and on CPUs, from the one that trains most."""

LONGEST = 2048
"""LLaVA's ``max_length``."""

_LENGTH_STEP = 256
_TEXT_TOKENS = 256


class StageMemory(NamedTuple):
    """The prediction of a stage: whether it fits (None: unknown), its peak, and the settings that lead to it.

    ``assumes``: the lengths of samples that the peak is predicted for.
    """

    fits: bool | None
    peak: int | None
    settings: MemorySettings
    assumes: LongestMicroBatch | None = None
    optimizer_state: str = "device"


class MemoryPlan(NamedTuple):
    """The method of stage 2 and why, and the prediction of each stage."""

    method: str
    reason: str
    stages: Mapping[int, StageMemory]

    @property
    def fits(self) -> bool | None:
        """Whether all stages fit; None if it isn't known."""
        fits = [each.fits for each in self.stages.values()]
        return None if None in fits and False not in fits else all(fits)


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
    process_bytes()  # before models are traced
    tried: list[str] = []
    methods = (wanted,) if wanted else _METHODS[target.cuda]
    first = _predicted(facts, 1, target, slow=True)
    for method in methods[:-1]:
        second = _predicted(replace(facts, method=method), 2, target, slow=False)
        if second.fits is not False:
            break
        tried.append(f"{method} needs {gigabytes(second.peak or 0)}")
    else:
        method = methods[-1]
        second = _predicted(replace(facts, method=method), 2, target, slow=True)
    return MemoryPlan(method, _method_reason(method, second, tried, target, wanted), {1: first, 2: second})


def _predicted(facts: RecipeFacts, stage: int, target: Target, *, slow: bool) -> StageMemory:
    """The fastest choice that fits, or the one with the lowest peak, as training and its dry run choose.

    On CUDA they make the choice themselves (``auto``); on a CPU the recipe has its values. ``slow``: also with
    optimizer state in host memory.
    """
    try:
        with recipe_location(recipe_text(facts), facts) as location:
            recipe = load_recipe(location)
            predictor = stage_predictor(recipe, stage, target)
            possible = choices(recipe, predictor.settings, target, free=True)
            allowed = [each for each in possible if slow or each.placement.optimizer_state == "device"]
            prediction, fits = choose_from(predictor, allowed, target)
    except LlavactlError:  # a plugin's model that can't be predicted; recipes check warns of it
        return StageMemory(None, None, _settings(target))
    choice = prediction.choice
    return StageMemory(
        fits,
        target.process_bytes(prediction),
        _settings(target, choice.gradient_checkpointing, choice.micro_batch_tokens),
        predictor.longest_micro_batch(choice),
        choice.placement.optimizer_state,
    )


def _settings(target: Target, checkpointing: bool = False, tokens: int | None = None) -> MemorySettings:
    """The settings of the recipe: on CUDA, training chooses them."""
    return MemorySettings() if target.cuda else MemorySettings(checkpointing, tokens)


def _published_plan(facts: RecipeFacts, target: Target, wanted: str | None) -> MemoryPlan:
    """As ``planned``, from stored predictions of models that aren't on this machine."""
    unknown = StageMemory(None, None, _settings(target))
    model = MODELS.get(str(facts.language.spec.get("model")))
    if model is None:
        method = wanted or "lora"
        why = "its memory isn't known before the language model is downloaded: `llavactl train --stage 2 --dry-run`"
        return MemoryPlan(method, "requested" if wanted else why, {1: unknown, 2: unknown})
    first = _published(model, "connector", target)
    methods = (wanted,) if wanted else _METHODS[target.cuda]
    for method in methods:
        second = _published(model, method, target)
        if second.fits and second.optimizer_state == "device":
            break
    return MemoryPlan(method, _method_reason(method, second, [], target, wanted), {1: first, 2: second})


def _published(model: str, method: str, target: Target) -> StageMemory:
    """The stored prediction of the fastest choice that fits; if none does, the one with the lowest peak."""
    fit = fastest_fit(model, method, target)
    peak = fit or lowest_peak(model, method, target)
    if peak is None:
        return StageMemory(None, None, _settings(target))
    settings = _settings(target, peak.gradient_checkpointing, peak.micro_batch_tokens)
    return StageMemory(fit is not None, peak.bytes, settings, peak.assumes, peak.optimizer_state)


def _method_reason(method: str, memory: StageMemory, tried: Sequence[str], target: Target, wanted: str | None) -> str:
    """The comment beside ``method``."""
    why = {"full": "all weights", "lora": "adapters", "qlora": "adapters on a language model in 4 bits"}[method]
    if memory.peak:
        processes = "" if target.cuda or target.count == 1 else f"{target.count} × "
        peak = f"{processes}{gigabytes(memory.peak)} of {gigabytes(target.memory_bytes)}"
        why += f"; predicted peak {peak}, with {memory.assumes}"
    if memory.optimizer_state == "host":
        why += "; the optimizer state is in host memory, which is slow"
    if memory.fits is None:
        why += "; its memory can't be predicted"
    elif not memory.fits:
        why += ": this doesn't fit; use a smaller language model, or a device with more memory"
    if method == "qlora":
        why += "; needs `pip install 'llavactl[qlora]'`"
    return why + "".join(f"; {each}" for each in tried) + ("; requested" if wanted else "")
