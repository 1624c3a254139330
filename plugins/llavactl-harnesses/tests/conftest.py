"""A toy model, and a folder for llavactl's files."""

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

import llavactl
from llavactl import Assistant
from llavactl.testing import toy_model, toy_photos

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # not for the tests of other folders in the same process


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a toy model with random weights."""
    return toy_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def model(folder: Path) -> Assistant:
    return llavactl.load_model(folder, device="cpu")


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Path]:
    return toy_photos(tmp_path_factory.mktemp("photos"), 4)
