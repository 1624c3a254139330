"""A conversation to token ids and labels, built together from one tokenisation.

The template says what is written and which of it is trained; the text between two images is tokenised
whole, as LLaVA does, and a token is trained when its last character is. For a tokenizer with an ``image_token`` of its
own, images are that token and the whole text is tokenised at once, as transformers' processors do. Nothing is tokenised
twice, so a "tokenization mismatch" can't exist.

What is said is never more than text: the name of a special token in a caption, a question or an answer
(``</s>``, ``<|im_end|>``) is spelled with ordinary tokens. Only the template writes special ones.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

from llavactl.components.languages.image_token import image_token
from llavactl.components.languages.sentencepiece_spaces import omitted_space_prefixes
from llavactl.core.errors import ConversationError
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Content, Encoded, ImageRef, Segment, Text, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template

ImageOrder = Literal["first", "random", "as-data"]

_BREAKS = tuple(chr(0xFDEF - index) for index in range(32))
"""Unicode noncharacters. One that a conversation doesn't contain, inserted into a special token's name, hides it.

Its own tokens are removed again after tokenising.
"""


class _Run(NamedTuple):
    """The tokens between two images (``spans``: their positions in ``text``; ``mark``: the break), or of one image.

    Before ``_split_at_images``, it may contain images as single tokens.
    """

    ids: list[int]
    labels: list[int]
    text: str = ""
    spans: Sequence[tuple[int, int]] = ()
    mark: str = ""

    def texts(self) -> Iterator[str]:
        """What each token stands for: of the bytes of one character the first one has it."""
        behind = 0
        for start, end in self.spans or [(0, 0)] * len(self.ids):
            text = self.text[max(start, behind) : end]
            yield text.replace(self.mark, "") if self.mark else text
            behind = max(end, behind)


@dataclass(frozen=True)
class Encoding:
    """How conversations become tokens: the template, the tokenizer, and Q ``image_tokens`` an image."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_tokens: int
    max_length: int | None = None

    def encode(self, turns: Sequence[Turn], *, generate: bool = False) -> Encoded:
        """``turns`` as ids and labels [T], cut to ``max_length``; an image is cut whole or not at all."""
        runs = self._runs(turns, generate)
        ids = [token for run in runs for token in run.ids]
        labels = [label for run in runs for label in run.labels]
        images = tuple(image for turn in turns for image in turn.images)
        if self.max_length is not None and len(ids) > self.max_length:
            return self._truncated(ids, labels, images, self.max_length)
        return Encoded(tuple(ids), tuple(labels), images)

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        """The characters that each token of ``turns`` stands for, nothing cut; none for those of images."""
        return [text for run in self._runs(turns, False) for text in run.texts()]

    def lengths(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        """T of each of ``conversations``, uncut: as ``encode`` makes them, but tokenised at once, on all cores."""
        written = [self._written(turns) for turns in conversations]
        # A part with a break is tokenised separately, below.
        texts = list(dict.fromkeys(part for parts, mark in written for part in parts if part and not _in(mark, part)))
        bare = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        known = dict(zip(texts, self.tokenizer(texts, **bare)["input_ids"] if texts else [], strict=True))
        totals = []
        for parts, mark in written:
            runs = [
                self._alone(part, mark) if part is None or _in(mark, part) or part not in known else known[part]
                for part in parts
            ]
            begins = bool(runs) and list(runs[0][:1]) == [self._bos]
            images = sum(list(run).count(self._image[1]) for run in runs) if self._image else 0
            totals.append(
                sum(map(len, runs)) + images * (self.image_tokens - 1) + (self._bos is not None and not begins)
            )
        return totals

    def written(self, turns: Sequence[Turn]) -> str:
        """The text that the template renders, without images and without tokenising.

        Raises:
            ConversationError: the template refuses ``turns``.
        """
        return "".join(each.text for each in self._render(turns, False)[0] if isinstance(each, Text))

    def may_exceed(self, turns: Sequence[Turn], length: int) -> bool:
        """False where ``turns`` can't have more than ``length`` tokens, which no tokenizer is asked for.

        Of ASCII a token has a character at least, but for one that some tokenizers put before a text.
        """
        segments, _ = self._render(turns, False)
        texts = [each.text for each in segments if isinstance(each, Text)]
        images = len(segments) - len(texts)
        most = 2 + images * (self.image_tokens + 1) + sum(map(len, texts))
        return most > length or not all(text.isascii() for text in texts)

    def _written(self, turns: Sequence[Turn]) -> tuple[list[str | None], str]:
        """The texts that are tokenised, None for an image between two; and the break that they may contain."""
        segments, mark = self._render(turns, False)
        pieces = self._chunks(segments)
        return [None if piece is None else "".join(segment.text for segment in piece) for piece in pieces], mark

    def _alone(self, part: str | None, mark: str) -> Sequence[int]:
        """The ids of one part of ``_written``."""
        return [IMAGE_TOKEN] * self.image_tokens if part is None else _tokenise([Text(part)], self.tokenizer, mark).ids

    def trains(self, turns: Sequence[Turn]) -> bool:
        """Whether ``turns`` have a target token within ``max_length``; renders all of them, so that a refusal raises.

        A text has at most as many tokens as bytes, plus one if it begins a new text. Only if this bound isn't enough
        is anything tokenised.
        """
        most = 2
        for segment in self._render(turns, False)[0]:
            if not isinstance(segment, Text):
                most += self.image_tokens + 1
            elif segment.trained and segment.text and (self.max_length is None or most < self.max_length):
                return True
            else:
                most += len(segment.text.encode("utf-8", "surrogatepass"))
        return self.encode(turns).target_tokens > 0

    def _runs(self, turns: Sequence[Turn], generate: bool) -> list[_Run]:
        """BOS where this tokenizer begins with it, then text and images in turn."""
        image = _Run([IMAGE_TOKEN] * self.image_tokens, [IGNORE] * self.image_tokens)
        segments, mark = self._render(turns, generate)
        runs: list[_Run] = []
        for piece in self._chunks(segments):
            runs += [image] if piece is None else self._split_at_images(_tokenise(piece, self.tokenizer, mark), image)
        bos = self._bos
        if bos is not None and not (runs and runs[0].ids[:1] == [bos]):
            text = str(self.tokenizer.bos_token)
            runs.insert(0, _Run([bos], [IGNORE], text, [(0, len(text))]))
        return runs

    def _chunks(self, segments: Sequence[Segment]) -> list[list[Text] | None]:
        """The texts that are tokenised together; None for an image between two."""
        if self._image is None:
            pieces = _pieces(segments)
            omitted = self._omitted_spaces
            return pieces if omitted is None else [piece and _with_spaces(piece, omitted) for piece in pieces]
        token = Text(self._image[0])
        return [[each if isinstance(each, Text) else token for each in segments]]

    def _split_at_images(self, run: _Run, image: _Run) -> list[_Run]:
        """``run`` split at its image tokens, each replaced by ``image``."""
        if self._image is None:
            return [run]
        found: list[_Run] = []
        start = 0
        places = [at for at, token in enumerate(run.ids) if token == self._image[1]]
        for at in (*places, len(run.ids)):
            ids, labels, spans = run.ids[start:at], run.labels[start:at], run.spans[start:at]
            found += [_Run(ids, labels, run.text, spans, run.mark), image]
            start = at + 1
        return found[:-1]

    def _render(self, turns: Sequence[Turn], generate: bool) -> tuple[list[Segment], str]:
        """``turns`` as the template renders them, and the break inserted into special tokens' names, if any occur.

        Raises:
            ConversationError: the template refuses them.
        """
        names, mark = self._specials, ""
        if names is not None and any(names.search(turn.text) for turn in turns):
            said = {each for turn in turns for each in turn.text}
            mark = next((each for each in _BREAKS if each not in said), "")
            if not mark:
                raise ConversationError("the conversation has too many Unicode noncharacters (U+FDD0 to U+FDEF)")
            turns = [Turn(turn.role, tuple(_broken(part, names, mark) for part in turn.content)) for turn in turns]
        return self.template.render(turns, self.tokenizer, generate=generate), mark

    @cached_property
    def _specials(self) -> re.Pattern[str] | None:
        """A pattern for the first character of the name of any token that is special or delimits turns.

        A name of a single character can't be broken up.
        """
        added = {token.content: token.special for token in self.tokenizer.added_tokens_decoder.values()}
        written = self._turned()
        names = {name for name, special in added.items() if special or name in written}
        names |= {*self.tokenizer.all_special_tokens, *(self._image or ())[:1]}
        longer = sorted(name for name in names if len(name) > 1)
        if not longer:
            return None
        firsts = "".join(sorted({re.escape(name[0]) for name in longer}))
        # Searching for a character class is three times as fast as for an alternation of names.
        return re.compile(f"([{firsts}])(?<=(?={'|'.join(map(re.escape, longer))}).)", re.DOTALL)

    def _turned(self) -> str:
        """The text that the template writes around turns."""
        talk = [Turn("user", ("a",)), Turn("assistant", ("a",)), Turn("user", ("a",))]
        for turns in (talk, talk[:1]):
            try:
                found = self.template.render(turns, self.tokenizer, generate=True)
            except ConversationError:
                continue
            texts = [each.text for each in found if isinstance(each, Text)]
            return "".join([*texts, *self.template.stop(self.tokenizer)])
        return ""

    @cached_property
    def _omitted_spaces(self) -> re.Pattern[str] | None:
        return omitted_space_prefixes(self.tokenizer)

    @cached_property
    def _image(self) -> tuple[str, int] | None:
        """The image token and its id; None: the text is split at images."""
        token = image_token(self.tokenizer)
        return None if token is None else (token, int(self.tokenizer.convert_tokens_to_ids(token)))

    @cached_property
    def _bos(self) -> int | None:
        """The token that this tokenizer begins every text with, if it does."""
        first = self.tokenizer("a")["input_ids"][:1]
        return first[0] if first and first[0] == self.tokenizer.bos_token_id else None

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


def _with_spaces(piece: list[Text], omitted: re.Pattern[str]) -> list[Text]:
    """``piece`` with an additional space at the end of each match of ``omitted``."""
    places = [found.end() for found in omitted.finditer("".join(each.text for each in piece))]
    if not places:
        return piece
    spaced, start = [], 0
    for each in piece:
        end = start + len(each.text)
        cuts = [start, *(at for at in places if start <= at < end), end]
        parts = [each.text[one - start : other - start] for one, other in pairwise(cuts)]
        spaced.append(Text(" ".join(parts), each.trained))
        start = end
    return spaced


def _in(mark: str, text: str) -> bool:
    return bool(mark) and mark in text


def _broken(part: Content, names: re.Pattern[str], mark: str) -> Content:
    return names.sub(rf"\1{mark}", part) if isinstance(part, str) else part


def _tokenise(piece: Sequence[Text], tokenizer: PreTrainedTokenizerBase, mark: str) -> _Run:
    text = "".join(segment.text for segment in piece)
    if not text:
        return _Run([], [])
    trained = [segment.trained for segment in piece for _ in segment.text]
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, spans = list(found["input_ids"]), list(found["offset_mapping"])
    if _in(mark, text):
        kept = [at for at, (start, end) in enumerate(spans) if text[start:end] != mark]
        ids, spans = [ids[at] for at in kept], [spans[at] for at in kept]
    # A token that the tokenizer put in by itself (SentencePiece's leading space) has no length.
    last = [min(max(start, end - 1), len(trained) - 1) for start, end in spans]
    labels = [token if trained[at] else IGNORE for token, at in zip(ids, last, strict=True)]
    return _Run(ids, labels, text, spans, mark)


def arrange(turns: Sequence[Turn], order: ImageOrder, seed: str) -> tuple[Turn, ...]:
    """Moves the images of each user turn before its text, as LLaVA v1.5 does (``first``).

    ``random`` puts those of the first user turn before or after the question by a coin seeded with ``seed``
    (LLaVA paper, equation 2), those of later turns before it; ``as-data`` leaves all where the record has them.
    """
    if order == "as-data":
        return tuple(turns)
    return _arranged(turns, after=order == "random" and random.Random(seed).random() < 0.5)


def arrangements(turns: Sequence[Turn], order: ImageOrder) -> tuple[tuple[Turn, ...], ...]:
    """All that ``arrange`` may make of ``turns``, whatever the seed."""
    if order == "as-data":
        return (tuple(turns),)
    return tuple(_arranged(turns, after=after) for after in ((False, True) if order == "random" else (False,)))


def _arranged(turns: Sequence[Turn], *, after: bool) -> tuple[Turn, ...]:
    arranged = []
    for turn in turns:
        if turn.role == "user":
            arranged.append(Turn("user", _beside(turn, after)) if turn.images else turn)
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
