"""What both harnesses need: their requests as conversations of llavactl, answered in batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, TypeVar

import torch

from llavactl import Assistant, Content, DataError, Likelihood, ModelError, Role, Sampling, Turn, image_in_memory
from llavactl import load_model as load

log = logging.getLogger(__name__)

TAG = "<image>"
"""The position of an image in the text of a task."""

_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_USED = frozenset({*_LIMITS, "do_sample", "temperature", "top_p", "until", "num_beams"})

T = TypeVar("T")


class ChatHistory(str):
    """The messages of a conversation as JSON: a harness passes prompts on as strings."""

    __slots__ = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt of a task: ``messages`` are (role, text).

    ``images`` returns the PIL images of the document; it is called when the prompt is answered, as all images of a
    benchmark may not fit into memory.
    """

    messages: Sequence[tuple[Role, str]]
    images: Callable[[], Sequence[Any]]

    def turns(self) -> list[Turn]:
        """The conversation, with images at their tags, or before the last question if there are no tags.

        Raises:
            DataError: the number of tags is not the number of images, or something else than a PIL image.
            ModelError: the last message is not a question.
        """
        if not self.messages or self.messages[-1][0] != "user":
            raise ModelError(
                "a prompt that begins the answer can't be rendered by a conversation template",
                hint="run tasks with gen_prefix without --apply_chat_template",
            )
        images = [_reference(image) for image in self.images()]
        tags = sum(text.count(TAG) for _, text in self.messages) if images else 0
        if tags not in (0, len(images)):
            raise DataError(
                f"a prompt has {len(images)} images and {tags} {TAG} tags",
                hint="examples (--num_fewshot) with images are not supported",
            )
        remaining = iter(images)
        turns = [Turn(role, _content(text, remaining) if tags else (text,)) for role, text in self.messages]
        return [*turns[:-1], Turn("user", (*remaining, *turns[-1].content))]


def _content(text: str, images: Iterator[Content]) -> tuple[Content, ...]:
    """``text`` with the next of ``images`` in place of each tag."""
    first, *others = text.split(TAG)
    parts = [first, *(part for other in others for part in (next(images), other))]
    return tuple(part for part in parts if part != "")


def _reference(image: Any) -> Content:
    if isinstance(image, str):
        raise DataError(f"expected images, got {image!r:.80}", hint="videos and audio are not supported")
    return image_in_memory(image)


def load_model(model: str, template: str | None, device: str | None) -> Assistant:
    """The model in the folder ``model``; a CUDA device that isn't available is replaced by the default device.

    lm-eval's default is ``cuda:0``.
    """
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        device = None
    return load(model, template=template, device=device)


def batch_size_of(value: int | str) -> int:
    """``value`` as an integer.

    Raises:
        ModelError: ``auto``, or not an integer of at least 1.
    """
    if not str(value).isdecimal() or int(value) < 1:
        raise ModelError(f"batch_size: expected an integer ≥ 1, got {value!r}", hint="choose a size, such as 8")
    return int(value)


def sampling_of(options: Mapping[str, Any], max_new_tokens: int) -> tuple[Sampling, tuple[str, ...]]:
    """The sampling and the stop strings of a task's generation ``options``; greedy unless they say otherwise.

    ``max_new_tokens`` is the default. Options that llavactl doesn't have are ignored with a warning.

    Raises:
        ModelError: beam search.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if given.get("num_beams", 1) != 1:
        raise ModelError("beam search is not supported", hint="--gen_kwargs num_beams=1")
    if ignored := sorted(given.keys() - _USED):
        log.warning("ignored generation options: %s", ", ".join(ignored))
    limit = next((given[name] for name in _LIMITS if name in given), max_new_tokens)
    temperature = float(given.get("temperature", 0.0)) if given.get("do_sample", True) else 0.0
    until = given.get("until", ())
    stops = (until,) if isinstance(until, str) else tuple(until)
    top_p = float(given.get("top_p", 1.0))
    # With greedy decoding, tasks write any value.
    return Sampling(int(limit), temperature, top_p if temperature and 0 < top_p <= 1 else 1.0), stops


def answers(
    model: Assistant, prompts: Sequence[Prompt], options: Sequence[tuple[Sampling, tuple[str, ...]]], batch_size: int
) -> Iterator[str]:
    """The answer to each of ``prompts``, in order; those with the same options are answered in batches."""
    pairs = zip(prompts, options, strict=True)
    for (sampling, until), group in groupby(pairs, key=lambda pair: pair[1]):
        for batch in _batches(group, batch_size):
            yield from model.answer([prompt.turns() for prompt, _ in batch], sampling, until=until)


def likelihoods(
    model: Assistant, prompts: Sequence[Prompt], continuations: Sequence[str], batch_size: int
) -> Iterator[Likelihood]:
    """The likelihood of the continuation of each of ``prompts``, in order.

    Spaces before a continuation are removed: the template writes those before an answer.
    """
    for batch in _batches(zip(prompts, continuations, strict=True), batch_size):
        texts = [continuation.lstrip() for _, continuation in batch]
        yield from model.log_likelihoods([prompt.turns() for prompt, _ in batch], texts)


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
