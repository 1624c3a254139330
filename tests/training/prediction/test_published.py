"""Stored predictions: the fastest choice that fits, for any memory and number of devices."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from transformers import LlamaConfig

from llavactl.recipe.load import load_recipe
from llavactl.testing import toy_clip
from llavactl.training.prediction.choices import distinct_choices
from llavactl.training.prediction.model import feature_shape
from llavactl.training.prediction.predict import StagePredictor
from llavactl.training.prediction.published import MODELS, fastest_fit, published_peaks
from llavactl.training.prediction.target import Target

METHODS = ("connector", "full", "lora", "qlora")


@pytest.mark.parametrize(("model", "method"), list(itertools.product(MODELS.values(), METHODS)))
def test_choices_are_sorted_by_speed_and_need_less_and_less(model: str, method: str) -> None:
    sizes = [peak.bytes for peak in published_peaks(model, method, Target(True, 0, 1))]
    assert sizes
    assert sizes == sorted(set(sizes), reverse=True)
    larger = fastest_fit(model, method, Target(True, 10**12))
    assert larger is not None
    assert larger.bytes == sizes[0]
    assert fastest_fit(model, method, Target(True, 10**8)) is None


def test_more_devices_share_what_one_must_hold() -> None:
    one, eight = (fastest_fit("Vicuna 7B", "full", Target(True, 24 * 10**9, count)) for count in (1, 8))
    assert one is None
    assert eight is not None
    assert eight.sharded
    five, four = (published_peaks("Vicuna 7B", "full", Target(True, 0, count)) for count in (5, 4))
    assert five == four, "as predicted for fewer devices"


def test_the_stored_prediction_is_that_of_the_model(tmp_path: Path) -> None:
    """Of the smallest model, computed again: the fastest choices of full fine-tuning on a CPU."""
    LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "language")
    toy_clip(tmp_path / "clip", size=336, width=1024, layers=1)
    models = [f"language.model={tmp_path / 'language'}", f"vision.model={tmp_path / 'clip'}", "vision.layer=-1"]
    recipe = load_recipe("llava-v1.5-7b", models)
    shape = feature_shape(recipe, 2)
    predictor = StagePredictor(recipe, 2, shape, shape.patches, None, 1, cuda=True)
    target = Target(True, 0)
    fastest = next(distinct_choices(predictor, recipe, target))
    stored = published_peaks("SmolLM2 135M", "full", target)[0]
    assert predictor.predict(fastest).device_bytes == pytest.approx(stored.bytes, rel=0.01)
    assert fastest.micro_batch_tokens == stored.micro_batch_tokens
