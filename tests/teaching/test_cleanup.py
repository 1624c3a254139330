"""Thinking, wrapping and remarks around a reply are removed, or the reply is refused; its content never changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavactl.core.errors import DataError
from llavactl.core.protocols import Reply, Request
from llavactl.core.registry import registry
from llavactl.core.schema import Sample
from llavactl.teaching.budgeted import ask_function
from llavactl.teaching.cleanup import ChatterError, reject_chatter, without_thinking, without_wrapping
from llavactl.teaching.generate import CHATTER, MALFORMED, generate_record, parse_record
from llavactl.teaching.messages import load_prompts
from llavactl.teaching.replies import parse_turns

WORDS = re.findall(
    r"\S+",
    "a dog sits on the mat and Sure enough Certainly visible Great hills Here is a man in conversation Below are two "
    "I question answer the description of *it* **bold** _so_ Q: A: 1. - > ``code`` === let me think okay <b> "
    "reasoning </b> [1] “so” 🐕 this is what: Note",
)
TEXTS = st.lists(st.sampled_from([*WORDS, "\n", "\n\n"]), min_size=1, max_size=30).map(" ".join)
CONTENT = st.sampled_from(
    [
        "A dog.",
        "A dog sits on a mat.\n\nBehind it, a *small* cat is asleep: it dreams.",
        "Sure enough, it rains. Here is a man in conversation: he laughs.",
        "There are\n\n- two dogs\n- a cat",
        "I is the first letter on the sign.\n\nFeel free to hang your coat here, it says.",
    ]
)
BEFORE = st.sampled_from(
    [
        "",
        "Sure!\n\n",
        "Certainly! Here is a detailed description of the image:\n\n",
        "Here's the description: ",
        "Okay, here is a detailed and accurate description of the picture.\n",
        "I'd be happy to help. Here's a description based on the provided captions:\n",
        "Of course.\n---\n",
        "**Description:** ",
        "### Image Description\n\n",
    ]
)
AFTER = st.sampled_from(
    [
        "",
        "\n\nLet me know if you'd like anything changed!",
        "\nI hope this helps! Feel free to ask for more. 😊",
        "\n\n---\n\nIf you need more details, please let me know.",
        "\n\nWould you like me to describe another image?",
    ]
)
THINKING = st.sampled_from(
    [
        "",
        "<think>\nHm: a dog?\n</think>\n\n",
        "Hm: a dog?</think>",
        "<thinking>Hm</thinking>",
        "<reasoning>Hm</reasoning>\n<think></think>",
        "◁think▷Hm◁/think▷",
        "Hm\n[/THINK]",
        "<|begin_of_thought|>Hm<|end_of_thought|>",
        "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>",
        "analysisWe need to say: a dog.assistantfinal",
    ]
)


def detail(reply: str) -> str:
    ((_, answer),) = parse_turns("detail", reply, "", ("Q?",))
    return answer


@settings(max_examples=500)
@given(TEXTS)
def test_text_is_unchanged_or_refused(text: str) -> None:
    try:
        kept = detail(text)
    except DataError:
        return
    assert kept == text.strip()


@settings(max_examples=500)
@given(st.text() | TEXTS | st.tuples(THINKING, BEFORE, TEXTS, AFTER).map("".join))
def test_the_kept_text_is_a_substring_of_the_reply(reply: str) -> None:
    try:
        kept = detail(reply)
    except DataError:
        return
    assert kept in reply


@given(THINKING, BEFORE, CONTENT, AFTER, st.booleans())
def test_text_around_a_description_is_removed(
    thinking: str, before: str, content: str, after: str, fence: bool
) -> None:
    inner = f"```text\n{content}\n```" if fence else content
    if fence and before.endswith(" "):
        before = before.strip() + "\n"
    assert detail(f"{thinking}{before}{inner}{after}") == content


@pytest.mark.parametrize(
    "reply",
    [
        "<think>A dog",
        "<think>A</think><think>dog",
        "A dog. <think>Is it?</think> It is.",
        "<thinking>\nA dog\n\nThe image shows a dog.",
        "◁think▷A dog",
        "<|channel|>analysis<|message|>A dog",
        "analysisWe need to say: a dog.",
        "A dog.</think>",
        "<think></think>",
    ],
)
def test_unclosed_or_inner_thinking_is_refused(reply: str) -> None:
    with pytest.raises(DataError):
        detail(reply)
    with pytest.raises(DataError):
        parse_turns("conversation", f"{reply}\nQuestion: What?\n===\nAnswer: {reply}", "", ())


@pytest.mark.parametrize(
    "reply",
    [
        "A dog sits here. Let me know if you need more.",
        "Certainly, a dog sits here.",
        "A dog. Here is a detailed description of the image: it sits.",
        "As requested, a dog sits here.",
        "I hope this helps. A dog sits here.",
        "I'd be happy to describe it: a dog.",
    ],
)
def test_remarks_inside_a_description_are_refused(reply: str) -> None:
    with pytest.raises(ChatterError):
        detail(reply)
    result = parse_record(Request("a", "detail", (), Sample("a", ())), Reply(reply), load_prompts())
    assert (result.record, result.category) == (None, CHATTER)


@pytest.mark.parametrize("reply", ["A dog.\n```\nprint()\n```\nA cat.", "```\nA dog.", "```a\n```\n```b\n```"])
def test_a_code_fence_inside_a_reply_is_refused(reply: str) -> None:
    result = parse_record(Request("a", "detail", (), Sample("a", ())), Reply(reply), load_prompts())
    assert (result.record, result.category) == (None, MALFORMED)


MARKERS = [
    "{}:",
    "**{}:**",
    "**{}**:",
    "### {}:",
    "### **{}:**",
    "{} 1:",
    "**{} 2:**",
    "1. {}:",
    "- **{}:**",
    "__{}__:",
]


@pytest.mark.parametrize(
    "marker", [*MARKERS, "> {}:", "*{}:*", "### {}\n", "**{}**\n", "#{} :", "{} #3:", "2) **{}**:"]
)
@pytest.mark.parametrize("names", [("Question", "Answer"), ("QUESTION", "ANSWER"), ("Q", "A")])
def test_markdown_around_the_markers_is_removed(marker: str, names: tuple[str, str]) -> None:
    question, answer = (marker.format(name) for name in names)
    text = "It is **red**:\n\n1. *very* red."
    reply = f"{question} What color?\n===\n{answer}\n{text}\n===\n{question}\nWhy?\n======\n{answer} {text}"
    if marker.endswith("\n"):
        reply = reply.replace("\n What", "\nWhat").replace("\n It", "\nIt")
    assert parse_turns("conversation", reply, "", ()) == [("What color?", text), ("Why?", text)]


def test_bold_around_an_entire_line_is_removed() -> None:
    reply = (
        "**Question: What is it?**\n===\n**Answer:** A dog.\n===\n**Question: And *this*?**\n===\nAnswer: **A** cat."
    )
    assert parse_turns("conversation", reply, "", ()) == [("What is it?", "A dog."), ("And *this*?", "**A** cat.")]


@given(THINKING, AFTER, st.booleans())
def test_text_around_a_conversation_is_removed(thinking: str, after: str, fence: bool) -> None:
    talk = "Question:\nCan you describe it?\n===\nAnswer:\nCertainly! It is a dog."
    inner = f"```\n{talk}\n```" if fence else talk
    for before in ("", "Sure!\n", "Sure! Here are the questions and answers:\n\n", "Here is the conversation:\n---\n"):
        for between in ("", "\n==="):
            if fence and between:
                continue
            pairs = parse_turns("conversation", f"{thinking}{before}{inner}{between}{after}", "", ())
            assert pairs == [("Can you describe it?", "Certainly! It is a dog.")]


@pytest.mark.parametrize("before", ["The picture is told in captions.\n", "A dog.\n===\n", "Title: dogs\n\n"])
def test_other_text_before_a_conversation_is_refused(before: str) -> None:
    with pytest.raises(DataError):
        parse_turns("conversation", f"{before}Question: What?\n===\nAnswer: A dog.", "", ())


def test_replies_of_an_exact_teacher_are_unchanged() -> None:
    class Exact:
        exact = True

        def reply(self, request: Request) -> str:
            return "Sure!\nDescription: ```a``` Let me know if it helps."

    result = generate_record(Exact(), Request("a", "detail", (), Sample("a", ())))
    assert result.record is not None
    assert result.record["conversations"][1]["value"] == "Sure!\nDescription: ```a``` Let me know if it helps."


def test_the_thinking_of_a_judge_is_removed(tmp_path: Any) -> None:
    (tmp_path / "r.jsonl").write_text(
        '{"id": "1", "reply": "<think>8 or 9?</think>\\n8 9\\nGood."}\n{"id": "2", "reply": "Hm</think>7 7"}\n'
        '{"id": "3", "reply": " 5 6\\nAs it stands. "}\n{"id": "4", "reply": "<think>8 9"}\n'
    )
    from llavactl.core.protocols import BudgetedTeacher

    ask = ask_function(BudgetedTeacher({"name": "replay", "path": str(tmp_path / "r.jsonl")}), tmp_path / "kept.sqlite")
    replies = ask([Request(name, "judge", (), Sample(name, ())) for name in "1234"])
    assert replies == {"1": "8 9\nGood.", "2": "7 7", "3": " 5 6\nAs it stands. ", "4": "<think>8 9"}
    assert registry().get("teachers", "replay")


def test_a_recorded_reply_needs_an_id(tmp_path: Any) -> None:
    for name in ("null", "[1]", '""'):
        (tmp_path / "r.jsonl").write_text(f'{{"id": {name}, "reply": "A dog."}}\n')
        with pytest.raises(DataError, match=r"r\.jsonl:1"):
            registry().create("teachers", {"name": "replay", "path": str(tmp_path / "r.jsonl")})


LONG = "A dog runs on green grass, and a child in a red coat throws a ball."


@pytest.mark.parametrize(
    "reply",
    [
        f"Assistant: {LONG}", f"[Response]\n{LONG}", f"Great question! {LONG}", f"Here you go:\n{LONG}",
        f"Okay so the user wants a description.\n\n{LONG}", f'{{"description": "{LONG}"}}', f"<description>\n{LONG}",
        f"The following is a detailed description of the image: {LONG}", f"{LONG}\n\nP.S. Tell me what to change.",
        f"{LONG}\n\nEnd of description.", f"{LONG}\n\n(Word count: 120)", f"Let me describe this. {LONG}",
        f"{LONG}<|im_end|>", f"{LONG}<end_of_turn>", f"{LONG}[/INST]", f"{LONG}</s>",
        f"{LONG}\n\nUser: Where?\nAssistant: On it.",
        f"{LONG}\n\n### Human: more", f"Reasoning: I see a dog.\nDescription: {LONG}", f"Thinking:\nA dog.\n\n{LONG}",
        f"I think we need to write this down. {LONG}", f"{LONG}\n\nHow does this look?", f"{LONG} END",
        f"{LONG}\n\nThis description covers all captions.", f"<|start_header_id|>assistant<|end_header_id|>\n\n{LONG}",
    ],
)  # fmt: skip
def test_more_remarks_around_a_description(reply: str) -> None:
    """Removed if they are unambiguous, else refused."""
    try:
        text = without_wrapping(without_thinking(reply), label=True)
        reject_chatter(text, talk=False)
    except DataError:
        return
    assert text == LONG


@pytest.mark.parametrize(
    "reply", [f"<final_answer>{LONG}</final_answer>", f"<caption>\n{LONG}\n</caption>", f"Response:\n\n{LONG}"]
)
def test_tags_and_labels_are_removed(reply: str) -> None:
    assert without_wrapping(reply, label=True) == LONG
