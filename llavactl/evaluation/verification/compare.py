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
    faults = _stated_faults(outputs.stated, assistant, precision)
    ids_equal = text_equal = 0
    pixels = logits = largest = 0.0
    for index, turns in enumerate(conversations):
        theirs = _PromptOutputs(index, outputs.tensors)
        prompt_faults: list[str] = []
        encoded = assistant.encode(turns)
        if difference := _ids_difference(theirs.ids, encoded.ids):
            faults.append(f"{theirs.name}: {difference}")
            continue
        ids_equal += 1
        if encoded.images:
            features: Any = assistant.features
            off, why = _pixel_difference([features.pixels(image) for image in encoded.images], theirs.pixels)
            pixels = max(pixels, off)
            prompt_faults += why
        ours = prompt_logits(assistant, turns)
        off, why = _logit_difference(ours, theirs.logits)
        logits, largest = max(logits, off), max(largest, ours.abs().max().item())
        prompt_faults += why
        (answer,) = assistant.answer([turns], Sampling(max_new_tokens=MAX_NEW_TOKENS))
        their_answer = _answer_text(assistant, theirs.answer)
        text_equal += their_answer == answer
        if their_answer != answer:
            prompt_faults.append("greedy answer differs")
        if theirs.batched_answer is not None and _answer_text(assistant, theirs.batched_answer) != their_answer:
            prompt_faults.append("greedy answer in a padded batch differs from the unpadded one")
        faults += [f"{theirs.name}: {fault}" for fault in prompt_faults]
    if rounding > MAX_ROUNDING * largest:
        faults.append(f"merging the adapter changed logits by up to {rounding:.3g} (largest logit: {largest:.3g})")
    return VerificationResult(
        prompts=len(conversations),
        photos=images,
        ids_equal=ids_equal,
        text_equal=text_equal,
        pixels=pixels,
        logits=logits,
        largest_logit=largest,
        rounding=rounding,
        tolerance=LOGIT_TOLERANCE,
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
    def name(self) -> str:
        return f"prompt {self.index + 1}"

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


def _pixel_difference(ours: Sequence[np.ndarray], theirs: torch.Tensor) -> tuple[float, list[str]]:
    """The largest difference of pixels [I, 3, H, W], and the faults."""
    import torch

    expected = torch.stack([torch.from_numpy(pixels) for pixels in ours])
    if expected.shape != theirs.shape:
        return 0.0, [f"pixels have shape {list(theirs.shape)}, expected {list(expected.shape)}"]
    off = (expected - theirs).abs().max().item()
    return off, [] if off <= PIXEL_TOLERANCE else [f"pixels differ by up to {off:.3g} (tolerance {PIXEL_TOLERANCE:g})"]


def _logit_difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, list[str]]:
    """The largest difference of logits [T, V], and the faults.

    ``theirs`` may have more tokens than ``ours`` if none of them is ever the most likely one.
    """
    tokens = ours.shape[-1]
    if len(theirs) != len(ours) or theirs.shape[-1] < tokens:
        return 0.0, [f"logits have shape {list(theirs.shape)}, expected {list(ours.shape)}"]
    off, largest = (ours - theirs[:, :tokens]).abs().max().item(), ours.abs().max().item()
    limit = LOGIT_TOLERANCE * largest
    faults = [] if off <= limit else [f"logits differ by up to {off:.3g} (tolerance {limit:.3g})"]
    if int(theirs.argmax(-1).max()) >= tokens:
        faults.append("the most likely token is one that only the export has")
    return off, faults


def _ids_difference(theirs: Sequence[int], ours: Sequence[int]) -> str:
    """Where token ids differ; "" if they are equal.

    At image positions ``theirs`` has one number of its own, which is not the id of any token in the text.
    """
    image_ids = {their_id for their_id, our_id in zip(theirs, ours, strict=False) if our_id == IMAGE_TOKEN}
    if len(theirs) == len(ours) and len(image_ids) <= 1:
        image_id = next(iter(image_ids), IMAGE_TOKEN)
        if [IMAGE_TOKEN if token == image_id else token for token in theirs] == list(ours):
            return ""
    text_tokens = [token for token in ours if token != IMAGE_TOKEN]
    pairs = enumerate(zip(theirs, ours, strict=False))
    at = next((at for at, (their_id, our_id) in pairs if our_id != IMAGE_TOKEN and their_id != our_id), None)
    if at is None:
        images = len(ours) - len(text_tokens)
        return f"token ids differ: {len(theirs)} tokens, expected {len(ours)} ({images} of them for images)"
    return f"token ids differ at position {at}: {list(theirs[at : at + 4])}, expected {list(ours[at : at + 4])}"


def _answer_text(assistant: Assistant, ids: Sequence[int]) -> str:
    """The text of the generated ``ids`` up to the first stop token or stop string."""
    detokenizer = Detokenizer(assistant.encoding.tokenizer, assistant.stops)
    for token in ids:
        detokenizer.add(None if token in assistant.stops.ids else token)
        if detokenizer.done:
            break
    detokenizer.add(None)
    return detokenizer.text.strip()
