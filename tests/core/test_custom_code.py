"""Custom code of models (trust_remote_code) is never run, even if the user confirms at a terminal."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from llavactl.core.paths import read_json
from llavactl.testing import run_cli
from llavactl.verbs.new_plugin import KINDS, plugin_files

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


UNPICKLING = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "cloudpickle.load", "joblib.load", "shelve.open"),
    *("marshal.load", "marshal.loads", "pandas.read_pickle", "yaml.load", "yaml.unsafe_load", "eval", "exec"),
}
"""Calls that can run code contained in data."""


def _unsafe_calls(code: str) -> list[str]:
    """Calls that can run code of a checkpoint, a model repository or a data file."""
    return [ast.unparse(call) for call in ast.walk(ast.parse(code)) if isinstance(call, ast.Call) and _is_unsafe(call)]


def _is_unsafe(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    words = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if name == "torch.load":
        return words.get("weights_only") != "True"
    own_data = bool(call.args) and ast.unparse(call.args[0]).startswith("pickle.dumps(")
    return (
        (name in UNPICKLING and not own_data)
        or words.get("trust_remote_code", "False") != "False"
        or words.get("allow_pickle", "False") != "False"
    )


@pytest.mark.parametrize(
    ("code", "unsafe"),
    [
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", True),
        ("AutoModel.from_pretrained(x, trust_remote_code=option)", True),
        ("AutoModel.from_pretrained(x, trust_remote_code=False)", False),
        ("torch.load(file)", True),
        ("torch.load(file, weights_only=False)", True),
        ("torch.load(file, weights_only=True)", False),
        ("pickle.load(file)", True),
        ("pickle.loads(pickle.dumps(value))", False),
        ("numpy.load(file, allow_pickle=True)", True),
        ("numpy.load(file)", False),
        ("eval(text)", True),
        ("model.eval()", False),
    ],
)
def test_unsafe_calls(code: str, unsafe: bool) -> None:
    assert bool(_unsafe_calls(code)) == unsafe


def test_no_code_of_a_recipe_a_checkpoint_or_a_model_is_run() -> None:
    root = PACKAGE.parent
    files = [*PACKAGE.rglob("*.py"), *root.glob("plugins/*/llavactl_*/**/*.py")]
    found = {str(file): calls for file in files if (calls := _unsafe_calls(file.read_text(encoding="utf-8")))}
    assert found == {}
    new = plugin_files("example", list(KINDS))
    assert {path: _unsafe_calls(text) for path, text in new.items() if path.endswith(".py")}.keys() >= {
        "llavactl_example/language.py"
    }
    assert not any(_unsafe_calls(text) for path, text in new.items() if path.endswith(".py"))


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
