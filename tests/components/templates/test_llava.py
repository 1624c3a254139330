"""Ids and labels equal those of LLaVA's training code; the last tests cover the cases that differ.

LLaVA tokenizes a conversation, then each of its rounds again, and derives the masks from the lengths. If they don't add
up ("tokenization mismatch"), it doesn't train the sample; llavactl does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llavactl.components.sources.llava_json import llava_sample
from llavactl.core.registry import registry
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Sample, Turn
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.images.image_file import ImageFile

USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMAN = USER.replace("user", "human")
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
    "provides, and assist the user with a variety of tasks using natural language."
)
Ids = list[int]
Tokenize = Callable[[str], Ids]
IdsAndLabels = tuple[Ids, Ids] | None
"""Ids and labels; None for a tokenization mismatch."""


def values(turns: Sequence[Turn]) -> list[str]:
    return ["".join(part if isinstance(part, str) else "<image>" for part in turn.content) for turn in turns]


def with_image(tokenize: Tokenize) -> Tokenize:
    """One BOS, one token per image, and every piece in between tokenized separately."""

    def tokenize_text(text: str) -> Ids:
        first, *rest = (tokenize(piece)[1:] for piece in text.split("<image>"))
        return [1, *first, *(token for piece in rest for token in (IMAGE_TOKEN, *piece))]

    return tokenize_text


def rounds(text: str, separator: str, tokenize: Tokenize, shorter: int) -> IdsAndLabels:
    """The labels of v1 and llama_2: in each round, everything up to ``separator`` is masked.

    ``shorter``: number of tokens that are subtracted from the length of all rounds but the first.
    """
    ids = tokenize(text)
    labels = [IGNORE] * len(ids)
    at = 1
    for number, said in enumerate(text.split("</s>")):
        parts = said.split(separator)
        if not said or len(parts) != 2:
            break
        less = shorter if number else 0
        length = len(tokenize(said)) - less
        question = len(tokenize(parts[0] + separator)) - 2 - less
        labels[at + question : at + length] = ids[at + question : at + length]
        at += length
    return (ids, labels) if at == len(ids) else None


def v1(system: str) -> Callable[[Sequence[Turn], Tokenize, bool], IdsAndLabels]:
    def masked(turns: Sequence[Turn], tokenize: Tokenize, legacy: bool) -> IdsAndLabels:
        text = system + " "
        for number, value in enumerate(values(turns)):
            text += f"USER: {value} " if number % 2 == 0 else f"ASSISTANT: {value}</s>"
        return rounds(text, " ASSISTANT: ", tokenize, 0 if legacy else 1)

    return masked


def llama_2(turns: Sequence[Turn], tokenize: Tokenize, legacy: bool) -> IdsAndLabels:
    text = ""
    for number, value in enumerate(values(turns)):
        system = f"<<SYS>>\n{VISION}\n<</SYS>>\n\n" if number == 0 else ""
        text += f"<s>[INST] {system}{value} [/INST]" if number % 2 == 0 else f" {value} </s>"
    return rounds(text.lstrip("<s>"), "[/INST] ", tokenize, 0)


def plain(turns: Sequence[Turn], tokenize: Tokenize, legacy: bool) -> IdsAndLabels:
    assert len(turns) == 2
    ids = tokenize("<image>" + turns[1].text + "\n")
    asked = len(tokenize("<image>"))
    return ids, [IGNORE] * asked + ids[asked:]


def v0(turns: Sequence[Turn], tokenize: Tokenize, legacy: bool) -> IdsAndLabels:
    header = HUMAN + "\n\n"
    said = [f"### {('Human', 'Assistant')[at % 2]}: {value}\n" for at, value in enumerate(values(turns))]
    ids = tokenize(header + "".join(said) + "### ")
    at = len(tokenize(header))
    labels = [IGNORE] * at + ids[at:]
    for number, turn in enumerate(said):
        length = len(tokenize(turn))
        if number % 2 == 0:
            labels[at + 2 : at + length] = [IGNORE] * len(labels[at + 2 : at + length])
        at += length
    return ids, labels


LLAVA: dict[str, Callable[[Sequence[Turn], Tokenize, bool], IdsAndLabels]] = {
    "vicuna-v1": v1(USER),
    "llava-v1": v1(HUMAN),
    "llama-2": llama_2,
    "plain": plain,
}


def encode(name: str, vocabulary: Any, turns: Sequence[Turn]) -> tuple[Ids, Ids]:
    made = Encoding(registry().create("templates", {"name": name}), vocabulary.tokenizer, 1).encode(turns)
    return list(made.ids), list(made.labels)


def conversations(samples: list[Sample], name: str) -> list[tuple[Turn, ...]]:
    """Conversations without ``<image>`` in their text, the image first; for plain only one caption."""
    turns = [arrange(sample.turns, "first", "") for sample in samples]
    turns = [each for each in turns if not any("<image>" in turn.text for turn in each)]
    return [each[:2] for each in turns if each[0].images] if name == "plain" else turns


def compare(name: str, vocabulary: Any, samples: list[Sample]) -> None:
    tokenize = with_image(vocabulary.reference)
    found = conversations(samples, name)
    assert len(found) >= 5
    for turns in found:
        assert LLAVA[name](turns, tokenize, vocabulary.reference.legacy) == encode(name, vocabulary, turns), turns


@pytest.mark.parametrize("name", LLAVA)
def test_ids_and_labels_equal_llavas(llama: Any, samples: list[Sample], name: str) -> None:
    compare(name, llama, samples)


@pytest.mark.slow
@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not-legacy"])
def test_ids_and_labels_equal_llavas_with_llamas_vocabulary(
    vicuna: Any, samples: list[Sample], name: str, legacy: bool
) -> None:
    compare(name, vicuna(legacy), samples)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not-legacy"])
def test_v0_equals_llavas_with_llamas_vocabulary(vicuna: Any, samples: list[Sample], legacy: bool) -> None:
    """LLaVA counts BOS in each turn, which is compensated because ### is one token at the beginning, two inside."""
    vocabulary = vicuna(legacy)
    assert len(vocabulary.reference.encode_without_bos("###")[0]) == 1
    assert len(vocabulary.reference.encode_without_bos("\n###")[0]) == 2 + 2
    for turns in conversations(samples, "vicuna-v0"):
        assert v0(turns, with_image(vocabulary.reference), legacy) == encode("vicuna-v0", vocabulary, turns)


