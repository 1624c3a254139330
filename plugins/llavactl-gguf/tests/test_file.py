"""GGUF files are written tensor by tensor, and completely or not at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGUFReader
from llavactl_gguf.file import StoredTensor, write_file
from llavactl_gguf.language import language_tensors
from llavactl_gguf.vision import vision_tensors

from llavactl import open_model

from .conftest import Toys


def test_one_tensor_is_made_at_a_time(tmp_path: Path) -> None:
    made: list[int] = []
    seen: list[int] = []

    class Weight:
        def __del__(self) -> None:
            made.remove(0)

    def make() -> Any:
        keeper = Weight()
        made.append(0)
        seen.append(len(made))
        tensor = torch.ones(4, 32)
        tensor.keeper = keeper  # type: ignore[attr-defined]
        return tensor

    write_file(tmp_path / "a.gguf", "clip", [], (StoredTensor(f"t{at}", (4, 32), "f32", make) for at in range(5)))
    assert seen == [1] * 5
    assert len(GGUFReader(tmp_path / "a.gguf").tensors) == 5


@pytest.mark.parametrize("connector", ["linear", "mlp2x-gelu"])
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_listing_tensors_copies_no_weights(toys: Toys, vision: str, connector: str) -> None:
    """A tensor that isn't a vector is only made when it is written, and then has the announced shape."""
    saved = open_model(toys.model(vision=vision, connector={"name": connector}, layer=[-1, 1]))
    language = saved.language()
    allocated = 0

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal allocated
            result = func(*args, **kwargs or {})
            if isinstance(result, torch.Tensor) and result.dim() > 1 and "view" not in str(func):
                allocated += not any(
                    isinstance(each, torch.Tensor) and each.data_ptr() == result.data_ptr() for each in args
                )
            return result

    with Count():
        tensors = [*language_tensors(language, "f32")]
    assert not allocated
    tensors += vision_tensors(saved, "f32", "cls-last")
    for tensor in tensors:
        assert tuple(tensor.make().shape) == tensor.shape


@pytest.mark.parametrize("failure", [MemoryError, KeyboardInterrupt])
def test_after_a_failure_there_is_no_file(tmp_path: Path, failure: type[BaseException]) -> None:
    def fail() -> torch.Tensor:
        raise failure

    good = StoredTensor.of("good", torch.ones(4, 32), "f32")
    with pytest.raises(failure):
        write_file(tmp_path / "a.gguf", "clip", [], [good, StoredTensor("bad", (4, 32), "f32", fail)])
    assert not list(tmp_path.iterdir())


def test_after_a_failure_the_file_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import GGUFWriter

    opened: list[Any] = []
    write_header = GGUFWriter.write_header_to_file

    def remembered(writer: GGUFWriter) -> None:
        write_header(writer)
        opened.extend(writer.fout or ())

    monkeypatch.setattr(GGUFWriter, "write_header_to_file", remembered)
    monkeypatch.setattr(GGUFWriter, "write_tensor_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_file(tmp_path / "a.gguf", "clip", [], [StoredTensor.of("t", torch.ones(4, 32), "f32")])
    assert [file.closed for file in opened] == [True]
