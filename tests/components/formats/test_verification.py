"""Verification: what it compares, when it runs, and its isolation from llavactl."""

from __future__ import annotations

import errno
import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavactl.components.formats.hf import HfLlava
from llavactl.core.errors import ModelError, ProgramMissingError
from llavactl.evaluation.verification.outputs import Stated
from llavactl.evaluation.verification.result import VerificationResult, judge
from llavactl.evaluation.verification.script import run_isolated
from llavactl.testing import run_cli
from llavactl.testing.runner import Result
from llavactl.verbs.export import export as export_model

from .conftest import Make
from .test_export import written

EXACT_RESULT = judge({}, Stated(), prompts=7, images=3)


def test_the_script_cannot_import_llavactl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even with llavactl in PYTHONPATH; other packages can be imported."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    script = tmp_path / "script.py"
    script.write_text(
        "import sys, torch, transformers\n"
        "for name in ('llavactl', 'llavactl.core.errors'):\n"
        "    try:\n        __import__(name)\n"
        "    except ImportError:\n        continue\n"
        "    sys.exit('imported ' + name)\n"
        "print(sys.argv[1:])\n"
    )
    done = run_isolated(script, tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([str(tmp_path)])


def change_json(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document).ljust(file.stat().st_size))


def test_settings_in_the_files_are_compared(native: Make, tmp_path: Path) -> None:
    """End tokens, precision and padding side don't affect the logits of a single prompt."""
    model, out = native("ours"), tmp_path / "out"
    written(model, "hf", out)
    change_json(out / "generation_config.json", lambda document: document.update(eos_token_id=[1, 9]))
    change_json(out / "config.json", lambda document: document.update(dtype="float16"))
    change_json(out / "tokenizer_config.json", lambda document: document.update(padding_side="right"))
    change_json(
        out / "processor_config.json", lambda document: document["image_processor"].update(image_mean=[0.4, 0.4, 0.4])
    )
    update_record(out)
    result = export(model, out)
    assert result.exit_code == 1
    for fault in ("end tokens", "float16", "padding side", "pixels"):
        assert fault in result.stderr


def update_record(out: Path) -> None:
    """Updates the record to the current files, as if llavactl had written them."""
    from llavactl.model.export_folder import RECORD, file_hashes

    change_json(out / RECORD, lambda record: record.update(files=file_hashes(out), verified=None))


def export(model: Path, out: Path, *more: str) -> Result:
    return run_cli("export", "--model", str(model), "--format", "hf", "--to", str(out), "--json", *more)


@pytest.fixture
def verdicts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The faults that the next verifications report; no export is loaded."""
    faults: list[tuple[str, ...]] = []

    def verify(*_: Any) -> VerificationResult:
        return replace(EXACT_RESULT, verdict="different" if faults[0] else "exact", faults=faults.pop(0))

    monkeypatch.setattr("llavactl.verbs.export.verify", verify)
    return faults


def test_an_export_is_verified_once(native: Make, toys: Path, tmp_path: Path, verdicts: list[tuple[str, ...]]) -> None:
    model, out = native("ours"), tmp_path / "out"
    assert export(model, out, "--no-verify").json()["verified"] is None
    verdicts += [()]
    assert export(model, out).json()["verified"]["faults"] == []  # an unverified export is verified the next time
    again = export(model, out).json()  # a verified export is not verified again
    assert again["finished_before"]
    assert again["verified"]["prompts"] == 7
    assert export(model, out, "--verify").exit_code == 0
    change_json(out / "generation_config.json", lambda document: document.update(do_sample=True))
    update_record(out)
    verdicts += [("answer differs",), ("answer differs",), ()]
    for _ in range(2):
        failed = export(model, out)
        assert failed.exit_code == 1
        assert "answer differs" in failed.stderr
    assert export(model, out).exit_code == 0
    assert '"do_sample": true' not in (out / "generation_config.json").read_text()  # a failed export is written again
    verdicts += [()]
    assert export(model, out, "--image", str(toys / "images" / "photo-000.jpg")).exit_code == 0
    assert not verdicts  # --image verifies again
    assert export(model, out, "--image", str(tmp_path / "none.jpg")).exit_code == 1


def test_a_format_without_a_verification_script(
    native: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdicts: list[tuple[str, ...]]
) -> None:
    monkeypatch.setattr(HfLlava, "reload", None)
    model, out = native("ours"), tmp_path / "out"
    assert export(model, out, "--verify").exit_code == 1
    assert not out.exists()
    result = export(model, out)
    assert result.exit_code == 0
    assert result.json()["verified"] is None
    assert "verif" in result.stderr


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The verification script of format ``hf``, empty."""
    file = tmp_path / "script.py"
    file.touch()
    monkeypatch.setattr(HfLlava, "reload", file)
    return file