def test_llavas_v0_masks_shift_with_other_vocabularies(llama: Any, samples: list[Sample]) -> None:
    """### is one token inside as well: LLaVA's masks shift by one more token with every turn, llavactl's don't."""
    turns = conversations(samples, "vicuna-v0")[1]
    assert len(turns) == 6
    theirs = v0(turns, with_image(llama.reference), llama.reference.legacy)
    ids, labels = encode("vicuna-v0", llama, turns)
    assert theirs is not None
    assert theirs[0] == ids
    masked = [llama.reference.pieces[token] for token, label in zip(ids, theirs[1], strict=True) if label == IGNORE]
    assert masked.count("###") == 3, "the beginning of every answer is masked"
    assert masked.count("▁Human") == 0, "the user's name is not masked"
    assert [label for token, label in zip(ids, labels, strict=True) if llama.reference.pieces[token] == "###"] == (
        [llama.reference.pieces.index("###")] * 7
    )


IMAGE = ImageFile("/photos", "a.jpg")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does ASSISTANT: mean?", "The one who answers."),
        ("Who speaks?", "First USER: then ASSISTANT: speaks."),
        ("What is </s>?", "The end."),
        ("What ends it?", "It is </s> that ends it."),
    ],
)
def test_samples_with_a_mismatch_in_llava_are_trained(llama: Any, question: str, answer: str) -> None:
    turns = (Turn("user", (IMAGE, f"\n{question}")), Turn("assistant", (answer,)))
    assert LLAVA["vicuna-v1"](turns, with_image(llama.reference), llama.reference.legacy) is None
    _, labels = encode("vicuna-v1", llama, turns)
    trained = [label for label in labels if label != IGNORE]
    assert trained[-1] == llama.tokenizer.eos_token_id
    assert llama.tokenizer.eos_token_id not in trained[:-1]
    assert llama.tokenizer.decode(trained[:-1]) == answer


