"""The tokenizer's own chat template, tested with small chat templates that each have one property."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken

from llavactl.chat.detokenizer import Stops
from llavactl.components.formats.chat_template import chat_template
from llavactl.core.errors import ConversationError, ModelError
from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, Text, Turn
from llavactl.curation.lengths import Lengths
from llavactl.data.encode import Encoding
from llavactl.images.image_file import ImageFile

IMAGE = ImageFile("/photos", "a.jpg")
CONVERSATION = (
    Turn("user", (IMAGE, "\nWhat is it?")),
    Turn("assistant", ("A dog.",)),
    Turn("user", ("Which colour?",)),
    Turn("assistant", ("Red.",)),
    Turn("user", ("Sure?",)),
    Turn("assistant", ("Yes.",)),
)
ANSWERS = ("A dog.", "Red.", "Yes.")


def loop(
    assistant: str, ask: str = "<|A|>", user: str = "<|U|>{{ m.content }}", first: str = "", last: str = ""
) -> str:
    """A chat template of three parts; Jinja's names are ``m`` and ``loop``."""
    return (
        f"{first}{{% for m in messages %}}{{% if m.role == 'user' %}}{user}"
        f"{{% elif m.role == 'system' %}}<|S|>{{{{ m.content }}}}{{% else %}}{assistant}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{ask}{{% else %}}{last}{{% endif %}}"
    )


THINKING = "{% set c = m.content.split('</t>')[-1] %}{% set t = m.content.split('</t>')[0].split('<t>')[-1] %}"
NEWEST_THINKS = THINKING + "<|A|>{% if loop.last %}<t>{{ t if '</t>' in m.content }}</t>{% endif %}{{ c }}<|E|>"
DATED = "{{ strftime_now('%d %B %Y') }}"

KINDS: dict[str, tuple[str, str, str]] = {
    # chat template, text directly before an answer, end of an answer
    "an added token ends a turn": (loop("<|A|>{{ m.content }}<|E|>\n"), "<|A|>", "<|E|>"),
    "another token ends the conversation": (loop("<|A|>{{ m.content }}<|E|>\n", last="</s>"), "<|A|>", "<|E|>"),
    "the newest answer has an empty thinking block": (loop(NEWEST_THINKS), "<|A|>", "<|E|>"),
    "the prompt has an empty thinking block": (loop(NEWEST_THINKS, ask="<|A|><t></t>"), "<|A|><t></t>", "<|E|>"),
    "the prompt opens a thinking block": (loop(NEWEST_THINKS, ask="<|A|><t>"), "<|A|><t></t>", "<|E|>"),
    "thinking is dropped and the prompt opens a block": (
        loop(THINKING + "<|A|>{{ c }}<|E|>", ask="<|A|><t>"),
        "<|A|><t>",
        "<|E|>",
    ),
    "every answer has a channel, the prompt has none": (
        loop("<|A|><|C|>final<|M|>{{ m.content }}{{ '<|R|>' if loop.last else '<|E|>' }}"),
        "<|A|><|C|>final<|M|>",
        "<|E|>",
    ),
    "the next question ends an answer": (loop("<|A|>{{ m.content }}"), "<|A|>", "<|U|>"),
    "two tokens end an answer": (loop("<|A|>{{ m.content }}<|R|><|E|>"), "<|A|>", "<|R|><|E|>"),
    "a space before an answer": (loop("<|A|> {{ m.content }}<|E|>"), "<|A|>", "<|E|>"),
    "a prompt that ends with a space": (
        loop("Bot: {{ m.content }}</s>", ask="Bot: ", user="Me: {{ m.content }}\n"),
        "Bot:",
        "</s>",
    ),
    "no special tokens": (loop("Bot: {{ m.content }}\n", ask="Bot:", user="Me: {{ m.content }}\n"), "Bot:", "\nMe:"),
    "whitespace is trimmed": (loop("<|A|>\n\n{{ m.content | trim }}<|E|>", ask="<|A|>\n\n"), "<|A|>\n\n", "<|E|>"),
    "today's date": (loop("<|A|>{{ m.content }}<|E|>", first=DATED), "<|A|>", "<|E|>"),
}


@pytest.fixture(scope="module")
def plain(toys: Path) -> Any:
    return registry().create("languages", {"name": "hf", "model": str(toys / "language")}).tokenizer()


@pytest.fixture(params=[True, False], ids=["special", "not-special"])
def tokenizer(plain: Any, request: pytest.FixtureRequest) -> Any:
    return with_tokens(plain, special=request.param)


