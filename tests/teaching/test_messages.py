"""Prompts: ours are whole and pass our own gates, a user's are checked with their lines."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import Reply, Request
from llavactl.core.schema import Box, Sample
from llavactl.recipe.sections import Gates
from llavactl.teaching import files
from llavactl.teaching.gates import Gatekeeper
from llavactl.teaching.generate import record, requests
from llavactl.teaching.messages import prompts
from llavactl.teaching.prices import prices
from llavactl.teaching.replies import Kind

DOG = Sample("a", (), captions=("A dog.",), boxes=(Box("dog", (0.1, 0.25, 0.5, 1)),))


@pytest.mark.parametrize("kind", get_args(Kind))
def test_our_examples_are_what_we_ask_for(kind: Kind) -> None:
    told = prompts()
    assert len(told.kinds[kind].examples) >= 2
    keeper = Gatekeeper(Gates())
    for number, example in enumerate(told.kinds[kind].examples):
        made = record(Request(f"{number}-{kind}", kind, (), Sample(str(number), ())), Reply(example.reply), told)
        assert made.reason == ""
        assert keeper.check(made).reason == ""
        assert ("[0." in example.picture) is (kind != "conversation"), "boxes are told but for a conversation"


def test_a_detail_has_sixteen_questions() -> None:
    assert len(set(prompts().questions)) == 16


def test_the_picture_comes_last_and_examples_before() -> None:
    messages = prompts().messages(DOG, "detail")
    assert [each["role"] for each in messages] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert messages[-1]["content"] == "A dog.\n\ndog: [0.100, 0.250, 0.500, 1.000]"
    assert prompts().messages(DOG, "conversation")[-1]["content"] == "A dog."


def test_asked_again_about_the_same_no_request_is_sent_twice() -> None:
    picture = Sample("a", (), captions=("A dog.", "A cat.", "A cow."))
    told = prompts()
    talks = [told.messages(picture, "conversation", again) for again in range(12)]
    assert len({repr(talk) for talk in talks}) == 12
    assert talks[0] == told.messages(picture, "conversation")
    assert len({frozenset(talk[-1]["content"].split("\n")) for talk in talks}) == 1
    asked = [request.messages for request in requests([picture, DOG], {"conversation": 1, "detail": 1}, 12, 0, told)]
    assert len({repr(each) for each in asked if "A cat." in each[-1]["content"]}) == 6


def test_a_users_folder_replaces_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "detail.yaml").write_text("system: Describe it.\n")
    told = prompts(tmp_path)
    assert [each["role"] for each in told.messages(DOG, "detail")] == ["system", "user"]
    assert told.questions == prompts().questions
    assert told.kinds["reasoning"] == prompts().kinds["reasoning"]
    assert told.digest != prompts().digest


def test_what_is_wrong_with_a_prompt_is_said_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="holds no prompt"):
        prompts(tmp_path)
    (tmp_path / "detail.yaml").write_text("system: x\nexampels: []\nexamples:\n  - {picture: a, reply: 7}\n")
    with pytest.raises(RecipeError) as caught:
        prompts(tmp_path)
    assert "detail.yaml:2: exampels: unknown key" in caught.value.message
    assert "detail.yaml:4: examples.0.reply: must be" in caught.value.message
    (tmp_path / "detail.yaml").unlink()
    (tmp_path / "reasoning.yaml").write_text("system: x\nexamples:\n  - {picture: a, reply: no blocks}\n")
    with pytest.raises(RecipeError, match=r"examples.0.reply: the reply is not in blocks"):
        prompts(tmp_path)


def test_prices_have_a_date_and_a_users_file_is_checked(tmp_path: Path) -> None:
    ours = prices()
    assert ours.date[:2] == "20"
    assert all(price.written > price.read > 0 for price in ours.models.values())
    assert ours.models["gpt-4o"].of(1e6, 1e6) == 12.5
    (tmp_path / "p.yaml").write_text("date: 2026-01\nmodels: {m: {in: -1, out: 2}}\n")
    with pytest.raises(RecipeError, match=r"p.yaml:2: models.m.in: must be"):
        prices(tmp_path / "p.yaml")
    assert (files.HERE / "prices.yaml").is_file()
