"""Writes GGUF files tensor by tensor: besides the model, only one tensor and its conversion are in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
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

HINT = "use `--format hf`"
"""For models that the format can't represent."""

BLOCK = 32
"""Weights of one scale in q8_0; a row of a quantized matrix is a multiple of it."""

Key = tuple[str, bool | int | float | str | Sequence[Any]]
"""A metadata key with its value. An integer is stored as uint32, a list of integers as int32."""


class StoredTensor(NamedTuple):
    """A tensor under its name in llama.cpp, which is made when it is written.

    Vectors are stored in float32, as llama.cpp requires.
    """

    name: str
    shape: tuple[int, ...]
    type: TensorType
    make: Callable[[], torch.Tensor]

    @classmethod
    def of(
        cls,
        name: str,
        weight: torch.Tensor,
        kind: TensorType,
        change: Callable[[torch.Tensor], torch.Tensor] = lambda weight: weight,
    ) -> StoredTensor:
        """The tensor ``change(weight)``, which has the shape of ``weight``."""
        return cls(name, tuple(weight.shape), kind, lambda: change(weight))

    @property
    def stored_type(self) -> TensorType:
        """The type in the file: f32 for a vector, f16 instead of q8_0 for rows that aren't a multiple of a block."""
        if len(self.shape) < 2:
            return "f32"
        return "f16" if self.type == "q8_0" and self.shape[-1] % BLOCK else self.type

    def values(self) -> np.ndarray:
        """The values as they are stored."""
        from gguf import GGMLQuantizationType, quantize

        return quantize(self.make().detach().float().numpy(), GGMLQuantizationType[self.stored_type.upper()])


def write_file(path: Path, architecture: str, keys: Iterable[Key], tensors: Iterable[StoredTensor]) -> None:
    """Writes the GGUF file ``path``; after an exception there is none."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    with _writer(path, architecture) as writer:
        for key, value in keys:
            _add_key(writer, key, value)
        listed = [*tensors]
        for tensor in listed:
            kind = GGMLQuantizationType[tensor.stored_type.upper()]
            block, block_bytes = GGML_QUANT_SIZES[kind]
            size = math.prod(tensor.shape) // block * block_bytes
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in listed:
            writer.write_tensor_data(tensor.values())


@contextmanager
def _writer(path: Path, architecture: str) -> Iterator[Any]:
    """A writer of the file ``path``, which is closed in any case and removed after an exception."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    try:
        yield writer
        writer.close()
    except BaseException:
        with suppress(OSError):  # on a full disk, closing fails as well
            writer.close()
        path.unlink(missing_ok=True)
        raise


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
