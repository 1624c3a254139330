"""Compares the outputs of a verification script with those of the model: figures over all prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llavactl.chat.assistant import Assistant
from llavactl.chat.detokenizer import Detokenizer
from llavactl.core.schema import IMAGE_TOKEN, Encoded, Turn
from llavactl.data.batches import collate
from llavactl.evaluation.verification.outputs import PromptOutputs, ScriptOutputs, Stated
from llavactl.evaluation.verification.result import TITLES, Figure
from llavactl.evaluation.verification.script import MAX_NEW_TOKENS
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    import numpy as np
    import torch

MAX_DETAILS = 3
"""Details per figure: one mistake gives as many as there are prompts."""


def figures(
    assistant: Assistant, conversations: Sequence[tuple[Turn, ...]], outputs: ScriptOutputs, precision: str
) -> dict[str, Figure]:
    """The differences between ``outputs`` and the model of ``assistant``, by the keys of ``TITLES``.

    The features of ``assistant`` are not rounded; ``precision`` is the dtype that the model was trained in.
    """
    compared = [
        _prompt_figures(assistant, turns, exported, outputs.stated.tokens)
        for turns, exported in zip(conversations, outputs.prompts, strict=True)
    ]
    found = {name: [figure.get(name) for figure in compared] for name in TITLES}
    combined = {name: _combined(name, each) for name, each in found.items() if any(each)}
    settings = _settings(outputs.stated, assistant, precision)
    return {**combined, **({"settings": settings} if settings.total else {})}


def _combined(name: str, each: Sequence[Figure | None]) -> Figure:
    """The figure ``name`` over all prompts: the sum of counts, else the worst value; details with their prompt."""
    present = [figure for figure in each if figure is not None]
    values = [figure.value for figure in present if figure.value is not None]
    details = [
        f"prompt {number}: {detail}"
        for number, figure in enumerate(each, 1)
        for detail in (figure.details if figure is not None else ())
    ]
    total = sum(figure.total for figure in present if figure.total is not None)
    if total:
        value: float | None = sum(values)
    elif len(values) < len(present) or not all(map(math.isfinite, values)):  # min and max may ignore NaN
        value = None
    else:
        value = min(values) if name.endswith("_cosine") else max(values)
    return Figure(value, total or None, tuple(details[:MAX_DETAILS]))


def _prompt_figures(
    assistant: Assistant, turns: Sequence[Turn], exported: PromptOutputs, image_tokens: Sequence[int | None] | None
) -> dict[str, Figure]:
    """The figures of one prompt; only ``ids`` if they differ, because nothing else can be equal then."""
    encoded = assistant.encode(turns)
    difference = _ids_difference(exported.ids, encoded.ids)
    compared = {"ids": _count(bool(difference), *filter(None, [difference]))}
    if difference:
        return compared
    if encoded.images:
        features: Any = assistant.features
        compared |= _pixels(exported.pixels, [features.pixels(image) for image in encoded.images])
        expected = _image_embeddings(assistant, encoded)
        compared |= _embeddings(exported.embeddings, expected, image_tokens)
        compared |= _unprepared(exported.unprepared, expected, image_tokens)
    text = [at for at, token in enumerate(encoded.ids) if token != IMAGE_TOKEN]
    # At images, logits follow from the token at the position, which may be another one.
    compared |= _logits(exported.logits, prompt_logits(assistant, turns), text, text_only=bool(image_tokens))
    (expected_answer,) = assistant.answer([turns], Sampling(max_new_tokens=MAX_NEW_TOKENS))
    answer = _answer_text(assistant, exported.said)
    compared["answers"] = _count(answer != expected_answer)
    if exported.batched_answer is not None:
        compared["batched_answers"] = _count(_answer_text(assistant, exported.batched_answer) != answer)
    return compared


def _count(differs: bool, *details: str) -> Figure:
    """One prompt in a count of prompts that differ."""
    return Figure(int(differs), 1, details)


def prompt_logits(assistant: Assistant, turns: Sequence[Turn]) -> torch.Tensor:
    """Logits [T, V] at every position of the prompt."""
    import torch

    with torch.inference_mode():
        return assistant.model.logits(collate([assistant.encode(turns)], assistant.features))[0]


def _image_embeddings(assistant: Assistant, encoded: Encoded) -> torch.Tensor:
    """Embeddings [I, Q, D] of the images as the language model receives them."""
    import torch

    batch = collate([encoded], assistant.features)
    with torch.inference_mode():
        embedded = assistant.model.embed(batch.ids, batch.features)
    return embedded[batch.ids == IMAGE_TOKEN].unflatten(0, (len(encoded.images), -1))


def _pixels(exported: torch.Tensor | None, expected: Sequence[np.ndarray]) -> dict[str, Figure]:
    """The largest difference of pixels [I, 3, H, W]."""
    import torch

    if exported is None:
        return {}
    pixels = torch.stack([torch.from_numpy(image) for image in expected])
    if problem := _shape_problem("pixels", exported, pixels):
        return {"pixels": Figure(None, details=(problem,))}
    return {"pixels": Figure((exported - pixels).abs().max().item())}


def _embeddings(
    exported: torch.Tensor | None, expected: torch.Tensor, tokens: Sequence[int | None] | None = None
) -> dict[str, Figure]:
    """The smallest cosine of a token of embeddings [I, Q, D]; their largest difference, relative to the largest."""
    if exported is None:
        return {}
    if problem := _embeddings_problem("embeddings", exported, expected, tokens):
        return {name: Figure(None, details=(problem,)) for name in ("embedding_cosine", "embedding_error")}
    exported, expected = _same_tokens(exported, expected, tokens)
    return {
        "embedding_cosine": Figure(_cosines(exported, expected).min().item()),
        "embedding_error": Figure(_relative_difference(exported, expected)),
    }


def _unprepared(
    exported: torch.Tensor | None, expected: torch.Tensor, tokens: Sequence[int | None] | None = None
) -> dict[str, Figure]:
    """The smallest mean cosine of an image of embeddings [I, Q, D].

    Where the border of padding is resampled, single tokens may change much; the mean separates this from mistakes.
    """
    if exported is None:
        return {}
    if problem := _embeddings_problem("unprepared", exported, expected, tokens):
        return {"unprepared_cosine": Figure(None, details=(problem,))}
    return {"unprepared_cosine": Figure(_cosines(*_same_tokens(exported, expected, tokens)).mean(-1).min().item())}


def _embeddings_problem(
    name: str, exported: torch.Tensor, expected: torch.Tensor, tokens: Sequence[int | None] | None
) -> str:
    """Why embeddings [I, Q, D] can't be compared; "" if they can."""
    problem = _shape_problem(name, exported, expected)
    if problem or tokens is None:
        return problem
    count = expected.shape[1]
    compared = [token for token in tokens if token is not None]
    if compared and len(tokens) == count and 0 <= min(compared) <= max(compared) < count:
        return ""
    return f"`stated.tokens` aren't indexes of {count} tokens"


