"""Exports equal their model in a process without llavactl, and when llavactl reads them again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.errors import ModelError
from llavactl.core.model_description import read_description
from llavactl.model import folder as model_folder
from llavactl.model.imported import resolve
from llavactl.testing import run_cli

from .conftest import Make


def exported(model: Path, form: str, to: Path, *images: Path) -> Any:
    """The report of a verified export."""
    options = [part for image in images for part in ("--image", str(image))]
    return written(model, form, to, "--verify", *options)


def written(model: Path, form: str, to: Path, *more: str) -> Any:
    """The report of an export, not verified unless ``more`` has ``--verify``."""
    verify = () if "--verify" in more else ("--no-verify",)
    result = run_cli("export", "--model", str(model), "--format", form, "--to", str(to), "--json", *verify, *more)
    assert result.exit_code == 0, result.stderr
    return result.json()


def weights(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Connector and language model of a model folder, adapter merged."""
    loaded = model_folder.load(folder)
    language: Any = loaded.bundle.model.language
    if loaded.description["method"] == "lora":
        language = language.merge_and_unload()
    return loaded.bundle.model.connector.state_dict(), language.state_dict()


def same(ours: dict[str, Any], theirs: dict[str, Any], rows: int | None = None) -> None:
    """Weights are equal; with ``rows``, ``theirs`` may have more rows."""
    import torch

    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        other = theirs[name][: len(weight)] if rows is not None else theirs[name]
        assert torch.equal(weight, other), name


@pytest.mark.parametrize(
    ("form", "connector", "image", "template"),
    [
        ("hf", "linear", "pad", "vicuna-v1"),
        pytest.param("hf", "mlp2x-gelu", "square", "tokenizer", marks=pytest.mark.slow),
        pytest.param("llava", "linear", "square", "tokenizer", marks=pytest.mark.slow),
        ("llava", "mlp2x-gelu", "pad", "vicuna-v1"),
    ],
)
def test_an_export_is_read_as_the_same_model(
    native: Make, toys: Path, tmp_path: Path, form: str, connector: str, image: str, template: str
) -> None:
    model = native("ours", connector=connector, image=image, template=template)
    images = sorted((toys / "images").iterdir())[:2]
    report = exported(model, form, tmp_path / "out", *images)
    verified = report["verified"]
    assert (verified["verdict"], verified["prompts"]) == ("exact", 7)
    assert verified["compared"]["pixels"]["value"] == 0
    back = resolve(tmp_path / "out")
    for ours, theirs in zip(weights(model), weights(back), strict=True):
        same(ours, theirs, rows=1 if form == "hf" else None)
    assert read_description(back)["template"] == template


@pytest.mark.parametrize("form", ["hf", *(pytest.param(form, marks=pytest.mark.slow) for form in ("llava", "peft"))])
def test_adapters(native: Make, tmp_path: Path, form: str) -> None:
    """Merging in float32 stays within the tolerance; ``peft`` preserves the adapter exactly."""
    model = native("ours", method="lora")
    report = exported(model, form, tmp_path / "out")
    assert report["verified"]["verdict"] == "exact"
    if form == "peft":
        back = resolve(tmp_path / "out")
        for ours, theirs in zip(weights(model), weights(back), strict=True):
            same(ours, theirs, rows=1)
        assert exported(tmp_path / "out", "llava", tmp_path / "llava")["verified"]["verdict"] == "exact"


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "llava"])
def test_conversion_between_formats(native: Make, tmp_path: Path, form: str) -> None:
    other = {"hf": "llava", "llava": "hf"}[form]
    written(native("ours"), form, tmp_path / "one")
    assert exported(tmp_path / "one", other, tmp_path / "two")["verified"]["verdict"] == "exact"
    if other == "llava":
        # The export doesn't depend on the folder it was converted from.
        shutil.rmtree(tmp_path / "one")
        assert run_cli("chat", "--model", str(tmp_path / "two"), "--prompt", "Hello?").exit_code == 0


@pytest.mark.slow
def test_a_stage_1_model(native: Make, tmp_path: Path) -> None:
    """In format llava a bare projector; the template ``plain`` has no chat template."""
    model = native("ours", method="connector", template="plain")
    assert exported(model, "llava", tmp_path / "llava")["verified"]["verdict"] == "exact"
    assert (tmp_path / "llava" / "mm_projector.bin").is_file()
    assert not list((tmp_path / "llava").glob("*.safetensors"))
    assert exported(model, "hf", tmp_path / "hf")["verified"]["verdict"] == "exact"
    assert not (tmp_path / "hf" / "chat_template.jinja").exists()


@pytest.mark.slow
def test_with_the_class_token(native: Make, tmp_path: Path) -> None:
    assert exported(native("ours", select="cls-patch"), "hf", tmp_path / "out")["verified"]["verdict"] == "exact"
    assert read_description(resolve(tmp_path / "out"))["vision"]["select"] == "cls-patch"


