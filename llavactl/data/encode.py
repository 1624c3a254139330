"""A conversation to token ids and labels, built together from one tokenisation.

The template says what is written and which of it is trained; the text between two images is tokenised
whole, as LLaVA does, and a token is trained when its last character is. Nothing is tokenised twice, so a
"tokenization mismatch" can't exist.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Content, Encoded, ImageRef, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template


@dataclass(frozen=True)
class Encoding:
    """How conversations become tokens: the template, the tokenizer, and Q ``image_tokens`` an image."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_tokens: int
    max_length: int | None = None

    def encode(self, turns: Sequence[Turn], *, generate: bool = False) -> Encoded:
        """``turns`` as ids and labels [T], cut to ``max_length``; an image is cut whole or not at all."""
        segments = self.template.render(turns, self.tokenizer, generate=generate)
        images = tuple(image for turn in turns for image in turn.images)
        ids: list[int] = []
        labels: list[int] = []
        for piece in _pieces(segments):
            if piece is None:
                ids += [IMAGE_TOKEN] * self.image_tokens
                labels += [IGNORE] * self.image_tokens
            else:
                piece_ids, piece_labels = _tokenise(piece, self.tokenizer)
                ids += piece_ids
                labels += piece_labels
        bos = _bos(self.tokenizer)
        if bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
            labels.insert(0, IGNORE)
        if self.max_length is not None and len(ids) > self.max_length:
            return self._truncated(ids, labels, images, self.max_length)
        return Encoded(tuple(ids), tuple(labels), images)

    def _truncated(self, ids: list[int], labels: list[int], images: tuple[ImageRef, ...], length: int) -> Encoded:
        """The first ``length`` tokens, less the image that would be cut through (or has nothing after it)."""
        while length and ids[length - 1] == IMAGE_TOKEN:
            length -= 1
        kept = sum(token == IMAGE_TOKEN for token in ids[:length]) // max(self.image_tokens, 1)
        return Encoded(tuple(ids[:length]), tuple(labels[:length]), images[:kept])


def _pieces(segments: Sequence[Segment]) -> list[list[Text] | None]:
    """Runs of text between images; None is an image."""
    pieces: list[list[Text] | None] = []
    for segment in segments:
        if not isinstance(segment, Text):
            pieces.append(None)
        elif pieces and (run := pieces[-1]) is not None:
            run.append(segment)
        else:
            pieces.append([segment])
    return pieces


def _tokenise(piece: Sequence[Text], tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    text = "".join(segment.text for segment in piece)
    if not text:
        return [], []
    trained = [segment.trained for segment in piece for _ in segment.text]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    # A token that the tokenizer put in by itself (SentencePiece's leading space) has no length.
    last = [min(max(start, end - 1), len(trained) - 1) for start, end in found["offset_mapping"]]
    ids = list(found["input_ids"])
    return ids, [token if trained[at] else IGNORE for token, at in zip(ids, last, strict=True)]


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that this tokenizer begins every text with, if it does."""
    first = tokenizer("a")["input_ids"][:1]
    return first[0] if first and first[0] == tokenizer.bos_token_id else None


def arrange(turns: Sequence[Turn], order: Literal["first", "random", "as-data"], seed: str) -> tuple[Turn, ...]:
    """Moves the images of each user turn before its text, as LLaVA v1.5 does (``first``).

    ``random`` puts those of the first turn before or after the question by a coin seeded with ``seed``
    (LLaVA paper, equation 2); ``as-data`` leaves all where the record has them.
    """
    if order == "as-data":
        return tuple(turns)
    after = order == "random" and random.Random(seed).random() < 0.5
    arranged = []
    for turn in turns:
        if turn.role == "user" and turn.images:
            arranged.append(Turn("user", _beside(turn, after)))
            after = False
        else:
            arranged.append(turn)
    return tuple(arranged)


def _beside(turn: Turn, after: bool) -> tuple[Content, ...]:
    text = turn.text.strip()
    if after:
        return (text, *(part for image in turn.images for part in ("\n", image)))
    front: tuple[Content, ...] = tuple(part for image in turn.images for part in (image, "\n"))
    return (*front, text) if text else front[:-1]