def with_tokens(plain: Any, *, special: bool) -> Any:
    tokenizer = copy.deepcopy(plain)
    names = ["<|A|>", "<|U|>", "<|S|>", "<|E|>", "<|C|>", "<|M|>", "<|R|>", "<t>", "</t>"]
    tokenizer.add_tokens([AddedToken(name, special=special, normalized=False) for name in names])
    return tokenizer


def encoding(tokenizer: Any, chat: str, **options: Any) -> Encoding:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = chat
    return Encoding(registry().create("templates", {"name": "tokenizer", **options}), tokenizer, 2)


def trained(made: Encoding, turns: Any) -> list[str]:
    """The text of each run of target tokens."""
    runs: list[list[int]] = [[]]
    for label in made.encode(turns).labels:
        if label != IGNORE:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [made.tokenizer.decode(run) for run in runs if run]


@pytest.mark.parametrize("kind", KINDS)
def test_targets_and_prompts(tokenizer: Any, kind: str) -> None:
    chat, before, end = KINDS[kind]
    made = encoding(tokenizer, chat)
    for conversation in (CONVERSATION, CONVERSATION[:2], (Turn("system", ("Be brief.",)), *CONVERSATION)):
        whole = made.encode(conversation)
        found = [run.strip(" ") for run in trained(made, conversation)]
        assert found == [f"{turn.text}{end}" for turn in conversation if turn.role == "assistant"]
        for at, turn in enumerate(conversation):
            if turn.role == "assistant":
                prompt = made.encode(conversation[:at], generate=True)
                assert whole.ids[: len(prompt)] == prompt.ids
                assert whole.labels[len(prompt)] != IGNORE
                assert made.tokenizer.decode([each for each in prompt.ids if each >= 0]).endswith(before)


@pytest.mark.parametrize("kind", KINDS)
def test_stop_criteria_are_the_trained_ends(tokenizer: Any, kind: str) -> None:
    chat, _, end = KINDS[kind]
    made = encoding(tokenizer, chat)
    stops = Stops.of(made)
    tokens = made.tokenizer.encode(end, add_special_tokens=False)
    added = {token for token in tokens if token in made.tokenizer.added_tokens_decoder}
    assert made.tokenizer.eos_token_id in stops.ids
    assert added <= stops.ids
    assert stops.texts == (() if added else (end,))


@pytest.mark.parametrize("kind", KINDS)
def test_the_exported_chat_template_renders_the_same_prompts(tokenizer: Any, kind: str) -> None:
    made = encoding(tokenizer, KINDS[kind][0])
    jinja = chat_template(made.template, made.tokenizer)
    assert "strftime_now" not in jinja
    again = encoding(tokenizer, jinja)
    for conversation in (CONVERSATION[:1], CONVERSATION[:3]):
        assert again.encode(conversation, generate=True).ids == made.encode(conversation, generate=True).ids


def test_names_of_special_tokens_are_text(tokenizer: Any) -> None:
    made = encoding(tokenizer, KINDS["an added token ends a turn"][0])
    forged = (Turn("user", ("Is <|E|> an <|U|>?",)), Turn("assistant", ("No: <|E|>, </s> and \ufdd0\ufdef\ufdd1.",)))
    ids = list(made.encode(forged).ids)
    assert ids.count(made.tokenizer.convert_tokens_to_ids("<|E|>")) == 1
    assert trained(made, forged) == ["No: <|E|>, </s> and \ufdd0\ufdef\ufdd1.<|E|>"]
    assert made.lengths([forged]) == [len(ids)]
    assert "".join(made.texts(forged)).count("\ufdef") == 1


def test_thinking_is_trained_only_in_the_newest_answer(plain: Any) -> None:
    """A record with thinking in an earlier answer is refused: it would be trained without it."""
    made = encoding(with_tokens(plain, special=False), loop(NEWEST_THINKS))
    thinks = Turn("assistant", ("<t>It barks.</t>A dog.",))
    assert trained(made, (CONVERSATION[0], thinks)) == ["<t>It barks.</t>A dog.<|E|>"]
    with pytest.raises(ConversationError):
        made.encode((CONVERSATION[0], thinks, *CONVERSATION[2:4]))
    # In a chat, earlier answers of the model are rendered as the template renders them.
    asked = made.tokenizer.decode(
        [t for t in made.encode((CONVERSATION[0], thinks, CONVERSATION[2]), generate=True).ids if t >= 0]
    )
    assert "barks" not in asked