def _same_tokens(
    exported: torch.Tensor, expected: torch.Tensor, tokens: Sequence[int | None] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings that are compared: ``tokens`` has the index in ``expected`` of each exported one, or None."""
    if tokens is None:
        return exported, expected
    compared = {at: token for at, token in enumerate(tokens) if token is not None}
    return exported[:, [*compared]], expected[:, [*compared.values()]]


def _cosines(exported: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The cosines of the last dimension."""
    from torch.nn.functional import normalize

    # cos = 1 - |a - b|²/2 for unit vectors: exact near 1, and 1 for two zero vectors.
    return 1 - (normalize(exported.double(), dim=-1) - normalize(expected.double(), dim=-1)).square().sum(-1) / 2


def _logits(
    exported: torch.Tensor, expected: torch.Tensor, text: Sequence[int], *, text_only: bool = False
) -> dict[str, Figure]:
    """The largest difference of logits [T, V] relative to the largest one, and positions with another next token.

    ``exported`` has all positions, those of ``text``, or the last one, and may have more tokens than ``expected`` if
    none is ever the most likely one. With ``text_only``, other positions aren't compared.
    """
    tokens = expected.shape[-1]
    if len(exported) == len(expected) and text_only:
        exported = exported[[*text]]
    if len(exported) == len(text):
        expected = expected[[*text]]
    elif len(exported) == 1:
        expected = expected[-1:]
    if len(exported) != len(expected) or exported.shape[-1] < tokens:
        problem = f"logits have shape {list(exported.shape)}, expected {list(expected.shape)}"
        return {"logits": Figure(None, details=(problem,))}
    next_token = Figure(int((exported.argmax(-1) != expected.argmax(-1)).sum()), len(expected))
    if int(exported.argmax(-1).max()) >= tokens:
        problem = "the most likely token is one that only the export has"
        return {"logits": Figure(None, details=(problem,)), "next_token": next_token}
    return {"logits": Figure(_relative_difference(exported[:, :tokens], expected)), "next_token": next_token}


def _relative_difference(exported: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest expected value."""
    largest = expected.abs().max().item()
    return (exported - expected).abs().max().item() / (largest or 1.0)


def _shape_problem(name: str, exported: torch.Tensor, expected: torch.Tensor) -> str:
    if exported.shape == expected.shape:
        return ""
    return f"{name} have shape {list(exported.shape)}, expected {list(expected.shape)}"


def _settings(stated: Stated, assistant: Assistant, precision: str) -> Figure:
    """The settings of the export's files that differ from the model's."""
    compared: list[tuple[str, Any, Any]] = []
    if stated.eos is not None:
        compared.append(("end tokens", sorted(stated.eos), sorted(assistant.stops.ids)))
    if stated.padding is not None:
        compared.append(("padding side of the tokenizer", stated.padding, "left"))
    compared += [("dtype in config.json", dtype, precision) for dtype in stated.dtype]
    compared += [("dtype of saved weights", dtype, precision) for dtype in stated.saved]
    details = [f"{name}: {value}, expected {expected}" for name, value, expected in compared if value != expected]
    return Figure(len(details), len(compared), tuple(details))


def _ids_difference(exported: Sequence[int], expected: Sequence[int]) -> str:
    """Where token ids differ; "" if they are equal.

    At image positions ``exported`` has a single number that is not the id of any token in the text.
    """
    pairs = list(zip(exported, expected, strict=False))
    image_ids = {token for token, expected_token in pairs if expected_token == IMAGE_TOKEN}
    if len(exported) == len(expected) and len(image_ids) <= 1:
        image_id = next(iter(image_ids), IMAGE_TOKEN)
        if [IMAGE_TOKEN if token == image_id else token for token in exported] == list(expected):
            return ""
    at = next(
        (at for at, (token, expected_token) in enumerate(pairs) if expected_token not in (IMAGE_TOKEN, token)), None
    )
    if at is None:
        image_tokens = list(expected).count(IMAGE_TOKEN)
        return f"token ids differ: {len(exported)} tokens, expected {len(expected)} ({image_tokens} of them for images)"
    return f"token ids differ at position {at}: {list(exported[at : at + 4])}, expected {list(expected[at : at + 4])}"


def _answer_text(assistant: Assistant, ids: Sequence[int]) -> str:
    """The text of the generated ``ids`` up to the first stop token or stop string."""
    detokenizer = Detokenizer(assistant.encoding.tokenizer, assistant.stops)
    for token in ids:
        detokenizer.add(None if token in assistant.stops.ids else token)
        if detokenizer.done:
            break
    detokenizer.add(None)
    return detokenizer.text.strip()
