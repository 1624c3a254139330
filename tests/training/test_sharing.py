"""A finished stage is linked into another run, or copied, and never overwritten through the link."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavactl.core.hashes import hash_folder
from llavactl.training.report import REPORT
from llavactl.training.sharing import finished_stage, remove_link, share_stage

NEEDED = {
    **dict.fromkeys(("stage", "steps", "resumed_from", "samples", "validation_samples", "skipped_samples"), 1),
    **dict.fromkeys(("trainable_parameters", "tokens", "seconds", "tokens_per_s", "padding", "prefix_sharing"), 1),
    **dict.fromkeys(("loss", "val_loss", "packing", "model"), None),
}


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """A finished stage of the run ``a``, digest ``d``."""
    folder = tmp_path / "a" / "stage1"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "connector.safetensors").write_bytes(b"weights")
    (folder / "checkpoints").mkdir()
    report = {"digest": "d", "restore_best": False, "model_step": 1, "model_sha256": hash_folder(folder / "model")}
    (folder / REPORT).write_text(json.dumps({**NEEDED, **report}))
    return folder


def test_a_stage_is_found_by_its_digest(stage: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "none", tmp_path / "a"]
    assert finished_stage(runs, "stage1", "d", False) == stage
    assert finished_stage(runs, "stage1", "other", False) is None
    assert finished_stage(runs, "stage1", "d", "pope.f1") is None
    assert finished_stage(runs, "stage2", "d", False) is None
    (stage / "model" / "connector.safetensors").write_bytes(b"damaged")
    assert finished_stage(runs, "stage1", "d", False) is None


def test_a_link_is_relative_and_replaces_what_was_there(stage: Path, tmp_path: Path) -> None:
    folder = tmp_path / "b" / "stage1"
    (folder / "checkpoints").mkdir(parents=True)
    share_stage(stage, folder)
    assert folder.readlink() == Path("../a/stage1")
    share_stage(stage, folder)  # once more
    assert (folder / "model" / "connector.safetensors").read_bytes() == b"weights"
    assert finished_stage([tmp_path / "b"], "stage1", "d", False) == stage  # never a link to a link
    remove_link(folder)
    remove_link(stage)  # not a link
    assert not folder.exists()
    assert stage.is_dir()


def test_a_linked_run_folder_has_links_that_work(stage: Path, tmp_path: Path) -> None:
    (tmp_path / "disk" / "deep" / "b").mkdir(parents=True)
    (tmp_path / "b").symlink_to(tmp_path / "disk" / "deep" / "b")
    share_stage(stage, tmp_path / "b" / "stage1")
    assert (tmp_path / "b" / "stage1" / REPORT).is_file()


def test_without_links_the_stage_is_copied(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    folder = tmp_path / "b" / "stage1"
    share_stage(stage, folder)
    assert not folder.is_symlink()
    assert finished_stage([tmp_path / "b"], "stage1", "d", False) == folder
    assert not (folder / "checkpoints").exists()
