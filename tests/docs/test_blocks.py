"""What README.md and docs/ tell a reader to type is right: commands parse, recipes check, code compiles."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import click
import pytest
from ruamel.yaml import YAML

from llavactl.cli.root import root
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import check
from llavactl.testing import check_source

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    where: str
    text: str


def blocks(*languages: str) -> list[Any]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            where = f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, match.start()) + 1}"
            if match[1] in languages:
                found.append(pytest.param(Block(where, match[2]), id=where))
    return found


def shell_lines() -> list[Any]:
    lines = []
    for param in blocks("sh", "bash", "console"):
        where, text = param.values[0]
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                lines.append(pytest.param(words, id=f"{where} {' '.join(words)}"))
    return lines


@pytest.mark.parametrize("words", shell_lines())
def test_a_command_can_be_typed_as_it_stands(words: list[str]) -> None:
    for cut in (">", "|", "&&"):
        words = words[: words.index(cut)] if cut in words else words
    program = words[0].removeprefix(".venv/bin/")
    if program == "llavactl":
        parse(root, words[1:])
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program in ("git", "pip", "python", "python3", "cd", "transformers", "vllm"), (
            "a program this test does not know"
        )


def parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    """Takes ``words`` as click would, to the last option, and runs nothing."""
    context = command.make_context(command.name, list(words), parent=parent)
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, context._protected_args + context.args)
        assert found is not None, name
        parse(found, rest, context)


def test_a_wrong_command_would_be_noticed() -> None:
    for words in (["trian"], ["train", "--stage", "3"], ["run", "--no-such-option"], ["recipes", "copy"]):
        with pytest.raises(click.UsageError):
            parse(root, words)


@pytest.mark.parametrize("block", blocks("yaml"))
def test_a_recipe_checks(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block.text)
    assert [str(problem) for problem in check(str(path))] == []


@pytest.mark.parametrize("block", blocks("json"))
def test_json_is_json(block: Block) -> None:
    json.loads(block.text)


@pytest.mark.parametrize("block", blocks("python"))
def test_python_compiles(block: Block) -> None:
    compile(block.text, block.where, "exec")


def test_the_reference_has_every_key_of_the_frame_with_its_default() -> None:
    whole = next(param.values[0] for param in blocks("yaml") if "\nrun_dir: " in param.values[0].text)
    assert whole.where.startswith("docs/recipes.md")
    written = YAML(typ="safe", pure=True).load(whole.text)
    assert written.keys() == Recipe.model_fields.keys()
    for name in ("features", "stage1", "stage2", "eval"):
        assert written[name] == Recipe.model_fields[name].get_default().model_dump(mode="json")


def test_the_plugin_of_the_page_works(tmp_path: Path) -> None:
    """Its files laid out as their first lines say, with the metadata that installing would write."""
    files = [
        param.values[0] for param in blocks("python", "toml") if param.values[0].where.startswith("docs/plugins.md")
    ]
    for _, text in files:
        if head := re.match(r"# (\S+\.(?:py|toml))\n", text):
            (tmp_path / head[1]).parent.mkdir(exist_ok=True)
            (tmp_path / head[1]).write_text(text)
    project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = "".join(f"{name} = {module}\n" for name, module in project["entry-points"]["llavactl"].items())
    (info / "entry_points.txt").write_text(f"[llavactl]\n{points}")
    (its_test,) = (text for _, text in files if "def test_" in text)
    (tmp_path / "run.py").write_text(f"{its_test}\n\n{CHECKS}")
    alone = {"PYTHONPATH": str(tmp_path), "LLAVACTL_HOME": str(tmp_path / "home"), "LLAVACTL_STRICT_PLUGINS": "1"}
    done = subprocess.run(
        [sys.executable, "run.py"],
        cwd=tmp_path,
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_plugin_of_the_readme_works() -> None:
    (block,) = (param.values[0] for param in blocks("python") if param.values[0].where.startswith("README.md"))
    names: dict[str, Any] = {}
    exec(block.text, names)
    registered = []
    names["register_sources"](lambda name, target, summary: registered.append((name, target)))
    assert registered == [("birds", "llavactl_birds:birds")]
    assert check_source(names["birds"](None)) == []


CHECKS = """
test_connector()
from llavactl.testing import check_plugin
assert check_plugin("average") == []
"""
