"""Writes GGUF files tensor by tensor: besides the model, only one converted tensor is in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    import numpy as np
    import torch

TensorType = Literal["f32", "f16", "bf16", "q8_0"]
TENSOR_TYPES: tuple[TensorType, ...] = get_args(TensorType)

FILE_TYPES: Mapping[TensorType, str] = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
}
"""Names of ``general.file_type``."""

BLOCK = 32
"""Weights of one scale in q8_0; a row of a quantized matrix is a multiple of it."""

Key = tuple[str, bool | int | float | str | Sequence[Any]]
"""A metadata key with its value. An integer is stored as uint32, a list of integers as int32."""


class StoredTensor(NamedTuple):
    """A tensor under its name in llama.cpp. Vectors are stored in float32, as llama.cpp requires."""

    name: str
    weight: torch.Tensor
    type: TensorType

    @property
    def stored_type(self) -> TensorType:
        """The type in the file: f32 for a vector, f16 instead of q8_0 for rows that aren't a multiple of a block."""
        if self.weight.dim() < 2:
            return "f32"
        return "f16" if self.type == "q8_0" and self.weight.shape[-1] % BLOCK else self.type

    def values(self) -> np.ndarray:
        """The values as they are stored."""
        from gguf import GGMLQuantizationType, quantize

        return quantize(self.weight.detach().float().numpy(), GGMLQuantizationType[self.stored_type.upper()])


def write_file(path: Path, architecture: str, keys: Iterable[Key], tensors: Sequence[StoredTensor]) -> None:
    """Writes the GGUF file ``path``."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in keys:
        _add_key(writer, key, value)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.stored_type.upper()]
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = tensor.weight.numel() // block * block_bytes
        writer.add_tensor_info(tensor.name, tensor.weight.shape, np.dtype(np.float32), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        writer.write_tensor_data(tensor.values())
    writer.close()


def _add_key(writer: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
