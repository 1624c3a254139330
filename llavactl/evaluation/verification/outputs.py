"""The outputs of a verification script: reads and checks them, so that an odd one is reported by its name.

``OUT.safetensors`` has these tensors for prompt ``i``, counted from 0 (I images, T tokens, V vocabulary, N generated
tokens, Q tokens per image, D width of the language model):

  {i}.ids         [T]            token ids of the prompt; at image positions, one id that no text token has
  {i}.pixels      [I, 3, H, W]   preprocessed images; optional
  {i}.embeddings  [I, Q, D]      image embeddings as the language model receives them; optional
  {i}.unprepared  [I, Q, D]      the same for unchanged images, if the others are of images that the script prepared;
                                 optional
  {i}.logits      [N, V]         logits at every position of the prompt, at those of text, or at the last one
  {i}.said        [N]            token ids of the greedy answer
  {i}.batched_answer  [N]        token ids of the greedy answer in a padded batch with another prompt; optional

Ids are integers; the other tensors are floating-point numbers without NaN and infinities. The metadata key ``stated``
is a JSON object, see ``Stated``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError

from llavactl.core.errors import ModelError
from llavactl.core.library_errors import reason
from llavactl.core.validation import explain

if TYPE_CHECKING:
    import torch

ALL_IDS = ("ids", "said", "batched_answer")
REQUIRED = ("ids", "said", "logits")
NAMES = (*ALL_IDS, "logits", "pixels", "embeddings", "unprepared")

HINT = "the outputs of a verification script are documented in docs/reference/export.md#verification-script"


class Stated(BaseModel):
    """What a script states about an export and its program; everything is optional, unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    eos: list[int] | None = None
    """End token ids in the export's files."""
    padding: str | None = None
    """Padding side of the tokenizer."""
    dtype: list[str | None] = []
    """The dtype in config.json."""
    saved: list[str] = []
    """The dtypes of the language model's saved weights."""
    program: str = ""
    """Name and version of the program that ran the export, such as ``transformers 5.17.0``."""
    rounding: str | None = None
    """The least precise type that weights or intermediate values were rounded to, such as ``f16`` or ``q8_0``;
    ``f16-gelu`` if only values of GELU were rounded."""
    known_differences: list[str] = []
    """What is known to differ in the program, as sentences; no bound depends on them."""
    resampled: bool = False
    """Whether the program resamples the images of the prompts in its own way."""
    own_padding: bool = False
    """Whether the program pads images that aren't square as in training, but resizes them in its own way: what this
    changes is then reported without a bound. A user can prepare the images."""
    tokens: list[int | None] | None = None
    """For each embedding of an image, the index of the model's token that it is, null for one that the model doesn't
    have; absent: all of them, in order. If it is given, logits are compared at text only."""


@dataclass(frozen=True)
class PromptOutputs:
    """The outputs for one prompt; see the module for shapes. Values are float32."""

    ids: list[int]
    said: list[int]
    batched_answer: list[int] | None
    logits: torch.Tensor
    pixels: torch.Tensor | None
    embeddings: torch.Tensor | None
    unprepared: torch.Tensor | None


@dataclass(frozen=True)
class ScriptOutputs:
    """The outputs of a script for all prompts, and what it states."""

    prompts: Sequence[PromptOutputs]
    stated: Stated


def read_outputs(script: str, file: Path, images: Sequence[int]) -> ScriptOutputs:
    """The outputs of ``script`` in ``file`` for one prompt per item of ``images``, the number of its images.

    Raises:
        ModelError: a tensor is missing, unknown, or has the wrong shape or dtype, or a value isn't finite; the message
            names it.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            stated = (opened.metadata() or {}).get("stated", "{}")
    except (OSError, SafetensorError) as error:
        _refuse(script, f"it wrote no safetensors file: {reason(error)}")
    expected = {f"{index}.{name}" for index in range(len(images)) for name in NAMES}
    if unknown := sorted(tensors.keys() - expected):
        _refuse(script, f"tensor {unknown[0]} is unknown, or its prompt is")
    for index, count in enumerate(images):
        for name in NAMES:
            if problem := _problem(tensors, index, name, count):
                _refuse(script, f"tensor {index}.{name} {problem}")
    return ScriptOutputs([_prompt_outputs(tensors, index) for index in range(len(images))], _stated(script, stated))


def _refuse(script: str, problem: str) -> NoReturn:
    raise ModelError(f"verification script {script}: {problem}", hint=HINT)


def _problem(tensors: Mapping[str, torch.Tensor], index: int, name: str, images: int) -> str:
    """What is wrong with tensor ``name`` of prompt ``index``; "" if nothing is."""
    tensor = tensors.get(f"{index}.{name}")
    if tensor is None:
        return "is missing" if name in REQUIRED else ""
    dtype, expected_dtype = str(tensor.dtype).removeprefix("torch."), "int" if name in ALL_IDS else "float"
    if not dtype.removeprefix("b").removeprefix("u").startswith(expected_dtype):
        return f"has dtype {dtype}, expected {expected_dtype}"
    shape, tokens = list(tensor.shape), tensors[f"{index}.ids"].numel()
    expected_shape, fits = {
        "logits": (f"[N, V] with at most {tokens} rows", len(shape) == 2 and 0 < shape[0] <= tokens),
        "pixels": (f"[{images}, 3, H, W]", len(shape) == 4 and shape[:2] == [images, 3]),
        "embeddings": (f"[{images}, Q, D]", len(shape) == 3 and shape[0] == images),
        "unprepared": (f"[{images}, Q, D]", len(shape) == 3 and shape[0] == images),
    }.get(name, ("one dimension", len(shape) == 1))
    if not fits:
        return f"has shape {shape}, expected {expected_shape}"
    return "" if bool(tensor.float().isfinite().all()) else "has values that are NaN or infinite"


def _prompt_outputs(tensors: Mapping[str, torch.Tensor], index: int) -> PromptOutputs:
    given = {name: tensors.get(f"{index}.{name}") for name in NAMES}
    outputs: dict[str, Any] = {
        name: tensor if tensor is None else tensor.tolist() if name in ALL_IDS else tensor.float()
        for name, tensor in given.items()
    }
    return PromptOutputs(**outputs)


def _stated(script: str, text: str) -> Stated:
    document: Any = None
    try:
        document = json.loads(text)
        return Stated.model_validate(document)
    except ValidationError as error:
        path, why = next(explain(error, Stated, document))
        _refuse(script, f"metadata `{'.'.join(['stated', *map(str, path)])}`: {why}")
    except ValueError as error:
        _refuse(script, f"metadata `stated`: {error}")
