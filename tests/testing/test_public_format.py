"""A format that uses public names only passes the kit, also for models that it must restore from settings."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import llavactl
from llavactl.testing import check_format, toy_model


class TwoFiles:
    """The connector and a description; the models that it was trained with are referenced."""

    reload = None

    def recognise(self, folder: Path) -> bool:
        return (folder / "two-files.json").is_file()

    def write(self, model: Path, to: Path) -> None:
        saved = llavactl.open_model(model)
        if saved.description["method"] == "full":
            raise llavactl.ModelError("two-files can't represent a fully trained language model")
        save_file(saved.connector_weights(), to / "connector.safetensors")
        if saved.adapter is not None:
            shutil.copytree(saved.adapter, to / "adapter")
        description = {key: saved.description[key] for key in ("connector", "language", "vision")}  # type: ignore[literal-required]
        (to / "two-files.json").write_text(json.dumps({**description, "settings": saved.settings()}))

    def read(self, folder: Path, model: Path) -> None:
        description = json.loads((folder / "two-files.json").read_text())
        adapter = folder / "adapter"
        weights = load_file(folder / "connector.safetensors")
        llavactl.save_model(model, weights, **description, adapter=adapter if adapter.is_dir() else None)


def test_it_conforms() -> None:
    assert check_format(TwoFiles()) == []


def test_a_format_that_only_writes_recognizes_no_export() -> None:
    assert any("only writes" in problem for problem in check_format(TwoFiles(), reads=False))


class Unrecognised(TwoFiles):
    """Recognizes no folder."""

    def recognise(self, folder: Path) -> bool:
        return False


class OnlyWrites(Unrecognised):
    def read(self, folder: Path, model: Path) -> None:
        raise llavactl.ModelError("two-files only writes")


def test_a_format_that_only_writes_conforms() -> None:
    assert check_format(OnlyWrites()) == check_format(OnlyWrites(), reads=False) == []


def test_a_format_that_reads_must_recognize_its_exports() -> None:
    assert all("recognise()" in problem for problem in check_format(Unrecognised()))
    assert check_format(Unrecognised())


class Doubled(TwoFiles):
    """Reads twice the weights of the connector."""

    def read(self, folder: Path, model: Path) -> None:
        super().read(folder, model)
        weights = load_file(model / "connector.safetensors")
        save_file({name: 2 * weight for name, weight in weights.items()}, model / "connector.safetensors")


def test_other_weights_are_a_fault() -> None:
    problems = check_format(Doubled())
    assert [problem.partition(":")[0] for problem in problems] == ["lora", "connector"]
    assert all("logits differ" in problem for problem in problems)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_model(tmp_path_factory.mktemp("toy"), method="lora")


def test_settings_are_restored(model: Path, tmp_path: Path) -> None:
    written = json.loads((model / "llavactl.json").read_text())
    changed = {"image_order": "as-data", "stage": 1, "template": {"name": "tokenizer", "date": "2024-01-01"}}
    (model / "llavactl.json").write_text(json.dumps({**written, **changed}))
    (tmp_path / "export").mkdir()
    TwoFiles().write(model, tmp_path / "export")
    TwoFiles().read(tmp_path / "export", tmp_path / "read")
    (model / "llavactl.json").write_text(json.dumps(written))
    restored: Any = llavactl.open_model(tmp_path / "read").description
    assert (restored["image_order"], restored["stage"], restored["method"]) == ("as-data", 1, "lora")
    assert restored["template"] == "tokenizer"  # its date is fixed in the text of the exported chat template


def test_parts_of_a_model(model: Path) -> None:
    saved = llavactl.open_model(model)
    tokenizer = saved.tokenizer()
    prompt = saved.prompt([llavactl.Turn("user", (llavactl.ImageFile(str(model), "a.jpg"), "\nWhat?"))])
    assert prompt.endswith("USER: <image>\nWhat? ASSISTANT:")
    assert saved.stop_criteria(tokenizer) == (frozenset({tokenizer.eos_token_id}), ())
    assert "add_generation_prompt" in saved.chat_template(tokenizer)
    assert saved.language_config().hidden_size == saved.language().get_input_embeddings().weight.shape[1]
    plain, merged = saved.language(merged=False).state_dict(), saved.language().state_dict()
    assert plain.keys() == merged.keys()
    assert any(not plain[name].equal(merged[name]) for name in plain)
    assert saved.vision().shape() == saved.shape


@pytest.mark.parametrize(
    ("change", "message"), [({"format": 2}, "format 2"), ({"vision": ...}, "no vision"), (None, "not a model folder")]
)
def test_a_folder_that_cannot_be_read(change: Any, message: str, model: Path, tmp_path: Path) -> None:
    if change is not None:
        description = {**json.loads((model / "llavactl.json").read_text()), **change}
        kept = {key: value for key, value in description.items() if value is not ...}
        (tmp_path / "llavactl.json").write_text(json.dumps(kept))
    with pytest.raises(llavactl.ModelError, match=message):
        llavactl.open_model(tmp_path)


def test_unknown_keys_are_ignored(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    file = tmp_path / "model" / "llavactl.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "later": {"key": 1}}))
    assert llavactl.open_model(tmp_path / "model").connector_weights()