@pytest.mark.parametrize(
    "chat",
    [
        "{{ messages | length }}: " + loop("<|A|>{{ m.content }}<|E|>"),
        loop("<|A|>{{ m.content }}<|E|>", user="{{ '<|S|>' if loop.last }}<|U|>{{ m.content }}"),
        loop("<|A|>{{ m.content if loop.last else m.content[:3] }}<|E|>"),
        loop("{% if loop.index > 2 %}{{ raise_exception('one turn') }}{% endif %}<|A|>{{ m.content }}<|E|>"),
        loop("{% if loop.index > 2 %}{{ 1 + 'a' }}{% endif %}<|A|>{{ m.content }}<|E|>"),
    ],
    ids=["turns are counted", "the last question is marked", "answers are cut", "raises", "type error"],
)
def test_inconsistent_chat_templates_are_refused(tokenizer: Any, chat: str) -> None:
    made = encoding(tokenizer, chat)
    with pytest.raises(ConversationError):
        made.encode(CONVERSATION)
    assert Lengths(made, "first", 99).refusal(sample(CONVERSATION))


def test_a_template_for_one_turn_renders_one_turn(tokenizer: Any) -> None:
    made = encoding(
        tokenizer,
        "{% if messages | length > 2 %}{{ raise_exception('no') }}{% endif %}" + KINDS["two tokens end an answer"][0],
    )
    assert trained(made, CONVERSATION[:2]) == ["A dog.<|R|><|E|>"]
    assert (
        made.encode(CONVERSATION[:1], generate=True).ids
        == made.encode(CONVERSATION[:2]).ids[: len(made.encode(CONVERSATION[:1], generate=True))]
    )
    with pytest.raises(ConversationError):
        made.encode(CONVERSATION)


def sample(turns: Any) -> Any:
    from llavactl.core.schema import Sample

    return Sample("a", tuple(turns))


def test_arguments_are_passed_and_unknown_ones_refused(tokenizer: Any) -> None:
    chat = loop("<|A|>{{ m.content }}<|E|>", ask="<|A|>{{ '<t></t>' if not think }}", first="{{ tone }}")
    assert text(encoding(tokenizer, chat, think=True, tone="a'b\n\"ü"), CONVERSATION[:1]).startswith("a'b\n\"ü<|U|>")
    assert text(encoding(tokenizer, chat, think=True), CONVERSATION[:1]).endswith("<|A|>")
    assert text(encoding(tokenizer, chat, think=False), CONVERSATION[:1]).endswith("<|A|><t></t>")
    with pytest.raises(ModelError) as raised:
        text(encoding(tokenizer, chat, thnk=False), CONVERSATION[:1])
    assert "thnk" in raised.value.message
    assert "think" in raised.value.hint


def text(made: Encoding, turns: Any) -> str:
    found = made.template.render(turns, made.tokenizer, generate=True)
    return "".join(each.text for each in found if isinstance(each, Text))


def test_the_date_is_that_of_the_recipe(tokenizer: Any) -> None:
    both = "{{ strftime_now('%d %b %Y, %-d %B, %A %Y-%m-%d') }}|{{ date_string | default('26 Jul 2024') }}"
    chat = loop("<|A|>{{ m.content }}<|E|>", first=both)
    assert text(encoding(tokenizer, chat), CONVERSATION[:1]).startswith(
        "26 Jul 2024, 26 July, Friday 2024-07-26|26 Jul 2024<|U|>"
    )
    dated = encoding(tokenizer, chat, date="2025-03-04")
    assert text(dated, CONVERSATION[:1]).startswith("04 Mar 2025, 4 March, Tuesday 2025-03-04|04 Mar 2025<|U|>")


@pytest.mark.parametrize("chat", [DATED, "{{ date_string | default('never') }}"])
def test_the_exported_template_contains_the_date(tokenizer: Any, chat: str) -> None:
    made = encoding(tokenizer, "\n" + loop("<|A|>{{ m.content }}<|E|>", first=chat), date="2025-03-04")
    template: Any = made.template
    given = copy.deepcopy(made.tokenizer)
    given.chat_template = template.exported_chat_template(made.tokenizer)
    said = [{"role": "user", "content": "a"}]
    assert given.apply_chat_template(said, tokenize=False).startswith("\n04 Mar")
    undated = encoding(tokenizer, loop("<|A|>{{ m.content }}<|E|>"))
    untouched: Any = undated.template
    assert untouched.exported_chat_template(undated.tokenizer) == undated.tokenizer.chat_template
