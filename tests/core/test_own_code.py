"""Models that bring code of their own: it is never run, whoever says yes at a terminal."""

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
"""Scripts that read an export of ours in a process of its own, as its users do."""


def _trusting(code: str) -> list[str]:
    """Calls that would ask at the terminal whether a model's own code may run."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [
        ast.unparse(call)
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("from_pretrained", "from_config")
        and ast.unparse(call.func.value) in AUTO
        and not any(each.arg == "trust_remote_code" and ast.unparse(each.value) == "False" for each in call.keywords)
    ]


def test_no_call_leaves_it_to_a_prompt() -> None:
    files = [file for file in PACKAGE.rglob("*.py") if file.name not in EXEMPT]
    assert {str(file): found for file in files if (found := _trusting(file.read_text(encoding="utf-8")))} == {}
    assert _trusting("AutoConfig.from_pretrained(x)") == ["AutoConfig.from_pretrained(x)"]


def _change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**read_json(file), **changes}), encoding="utf-8")


CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoImageProcessor")
MAP = dict.fromkeys(CLASSES, "evil.Thing")


@pytest.mark.parametrize(
    ("file", "changes", "command"),
    [
        ("language/config.json", {"model_type": "strange", "auto_map": MAP}, ["train", "--stage", "1"]),
        (
            "language/tokenizer_config.json",
            {"tokenizer_class": "Strange", "auto_map": {"AutoTokenizer": ["evil.Thing", None]}},
            ["train", "--stage", "1"],
        ),
        ("clip/config.json", {"model_type": "strange", "auto_map": MAP}, ["extract"]),
        ("clip/preprocessor_config.json", {"image_processor_type": "Strange", "auto_map": MAP}, ["extract"]),
        (
            "language/processor_config.json",
            {"processor_class": "Strange", "auto_map": {"AutoProcessor": "evil.Thing"}},
            ["eval", "scenes", "--model", "hf:language"],
        ),
    ],
    ids=["language", "tokenizer", "vision", "image-processor", "hf"],
)
def test_yes_is_not_asked_for(toy: Path, file: str, changes: dict[str, Any], command: list[str]) -> None:
    features = ["-o", "features.mode=live"] if command[0] == "train" else []
    _change(toy / file, **changes)
    (toy / file).with_name("evil.py").write_text(f"open({str(toy / 'ran')!r}, 'w')\n", encoding="utf-8")
    done = run_cli(*command, *features, cwd=toy, stdin="y\n" * 9)
    assert (done.exit_code, done.stdout) == (1, "")
    (error, _hint) = done.stderr.splitlines()
    assert "custom code" in error
    assert str((toy / file).parent) in error
    assert not (toy / "ran").exists()
