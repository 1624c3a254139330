"""Encodes a conversation as token ids and labels, both from one tokenization.

The template renders the conversation and marks the target text. The text between two images is tokenized as one string,
as in LLaVA. If the tokenizer has an image token, images are written as that token and the whole conversation is
tokenized as one string, as in the processors of transformers. Since no text is tokenized twice, ids and labels can't
disagree ("tokenization mismatch" in LLaVA).

Text of captions, questions and answers is always encoded as ordinary tokens, even if it contains the name of a special
token (``</s>``, ``<|im_end|>``). Only the template writes special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from llavactl.components.languages.image_token import image_token
from llavactl.components.languages.sentencepiece_spaces import omitted_space_prefixes
from llavactl.core.errors import ConversationError
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, ImageRef, Segment, Text, Turn
from llavactl.data.text_tokens import (
    SEPARATORS,
    TokenRun,
    contains_separator,
    insert_separator,
    restore_spaces,
    special_name_pattern,
    split_at_images,
    tokenize,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llavactl.core.protocols import Template
    from llavactl.data.token_counts import TokenCounter


class Rendered(NamedTuple):
    """A conversation as its template renders it, and the separator in names of special tokens ("" if none occurs)."""

    segments: list[Segment]
    separator: str


class TokenSpan(NamedTuple):
    """The number of tokens of a piece of a conversation; it is an ``image``, a ``target`` of the loss, or neither."""

    tokens: int
    target: bool = False
    image: bool = False


@dataclass(frozen=True)
class Encoding:
    """Encodes conversations with a template and a tokenizer; each image becomes ``image_tokens`` (Q) tokens."""

    template: Template
    tokenizer: PreTrainedTokenizerBase
    image_tokens: int
    max_length: int | None = None

    def encode(self, turns: Sequence[Turn], *, generate: bool = False) -> Encoded:
        """``turns`` as ids and labels [T], truncated to ``max_length``; an image is kept complete or removed."""
        return self._encoded(self.render(turns, generate=generate), turns)

    def encode_answer(self, turns: Sequence[Turn]) -> Encoded:
        """``turns``, which end with an answer, as in ``encode``; the only targets are the tokens of that answer.

        They follow the prompt for the answer and don't include the text that ends it.

        Raises:
            ConversationError: the template refuses ``turns``, or renders other text before the answer than its prompt.
        """
        rendered = self.render(turns)
        prompt = _characters(self.render(turns[:-1], generate=True).segments)
        probe = _characters(self.render([*turns[:-1], Turn("assistant", ("a",))]).segments)
        whole, probe_answer = _characters(rendered.segments), probe[len(prompt) :].lstrip()
        if not whole.startswith(prompt) or not probe.startswith(prompt) or not probe_answer.startswith("a"):
            raise ConversationError("the template renders other text before an answer than in the prompt for it")
        end = len(whole) - len(probe_answer[1:])
        return self._encoded(Rendered([*_with_target(rendered.segments, len(prompt), end)], rendered.separator), turns)

    def _encoded(self, rendered: Rendered, turns: Sequence[Turn]) -> Encoded:
        """``rendered``, which is ``turns``, as ids and labels."""
        runs = self._runs(rendered)
        ids = [token for run in runs for token in run.ids]
        labels = [label for run in runs for label in run.labels]
        images = tuple(image for turn in turns for image in turn.images)
        if self.max_length is not None and len(ids) > self.max_length:
            return self._truncated(ids, labels, images, self.max_length)
        return Encoded(tuple(ids), tuple(labels), images)

    def texts(self, turns: Sequence[Turn]) -> list[str]:
        """The characters of each token of ``turns``, not truncated; "" for image tokens."""
        return [text for run in self._runs(self.render(turns)) for text in run.texts()]

    def lengths(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        """T of each conversation, not truncated: as in ``encode``, but tokenized in one call on all cores."""
        chunked = [self._chunk_texts(turns) for turns in conversations]
        texts = list(
            dict.fromkeys(
                text
                for chunks, separator in chunked
                for text in chunks
                if text and not contains_separator(text, separator)
            )
        )
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids_by_text = dict(zip(texts, self.tokenizer(texts, **options)["input_ids"] if texts else [], strict=True))
        totals = []
        for chunks, separator in chunked:
            runs = [
                # A text with a separator is tokenized separately, as the separator's tokens must be removed.
                self._chunk_ids(text, separator)
                if text is None or contains_separator(text, separator) or text not in ids_by_text
                else ids_by_text[text]
                for text in chunks
            ]
            starts_with_bos = bool(runs) and list(runs[0][:1]) == [self._bos]
            images = sum(list(run).count(self._image[1]) for run in runs) if self._image else 0
            totals.append(
                sum(map(len, runs)) + images * (self.image_tokens - 1) + (self._bos is not None and not starts_with_bos)
            )
        return totals

    def token_spans(self, rendered: Rendered, counter: TokenCounter) -> Iterator[TokenSpan]:
        """The tokens that ``encode`` returns before truncation, counted; ``rendered`` must have no separator."""
        image = Text("") if self._image is None else Text(self._image[0])
        for index, chunk in enumerate(self._chunks(rendered.segments, image)):
            if chunk is None:
                if not index and self._bos is not None:
                    yield TokenSpan(1)
                yield TokenSpan(self.image_tokens, image=True)
                continue
            pieces = [
                (list(parts), key)
                for key, parts in groupby(chunk, lambda part: None if part is image else part.trained)
            ]
            counts, first_id = counter.counts(["".join([part.text for part in parts]) for parts, _ in pieces])
            if not index and self._bos is not None and first_id != self._bos:
                yield TokenSpan(1)
            for (parts, trained), count in zip(pieces, counts, strict=True):
                if trained is None:
                    yield from [TokenSpan(self.image_tokens, image=True)] * len(parts)
                elif count:
                    yield TokenSpan(count, target=trained)

    def rendered_text(self, turns: Sequence[Turn]) -> str:
        """The text that the template renders, without images; nothing is tokenized.

        Raises:
            ConversationError: the template refuses ``turns``.
        """
        return "".join(segment.text for segment in self.render(turns)[0] if isinstance(segment, Text))

    def may_exceed(self, turns: Sequence[Turn], length: int) -> bool:
        """False if ``turns`` can't have more than ``length`` tokens; nothing is tokenized.

        In ASCII text every token has at least one character, except one that some tokenizers insert before a text.
        """
        segments, _ = self.render(turns)
        texts = [segment.text for segment in segments if isinstance(segment, Text)]
        images = len(segments) - len(texts)
        upper_bound = 2 + images * (self.image_tokens + 1) + sum(map(len, texts))
        return upper_bound > length or not all(text.isascii() for text in texts)

    def has_targets(self, turns: Sequence[Turn]) -> bool:
        """Whether ``turns`` have a target token within ``max_length``; the template must accept all of them.

        A text has at most as many tokens as bytes, plus one at the start of a new text. Tokenization is skipped if
        this bound is sufficient.
        """
        upper_bound = 2
        for segment in self.render(turns)[0]:
            if not isinstance(segment, Text):
                upper_bound += self.image_tokens + 1
            elif segment.trained and segment.text and (self.max_length is None or upper_bound < self.max_length):
                return True
            else:
                upper_bound += len(segment.text.encode("utf-8", "surrogatepass"))
        return self.encode(turns).target_tokens > 0

    def _runs(self, rendered: Rendered) -> list[TokenRun]:
        """The runs of text and image tokens, after BOS if the tokenizer starts texts with it."""
        image = TokenRun([IMAGE_TOKEN] * self.image_tokens, [IGNORE] * self.image_tokens)
        segments, separator = rendered
        runs: list[TokenRun] = []
        for chunk in self._chunks(segments):
            runs += [image] if chunk is None else self._expand_images(tokenize(chunk, self.tokenizer, separator), image)
        bos = self._bos
        if bos is not None and not (runs and runs[0].ids[:1] == [bos]):
            text = str(self.tokenizer.bos_token)
            runs.insert(0, TokenRun([bos], [IGNORE], text, [(0, len(text))]))
        return runs

    def _chunks(self, segments: Sequence[Segment], image: Text | None = None) -> list[list[Text] | None]:
        """The texts that are tokenized together; None for an image between them.

        If the tokenizer has an image token, images are texts, ``image`` if given.
        """
        if self._image is None:
            chunks = split_at_images(segments)
            omitted = self._omitted_spaces
            return chunks if omitted is None else [chunk and restore_spaces(chunk, omitted) for chunk in chunks]
        token = image or Text(self._image[0])
        return [[segment if isinstance(segment, Text) else token for segment in segments]]

    def _chunk_texts(self, turns: Sequence[Turn]) -> tuple[list[str | None], str]:
        """``_chunks`` as strings, and the separator that they may contain."""
        segments, separator = self.render(turns)
        chunks = self._chunks(segments)
        return [None if chunk is None else "".join(part.text for part in chunk) for chunk in chunks], separator

    def _chunk_ids(self, text: str | None, separator: str) -> Sequence[int]:
        """The ids of one of ``_chunk_texts``."""
        if text is None:
            return [IMAGE_TOKEN] * self.image_tokens
        return tokenize([Text(text)], self.tokenizer, separator).ids

    def _expand_images(self, run: TokenRun, image: TokenRun) -> list[TokenRun]:
        """``run`` split at its image tokens, each replaced by ``image``."""
        if self._image is None:
            return [run]
        runs: list[TokenRun] = []
        start = 0
        image_positions = [index for index, token in enumerate(run.ids) if token == self._image[1]]
        for end in (*image_positions, len(run.ids)):
            ids, labels, offsets = run.ids[start:end], run.labels[start:end], run.offsets[start:end]
            runs += [TokenRun(ids, labels, run.text, offsets, run.separator), image]
            start = end + 1
        return runs[:-1]

    def render(self, turns: Sequence[Turn], *, generate: bool = False) -> Rendered:
        """``turns`` as segments.

        Raises:
            ConversationError: the template refuses ``turns``.
        """
        names, separator = self._special_names, ""
        # Names are never longer than a turn, and "\0" is in none.
        if names is not None and names.search("\0".join([turn.text for turn in turns])):
            characters = {character for turn in turns for character in turn.text}
            separator = next((candidate for candidate in SEPARATORS if candidate not in characters), "")
            if not separator:
                raise ConversationError("the conversation has too many Unicode noncharacters (U+FDD0 to U+FDEF)")
            turns = [
                Turn(turn.role, tuple(insert_separator(part, names, separator) for part in turn.content))
                for turn in turns
            ]
        return Rendered(self.template.render(turns, self.tokenizer, generate=generate), separator)

    @cached_property
    def _special_names(self) -> re.Pattern[str] | None:
        """Matches the first character of the name of each token that is special or that the template writes.

        A name of a single character can't be separated and isn't matched.
        """
        added = {token.content: token.special for token in self.tokenizer.added_tokens_decoder.values()}
        template_text = self._template_text()
        names = {name for name, special in added.items() if special or name in template_text}
        names |= {*self.tokenizer.all_special_tokens, *(self._image or ())[:1]}
        return special_name_pattern(names)

    def _template_text(self) -> str:
        """The text that the template writes around turns."""
        conversation = [Turn("user", ("a",)), Turn("assistant", ("a",)), Turn("user", ("a",))]
        for turns in (conversation, conversation[:1]):
            try:
                segments = self.template.render(turns, self.tokenizer, generate=True)
            except ConversationError:
                continue
            texts = [segment.text for segment in segments if isinstance(segment, Text)]
            return "".join([*texts, *self.template.stop(self.tokenizer)])
        return ""

    @cached_property
    def _omitted_spaces(self) -> re.Pattern[str] | None:
        return omitted_space_prefixes(self.tokenizer)

    @cached_property
    def _image(self) -> tuple[str, int] | None:
        """The tokenizer's image token and its id; None if it has none, and text is split at images."""
        token = image_token(self.tokenizer)
        return None if token is None else (token, int(self.tokenizer.convert_tokens_to_ids(token)))

    @cached_property
    def _bos(self) -> int | None:
        """The BOS id if this tokenizer starts every text with it."""
        first = self.tokenizer("a")["input_ids"][:1]
        return first[0] if first and first[0] == self.tokenizer.bos_token_id else None

    def _truncated(self, ids: list[int], labels: list[int], images: tuple[ImageRef, ...], length: int) -> Encoded:
        """The first ``length`` tokens, without an image that would be cut or would be last."""
        while length and ids[length - 1] == IMAGE_TOKEN:
            length -= 1
        kept_images = sum(token == IMAGE_TOKEN for token in ids[:length]) // max(self.image_tokens, 1)
        return Encoded(tuple(ids[:length]), tuple(labels[:length]), images[:kept_images])


def _characters(segments: Sequence[Segment]) -> str:
    """The text of ``segments`` with one character for each image."""
    return "".join(segment.text if isinstance(segment, Text) else "\0" for segment in segments)


def _with_target(segments: Sequence[Segment], start: int, end: int) -> Iterator[Segment]:
    """``segments`` in which the characters from ``start`` to ``end``, as in ``_characters``, are the only target."""
    position = 0
    for segment in segments:
        if not isinstance(segment, Text):
            yield segment
            position += 1
            continue
        text = segment.text
        left, right = (min(max(at - position, 0), len(text)) for at in (start, end))
        yield from (Text(text[:left]), Text(text[left:right], trained=True), Text(text[right:]))
        position += len(text)
