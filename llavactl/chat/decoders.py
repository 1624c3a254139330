"""Decoders for several answers: in one batch that answers join and leave, or one answer at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import torch

from llavactl.model.generate import Sampling, generate, next_tokens
from llavactl.model.inputs import image_features
from llavactl.model.rows import Prefilled, Rows

if TYPE_CHECKING:
    from llavactl.core.schema import Batch
    from llavactl.model.llava import LlavaModel

Key = TypeVar("Key")

Token = int | Exception | None
"""The next token of an answer; None: it ends here. An error concerns this answer only."""


class Decoder(Protocol[Key]):
    """Generates answers, which are identified by keys. After an exception in ``step`` or ``keep``, it is unusable."""

    def start(self, key: Key, batch: Batch, sampling: Sampling) -> None:
        """Processes the prompt ``batch`` [1, T] of a new answer; after an exception, there is no such answer."""

    def step(self) -> Iterator[tuple[Key, Token]]:
        """The next token of each answer."""

    def keep(self, keys: Sequence[Key]) -> None:
        """Removes all answers but ``keys``; called between two steps."""


@dataclass
class _Answer(Generic[Key]):
    """``row`` is the processed prompt until the next step; ``token`` is the last token."""

    key: Key
    sampling: Sampling
    generator: torch.Generator
    row: Prefilled | None
    token: int = 0


class JoinedDecoder(Generic[Key]):
    """Answers that are generated in one batch; each has its own sampling."""

    def __init__(self, model: LlavaModel, stop_ids: Collection[int]) -> None:
        self.model, self.stop_ids = model, stop_ids
        self.rows = Rows(model.language)
        self.answers: list[_Answer[Key]] = []

    @torch.inference_mode()
    def start(self, key: Key, batch: Batch, sampling: Sampling) -> None:
        row = self.rows.prefill(self.model.embed(batch.ids, image_features(batch)))
        generator = torch.Generator(device=batch.ids.device).manual_seed(sampling.seed)
        self.answers.append(_Answer(key, sampling, generator, row))

    @torch.inference_mode()
    def step(self) -> Iterator[tuple[Key, Token]]:
        if len(self.rows):
            tokens = [answer.token for answer in self.answers if answer.row is None]
            self.rows.extend(self.model.embed(torch.tensor(tokens, device=self.model.device)[:, None], None))
        for index, answer in enumerate(self.answers):
            if answer.row is not None:
                self.rows.add(answer.row)
                answer.row = None
            yield answer.key, self._choose(answer, self.rows.logits[index : index + 1])

    def _choose(self, answer: _Answer[Key], logits: torch.Tensor) -> Token:
        try:
            answer.token = int(next_tokens(logits, answer.sampling, answer.generator))
        except Exception as error:  # noqa: BLE001 - concerns this answer only
            return error
        return None if answer.token in self.stop_ids else answer.token

    def keep(self, keys: Sequence[Key]) -> None:
        kept = [index for index, answer in enumerate(self.answers) if answer.key in keys]
        if len(kept) < len(self.answers):
            self.rows.keep(kept)
            self.answers = [self.answers[index] for index in kept]


class SingleDecoder(Generic[Key]):
    """One answer at a time, generated as by ``generate``."""

    def __init__(self, model: LlavaModel, stop_ids: Collection[int], *, cached: bool) -> None:
        self.model, self.stop_ids, self.cached = model, stop_ids, cached
        self.answers: dict[Key, Iterator[list[int | None]]] = {}

    def start(self, key: Key, batch: Batch, sampling: Sampling) -> None:
        self.answers[key] = generate(self.model, batch, sampling, self.stop_ids, cached=self.cached)

    def step(self) -> Iterator[tuple[Key, Token]]:
        for key, tokens in self.answers.items():
            yield key, next(tokens)[0]

    def keep(self, keys: Sequence[Key]) -> None:
        self.answers = {key: tokens for key, tokens in self.answers.items() if key in keys}