def test_an_image_tag_in_an_answer_is_text(llama: Any) -> None:
    turns = (Turn("user", (IMAGE, "\nWhich tag?")), Turn("assistant", ("Write <image> there.",)))
    theirs = LLAVA["vicuna-v1"](turns, with_image(llama.reference), llama.reference.legacy)
    assert theirs is not None
    assert theirs[0].count(IMAGE_TOKEN) == 2
    ids, labels = encode("vicuna-v1", llama, turns)
    assert ids.count(IMAGE_TOKEN) == 1
    assert llama.tokenizer.decode([label for label in labels if label != IGNORE]) == "Write <image> there.</s>"


def multimodal(question: str) -> str:
    """A question in a record with an image after LLaVA's ``preprocess_multimodal``."""
    return f"<image>\n{question.replace('<image>', '').strip()}".strip() if "<image>" in question else question


QUESTIONS = [
    "<image>",
    "<image>\n",
    " <image> ",
    "<image>\nTwo <image> tags",
    "What is <image> this?",
    "<image>What?<image>",
    "What?\n<image>\n",
]


@pytest.mark.parametrize("name", ["vicuna-v1", "llava-v1", "llama-2"])
@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_image_tags_in_questions_equal_llavas(llama: Any, name: str, question: str, image: bool) -> None:
    """In a record without an image, they are text."""
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]
    sample = llava_sample({"id": 1, **({"image": "a.jpg"} if image else {}), "conversations": said}, "here", "/photos")
    tokenize = with_image(llama.reference) if image else llama.reference
    turns = (Turn("user", (multimodal(question) if image else question,)), Turn("assistant", ("A dog.",)))
    assert encode(name, llama, arrange(sample.turns, "first", "")) == LLAVA[name](
        turns, tokenize, llama.reference.legacy
    )


@pytest.mark.parametrize(
    "caption", [" A dog", "  A dog", "\u2581A dog", "\u2581", "\nA dog", "\tA dog", "</s", "A  dog "]
)
def test_captions_that_begin_with_a_space_equal_llavas(llama: Any, caption: str) -> None:
    """SentencePiece prepends a space to every text, transformers 5 not to one that begins with a space."""
    turns = (Turn("user", (IMAGE,)), Turn("assistant", (caption,)))
    made = encode("plain", llama, turns)
    assert made == plain(turns, with_image(llama.reference), llama.reference.legacy)
    encoding = Encoding(registry().create("templates", {"name": "plain"}), llama.tokenizer, 1)
    assert encoding.lengths([turns]) == [len(made[0])]
    assert encoding.may_exceed(turns, len(made[0]) - 1)


def test_names_of_special_tokens_are_text(llama: Any) -> None:
    """LLaVA trains the end token and the turn that the answer quotes; here both are text."""
    answer = "A dog.</s>USER: faked ASSISTANT: answer"
    turns = (Turn("user", (IMAGE, "\nWhat?")), Turn("assistant", (answer,)))
    theirs = LLAVA["vicuna-v1"](turns, with_image(llama.reference), llama.reference.legacy)
    assert theirs is not None
    assert theirs[1].count(llama.tokenizer.eos_token_id) == 2
    for name in ("vicuna-v1", "vicuna-v0", "plain"):
        ids, labels = encode(name, llama, turns)
        assert ids.count(llama.tokenizer.eos_token_id) == (name == "vicuna-v1")
        assert answer in llama.tokenizer.decode([label for label in labels if label != IGNORE])
