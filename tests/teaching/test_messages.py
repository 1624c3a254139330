"""Prompts: the built-in ones are valid and pass the gates; custom ones are validated with line numbers."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import Reply, Request
from llavactl.core.schema import Box, Sample
from llavactl.recipe.sections import Gates
from llavactl.teaching import yaml_files
from llavactl.teaching.gates import GateChecker
from llavactl.teaching.generate import build_requests, parse_record
from llavactl.teaching.messages import load_prompts
from llavactl.teaching.prices import load_prices
from llavactl.teaching.replies import Kind

DOG = Sample("a", (), captions=("A dog.",), boxes=(Box("dog", (0.1, 0.25, 0.5, 1)),))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_built_in_examples_are_valid_replies(kind: Kind) -> None:
    prompts = load_prompts()
    assert len(prompts.kinds[kind].examples) >= 2
    checker = GateChecker(Gates())
    for number, example in enumerate(prompts.kinds[kind].examples):
        generated = parse_record(
            Request(f"{number}-{kind}", kind, (), Sample(str(number), ())), Reply(example.reply), prompts
        )
        assert generated.reason == ""
        assert checker.check(generated).reason == ""
        assert ("[0." in example.picture) is (kind != "conversation"), "all kinds but conversations have boxes"


def test_details_have_sixteen_questions() -> None:
    assert len(set(load_prompts().questions)) == 16


def test_the_image_comes_after_the_examples() -> None:
    messages = load_prompts().messages(DOG, "detail")
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"] == "A dog.\n\ndog: [0.100, 0.250, 0.500, 1.000]"
    assert load_prompts().messages(DOG, "conversation")[-1]["content"] == "A dog."


def test_repeated_requests_permute_captions_and_examples() -> None:
    image = Sample("a", (), captions=("A dog.", "A cat.", "A cow."))
    prompts = load_prompts()
    repeated = [prompts.messages(image, "conversation", repetition) for repetition in range(12)]
    assert len({repr(messages) for messages in repeated}) == 12
    assert repeated[0] == prompts.messages(image, "conversation")
    assert len({frozenset(messages[-1]["content"].split("\n")) for messages in repeated}) == 1
    requests = build_requests([image, DOG], {"conversation": 1, "detail": 1}, 12, 0, prompts)
    sent = [request.messages for request in requests]
    assert len({repr(messages) for messages in sent if "A cat." in messages[-1]["content"]}) == 6


def test_the_digest_of_the_built_in_prompts_is_stable() -> None:
    """Stored data has this digest: renaming the classes or fields of a prompt would generate it again."""
    assert load_prompts().digest.startswith("4c51d8d9fe73d2bc")


def test_a_custom_folder_replaces_the_kinds_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "detail.yaml").write_text("system: Describe it.\n")
    prompts = load_prompts(tmp_path)
    assert [each["role"] for each in prompts.messages(DOG, "detail")] == ["system", "user"]
    assert prompts.questions == load_prompts().questions
    assert prompts.kinds["reasoning"] == load_prompts().kinds["reasoning"]
    assert prompts.digest != load_prompts().digest


def test_invalid_prompts_are_reported_with_their_lines(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"generate\.prompts"):
        load_prompts(tmp_path)
    (tmp_path / "detail.yaml").write_text("system: x\nexampels: []\nexamples:\n  - {picture: a, reply: 7}\n")
    with pytest.raises(RecipeError) as caught:
        load_prompts(tmp_path)
    assert "detail.yaml:2: exampels: " in caught.value.message
    assert "detail.yaml:4: examples.0.reply: " in caught.value.message
    (tmp_path / "detail.yaml").unlink()
    (tmp_path / "reasoning.yaml").write_text("system: x\nexamples:\n  - {picture: a, reply: no blocks}\n")
    with pytest.raises(RecipeError, match=r"reasoning.yaml: examples.0.reply: "):
        load_prompts(tmp_path)


def test_prices_have_a_date_and_custom_files_are_validated(tmp_path: Path) -> None:
    builtin = load_prices()
    assert builtin.date[:2] == "20"
    assert all(price.per_million_out > price.per_million_in > 0 for price in builtin.models.values())
    assert builtin.models["gpt-4o"].cost(1e6, 1e6) == 12.5
    (tmp_path / "p.yaml").write_text("date: 2026-01\nmodels: {m: {in: -1, out: 2}}\n")
    with pytest.raises(RecipeError, match=r"p.yaml:2: models.m.in: "):
        load_prices(tmp_path / "p.yaml")
    assert (yaml_files.PACKAGE / "prices.yaml").is_file()
