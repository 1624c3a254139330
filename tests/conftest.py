"""Every test has its own LLAVACTL_HOME; toy models and data are made once."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from .preloaded import Interpreters

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


@pytest.fixture(autouse=True)
def drawn_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All loss curves are one image, except in tests of reports: drawing is a fifth of the time of a toy's training."""
    if "/report/" in request.node.nodeid:
        return
    from llavactl.report import plots

    draw = plots._draw_loss  # keeps what it has drawn
    monkeypatch.setattr(plots, "_draw_loss", lambda *_series: draw((1.0, 2.0), (2.0, 1.0), (), (), plots.LIGHT))


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings end with sample answers of 8 tokens instead of 64: a toy model never ends an answer."""
    from llavactl.training import sample_answers

    monkeypatch.setattr(sample_answers, "MAX_NEW_TOKENS", 8)


@pytest.fixture
def small_disk() -> Iterator[Callable[[Path, str], None]]:
    """Mounts a tmpfs: ``small_disk(folder, "size=64k")``; a second call changes it: ``"remount,size=1m"``.

    The test is skipped where nothing can be mounted.
    """
    mounted: list[Path] = []

    def mount(folder: Path, options: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"tmpfs can't be mounted: {error}")
        if folder not in mounted:
            mounted.append(folder)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture(scope="session")
def interpreters() -> Iterator[Interpreters]:
    """Runs programs in new processes, without the time that importing torch and transformers takes."""
    started = Interpreters()
    yield started
    started.close()


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
