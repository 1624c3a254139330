"""A loaded model with its prompt encoding and image features, which answers conversations in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from llavactl.chat.common_prefix import common_prefix_length, split_prompt, token_keys
from llavactl.chat.detokenizer import Detokenizer, Stops
from llavactl.core.schema import IGNORE, Encoded, Turn
from llavactl.data.batches import FeatureLookup, collate
from llavactl.data.encode import Encoding
from llavactl.data.image_order import arrange
from llavactl.model.exactness import Exact, exactness
from llavactl.model.generate import GREEDY, Sampling, generate, prefill
from llavactl.model.inputs import to_device

if TYPE_CHECKING:
    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel

MIN_COMMON_PREFIX = 16
"""Tokens; a shorter common prefix of a batch is not worth a separate forward pass."""


@dataclass
class Assistant:
    """Answers conversations that end with the user's turn."""

    model: LlavaModel
    encoding: Encoding
    features: FeatureLookup
    image_order: Literal["first", "random", "as-data"] = "first"
    name: str = ""

    def prompt(self, turns: Sequence[Turn]) -> Encoded:
        """The encoded prompt, never empty if the tokenizer has a BOS or EOS token, which then replaces an empty prompt.

        The template ``plain`` omits questions, so a question without an image gives an empty prompt.
        """
        encoded, tokenizer = self.encode(turns), self.encoding.tokenizer
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return encoded if encoded.ids or start is None else Encoded((start,), (IGNORE,))

    def encode(self, turns: Sequence[Turn]) -> Encoded:
        """The prompt as the template renders it; with ``image_order: random`` the image precedes the question."""
        order: Literal["first", "as-data"] = "as-data" if self.image_order == "as-data" else "first"
        return self.encoding.encode(arrange(turns, order, ""), generate=True)

    @cached_property
    def exact(self) -> Exact:
        """Which optimizations leave the answers unchanged."""
        return exactness(self.model.language)

    @cached_property
    def stops(self) -> Stops:
        return Stops.of(self.encoding, _eos_ids(self.model))

    def answer(self, conversations: Sequence[Sequence[Turn]], sampling: Sampling = GREEDY) -> list[str]:
        """One answer per conversation.

        They are generated in one left-padded batch, unless padding would change the answers. A common prefix of the
        prompts, such as an image, is processed once.
        """
        prompts = [self.prompt(turns) for turns in conversations]
        outputs = [Detokenizer(self.encoding.tokenizer, self.stops) for _ in conversations]
        pending = [(prompt, output) for prompt, output in zip(prompts, outputs, strict=True) if prompt.ids]
        for batch in [pending] if self.exact.padded else [[pair] for pair in pending]:
            if batch:
                self._generate([prompt for prompt, _ in batch], [output for _, output in batch], sampling)
        return [output.text.strip() for output in outputs]

    def _generate(self, prompts: Sequence[Encoded], outputs: Sequence[Detokenizer], sampling: Sampling) -> None:
        batch, cache = self._batch(prompts)
        for tokens in generate(self.model, batch, sampling, self.stops.ids, cache, cached=self.exact.cached):
            for output, token in zip(outputs, tokens, strict=True):
                output.add(token)
            if all(output.done for output in outputs):
                break
        for output in outputs:
            output.add(None)

    def _batch(self, prompts: Sequence[Encoded]) -> tuple[Batch, Any]:
        """The prompts as a batch, and None; or the prompts without their common prefix, and its key/value cache.

        Padding between the prefix and the rest would occupy part of a sliding window: ``exact.shared`` is False for
        models that have one.
        """
        per_image, device = self.encoding.image_tokens, self.model.device
        keys = [token_keys(prompt, per_image) for prompt in prompts]
        length = min((common_prefix_length(keys[0], other) for other in keys[1:]), default=0)
        if length < MIN_COMMON_PREFIX or not self.exact.shared:
            return to_device(collate(prompts, self.features, side="left"), device), None
        halves = [split_prompt(prompt, length, per_image) for prompt in prompts]
        cache = prefill(self.model, to_device(collate([halves[0][0]], self.features), device))
        cache.batch_repeat_interleave(len(prompts))
        return to_device(collate([rest for _, rest in halves], self.features, side="left"), device), cache


def _eos_ids(model: LlavaModel) -> frozenset[int]:
    """The end-of-sequence token ids of the language model's generation config."""
    ids = getattr(getattr(model.language, "generation_config", None), "eos_token_id", None)
    return frozenset([ids] if isinstance(ids, int) else ids or ())
