"""Compares the outputs of a verification script with those of the model: ids, pixels, logits, answers, settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from llavactl.chat.assistant import Assistant
from llavactl.chat.detokenizer import Detokenizer
from llavactl.core.schema import IMAGE_TOKEN, Turn
from llavactl.data.batches import collate
from llavactl.evaluation.verification.script import MAX_NEW_TOKENS, ScriptOutputs
from llavactl.model.generate import Sampling

if TYPE_CHECKING:
    import numpy as np
    import torch

LOGIT_TOLERANCE = 1e-4
"""Relative to the largest logit; two float32 implementations differ by less."""

PIXEL_TOLERANCE = 1e-3
"""For normalized pixels: a tenth of one gray level."""

MAX_ROUNDING = 0.2
"""Relative to the largest logit; rounding merged weights changes logits by less, a wrong merge by more."""


@dataclass(frozen=True)
class VerificationResult:
    """How far an export's outputs differ from those of its model, over ``prompts`` prompts about ``photos`` images.

    ``ids_equal`` and ``text_equal`` count prompts with equal token ids and equal greedy answers. ``pixels`` and
    ``logits`` are the largest absolute differences; ``tolerance`` is relative to ``largest_logit``. An adapter that was
    merged into weights of lower precision than float32 was rounded with them: the export is then compared with the
    model rounded in the same way, and ``rounding`` is the largest difference of its logits from the unmerged adapter's.
    """

    prompts: int
    photos: int
    ids_equal: int
    text_equal: int
    pixels: float
    logits: float
    largest_logit: float
    rounding: float
    tolerance: float
    faults: tuple[str, ...]

    @property
    def sound(self) -> bool:
        return not self.faults

    @classmethod
    def from_json(cls, document: Any) -> VerificationResult | None:
        """The result stored as ``document``; None if it failed, or has the fields of another version of llavactl."""
        if not isinstance(document, dict) or document.keys() != {field.name for field in fields(cls)}:
            return None
        return None if document["faults"] else cls(**{**document, "faults": ()})


def compare(
    assistant: Assistant,
    conversations: Sequence[tuple[Turn, ...]],
    outputs: ScriptOutputs,
    *,
    images: int,
    rounding: float,
    precision: str,
) -> VerificationResult:
    """The differences between ``outputs`` and the model of ``assistant``, whose features are not rounded.

    ``precision`` is the dtype that the model was trained in, ``rounding`` the effect of merging its adapter.
    """
    comparisons = [
        _compare_prompt(assistant, turns, _PromptOutputs(index, outputs.tensors))
        for index, turns in enumerate(conversations)
    ]
    largest_logit = max([0.0, *(comparison.largest_logit for comparison in comparisons)])
    faults = _stated_faults(outputs.stated, assistant, precision)
    faults += [
        f"prompt {index + 1}: {fault}" for index, comparison in enumerate(comparisons) for fault in comparison.faults
    ]
    if rounding > MAX_ROUNDING * largest_logit:
        faults.append(
            f"merging the adapter changed logits by up to {rounding:.3g} (largest logit: {largest_logit:.3g})"
        )
    return VerificationResult(
        prompts=len(conversations),
        photos=images,
        ids_equal=sum(comparison.ids_equal for comparison in comparisons),
        text_equal=sum(comparison.text_equal for comparison in comparisons),
        pixels=max([0.0, *(comparison.pixels for comparison in comparisons)]),
        logits=max([0.0, *(comparison.logits for comparison in comparisons)]),
        largest_logit=largest_logit,
        rounding=rounding,
        tolerance=LOGIT_TOLERANCE,
        faults=tuple(faults),
    )


@dataclass(frozen=True)
class _PromptComparison:
    """The fields of ``VerificationResult`` for one prompt."""

    ids_equal: bool = False
    text_equal: bool = False
    pixels: float = 0.0
    logits: float = 0.0
    largest_logit: float = 0.0
    faults: tuple[str, ...] = ()


def _compare_prompt(assistant: Assistant, turns: Sequence[Turn], exported: _PromptOutputs) -> _PromptComparison:
    encoded = assistant.encode(turns)
    if difference := _ids_difference(exported.ids, encoded.ids):
        return _PromptComparison(faults=(difference,))
    faults: list[str] = []
    pixels = 0.0
    if encoded.images:
        features: Any = assistant.features
        expected_pixels = [features.pixels(image) for image in encoded.images]
        pixels, pixel_faults = _pixel_difference(exported.pixels, expected_pixels)
        faults += pixel_faults
    expected_logits = prompt_logits(assistant, turns)
    logits, logit_faults = _logit_difference(exported.logits, expected_logits)
    faults += logit_faults
    (expected_answer,) = assistant.answer([turns], Sampling(max_new_tokens=MAX_NEW_TOKENS))
    answer = _answer_text(assistant, exported.answer)
    if answer != expected_answer:
        faults.append("greedy answer differs")
    if exported.batched_answer is not None and _answer_text(assistant, exported.batched_answer) != answer:
        faults.append("greedy answer in a padded batch differs from the unpadded one")
    return _PromptComparison(
        ids_equal=True,
        text_equal=answer == expected_answer,
        pixels=pixels,
        logits=logits,
        largest_logit=expected_logits.abs().max().item(),
        faults=tuple(faults),
    )


def prompt_logits(assistant: Assistant, turns: Sequence[Turn]) -> torch.Tensor:
    """Logits [T, V] at every position of the prompt."""
    import torch

    with torch.inference_mode():
        return assistant.model.logits(collate([assistant.encode(turns)], assistant.features))[0]


@dataclass(frozen=True)
class _PromptOutputs:
    """The tensors of prompt ``index`` under their names in a script's output file."""

    index: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def ids(self) -> list[int]:
        return self._ids("ids")

    @property
    def pixels(self) -> torch.Tensor:
        return self.tensors[f"{self.index}.pixels"]

    @property
    def logits(self) -> torch.Tensor:
        return self.tensors[f"{self.index}.logits"]

    @property
    def answer(self) -> list[int]:
        return self._ids("said")

    @property
    def batched_answer(self) -> list[int] | None:
        return self._ids("together") if f"{self.index}.together" in self.tensors else None

    def _ids(self, key: str) -> list[int]:
        ids: list[int] = self.tensors[f"{self.index}.{key}"].tolist()
        return ids


