"""Chooses the fastest settings whose predicted memory fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llavactl.training.prediction.choices import choices, distinct, tokens_limit
from llavactl.training.prediction.predict import Choice, Prediction, StagePredictor
from llavactl.training.prediction.target import Target

if TYPE_CHECKING:
    from llavactl.recipe.frame import Recipe


def choose(predictor: StagePredictor, recipe: Recipe, device: Target) -> tuple[Prediction, bool]:
    """The fastest choice that ``recipe`` allows and that fits; if none does, that with the lowest peak, and False."""
    return choose_from(predictor, choices(recipe, predictor.settings, device), device)


def choose_from(predictor: StagePredictor, possible: Sequence[Choice], device: Target) -> tuple[Prediction, bool]:
    """The first of ``possible`` that fits; if none does, the one with the lowest peak, and False."""
    if fitting := first_that_fits(predictor, possible, device):
        return fitting, True
    return _smallest(predictor, possible, device), False


def first_that_fits(predictor: StagePredictor, possible: Sequence[Choice], device: Target) -> Prediction | None:
    """The prediction of the first of ``possible`` that fits; None if none does."""
    for choice in distinct(predictor, possible):
        if predictor.static_bytes(choice) <= device.usable_bytes:
            prediction = predictor.predict(choice)
            if device.holds(prediction):
                return prediction
    return None


def _smallest(predictor: StagePredictor, possible: Sequence[Choice], device: Target) -> Prediction:
    """The prediction with the lowest peak among those of ``possible`` with the smallest micro-batches."""
    differing = list(distinct(predictor, possible))
    lowest = min(map(tokens_limit, differing))
    predictions = [predictor.predict(choice) for choice in differing if tokens_limit(choice) == lowest]
    return min(predictions, key=device.peak_bytes)
