"""What a stage saves."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

import llavactl
from llavactl.core.model_description import read_description
from llavactl.testing import run_cli
from llavactl.training.sharding import in_file


def test_training_from_a_checkout_that_is_not_installed(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def version_of_others(name: str) -> str:
        if name == "llavactl":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(metadata, "version", version_of_others)
    options = ["features.mode=live", f"run_dir={toy}/run", "stage1.max_steps=1", "eval.max_new_tokens=2"]
    words = [word for option in options for word in ("-o", option)]
    result = run_cli("train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *words)
    assert result.exit_code == 0, result.stderr
    assert read_description(toy / "run/stage1/model")["versions"]["llavactl"] == llavactl.__version__


@pytest.mark.parametrize("tensor", [torch.ones(3, 5, dtype=torch.bfloat16), torch.tensor(7), torch.zeros(0, 4)])
def test_a_gathered_weight_is_mapped_from_its_file(tensor: torch.Tensor, tmp_path: Path) -> None:
    mapped = in_file(tensor, tmp_path / "weight")
    assert mapped.dtype == tensor.dtype
    assert torch.equal(mapped, tensor)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_gathered_weight_on_a_full_disk_is_an_error() -> None:
    with pytest.raises(OSError, match="space"):
        in_file(torch.ones(3), Path("/dev/full"))
