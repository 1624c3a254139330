"""What a stage saves."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

import llavactl
from llavactl.model.folder import describe
from llavactl.testing import run_cli


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
    assert describe(toy / "run/stage1/model")["versions"]["llavactl"] == llavactl.__version__
