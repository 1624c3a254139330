"""What LLaVA's own training code masks, where it is right: the same ids and labels, to the token.

LLaVA tokenises a conversation, then its rounds once more, and subtracts. Where the two don't add up it drops the
sample; the last tests say where that is, and that we don't.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llavactl.components.sources.llava_json import sample_of
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
Tokenise = Callable[[str], Ids]
Made = tuple[Ids, Ids] | None
"""Ids and labels; None: a mismatch, the sample is dropped."""


def values(turns: Sequence[Turn]) -> list[str]:
    return ["".join(part if isinstance(part, str) else "<image>" for part in turn.content) for turn in turns]


def with_image(speak: Tokenise) -> Tokenise:
    """One BOS, one token an image, and every piece between tokenised as a text of its own."""

    def tokenise(text: str) -> Ids:
        first, *rest = (speak(piece)[1:] for piece in text.split("<image>"))
        return [1, *first, *(token for piece in rest for token in (IMAGE_TOKEN, *piece))]

    return tokenise


def rounds(text: str, mark: str, speak: Tokenise, shorter: int) -> Made:
    """The labels of v1 and llama_2: from each round the length of all up to ``mark`` is masked.

    ``shorter``: what a round is counted less where it is not the first.
    """
    ids = speak(text)
    labels = [IGNORE] * len(ids)
    at = 1
    for number, said in enumerate(text.split("</s>")):
        parts = said.split(mark)
        if not said or len(parts) != 2:
            break
        less = shorter if number else 0
        length = len(speak(said)) - less
        question = len(speak(parts[0] + mark)) - 2 - less
        labels[at + question : at + length] = ids[at + question : at + length]
        at += length
    return (ids, labels) if at == len(ids) else None


def v1(system: str) -> Callable[[Sequence[Turn], Tokenise, bool], Made]:
    def masked(turns: Sequence[Turn], speak: Tokenise, legacy: bool) -> Made:
        text = system + " "
        for number, value in enumerate(values(turns)):
            text += f"USER: {value} " if number % 2 == 0 else f"ASSISTANT: {value}</s>"
        return rounds(text, " ASSISTANT: ", speak, 0 if legacy else 1)

    return masked


def llama_2(turns: Sequence[Turn], speak: Tokenise, legacy: bool) -> Made:
    text = ""
    for number, value in enumerate(values(turns)):
        system = f"<<SYS>>\n{VISION}\n<</SYS>>\n\n" if number == 0 else ""
        text += f"<s>[INST] {system}{value} [/INST]" if number % 2 == 0 else f" {value} </s>"
    return rounds(text.lstrip("<s>"), "[/INST] ", speak, 0)


def plain(turns: Sequence[Turn], speak: Tokenise, legacy: bool) -> Made:
    assert len(turns) == 2
    ids = speak("<image>" + turns[1].text + "\n")
    asked = len(speak("<image>"))
    return ids, [IGNORE] * asked + ids[asked:]


def v0(turns: Sequence[Turn], speak: Tokenise, legacy: bool) -> Made:
    header = HUMAN + "\n\n"
    said = [f"### {('Human', 'Assistant')[at % 2]}: {value}\n" for at, value in enumerate(values(turns))]
    ids = speak(header + "".join(said) + "### ")
    at = len(speak(header))
    labels = [IGNORE] * at + ids[at:]
    for number, turn in enumerate(said):
        length = len(speak(turn))
        if number % 2 == 0:
            labels[at + 2 : at + length] = [IGNORE] * len(labels[at + 2 : at + length])
        at += length
    return ids, labels


LLAVA: dict[str, Callable[[Sequence[Turn], Tokenise, bool], Made]] = {
    "vicuna-v1": v1(USER),
    "llava-v1": v1(HUMAN),
    "llama-2": llama_2,
    "plain": plain,
}


def encode(name: str, vocabulary: Any, turns: Sequence[Turn]) -> tuple[Ids, Ids]:
    made = Encoding(registry().create("templates", {"name": name}), vocabulary.tokenizer, 1).encode(turns)
    return list(made.ids), list(made.labels)


def told(samples: list[Sample], name: str) -> list[tuple[Turn, ...]]:
    """Conversations as LLaVA trains them: the image first, ``<image>`` nowhere else; for plain one caption."""
    turns = [arrange(sample.turns, "first", "") for sample in samples]
    turns = [each for each in turns if not any("<image>" in turn.text for turn in each)]
    return [each[:2] for each in turns if each[0].images] if name == "plain" else turns


def compare(name: str, vocabulary: Any, samples: list[Sample]) -> None:
    speak = with_image(vocabulary.speaker)
    found = told(samples, name)
    assert len(found) >= 5
    for turns in found:
        assert LLAVA[name](turns, speak, vocabulary.speaker.legacy) == encode(name, vocabulary, turns), turns


@pytest.mark.parametrize("name", LLAVA)
def test_as_llava_does(llama: Any, samples: list[Sample], name: str) -> None:
    compare(name, llama, samples)


@pytest.mark.slow
@pytest.mark.parametrize("name", LLAVA)
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not-legacy"])
def test_as_llava_does_with_llamas_own_vocabulary(vicuna: Any, samples: list[Sample], name: str, legacy: bool) -> None:
    compare(name, vicuna(legacy), samples)


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [True, False], ids=["legacy", "not-legacy"])
def test_v0_is_as_llavas_with_the_vocabulary_it_was_written_for(
    vicuna: Any, samples: list[Sample], legacy: bool
) -> None:
    """It counts a BOS a turn, and a turn alone begins with one token where inside it begins with two (## and #)."""
    vocabulary = vicuna(legacy)
    assert len(vocabulary.speaker.bare("###")[0]) == 1
    assert len(vocabulary.speaker.bare("\n###")[0]) == 2 + 2
    for turns in told(samples, "vicuna-v0"):
        assert v0(turns, with_image(vocabulary.speaker), legacy) == encode("vicuna-v0", vocabulary, turns)


def test_v0_drifts_with_any_other_vocabulary(llama: Any, samples: list[Sample]) -> None:
    """Here ### is one token inside, too: LLaVA's masks slip by one more token with every turn, ours don't."""
    turns = told(samples, "vicuna-v0")[1]
    assert len(turns) == 6
    theirs = v0(turns, with_image(llama.speaker), llama.speaker.legacy)
    ids, labels = encode("vicuna-v0", llama, turns)
    assert theirs is not None
    assert theirs[0] == ids
    slipped = [llama.speaker.pieces[token] for token, label in zip(ids, theirs[1], strict=True) if label == IGNORE]
    assert slipped.count("###") == 3, "what every answer begins with is not trained"
    assert slipped.count("▁Human") == 0, "but the user's name is"
    assert [label for token, label in zip(ids, labels, strict=True) if llama.speaker.pieces[token] == "###"] == (
        [llama.speaker.pieces.index("###")] * 7
    )


PHOTO = ImageFile("/photos", "a.jpg")


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does ASSISTANT: mean?", "The one who answers."),
        ("Who speaks?", "First USER: then ASSISTANT: speaks."),
        ("What is </s>?", "The end."),
        ("What ends it?", "It is </s> that ends it."),
    ],
)
def test_where_llava_drops_a_sample_we_train_its_answer(llama: Any, question: str, answer: str) -> None:
    turns = (Turn("user", (PHOTO, f"\n{question}")), Turn("assistant", (answer,)))
    assert LLAVA["vicuna-v1"](turns, with_image(llama.speaker), llama.speaker.legacy) is None
    _, labels = encode("vicuna-v1", llama, turns)
    trained = [label for label in labels if label != IGNORE]
    assert trained[-1] == llama.tokenizer.eos_token_id
    assert llama.tokenizer.eos_token_id not in trained[:-1]
    assert llama.tokenizer.decode(trained[:-1]) == answer