def test_bfloat16_weights_are_saved_exactly(native: Make, tmp_path: Path) -> None:
    model = native("ours", precision="bfloat16")
    written(model, "hf", tmp_path / "out")
    for ours, theirs in zip(weights(model), weights(resolve(tmp_path / "out")), strict=True):
        same(ours, theirs, rows=1)


def test_new_tokens_are_never_the_most_likely(native: Make, tmp_path: Path) -> None:
    """The embeddings are padded to a multiple of 64 rows."""
    import torch
    from safetensors.torch import load_file

    written(native("ours"), "hf", tmp_path / "out")
    head = load_file(tmp_path / "out" / "model.safetensors")["language_model.lm_head.weight"]
    old_rows = 400
    assert len(head) == 448
    torch.manual_seed(0)
    logits = torch.randn(1000, head.shape[1]) @ head.T
    assert int(logits.argmax(-1).max()) < old_rows


@pytest.mark.slow
def test_verification_finds_changed_files(native: Make, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from .test_verification import update_record

    model = native("ours")
    written(model, "hf", tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["multi_modal_projector.linear_2.bias"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    update_record(tmp_path / "out")
    again = ("export", "--model", str(model), "--format", "hf", "--to", str(tmp_path / "out"), "--verify")
    result = run_cli(*again)
    assert result.exit_code == 1
    assert "logits: " in result.stderr
    template = tmp_path / "out" / "chat_template.jinja"
    template.write_text(template.read_text().replace("USER", "USEZ"))
    update_record(tmp_path / "out")
    assert "token ids: " in run_cli(*again).stderr
    file.write_bytes(b"no weights".ljust(file.stat().st_size))
    update_record(tmp_path / "out")
    assert "can't load it" in run_cli(*again).stderr


def test_unsupported_parts_are_refused(native: Make, tmp_path: Path) -> None:
    model = native("ours")
    description = json.loads((model / "llavactl.json").read_text())
    (model / "llavactl.json").write_text(
        json.dumps(description | {"connector": {"name": "mlp2x-gelu", "pixel_shuffle": 2}})
    )
    result = run_cli("export", "--model", str(model), "--format", "hf", "--to", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "mlp2x-gelu with pixel_shuffle: 2" in result.stderr
    assert not (tmp_path / "out").exists()
    result = run_cli("export", "--model", str(native("full")), "--format", "peft", "--to", str(tmp_path / "out"))
    assert "no adapter" in result.stderr


def test_other_files_are_never_overwritten(native: Make, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.txt").write_text("text")
    model = str(native("ours"))
    result = run_cli("export", "--model", model, "--format", "hf", "--to", str(folder))
    assert result.exit_code == 1
    assert "thesis.txt" in result.stderr
    assert (folder / "thesis.txt").read_text() == "text"
    to = ("export", "--model", model, "--to", str(tmp_path / "out"), "--json", "--no-verify")
    assert not run_cli(*to, "--format", "hf").json()["finished_before"]
    assert run_cli(*to, "--format", "hf").json()["finished_before"]
    assert not run_cli(*to, "--format", "llava").json()["finished_before"]
    assert (tmp_path / "out" / "config.json").read_text().count("mm_vision_tower") == 1


def test_a_user_file_in_an_export_is_kept_and_a_damaged_export_repeated(native: Make, tmp_path: Path) -> None:
    model, out = native("ours"), tmp_path / "out"
    written(model, "hf", out)
    (out / "mine.txt").write_text("mine")
    refused = run_cli("export", "--model", str(model), "--format", "llava", "--to", str(out))
    assert refused.exit_code == 1
    assert "mine.txt" in refused.stderr
    assert (out / "mine.txt").read_text() == "mine"
    (out / "mine.txt").unlink()
    size = (out / "model.safetensors").stat().st_size
    (out / "model.safetensors").write_bytes(b"cut")
    assert not written(model, "hf", out)["finished_before"]
    assert (out / "model.safetensors").stat().st_size == size


def test_unknown_format(native: Make, tmp_path: Path) -> None:
    result = run_cli("export", "--model", str(native("ours")), "--format", "hff", "--to", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "did you mean 'hf'" in result.stderr


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"llavactl\.json"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ModelError, match="unknown checkpoint format"):
        resolve(tmp_path)


def test_rotary_frequencies_stay_float32_with_an_adapter_in_bfloat16(native: Make) -> None:
    import torch

    language: Any = model_folder.load(native("ours", method="lora", precision="bfloat16")).bundle.model.language
    frequencies = [buffer for name, buffer in language.named_buffers() if name.endswith("inv_freq")]
    assert frequencies
    assert all(buffer.dtype == torch.float32 for buffer in frequencies)
    assert all(weight.dtype == torch.bfloat16 for weight in language.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "llava"])
def test_verification_reports_the_rounding_of_a_merged_adapter(native: Make, tmp_path: Path, form: str) -> None:
    verified = exported(native("ours", method="lora", precision="bfloat16"), form, tmp_path / "out")["verified"]
    assert verified["verdict"] == "exact"
    assert 0 < verified["compared"]["merging"]["value"] < 0.2
