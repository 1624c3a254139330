"""Outputs of verification scripts: what is accepted, and one line for everything else."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llavactl.core.errors import ModelError
from llavactl.evaluation.verification.outputs import ScriptOutputs, read_outputs

Tensors = dict[str, torch.Tensor]
T, V = 5, 7


def tensors() -> Tensors:
    """Outputs for a prompt with two images and one without."""
    one = {"ids": torch.arange(T), "said": torch.arange(2), "logits": torch.zeros(T, V)}
    images = {
        "pixels": torch.zeros(2, 3, 4, 4),
        "embeddings": torch.zeros(2, 3, 8),
        "unprepared": torch.zeros(2, 3, 8),
        "batched_answer": torch.arange(2),
    }
    outputs = {f"0.{name}": tensor for name, tensor in (one | images).items()}
    return outputs | {f"1.{name}": tensor.clone() for name, tensor in one.items()}


def read(folder: Path, outputs: Tensors, stated: str = "{}") -> ScriptOutputs:
    from safetensors.torch import save_file

    file = folder / "out.safetensors"
    save_file(outputs, file, metadata={"stated": stated})
    return read_outputs("script.py", file, [2, 0])


def test_complete_outputs(tmp_path: Path) -> None:
    stated = {
        "eos": [2],
        "rounding": "f16",
        "known_differences": ["Images are resampled."],
        "program": "p 1",
        "later": 1,
    }
    outputs = read(tmp_path, tensors(), json.dumps(stated))
    first, second = outputs.prompts
    assert first.ids == [0, 1, 2, 3, 4]
    assert first.embeddings is not None
    assert (second.pixels, second.embeddings, second.batched_answer) == (None, None, None)
    assert (outputs.stated.rounding, outputs.stated.eos, outputs.stated.padding) == ("f16", [2], None)


def test_the_last_position_alone_and_other_float_types(tmp_path: Path) -> None:
    changed = tensors() | {"0.logits": torch.zeros(1, V, dtype=torch.bfloat16), "0.ids": torch.arange(T).int()}
    logits = read(tmp_path, changed).prompts[0].logits
    assert (logits.shape, logits.dtype) == ((1, V), torch.float32)


def test_optional_tensors(tmp_path: Path) -> None:
    required = {name: tensor for name, tensor in tensors().items() if name[2:] in ("ids", "said", "logits")}
    assert read(tmp_path, required).prompts[0].pixels is None


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        *((name, None) for name in ("0.ids", "1.said", "1.logits")),
        ("0.embedings", torch.zeros(1)),
        ("2.ids", torch.arange(2)),
        ("0.ids", torch.zeros(T)),
        ("0.ids", torch.ones(T, dtype=torch.bool)),
        ("1.said", torch.zeros(1, 2, dtype=torch.int64)),
        ("1.logits", torch.zeros(T, V, dtype=torch.int64)),
        ("1.logits", torch.zeros(T, V, dtype=torch.complex64)),
        ("1.logits", torch.zeros(T + 1, V)),
        ("1.logits", torch.zeros(0, V)),
        ("1.logits", torch.zeros(V)),
        ("1.logits", torch.full((T, V), torch.nan)),
        ("0.embeddings", torch.full((2, 3, 8), torch.inf)),
        ("0.embeddings", torch.zeros(6, 8)),
        ("0.embeddings", torch.zeros(1, 3, 8)),
        ("0.unprepared", torch.zeros(1, 3, 8)),
        ("0.pixels", torch.zeros(2, 4, 4, 3)),
        ("0.pixels", torch.zeros(2, 3, 4, 4, dtype=torch.uint8)),
        ("1.pixels", torch.zeros(1, 3, 4, 4)),
        ("0.batched_answer", torch.zeros(2)),
    ],
)
def test_an_odd_tensor_is_named(tmp_path: Path, name: str, tensor: torch.Tensor | None) -> None:
    changed = {key: value for key, value in (tensors() | {name: tensor}).items() if value is not None}
    with pytest.raises(ModelError) as refused:
        read(tmp_path, changed)
    assert "script.py" in refused.value.message
    assert name in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize(
    ("stated", "named"),
    [
        ("{", "stated"),
        ("[]", "stated"),
        ('{"eos": 2}', "stated.eos"),
        ('{"eos": ["2"]}', "stated.eos"),
        ('{"rounding": 16}', "stated.rounding"),
        ('{"known_differences": "Images are resampled."}', "stated.known_differences"),
        ('{"dtype": [1]}', "stated.dtype"),
        ('{"resampled": "yes"}', "stated.resampled"),
    ],
)
def test_odd_metadata_is_named(tmp_path: Path, stated: str, named: str) -> None:
    with pytest.raises(ModelError) as refused:
        read(tmp_path, tensors(), stated)
    assert "script.py" in refused.value.message
    assert f"`{named}" in refused.value.message
    assert "\n" not in refused.value.message


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"not tensors")])
def test_no_outputs(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    read(tmp_path, tensors())
    damage(tmp_path / "out.safetensors")
    with pytest.raises(ModelError, match=r"script\.py"):
        read_outputs("script.py", tmp_path / "out.safetensors", [2, 0])
