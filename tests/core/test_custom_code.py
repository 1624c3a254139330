"""Custom code of models (trust_remote_code) is never run, even if the user confirms at a terminal."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.paths import read_json
from llavactl.testing import run_cli

PACKAGE = Path(__file__).parents[2] / "llavactl"
AUTO = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoTokenizer")
AUTO += ("AutoImageProcessor", "AutoProcessor")
EXEMPT = ("hf_outputs.py", "llava_outputs.py")
"""Scripts that load llavactl's own exports in a separate process."""


def _prompting_calls(code: str) -> list[str]:
    """Calls that would prompt the user to confirm running custom code."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(call.func.value) in AUTO
        and not any(word.arg == "trust_remote_code" and ast.unparse(word.value) == "False" for word in call.keywords)
    ]


def test_trust_remote_code_is_false_in_every_call() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.name not in EXEMPT]
    assert {str(file): calls for file in files if (calls := _prompting_calls(file.read_text(encoding="utf-8")))} == {}
    assert _prompting_calls("AutoConfig.from_pretrained(x)") == ["AutoConfig.from_pretrained(x)"]


def _change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**read_json(file), **changes}), encoding="utf-8")


CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoImageProcessor")
MAP = dict.fromkeys(CLASSES, "custom.Model")


@pytest.mark.parametrize(
    ("file", "changes", "command"),
    [
        ("language/config.json", {"model_type": "strange", "auto_map": MAP}, ["train", "--stage", "1"]),
        (
            "language/tokenizer_config.json",
            {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["custom.Model", None]}},
            ["train", "--stage", "1"],
        ),
        ("clip/config.json", {"model_type": "strange", "auto_map": MAP}, ["extract"]),
        ("clip/preprocessor_config.json", {"image_processor_type": "Strange", "auto_map": MAP}, ["extract"]),
        (
            "language/processor_config.json",
            {"processor_class": "Strange", "auto_map": {"AutoProcessor": "custom.Model"}},
            ["eval", "scenes", "--model", "hf:language"],
        ),
    ],
    ids=["language", "tokenizer", "vision", "image-processor", "hf"],
)
def test_custom_code_is_rejected(toy: Path, file: str, changes: dict[str, Any], command: list[str]) -> None:
    features = ["-o", "features.mode=live"] if command[0] == "train" else []
    _change(toy / file, **changes)
    (toy / file).with_name("custom.py").write_text(f"open({str(toy / 'ran')!r}, 'w')\n", encoding="utf-8")
    result = run_cli(*command, *features, cwd=toy, stdin="y\n" * 9)
    assert (result.exit_code, result.stdout) == (1, "")
    (error, _hint) = result.stderr.splitlines()
    assert "custom code" in error
    assert str((toy / file).parent) in error
    assert not (toy / "ran").exists()