def _stated_faults(stated: Mapping[str, Any], assistant: Assistant, precision: str) -> list[str]:
    """The settings of the export's files that differ from the model's."""
    faults = []
    expected = sorted(assistant.stops.ids)
    if "eos" in stated and sorted(stated["eos"]) != expected:
        faults.append(f"end tokens are {sorted(stated['eos'])}, expected {expected}")
    if (side := stated.get("padding", "left")) != "left":
        faults.append(f"padding side of the tokenizer is {side}, expected left for batched generation")
    faults += [
        f"{name} is {dtype}, expected {precision}, which the model was trained in"
        for name, key in (("dtype in config.json", "dtype"), ("dtype of saved weights", "saved"))
        for dtype in stated.get(key, ())
        if dtype != precision
    ]
    return faults


def _pixel_difference(exported: torch.Tensor, expected: Sequence[np.ndarray]) -> tuple[float, list[str]]:
    """The largest difference of pixels [I, 3, H, W], and the faults."""
    import torch

    pixels = torch.stack([torch.from_numpy(image) for image in expected])
    if exported.shape != pixels.shape:
        return 0.0, [f"pixels have shape {list(exported.shape)}, expected {list(pixels.shape)}"]
    difference = (exported - pixels).abs().max().item()
    if difference <= PIXEL_TOLERANCE:
        return difference, []
    return difference, [f"pixels differ by up to {difference:.3g} (tolerance {PIXEL_TOLERANCE:g})"]


def _logit_difference(exported: torch.Tensor, expected: torch.Tensor) -> tuple[float, list[str]]:
    """The largest difference of logits [T, V], and the faults.

    ``exported`` may have more tokens than ``expected`` if none of them is ever the most likely one.
    """
    tokens = expected.shape[-1]
    if len(exported) != len(expected) or exported.shape[-1] < tokens:
        return 0.0, [f"logits have shape {list(exported.shape)}, expected {list(expected.shape)}"]
    difference = (exported[:, :tokens] - expected).abs().max().item()
    tolerance = LOGIT_TOLERANCE * expected.abs().max().item()
    faults = []
    # Not `difference > tolerance`, which is false for NaN.
    if not difference <= tolerance:
        faults.append(f"logits differ by up to {difference:.3g} (tolerance {tolerance:.3g})")
    if int(exported.argmax(-1).max()) >= tokens:
        faults.append("the most likely token is one that only the export has")
    return difference, faults


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