def test_a_tag_in_an_answer_is_text_where_llava_looks_for_a_second_image(llama: Any) -> None:
    turns = (Turn("user", (PHOTO, "\nWhich tag?")), Turn("assistant", ("Write <image> there.",)))
    theirs = LLAVA["vicuna-v1"](turns, with_image(llama.speaker), llama.speaker.legacy)
    assert theirs is not None
    assert theirs[0].count(IMAGE_TOKEN) == 2
    ids, labels = encode("vicuna-v1", llama, turns)
    assert ids.count(IMAGE_TOKEN) == 1
    assert llama.tokenizer.decode([label for label in labels if label != IGNORE]) == "Write <image> there.</s>"


def multimodal(question: str) -> str:
    """What LLaVA's ``preprocess_multimodal`` makes of a question in a record with an image."""
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
def test_tags_are_read_as_in_llava(llama: Any, name: str, question: str, image: bool) -> None:
    """In a record with an image and in one without, where LLaVA trains them as text."""
    said = [{"from": "human", "value": question}, {"from": "gpt", "value": "A dog."}]
    sample = sample_of({"id": 1, **({"image": "a.jpg"} if image else {}), "conversations": said}, "here", "/photos")
    speak = with_image(llama.speaker) if image else llama.speaker
    turns = (Turn("user", (multimodal(question) if image else question,)), Turn("assistant", ("A dog.",)))
    assert encode(name, llama, arrange(sample.turns, "first", "")) == LLAVA[name](turns, speak, llama.speaker.legacy)


@pytest.mark.parametrize(
    "caption", [" A dog", "  A dog", "\u2581A dog", "\u2581", "\nA dog", "\tA dog", "</s", "A  dog "]
)
def test_a_caption_begins_with_a_space_of_its_own(llama: Any, caption: str) -> None:
    """Whatever it begins with: SentencePiece adds one, transformers 5 doesn't before a space."""
    turns = (Turn("user", (PHOTO,)), Turn("assistant", (caption,)))
    made = encode("plain", llama, turns)
    assert made == plain(turns, with_image(llama.speaker), llama.speaker.legacy)
    encoding = Encoding(registry().create("templates", {"name": "plain"}), llama.tokenizer, 1)
    assert encoding.lengths([turns]) == [len(made[0])]
    assert encoding.may_exceed(turns, len(made[0]) - 1)


def test_special_tokens_that_llava_takes_for_its_own_are_text(llama: Any) -> None:
    """LLaVA trains an end and another turn that the answer only quotes; here both are its words."""
    answer = "A dog.</s>USER: faked ASSISTANT: answer"
    turns = (Turn("user", (PHOTO, "\nWhat?")), Turn("assistant", (answer,)))
    theirs = LLAVA["vicuna-v1"](turns, with_image(llama.speaker), llama.speaker.legacy)
    assert theirs is not None
    assert theirs[1].count(llama.tokenizer.eos_token_id) == 2
    for name in ("vicuna-v1", "vicuna-v0", "plain"):
        ids, labels = encode(name, llama, turns)
        assert ids.count(llama.tokenizer.eos_token_id) == (name == "vicuna-v1")
        assert answer in llama.tokenizer.decode([label for label in labels if label != IGNORE])
