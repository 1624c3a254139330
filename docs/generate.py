"""Writes the generated blocks of README.md and docs/ anew, from the code they describe: ``make docs``.

A block stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; the text around it is ours.
``tests/docs`` fails while a page says something else than the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

# The pages describe llavactl itself, whatever is installed beside it.
os.environ["LLAVACTL_PLUGINS"] = ""

import click

import llavactl
from llavactl.core import hookspecs, protocols
from llavactl.core.registry import registry
from llavactl.core.validation import describe_options

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/recipes.md", "docs/plugins.md", "docs/cli.md", "docs/templates.md", "docs/data.md")
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end: \2 -->)", re.DOTALL)


def commands() -> Iterator[str]:
    """The commands and what they do."""
    from llavactl.core.builtins import COMMANDS

    yield "| command | does |\n|---|---|"
    for name, summary in COMMANDS.items():
        group = _command([name])
        names = list(group.commands) if isinstance(group, click.Group) else []
        yield f"| `llavactl {name}{' ' if names else ''}{'·'.join(names)}` | {summary} |"


def cli() -> Iterator[str]:
    """Every command with its usage, help and options."""
    from llavactl.core.builtins import COMMANDS

    for name in COMMANDS:
        yield from _describe([name])


def _command(path: list[str]) -> click.Command:
    """The command at ``path`` below ``llavactl``."""
    from llavactl.cli.root import root

    found: click.Command = root
    for name in path:
        assert isinstance(found, click.Group)
        below = found.get_command(click.Context(found), name)
        assert below is not None, path
        found = below
    return found


def _describe(path: list[str]) -> Iterator[str]:
    command = _command(path)
    context = click.Context(command, info_name=" ".join(["llavactl", *path]))
    pieces = " ".join(command.collect_usage_pieces(context))
    yield f"{'#' * (len(path) + 1)} `llavactl {' '.join(path)}`\n"
    if command.help:
        yield f"{inspect.cleandoc(command.help)}\n"
    if isinstance(command, click.Group):
        for name in command.commands:
            yield from _describe([*path, name])
        return
    yield f"```\nllavactl {' '.join(path)} {pieces}\n```\n"
    records = [param.get_help_record(context) for param in command.params if isinstance(param, click.Option)]
    lines = [f"- `{option}` – {' '.join(what.split())}".removesuffix(" – ") for option, what in filter(None, records)]
    if lines:
        yield "\n".join(lines) + "\n"


def hook_table() -> Iterator[str]:
    """One line per hook."""
    yield "| hook | purpose |\n|---|---|"
    for name, function in vars(hookspecs).items():
        if hasattr(function, "llavactl_spec"):
            yield f"| `{name}` | {(inspect.getdoc(function) or '').partition(chr(10))[0]} |"


def hooks() -> Iterator[str]:
    """Every hook with its signature and docstring, in the order of the module."""
    for name, function in vars(hookspecs).items():
        if hasattr(function, "llavactl_spec"):
            text = (inspect.getdoc(function) or "").replace("``", "`")
            yield f"### `{name}`\n\n```python\ndef {_signature(name, function)}: ...\n```\n\n{text}\n"


def _signature(name: str, function: Callable[..., Any]) -> str:
    parameters = [f"{p.name}: {p.annotation}" for p in inspect.signature(function).parameters.values()]
    return f"{name}({', '.join(parameters)}) -> {inspect.signature(function).return_annotation}"


def kinds() -> Iterator[str]:
    """The Protocol of every kind of component, with the other classes of the package that it mentions."""
    classes = [
        each
        for _, each in inspect.getmembers(protocols, inspect.isclass)
        if each.__module__.startswith(protocols.__name__)
    ]
    for kind, protocol in protocols.KINDS.items():
        source = _source(protocol)
        mentioned = [each for each in classes if each is not protocol and re.search(rf"\b{each.__name__}\b", source)]
        sources = "\n\n\n".join([source, *map(_source, mentioned)])
        yield f"### `{kind}`\n\n```python\n{sources}\n```\n"


def _source(protocol: type) -> str:
    return inspect.getsource(protocol).removeprefix("@runtime_checkable\n").rstrip()


def components() -> Iterator[str]:
    """Every component that llavactl brings, with its options."""
    for kind in protocols.KINDS:
        names = registry().names(kind)
        if names:
            yield f"### `{kind}`\n"
        for name in names:
            entry = registry().get(kind, name)
            yield f"- **`{name}`** – {entry.summary}"
            for option, what in describe_options(entry.options_model()).items():
                yield f"    - `{option}`: {what}"
        if names:
            yield ""


def problems() -> Iterator[str]:
    """What ``data check`` finds, and what each does to a run."""
    from llavactl.curation.problems import KINDS

    yield "| problem | effect | |\n|---|---|---|"
    for name, kind in KINDS.items():
        yield f"| `{name}` | {kind.effect} | {kind.description.replace('<image>', '`<image>`')} |"


def recipes() -> Iterator[str]:
    """The recipes that llavactl brings."""
    yield "| recipe | |\n|---|---|"
    for name in registry().names("recipes"):
        yield f"| `{name}` | {registry().get('recipes', name).summary} |"


def templates() -> Iterator[str]:
    """Every template that writes in a way of its own, as it writes one conversation."""
    from llavactl.components.templates.styles import STYLES
    from llavactl.core.schema import Text, Turn
    from llavactl.images.image_file import ImageFile

    asked = Turn("user", (ImageFile("photos", "a.jpg"), "\nWhat is it?"))
    talk = (asked, Turn("assistant", ("A dog.",)), Turn("user", ("Which colour?",)), Turn("assistant", ("Red.",)))
    tokenizer = SimpleNamespace(bos_token="<s>", eos_token="</s>", unk_token_id=0, convert_tokens_to_ids=len)
    for name in ("plain", *STYLES):
        template = registry().create("templates", {"name": name})
        segments = template.render(talk[:2] if name == "plain" else talk, tokenizer)
        text = ""
        for trained, run in itertools.groupby(segments, lambda each: isinstance(each, Text) and each.trained):
            written = "".join(each.text if isinstance(each, Text) else "<image>" for each in run)
            text += f"«{written}»" if trained else written
        yield f"### `{name}`\n\n```text\n{text}\n```\n"


def names() -> Iterator[str]:
    """The public names with the first paragraph of their docstrings."""
    yield "| name | description |\n|---|---|"
    for name in llavactl.__all__:
        yield f"| `{name}` | {_first_line(name)} |"


def _first_line(name: str) -> str:
    """The first paragraph about a public name: of its docstring, or of the string below its assignment."""
    value = getattr(llavactl, name)
    own = inspect.isclass(value) or inspect.isfunction(value)
    text = (inspect.getdoc(value) if own else _below_assignment(name)) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("``", "`")


def _below_assignment(name: str) -> str | None:
    """The string literal that follows ``name = …`` in the module it comes from."""
    module = importlib.import_module(llavactl._WHERE[name])
    for node, after in itertools.pairwise(ast.parse(inspect.getsource(module)).body):
        assigned = isinstance(node, ast.Assign) and any(ast.unparse(target) == name for target in node.targets)
        if assigned and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            return str(after.value.value)
    return None


BLOCKS: dict[str, Callable[[], Iterator[str]]] = {
    each.__name__: each
    for each in (commands, cli, hook_table, hooks, kinds, components, problems, recipes, templates, names)
}


def filled(text: str) -> str:
    """The page ``text`` with its generated blocks as the code has them."""

    def fill(match: re.Match[str]) -> str:
        block = "\n".join(BLOCKS[match[2]]()).rstrip("\n")
        return f"{match[1]}{block}\n{match[3]}"

    return BLOCK.sub(fill, text)


def main() -> None:
    """Writes every page."""
    for page in PAGES:
        path = ROOT / page
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
