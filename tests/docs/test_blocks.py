"""The code blocks of README.md and docs/: commands parse, recipes check, code compiles."""

import json
import os
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any, NamedTuple, get_args

import click
import pytest
from pydantic import BaseModel

from llavactl.cli.root import root
from llavactl.recipe.frame import Recipe
from llavactl.recipe.load import check
from llavactl.recipe.specs import ConnectorSpec, VisionSpec
from llavactl.testing import check_connector, check_source

from ..preloaded import Interpreters

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("plugins/*/README.md"))]
OTHER_PROGRAMS = {
    "cat",
    "cd",
    "diff",
    "export",
    "git",
    "hf",
    "llama-server",
    "pip",
    "python",
    "python3",
    "sbatch",
    "source",
    "tail",
    "transformers",
    "twine",
    "uv",
    "vllm",
}
EXAMPLES = "docs/how-to/plugin-examples.md"
"""Its commands need the page's plugins: tests/docs/test_plugin_tutorials.py runs them."""

FILE = re.compile(r"# \S+\.yaml\n")
"""The first line of a recipe that needs the page's plugin: tests/docs/test_plugin_tutorials.py writes and checks it."""

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
    for param in blocks("sh", "console"):
        where, text = param.values[0]
        if where.startswith(EXAMPLES):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                lines.append(pytest.param(words, id=f"{where} {' '.join(words)}"))
    return lines


@pytest.mark.parametrize("words", shell_lines())
def test_a_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVACTL_PLUGIN_FILES", "")  # set by --plugin
    for cut in ("<", ">", "2>&1", "|", "||", "&&"):
        words = words[: words.index(cut)] if cut in words else words
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    program = words[0].removeprefix(".venv/bin/")
    if words == ["llavactl"]:  # with a variable that requests a completion script
        pass
    elif program == "llavactl":
        parse(root, words[1:])
    elif program in ("torchrun", "accelerate"):  # tests/docs/test_cluster.py runs them
        parse(root, words[words.index("llavactl") + 1 :])
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program in OTHER_PROGRAMS, "unknown program"


def parse(command: click.Command, words: list[str], parent: click.Context | None = None) -> None:
    """Parses ``words`` as click does, without running the command."""
    context = command.make_context(command.name, list(words), parent=parent)
    if isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, context._protected_args + context.args)
        assert found is not None, name
        parse(found, rest, context)


def test_an_invalid_command_does_not_parse() -> None:
    for words in (["trian"], ["train", "--stage", "3"], ["run", "--no-such-option"], ["recipes", "copy"]):
        with pytest.raises(click.UsageError):
            parse(root, words)


@pytest.mark.parametrize("block", [each for each in blocks("yaml") if not FILE.match(each.values[0].text)])
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


def sections(model: type[BaseModel]) -> set[type[BaseModel]]:
    """``model`` and the models of its keys, at any depth."""

    def models(annotation: Any) -> set[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return sections(annotation)
        return set().union(*map(models, get_args(annotation)))

    return {model}.union(*(models(field.annotation) for field in model.model_fields.values()))


@pytest.mark.parametrize("model", sorted(sections(Recipe), key=lambda model: model.__name__))
def test_the_reference_describes_every_key_of_the_frame(model: type[BaseModel]) -> None:
    page = (ROOT / "docs" / "reference" / "recipes.md").read_text(encoding="utf-8")
    reference = page.partition("<!-- generated: keys -->")[2].partition("<!-- end: keys -->")[0]
    for key in model.model_fields:
        rows = [line for line in reference.splitlines() if line.startswith(f"| `{key}` |")]
        assert rows or model in (VisionSpec, ConnectorSpec), f"{model.__name__}.{key}"
        assert all(row.split("|")[-2].strip() for row in rows), f"{key} has no description"


def test_the_plugin_of_the_docs_works(tmp_path: Path, interpreters: Interpreters) -> None:
    """Writes the files to the paths in their first lines, with the metadata of an installed package."""
    files = [
        param.values[0]
        for param in blocks("python", "toml")
        if param.values[0].where.startswith("docs/how-to/plugin.md")
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
    (test,) = (text for _, text in files if "def test_" in text)
    (tmp_path / "run.py").write_text(f"{test}\n\n{CHECKS}")
    alone = {"PYTHONPATH": str(tmp_path), "LLAVACTL_HOME": str(tmp_path / "home"), "LLAVACTL_STRICT_PLUGINS": "1"}
    program = "import runpy; runpy.run_path('run.py', run_name='__main__')"
    done = interpreters.run(program, cwd=tmp_path, env={**os.environ, **alone})
    assert done.returncode == 0, done.stderr


def test_the_connector_of_the_reference_conforms() -> None:
    found = [param.values[0] for param in blocks("python") if "class Average:" in param.values[0].text]
    (text,) = (text for where, text in found if where.startswith("docs/reference/plugins.md"))
    names: dict[str, Any] = {}
    exec(text, names)
    average = names["Average"]
    for options in ({}, {"bias": False}):
        assert check_connector(average(average.Options(**options))) == []


def test_the_plugin_of_the_readme_works() -> None:
    (block,) = (param.values[0] for param in blocks("python") if param.values[0].where.startswith("README.md"))
    names: dict[str, Any] = {}
    exec(block.text, names)
    registered = []
    names["register_sources"](lambda name, target, summary: registered.append((name, target)))
    assert registered == [("birds", "llavactl_birds:birds")]
    assert check_source(names["birds"](None)) == []


@pytest.mark.parametrize("page", sorted(ROOT.glob("plugins/*/README.md")), ids=lambda page: page.parent.name)
def test_the_readme_of_a_plugin_begins_with_its_installation(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    first, *_, last = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert (first, last) == ("Install and run", "License")
    command = FENCE.search(text)
    assert command is not None
    words = shlex.split(command[2].splitlines()[0])
    assert words[:4] == ["pip", "install", "-e", "."]
    folder, *_ = words[5].split("[")  # without extras
    assert (ROOT / folder).resolve() == page.parent


CHECKS = """
test_connector()
from llavactl.testing import check_plugin
assert check_plugin("average") == []
"""
