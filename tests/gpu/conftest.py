"""Tests of this folder run on a CUDA device in ``make test-gpu``, and on the CPU in ``make test``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from llavactl.testing import toy_language


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Training uses a CUDA device wherever there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.fail("no CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device: make test-gpu")
    return torch.device(request.param)


@pytest.fixture
def toy(toys: Path, tmp_path: Path) -> Path:
    """A copy of ``toys`` with heads of 16, because torch's attention kernel for CUDA needs a multiple of 8."""
    folder = tmp_path / "toy"
    shutil.copytree(toys, folder)
    toy_language(folder / "language", width=64)
    return folder
