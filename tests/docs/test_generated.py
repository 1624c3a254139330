"""The generated pages are up to date and complete."""

import dataclasses
import inspect
import json
import os
import re
from pathlib import Path

import pytest

import llavactl
from llavactl.core import hookspecs, protocols
from llavactl.core.builtin_plugin import COMMANDS

from ..preloaded import Interpreters

ROOT = Path(__file__).parents[2]
GENERATE = ROOT / "docs" / "generate.py"
REFERENCE = ROOT / "docs" / "reference"
PLUGINS = (REFERENCE / "plugins.md").read_text()
CLI = (REFERENCE / "cli.md").read_text()
HOOKS = [name for name, each in vars(hookspecs).items() if hasattr(each, "llavactl_spec")]


def generator(interpreters: Interpreters, code: str) -> str:
    """The output of ``code`` in another process; ``m`` are the names in docs/generate.py."""
    script = f"import runpy; m = runpy.run_path({str(GENERATE)!r}); {code}"
    done = interpreters.run(script, cwd=ROOT, env=os.environ)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_pages_are_up_to_date(interpreters: Interpreters) -> None:
    stale = generator(
        interpreters,
        "read = lambda page: (m['ROOT'] / page).read_text(); "
        "print(*(page for page in m['PAGES'] if m['filled'](read(page)) != read(page)))",
    )
    assert stale.split() == [], "run `make docs`"


def test_every_block_is_in_some_page() -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in ROOT.glob("docs/**/*.md"))
    for name in (
        "commands",
        "cli",
        "hooks",
        "kinds",
        "keys",
        "components",
        "recipes",
        "templates",
        "data_classes",
        "names",
    ):
        assert f"<!-- generated: {name} -->" in pages
        assert f"<!-- end: {name} -->" in pages


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_in_the_reference_with_its_parameters(hook: str) -> None:
    _, _, entry = PLUGINS.partition(f"### `{hook}`\n")
    signature, _, about = entry.partition("\n```\n")
    for parameter in inspect.signature(getattr(hookspecs, hook)).parameters:
        assert f"{parameter}: " in signature
    assert about.strip().split("\n")[0].endswith((".", "time.", "once."))


@pytest.mark.parametrize("kind", protocols.KINDS)
def test_every_kind_is_in_the_reference(kind: str) -> None:
    assert f"### `{kind}`\n\n```python\nclass {protocols.KINDS[kind].__name__}(Protocol):" in PLUGINS


DATA_CLASSES = [name for name in llavactl.__all__ if dataclasses.is_dataclass(getattr(llavactl, name))]


@pytest.mark.parametrize("name", DATA_CLASSES)
def test_every_data_class_is_in_the_reference_with_its_fields_and_properties(name: str) -> None:
    data_class = getattr(llavactl, name)
    (entry,) = re.findall(rf"^class {name}\b.*?(?=^```|^class |^def )", PLUGINS, re.MULTILINE | re.DOTALL)
    fields, _, members = entry.partition("    @")
    assert re.findall(r"^    (\w+): ", fields, re.MULTILINE) == [field.name for field in dataclasses.fields(data_class)]
    properties = [name for name, each in vars(data_class).items() if isinstance(each, property)]
    public = {name for name in properties if not name.startswith("_")}
    assert public <= set(re.findall(r"def (\w+)\(self", members))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_reference(command: str) -> None:
    assert f"## `llavactl {command}`\n" in CLI


def test_every_key_and_option_has_a_description() -> None:
    rows = [line for line in (REFERENCE / "recipes.md").read_text().splitlines() if line.startswith("| `")]
    assert [row for row in rows if not row.split(" | ")[-1].strip("| ")] == []


def test_an_outdated_page_is_regenerated(interpreters: Interpreters) -> None:
    page = "a\n<!-- generated: recipes -->\nold\n<!-- end: recipes -->\nb\n"
    once, twice = json.loads(
        generator(
            interpreters, f"import json; once = m['filled']({page!r}); print(json.dumps([once, m['filled'](once)]))"
        )
    )
    assert "old" not in once
    assert twice == once


def test_every_public_name_of_testing_is_in_the_reference() -> None:
    from llavactl import testing

    for name in testing.__all__:
        assert name == "CHECKS" or re.search(rf"\| `{name}[`(]", PLUGINS), name
