"""A loaded model with its prompt encoding and image features, which answers conversations in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from llavactl.chat.common_prefix import common_prefix_length, split_prompt, token_keys
from llavactl.chat.detokenizer import Detokenizer, Stops
from llavactl.core.schema import IGNORE, Encoded, Text, Turn
from llavactl.data.batches import FeatureLookup, collate
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.model.exactness import Exact, exactness
from llavactl.model.generate import GREEDY, Sampling, generate, prefill
from llavactl.model.inputs import to_device
from llavactl.model.likelihood import Likelihood, likelihoods

if TYPE_CHECKING:
    from llavactl.core.schema import Batch, FeatureShape
    from llavactl.model.compiled import CompiledDecoder
    from llavactl.model.llava import LlavaModel

MIN_COMMON_PREFIX = 16
"""Tokens; a shorter common prefix of a batch is not worth a separate forward pass."""

COMPOSED = 4
"""The most characters that a tokenizer's Unicode normalization composes into one (NFC: 3)."""


@dataclass
class Assistant:
    """Answers conversations that end with the user's turn."""

    model: LlavaModel
    encoding: Encoding
    features: FeatureLookup
    image_order: Literal["first", "random", "as-data"] = "first"
    name: str = ""
    shape: FeatureShape | None = None
    """The shape of ``features``; None if it is unknown."""
    token_grid: tuple[int, int] | None = None
    """The grid (h, w) of the connector's tokens, see ``GridConnector``; None if they have none."""
    decoder: CompiledDecoder | None = None
    """Compiled decoding of conversations, one at a time; None: not compiled."""

    def prompt(self, turns: Sequence[Turn]) -> Encoded:
        """The encoded prompt; an empty one is replaced by the tokenizer's BOS or EOS token, if it has one.

        The template ``plain`` omits questions, so a question without an image gives an empty prompt.
        """
        encoded, start = self.encode(turns), self._start_id
        return encoded if encoded.ids or start is None else Encoded((start,), (IGNORE,))

    def min_tokens(self, turns: Sequence[Turn]) -> int:
        """A lower bound on the prompt's tokens, computed without tokenizing, which takes minutes for a book.

        Raises:
            ConversationError: the template refuses the conversation.
        """
        segments, separator = self.encoding.render(self._arranged(turns), generate=True)
        texts = [segment.text for segment in segments if isinstance(segment, Text)]
        characters = sum(len(text) - (text.count(separator) if separator else 0) for text in texts)
        images = len(segments) - len(texts)
        return images * self.encoding.image_tokens + characters // (COMPOSED * self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        """An upper bound on the characters of a token: some vocabularies spell tokens as bytes."""
        return max(map(len, self.encoding.tokenizer.get_vocab()), default=1)

    @property
    def _start_id(self) -> int | None:
        """The token that replaces an empty prompt."""
        tokenizer = self.encoding.tokenizer
        return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """The prompt as the template renders it; with ``image_order: random`` the image precedes the question."""
        return self.encoding.encode(self._arranged(turns), generate=True)

    def _arranged(self, turns: Sequence[Turn]) -> tuple[Turn, ...]:
        return arrange(turns, "as-data" if self.image_order == "as-data" else "first", "")

    @cached_property
    def exact(self) -> Exact:
        """Which optimizations leave the answers unchanged."""
        return exactness(self.model.language)

    @cached_property
    def stops(self) -> Stops:
        return Stops.of(self.encoding, _eos_ids(self.model))

    @cached_property
    def sampling(self) -> Sampling:
        """The sampling of the language model's generation config; greedy decoding unless it sets ``do_sample``."""
        return default_sampling(self.model.language)

    def answer(
        self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY, *, until: Sequence[str] = ()
    ) -> list[str]:
        """One answer per conversation, truncated at the first occurrence of a string in ``until``.

        Answers are generated in one left-padded batch, or one by one if padding would change them. A common prefix of
        the prompts (an image, for example) is processed once.

        Raises:
            ConversationError: the template refuses a conversation.
            DataError: an image can't be read.
        """
        prompts = [self.prompt(turns) for turns in conversations]
        stops = Stops(self.stops.ids, (*self.stops.texts, *filter(None, until)))
        outputs = [Detokenizer(self.encoding.tokenizer, stops) for _ in conversations]
        pending = [(prompt, output) for prompt, output in zip(prompts, outputs, strict=True) if prompt.ids]
        for batch in [pending] if self.exact.padded else [[pair] for pair in pending]:
            if batch:
                self._generate([prompt for prompt, _ in batch], [output for _, output in batch], sampling)
        return [output.text.strip() for output in outputs]

    def log_likelihoods(self, conversations: Sequence[Sequence[Turn]], answers: Sequence[str]) -> list[Likelihood]:
        """The likelihood of each answer given the conversation at the same index, excluding the token that ends it.

        Likelihoods are computed in one batch, as in ``answer``.

        Raises:
            ConversationError: the template refuses a conversation.
            DataError: an image can't be read.
        """
        encoded = [
            self.encode_answer([*turns, Turn("assistant", (answer,))])
            for turns, answer in zip(conversations, answers, strict=True)
        ]
        batches = [encoded] if self.exact.padded else [[item] for item in encoded]
        return [each for batch in batches if batch for each in self._likelihoods(batch)]

    def _likelihoods(self, encoded: Sequence[Encoded]) -> list[Likelihood]:
        batch, cache = self._batch(encoded, [len(item) - item.target_tokens for item in encoded])
        return likelihoods(self.model, batch, cache)

    def encode_answer(self, turns: Sequence[Turn]) -> Encoded:
        """``turns`` up to the last token of the answer; the first token is never a target: no token precedes it."""
        encoded, start = self.encoding.encode_answer(self._arranged(turns)), self._start_id
        end = max((index for index, label in enumerate(encoded.labels, 1) if label != IGNORE), default=len(encoded))
        ids, labels = encoded.ids[:end], encoded.labels[:end]
        if labels[:1] != (IGNORE,) and start is not None:
            ids, labels = (start, *ids), (IGNORE, *labels)
        return Encoded(ids, (IGNORE,) * len(labels[:1]) + labels[1:], encoded.images)

    def _generate(self, prompts: Sequence[Encoded], outputs: Sequence[Detokenizer], sampling: Sampling) -> None:
        batch, cache = self._batch(prompts, [len(prompt) for prompt in prompts])
        for tokens in generate(self.model, batch, sampling, self.stops.ids, cache, cached=self.exact.cached):
            for output, token in zip(outputs, tokens, strict=True):
                output.add(token)
            if all(output.done for output in outputs):
                break
        for output in outputs:
            output.add(None)

    def _batch(self, items: Sequence[Encoded], prompt_lengths: Sequence[int]) -> tuple[Batch, Any]:
        """``items`` as a batch without the common prefix of their prompts, and the prefix's key/value cache.

        The cache is None if no prefix was removed. The first ``prompt_lengths`` tokens of each item are its prompt.
        Models with a sliding window share no prefix (``exact.shared``): padding after it would occupy the window.
        """
        per_image, device = self.encoding.image_tokens, self.model.device
        prompts = [token_keys(item, per_image)[:end] for item, end in zip(items, prompt_lengths, strict=True)]
        # The prefix excludes the last token of every prompt, whose logits are needed.
        length = min((common_prefix_length(prompts[0][:-1], other) for other in prompts[1:]), default=0)
        if length < MIN_COMMON_PREFIX or not self.exact.shared:
            return to_device(collate(items, self.features, side="left"), device), None
        halves = [split_prompt(item, length, per_image) for item in items]
        cache = prefill(self.model, to_device(collate([halves[0][0]], self.features), device))
        cache.batch_repeat_interleave(len(items))
        return to_device(collate([rest for _, rest in halves], self.features, side="left"), device), cache


def default_sampling(language: Any) -> Sampling:
    """Temperature and ``top_p`` of the generation config of ``language``; greedy decoding without ``do_sample``."""
    config = getattr(language, "generation_config", None)
    if not getattr(config, "do_sample", False):
        return GREEDY
    temperature, top_p = getattr(config, "temperature", None), getattr(config, "top_p", None)
    return Sampling(temperature=1.0 if temperature is None else temperature, top_p=1.0 if top_p is None else top_p)


def _eos_ids(model: LlavaModel) -> frozenset[int]:
    """The end-of-sequence token ids of the language model's generation config."""
    ids = getattr(getattr(model.language, "generation_config", None), "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or ())