def test_a_missing_program(native: Make, tmp_path: Path, script: Path) -> None:
    """The export is kept, and the message has the command that verifies it later; with --verify it is an error."""
    script.write_text("import sys\nprint('noise\\nuses p: pip install p', file=sys.stderr)\nsys.exit(69)\n")
    model, out = native("ours"), tmp_path / "out"
    result = export(model, out)
    assert result.exit_code == 0
    report = result.json()
    assert (report["verified"], report["not_verified"]) == (None, "uses p: pip install p")
    assert (out / "model.safetensors").is_file()
    assert "uses p: pip install p" in result.stderr
    (arguments,) = re.findall(r"`[^`]*llavactl (export [^`]*)`", result.stderr)
    again = run_cli(*shlex.split(arguments))
    assert again.exit_code == 1
    assert "pip install p" in again.stderr
    assert export(model, out).json()["finished_before"]
    script.write_text("import sys\nsys.exit('wrong tensor')\n")
    failed = export(model, out)
    assert failed.exit_code == 1
    assert "wrong tensor" in failed.stderr


def test_a_result_is_kept_if_its_repetition_cannot_run(
    native: Make, tmp_path: Path, verdicts: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are the same; only a program that can't load them shows that the result doesn't hold."""
    model, out = native("ours"), tmp_path / "out"
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    verdicts += [()]
    assert export(model, out).exit_code == 0
    record, card = (out / "llavactl_export.json").read_bytes(), (out / "README.md").read_bytes()
    for error, kept in ((ProgramMissingError("uses p"), True), (ModelError("can't be loaded"), False)):

        def fail(*_: object, error: Exception = error, **__: object) -> None:
            raise error

        monkeypatch.setattr("llavactl.verbs.export.verify", fail)
        assert export(model, out, "--image", str(picture)).exit_code == (0 if kept else 1)
        assert ((out / "llavactl_export.json").read_bytes() == record) is kept
        assert ((out / "README.md").read_bytes() == card) is kept


def test_a_full_disk_is_not_a_fault_of_the_formats_plugin(
    native: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(HfLlava, "write", write)
    monkeypatch.setattr("llavactl.model.export_folder.plugin_fault", lambda _error: "a frame of a plugin")
    with pytest.raises(ModelError, match="No space left"):
        export_model(None, {"name": "hf"}, tmp_path / "out", model=str(native("ours")))
    assert not (tmp_path / "out").exists()


def test_a_script_that_writes_nothing(native: Make, tmp_path: Path, script: Path) -> None:
    result = export(native("ours"), tmp_path / "out")
    assert result.exit_code == 1
    assert script.name in result.stderr
    assert "Traceback" not in result.stderr


def test_an_export_that_may_differ(native: Make, tmp_path: Path, verdicts: list[tuple[str, ...]]) -> None:
    """It is kept with its faults and not verified again, until a difference is an error again."""
    model, out = native("ours"), tmp_path / "out"
    verdicts += [("answer differs",)]
    result = export(model, out, "--allow-different")
    assert result.exit_code == 0
    assert "answer differs" in result.stderr
    assert result.json()["verified"]["verdict"] == "different"
    again = export(model, out, "--allow-different").json()
    assert again["finished_before"]
    assert again["verified"]["faults"] == ["answer differs"]
    verdicts += [("answer differs",)]
    assert export(model, out).exit_code == 1
    assert not verdicts


def test_the_card_has_the_last_verdict(native: Make, tmp_path: Path, verdicts: list[tuple[str, ...]]) -> None:
    """Only between its marks; the text around them may be edited, and an edit doesn't repeat the verification."""
    model, out = native("ours"), tmp_path / "out"
    file = out / "README.md"
    export(model, out, "--no-verify")
    assert "Not verified." in file.read_text()
    file.write_text(file.read_text() + "More.\n")
    verdicts += [("answer differs",)]
    assert export(model, out, "--allow-different").exit_code == 0
    assert "answer differs" in file.read_text()
    assert "Not verified." not in file.read_text()
    assert file.read_text().endswith("More.\n")
    file.write_text(file.read_text() + "And more.\n")
    assert export(model, out, "--allow-different").json()["finished_before"]
    file.write_text("Edited.")
    verdicts += [()]
    assert export(model, out, "--image", str(model.parent / "none.jpg")).exit_code == 1
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert export(model, out, "--allow-different", "--image", str(picture)).exit_code == 0
    assert file.read_text() == "Edited."
    assert not verdicts


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_keeps_the_previous_export(
    native: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    out = tmp_path / "out"
    written(native("before"), "hf", out)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    original_write = HfLlava.write

    def write(self: HfLlava, model: Path, to: Path) -> None:
        original_write(self, model, to)
        raise error

    monkeypatch.setattr(HfLlava, "write", write)
    result = export(native("ours"), out)
    assert result.exit_code != 0
    assert "Traceback" not in result.stderr
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before
    assert not list(tmp_path.glob(".out*"))


def test_a_damaged_export_is_written_again(native: Make, tmp_path: Path) -> None:
    """Even if its files have the right sizes; an edited model card is kept."""
    model, out = native("ours"), tmp_path / "out"
    written(model, "hf", out)
    whole = (out / "model.safetensors").read_bytes()
    (out / "README.md").write_text("Edited.")
    assert export(model, out, "--no-verify").json()["finished_before"]
    assert (out / "README.md").read_text() == "Edited."
    (out / "model.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert not export(model, out, "--no-verify").json()["finished_before"]
    assert (out / "model.safetensors").read_bytes() == whole
