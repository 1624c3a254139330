"""Every test has its own LLAVACTL_HOME; toy models and data are made once."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# No test fails because the machine is slow just now.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# A shell that starts the tests in its background has them ignore Ctrl-C, and every process that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user folder of its own, so that no test sees another's cache or the developer's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LLAVACTL_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny CLIP, a tiny Llama, photos, records and recipe.yaml; don't write into it."""
    from llavactl.testing import toy_recipe

    return toy_recipe(tmp_path_factory.mktemp("toys")).parent


@pytest.fixture
def toy(toys: Path, tmp_path: Path) -> Path:
    """A copy of ``toys`` to run in."""
    folder = tmp_path / "toy"
    shutil.copytree(toys, folder)
    return folder
