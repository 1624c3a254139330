"""``llavactl plugins new``: writes a plugin package from the templates in ``llavactl/scaffold``.

Each kind has a folder: ``hook.py`` goes into the package's ``__init__.py``, ``recipe.yaml`` into its recipe, tests into
``tests`` and every other file into the package. Files of ``common`` are for all kinds.
"""

from __future__ import annotations

import ast
import keyword
import re
import string
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import llavactl
from llavactl.core import plugins
from llavactl.core.errors import RecipeError
from llavactl.core.locations import shown_path
from llavactl.core.registry import kind_label, registry
from llavactl.core.words import article

TEMPLATES = Path(llavactl.__file__).parent / "scaffold"

KINDS = {
    "source": "sources",
    "vision": "vision",
    "connector": "connectors",
    "language": "languages",
    "template": "templates",
    "teacher": "teachers",
    "task": "tasks",
    "format": "formats",
    "optimizer": "optimizers",
    "schedule": "schedules",
    "command": "commands",
    "observer": "observers",
}
"""Kinds of plugins, singular and plural. Each is the name of a folder of templates and of a module."""

PACKAGES = {"PIL": "pillow"}
"""Names of packages whose modules have another name."""

_PARENT = "llava-v1.5-7b"
_SECTION = re.compile(r"^(\w+):(.*\n(?:[ \t].*\n)*)", re.MULTILINE)
"""A top-level key of a recipe and the text of its value."""

_NAME = re.compile(r"[a-z][a-z0-9]*(?:-[a-z0-9]+)*")


@dataclass(frozen=True)
class NewPlugin:
    """A generated package: its ``folder``, and its ``files`` relative to it."""

    name: str
    kinds: tuple[str, ...]
    folder: str
    files: tuple[str, ...]


def kind_of(text: str) -> str | None:
    """The kind that ``text`` names, singular or plural; None if there is none."""
    return next((kind for kind, plural in KINDS.items() if text in (kind, plural)), None)


def new_plugin(name: str, kinds: Sequence[str], parent: Path) -> NewPlugin:
    """Writes the package ``llavactl-NAME`` for ``kinds`` (keys of ``KINDS``) into the folder ``parent``.

    Raises:
        RecipeError: the name is invalid or taken, or the folder exists.
    """
    kinds = tuple(dict.fromkeys(kinds))
    check_name(name, kinds)
    folder = parent / f"llavactl-{name}"
    if folder.exists():
        raise RecipeError(f"{shown_path(folder)} exists", hint="choose another name, or another folder with --to")
    files = plugin_files(name, kinds)
    for path, text in files.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return NewPlugin(name, kinds, str(folder), tuple(files))


