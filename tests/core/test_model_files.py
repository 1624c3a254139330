"""Broken model files (LFS pointers, error pages, truncated downloads) and the errors of libraries about them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import ModelError
from llavactl.core.model_files import file_error, weight_files
from llavactl.core.registry import registry

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21461\nsize 12345\n"
BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "Git LFS pointer": lambda _: LFS,
    "git-annex pointer": lambda _: b"/annex/objects/SHA256E-s12345--4d7a\n",
    "empty": lambda _: b"",
    "HTML": lambda _: b"\n<!DOCTYPE html><html><body>401</body></html>",
    "truncated": lambda data: data[: len(data) // 2],
    "garbage": lambda _: bytes(range(200, 256)) * 9,
    "zeros": lambda data: bytes(len(data)),
}
FILES = (
    *("clip/model.safetensors", "clip/config.json", "clip/preprocessor_config.json"),
    *("language/model.safetensors", "language/config.json", "language/generation_config.json"),
    *("language/tokenizer.json", "language/tokenizer_config.json"),
)


def _load(folder: Path) -> None:
    vision = registry().create("vision", {"name": "clip", "model": str(folder / "clip")})
    vision.identity()
    vision.load("cpu", "float32")
    language = registry().create("languages", {"name": "hf", "model": str(folder / "language")})
    language.tokenizer()
    language.load("float32")


@pytest.fixture(scope="module")
def bins(tmp_path_factory: pytest.TempPathFactory, toys: Path) -> Path:
    """The toy models with their weights as pickles."""
    import torch
    from safetensors.torch import load_file

    folder = tmp_path_factory.mktemp("bins")
    for name in ("clip", "language"):
        shutil.copytree(toys / name, folder / name)
        weights = load_file(folder / name / "model.safetensors")
        torch.save(weights, folder / name / "pytorch_model.bin")
        (folder / name / "model.safetensors").unlink()
    return folder


def test_complete_files_pass(toys: Path, bins: Path) -> None:
    for folder in (toys, bins):
        for name in ("clip", "language"):
            assert [error for file in (folder / name).iterdir() if (error := file_error(file))] == []
    _load(bins)


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("name", FILES)
def test_a_broken_file_is_named(toy: Path, name: str, how: str) -> None:
    file = toy / name
    file.write_bytes(BROKEN[how](file.read_bytes()))
    with pytest.raises(ModelError) as caught:
        _load(toy)
    assert str(file) in caught.value.message
    assert "\n" not in caught.value.message
    if how in ("Git LFS pointer", "git-annex pointer", "empty", "HTML"):
        assert how in caught.value.message
    assert ("git lfs pull" in caught.value.hint) == (how == "Git LFS pointer")


@pytest.mark.parametrize("how", BROKEN)
@pytest.mark.parametrize("which", ["clip", "language"])
def test_a_broken_pickle_is_named(bins: Path, tmp_path: Path, which: str, how: str) -> None:
    shutil.copytree(bins, tmp_path, dirs_exist_ok=True)
    file = tmp_path / which / "pytorch_model.bin"
    file.write_bytes(BROKEN[how](file.read_bytes()))
    with pytest.raises(ModelError) as caught:
        _load(tmp_path)
    assert str(file) in caught.value.message


def test_code_in_a_pickle_is_not_run(bins: Path, tmp_path: Path) -> None:
    import torch

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    shutil.copytree(bins, tmp_path, dirs_exist_ok=True)
    torch.save({"weight": Evil()}, tmp_path / "language" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"\.bin"):
        _load(tmp_path)
    assert not (tmp_path / "ran").exists()


class TestShards:
    @pytest.fixture
    def folder(self, toy: Path) -> Path:
        from safetensors.torch import load_file, save_file

        folder = toy / "language"
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        where = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(sorted(weights))}
        for shard in set(where.values()):
            part = {name: weights[name] for name in weights if where[name] == shard}
            save_file(part, folder / shard, metadata={"format": "pt"})
        index = {"metadata": {"total_size": 1}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    def test_complete(self, folder: Path) -> None:
        assert [file.name[:11] for file in weight_files(folder)] == ["model-00001", "model-00002"]
        _load(folder.parent)

    @pytest.mark.parametrize("how", BROKEN)
    def test_a_broken_shard(self, folder: Path, how: str) -> None:
        file = folder / "model-00002-of-00002.safetensors"
        file.write_bytes(BROKEN[how](file.read_bytes()))
        with pytest.raises(ModelError) as caught:
            _load(folder.parent)
        assert str(file) in caught.value.message

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelError, match=r"index\.json: .*model-00002-of-00002\.safetensors"):
            _load(folder.parent)

    @pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', LFS.decode()])
    def test_an_invalid_index(self, folder: Path, text: str) -> None:
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json"):
            _load(folder.parent)


def test_unused_files_may_be_pointers(toy: Path) -> None:
    """As after ``git lfs pull --include '*.safetensors'``."""
    for name in ("pytorch_model.bin", "tf_model.h5", "flax_model.msgpack"):
        (toy / "language" / name).write_bytes(LFS)
    _load(toy)


def test_a_broken_symbolic_link(toy: Path) -> None:
    file = toy / "language" / "model.safetensors"
    file.unlink()
    file.symlink_to(toy / "blobs" / "gone")
    with pytest.raises(ModelError, match=r"model\.safetensors: "):
        _load(toy)


def _config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        *(
            ({"quantization_config": {"quant_method": method}}, method)
            for method in ("gptq", "awq", "fp8", "compressed-tensors", "bitsandbytes", "mxfp4", "hqq")
        ),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, "awq"),
        ({"compression_config": {"format": "pack-quantized"}}, "quantized"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "MLX"),
    ],
)
@pytest.mark.parametrize("which", ["clip", "language"])
def test_quantized_weights_are_rejected(toy: Path, which: str, changes: dict[str, Any], method: str) -> None:
    _config(toy / which, **changes)
    with pytest.raises(ModelError, match="quantized") as caught:
        _load(toy)
    assert method in caught.value.message
    assert "unquantized" in caught.value.hint
    assert ("qlora" in caught.value.hint) == (which == "language")


def test_weights_quantized_by_autogptq_are_rejected(toy: Path) -> None:
    (toy / "language" / "quantize_config.json").write_text('{"bits": 4}', encoding="utf-8")
    with pytest.raises(ModelError, match="GPTQ"):
        _load(toy)


def test_a_null_quantization_config_is_accepted(toy: Path) -> None:
    _config(toy / "language", quantization_config=None)
    _load(toy)


@pytest.mark.parametrize(
    "changes", [{"model_type": "strange"}, {"hidden_act": "nope"}, {"num_attention_heads": 7}, {"hidden_size": "x"}]
)
@pytest.mark.parametrize("which", ["clip", "language"])
def test_an_invalid_configuration_is_rejected(toy: Path, which: str, changes: dict[str, Any]) -> None:
    _config(toy / which, **changes)
    with pytest.raises(ModelError) as caught:
        _load(toy)
    assert str(toy / which) in caught.value.message


@pytest.mark.parametrize("key", ["image_size", "patch_size", "num_hidden_layers"])
def test_an_unsupported_vision_configuration_is_rejected(toy: Path, key: str) -> None:
    _config(toy / "clip", **{key: [28, 28]})
    with pytest.raises(ModelError, match=key):
        _load(toy)
