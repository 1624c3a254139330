"""What a verification sees, when it is made, and that the other program has no llavactl."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavactl.components.formats.hf import HfLlava
from llavactl.evaluation.verification.compare import VerificationResult
from llavactl.evaluation.verification.script import run_isolated
from llavactl.testing import run_cli
from llavactl.testing.runner import Result

from .conftest import Make
from .test_export import written


def test_the_other_process_has_no_llavactl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is installed; and it has the rest."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, transformers\n"
        "for name in ('llavactl', 'llavactl.core.errors'):\n"
        "    try:\n        __import__(name)\n"
        "    except ImportError:\n        continue\n"
        "    sys.exit('it has ' + name)\n"
        "print(sys.argv[1:])\n"
    )
    done = run_isolated(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([str(tmp_path)])


def changed(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document).ljust(file.stat().st_size))


def test_what_an_export_states_of_itself(native: Make, tmp_path: Path) -> None:
    """End tokens, precision and the side of padding change no logits of one prompt."""
    model, out = native("ours"), tmp_path / "out"
    written(model, "hf", out)
    changed(out / "generation_config.json", lambda found: found.update(eos_token_id=[1, 9]))
    changed(out / "config.json", lambda found: found.update(dtype="float16"))
    changed(out / "tokenizer_config.json", lambda found: found.update(padding_side="right"))
    changed(out / "processor_config.json", lambda found: found["image_processor"].update(image_mean=[0.4, 0.4, 0.4]))
    stamped(out)
    result = asked(model, out)
    assert result.exit_code == 1
    for seen in ("end tokens", "float16", "padding side", "pixels differ"):
        assert seen in result.stderr


def stamped(out: Path) -> None:
    """Says that the files have the contents they have, as if llavactl had written them so."""
    from llavactl.model.export_folder import RECORD, file_hashes

    changed(out / RECORD, lambda record: record.update(files=file_hashes(out), verified=None))


def asked(model: Path, out: Path, *more: str) -> Result:
    return run_cli("export", "--model", str(model), "--format", "hf", "--to", str(out), "--json", *more)


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The faults that the next verifications will find; they take no time."""
    faults: list[tuple[str, ...]] = []

    def verify(*_: Any) -> VerificationResult:
        return VerificationResult(7, 3, 7, 7, 0.0, 0.0, 1.0, 0.0, 1e-4, faults.pop(0))

    monkeypatch.setattr("llavactl.verbs.export.verify", verify)
    return faults


def test_verified_once(native: Make, toys: Path, tmp_path: Path, verdicts: list[tuple[str, ...]]) -> None:
    model, out = native("ours"), tmp_path / "out"
    assert asked(model, out, "--no-verify").json()["verified"] is None
    verdicts += [()]
    assert asked(model, out).json()["verified"]["faults"] == []  # what wasn't verified is, the next time
    again = asked(model, out).json()  # nobody is asked again
    assert again["finished_before"]
    assert again["verified"]["prompts"] == 7
    assert asked(model, out, "--verify").exit_code == 0
    changed(out / "generation_config.json", lambda found: found.update(do_sample=True))
    stamped(out)
    verdicts += [("another text",), ("another text",), ()]
    for _ in range(2):
        failed = asked(model, out)
        assert failed.exit_code == 1
        assert "another text" in failed.stderr
    assert asked(model, out).exit_code == 0
    assert '"do_sample": true' not in (out / "generation_config.json").read_text()  # what failed was written again
    verdicts += [()]
    assert asked(model, out, "--image", str(toys / "images" / "photo-000.jpg")).exit_code == 0
    assert not verdicts  # asked about another image
    assert asked(model, out, "--image", str(tmp_path / "none.jpg")).exit_code == 1


def test_a_format_that_nobody_reloads(
    native: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdicts: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(HfLlava, "reload", None)
    model, out = native("ours"), tmp_path / "out"
    assert asked(model, out, "--verify").exit_code == 1
    assert not out.exists()
    result = asked(model, out)
    assert result.exit_code == 0
    assert result.json()["verified"] is None
    assert "verif" in result.stderr


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there(
    native: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "out"
    written(native("before"), "hf", out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    whole = HfLlava.write

    def write(self: HfLlava, model: Path, to: Path) -> None:
        whole(self, model, to)
        raise error

    monkeypatch.setattr(HfLlava, "write", write)
    result = asked(native("ours"), out)
    assert result.exit_code != 0
    assert "Traceback" not in result.stderr
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.glob(".out*"))


def test_a_damaged_export_is_written_again(native: Make, tmp_path: Path) -> None:
    """Also one whose files have the right sizes; the user's words on the model card stay."""
    model, out = native("ours"), tmp_path / "out"
    written(model, "hf", out)
    whole = (out / "model.safetensors").read_bytes()
    (out / "README.md").write_text("Mine.")
    assert asked(model, out, "--no-verify").json()["finished_before"]
    assert (out / "README.md").read_text() == "Mine."
    (out / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not asked(model, out, "--no-verify").json()["finished_before"]
    assert (out / "model.safetensors").read_bytes() == whole