def check_name(name: str, kinds: Iterable[str]) -> None:
    """Checks that ``name`` is valid, and not yet the name of a plugin or of a component of ``kinds``.

    Raises:
        RecipeError: it isn't.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(f"plugin name {name!r}: expected lower-case words with hyphens, such as bird-photos")
    if name.startswith("llavactl"):
        shorter = name.removeprefix("llavactl").strip("-") or "NAME"
        raise RecipeError(
            f"plugin name {name!r}: the package is named llavactl-NAME", hint=f"pass {shorter} as the name"
        )
    if name in {plugins.BUILTIN, *(point.name for point in plugins.entry_points())}:
        raise RecipeError(f"plugin {name!r} is installed", hint="choose another name")
    for kind in kinds:
        if name in registry().names(KINDS[kind]):
            entry = registry().get(KINDS[kind], name)
            label = kind_label(KINDS[kind])
            raise RecipeError(f"{label} {name!r} is registered by plugin {entry.plugin}", hint="choose another name")


def plugin_files(name: str, kinds: Sequence[str]) -> dict[str, str]:
    """The contents of the files of a new plugin, by path."""
    module = "llavactl_" + name.replace("-", "_")
    values = {
        "name": name,
        "module": module,
        "package": f"llavactl-{name}",
        "Class": "".join(map(str.capitalize, name.split("-"))),
        "summary": " and ".join(article(kind_label(KINDS[kind])) for kind in kinds),
    }
    assert not keyword.iskeyword(module)
    texts: dict[str, str] = {}
    for kind in kinds:
        for template in sorted((TEMPLATES / kind).glob("*.tmpl")):
            if template.name not in ("hook.py.tmpl", "recipe.yaml.tmpl"):
                folder = "tests" if template.name.startswith("test_") else module
                texts[f"{folder}/{template.name.removesuffix('.tmpl')}"] = _filled(template, values)
    hooks = [_filled(TEMPLATES / kind / "hook.py.tmpl", values) for kind in kinds]
    examples = [kind for kind in kinds if "\ndef example(" in texts.get(f"{module}/{kind}.py", "")]
    recipes = [path for kind in kinds if (path := TEMPLATES / kind / "recipe.yaml.tmpl").is_file()]
    if recipes:
        texts[f"{module}/recipe.yaml"] = _recipe(name, [_filled(path, values) for path in recipes])
        hooks.append(_RECIPE_HOOK.substitute(values))
    if examples:
        entries = "\n".join(f'        "{KINDS[kind]}": {{"{name}": {kind}.example(folder)}},' for kind in examples)
        hooks.append(_EXAMPLES_HOOK.substitute(values, modules=", ".join(sorted(examples)), entries=entries))
    texts[f"{module}/__init__.py"] = _joined(f'"""llavactl plugin: {values["summary"]}."""', hooks)
    texts[f"{module}/py.typed"] = ""
    values["dependencies"] = ", ".join(f'"{each}"' for each in _dependencies(texts, module))
    modules = [path for path, text in texts.items() if path.startswith(module) and text]
    values["files"] = "".join(_file_row(path, texts[path]) for path in modules)
    values["usage"] = _usage(name, kinds, bool(recipes))
    for file in ("pyproject.toml", "README.md", "tests/test_plugin.py"):
        texts[file] = _filled(TEMPLATES / "common" / f"{Path(file).name}.tmpl", values)
    return dict(sorted(texts.items()))


def _filled(path: Path, values: Mapping[str, str]) -> str:
    return string.Template(path.read_text(encoding="utf-8")).substitute(values)


_RECIPE_HOOK = string.Template('''\
from llavactl import Register, hookimpl


@hookimpl
def register_recipes(register: Register) -> None:
    """The recipe `$name`."""
    register(
        "$name",
        "$module:recipe.yaml",
        summary="a recipe that uses the plugin",
    )
''')

_EXAMPLES_HOOK = string.Template('''\
from pathlib import Path
from typing import Any

from llavactl import hookimpl


@hookimpl
def check_examples(folder: Path) -> dict[str, Any]:
    """Options with which `llavactl plugins check` creates the components."""
    from $module import $modules

    return {
$entries
    }
''')


def _joined(docstring: str, hooks: Sequence[str]) -> str:
    """A module with the functions of ``hooks``, whose imports are merged at the top."""
    names: dict[str, set[str]] = {}
    bodies = []
    for hook in hooks:
        imports, _, body = hook.partition("\n\n\n")
        for line in filter(None, imports.split("\n")):
            source, _, imported = line.removeprefix("from ").partition(" import ")
            names.setdefault(source, set()).update(imported.split(", "))
        bodies.append(body.strip())
    lines = {source: f"from {source} import {', '.join(sorted(imported))}" for source, imported in names.items()}
    standard = sorted(line for source, line in lines.items() if source.partition(".")[0] in sys.stdlib_module_names)
    others = sorted(line for line in lines.values() if line not in standard)
    head = [docstring, "from __future__ import annotations", "\n".join(standard), "\n".join(others)]
    return "\n\n".join(filter(None, head)) + "\n\n\n" + "\n\n\n".join(bodies) + "\n"


def _recipe(name: str, sections: Sequence[str]) -> str:
    """A recipe with ``sections`` and everything else from a published one; inline mappings of a key are merged."""
    merged: dict[str, str] = {}
    for section in sections:
        for key, text in _SECTION.findall(section):
            mapping = merged.get(key, "").endswith("}\n") and text.startswith(" {")
            merged[key] = f"{merged[key][:-2]}, {text[2:]}" if mapping else text
    head = f"# llavactl recipes check {name}\nextends: {_PARENT}\nname: {name}\n"
    return head + "".join(f"{key}:{text}" for key, text in merged.items())


def _dependencies(texts: Mapping[str, str], module: str) -> list[str]:
    """The packages that the modules of a plugin import."""
    imported = set()
    for path, text in texts.items():
        if path.startswith(module) and path.endswith(".py"):
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom):
                    imported.add(str(node.module).partition(".")[0])
                elif isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
    major, minor = llavactl.__version__.split(".")[:2]
    others = imported - sys.stdlib_module_names - {"llavactl", module}
    tested = f"llavactl>={major}.{minor},<{major}.{int(minor) + 2}"  # hooks are not removed without a warning before
    return [tested, *sorted(PACKAGES.get(name, name) for name in others)]


def _file_row(path: str, text: str) -> str:
    if path.endswith("__init__.py"):
        return ""
    about = (ast.get_docstring(ast.parse(text)) or "") if path.endswith(".py") else "a recipe that uses the plugin"
    first_sentence = re.split(r"\.\s", about)[0].rstrip(".")
    return f"| `{path}` | {first_sentence} |\n"


def _usage(name: str, kinds: Sequence[str], recipe: bool) -> str:
    lines = [f"llavactl components {KINDS[kind]}" for kind in kinds if kind not in ("command", "observer")]
    lines += [f"llavactl {name} --help"] if "command" in kinds else []
    lines += [f"llavactl recipes copy {name}"] if recipe else []
    return "```sh\n" + "\n".join(lines) + "\n```\n"
