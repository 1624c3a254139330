"""A recipe file as a tree that knows where everything was said: reading, merging, setting one value.

YAML 1.2 through ruamel.yaml's composer: ``1e-3`` is a number, ``on`` and ``no`` are text, and
each node has its line. Values are built here from the nodes, never from tags, so no file can
make an object; ``<<`` is an ordinary key, as YAML 1.2 has it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavactl.core.errors import Problem, RecipeError
from llavactl.core.options import Located
from llavactl.core.validation import Key

MAX_BYTES = 1_000_000
"""No recipe is larger; weights given as a recipe by mistake are."""

MAX_VALUES = 100_000
"""Aliases of aliases can make a small file enormous."""

_TAG = "tag:yaml.org,2002:"
_TRUTH = {"true": True, "false": False}
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass
class Node:
    """A value (scalar, mapping or list of nodes) and ``where`` it is said: ``file:line`` or ``-o key=value``."""

    value: Any
    where: str

    def plain(self) -> Any:
        """The value alone."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def get(self, key: Key) -> Node | None:
        """What lies under ``key``, if anything."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None

    def whereabouts(self, path: Sequence[Key]) -> str:
        """Where the value at ``path`` is said, or the nearest thing around it that is."""
        inner = self.get(path[0]) if path else None
        return self.where if inner is None else inner.whereabouts(path[1:])


def parse(text: str, base: Path, where: Callable[[int], str], problems: list[Problem]) -> Node:
    """``text`` as a tree; relative paths in it are relative to ``base``, ``where`` names a line.

    Twice-said keys and unknown tags go to ``problems``.

    Raises:
        RecipeError: it isn't YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # the second anchor wins, as YAML has it
    try:
        root = yaml.compose(text)
        return _Builder(base, where, problems).build(root)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refused(where(line), f"not YAML: {_yaml_problem(error)}") from error
    except YAMLError as error:
        raise _refused(where(1), "not a text file") from error
    except RecursionError as error:
        raise _refused(where(1), "nested too deeply, or an alias holds itself") from error


def read(file: Path, base: Path, problems: list[Problem]) -> Node:
    """The recipe in ``file``, a mapping.

    Raises:
        RecipeError: no such file, or it holds something else.
    """
    shown = display(file)
    root = parse(content(file), base, lambda line: f"{shown}:{line}", problems)
    if root.value is None:
        raise _refused(shown, "empty")
    if not isinstance(root.value, dict):
        raise _refused(root.where, "not a recipe: the file must hold `key: value` lines")
    return root


def content(file: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: no such file, or it can't be a recipe.
    """
    shown = display(file)
    try:
        if file.is_dir():
            raise _refused(shown, "a folder, not a recipe file", hint=_inside(file))
        if file.stat().st_size > MAX_BYTES:
            raise _refused(shown, f"not a recipe: {file.stat().st_size} bytes")
        return file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise _refused(shown, "no such file") from error
    except UnicodeDecodeError as error:
        raise _refused(shown, "not a text file (UTF-8)") from error
    except (OSError, ValueError) as error:
        raise _refused(shown, f"can't be read: {getattr(error, 'strerror', None) or error}") from error


def merge(parent: Node, child: Node, *, top: bool = True) -> Node:
    """``child`` over ``parent``: mappings merge, anything else of the child's replaces.

    A component with another ``name`` replaces the parent's whole: options of one mean nothing to
    another. So does a recipe's name its ``run_dir``: two recipes must not share a run folder by accident.
    """
    if not isinstance(parent.value, dict) or not isinstance(child.value, dict):
        return child
    name = child.get("name")
    renamed = name is not None and (before := parent.get("name")) is not None and before.value != name.value
    if renamed and not top:
        return child
    merged = {key: node for key, node in parent.value.items() if not (renamed and key == "run_dir")}
    for key, node in child.value.items():
        merged[key] = merge(merged[key], node, top=False) if key in merged else node
    return Node(merged, child.where)


def put(here: Node, path: Sequence[str], new: Node, said: str = "") -> str:
    """Sets the value at ``path`` below ``here`` (``said`` so far), making sections on the way.

    Returns what is wrong, or nothing. A list takes one item more than it has, so that lists can be begun.
    """
    key, rest = path[0], path[1:]
    at: Any = key
    if isinstance(here.value, list):
        if not key.isdecimal() or int(key) > len(here.value):
            return f"{said} is a list of {len(here.value)}; its items are numbered from 0, and there is no {key!r}"
        at = int(key)
        if at == len(here.value):
            here.value.append(Node(None, new.where))
    elif isinstance(here.value, dict):
        here.value.setdefault(at, Node(None, new.where))
    else:
        return f"{said} is {here.value!r}; there is nothing below it"
    if not rest:
        here.value[at] = new
        return ""
    if here.value[at].value is None:
        here.value[at] = Node([] if rest[0].isdecimal() else {}, new.where)
    return put(here.value[at], rest, new, f"{said}.{key}".lstrip("."))


def write(data: Any) -> str:
    """Plain data as YAML that YAML 1.1 readers (PyYAML) take for the same numbers: ``2.0e-05``, not ``2e-05``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """ruamel's, with a point in every number that isn't whole."""

    def number(self: Any, value: float) -> Any:
        text = repr(value)
        if "e" in text and "." not in text:
            return self.represent_scalar(f"{_TAG}float", text.replace("e", ".0e"))
        return SafeRepresenter.represent_float(self, value)

    Representer.add_representer(float, number)
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Representer = Representer
    yaml.default_flow_style = False
    yaml.allow_unicode = True
    yaml.width = 10_000
    yaml.sort_base_mapping_type_on_output = False
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def display(file: Path) -> str:
    """The file as a user would name it: relative to the working directory when it lies below."""
    try:
        return str(file.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(file)


@dataclass
class _Builder:
    base: Path
    where: Callable[[int], str]
    problems: list[Problem]
    values: int = field(default=0)

    def build(self, node: Any, path: tuple[str, ...] = (), line: int = 0) -> Node:
        """The tree of a composed ``node``; ``line`` is that of its key, for a value on the lines below it."""
        if node is None:
            return Node(None, self.where(1))
        where = self.where(line or node.start_mark.line + 1)
        self.values += 1
        if self.values > MAX_VALUES:
            raise _refused(where, f"more than {MAX_VALUES} values")
        if not str(node.tag).startswith(_TAG):
            self.problems.append(Problem(where, ".".join(path), f"the tag {node.tag} has no meaning in a recipe"))
        if node.id == "mapping":
            return Node(self._mapping(node, path), where)
        if node.id == "sequence":
            return Node([self.build(item, (*path, str(index))) for index, item in enumerate(node.value)], where)
        value = _scalar(str(node.tag), node.value)
        return Node(Located(value, self.base) if isinstance(value, str) else value, where)

    def _mapping(self, node: Any, path: tuple[str, ...]) -> dict[str, Node]:
        found: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            here = (*path, str(key.value))
            if key.id != "scalar":
                self.problems.append(Problem(self.where(line), ".".join(path), "a key must be text"))
            elif key.value in found:
                first = found[key.value].where
                self.problems.append(Problem(self.where(line), ".".join(here), f"said twice; first at {first}"))
            else:
                found[key.value] = self.build(value, here, line)
        return found


def _scalar(tag: str, text: str) -> str | float | bool | None:
    """The value of a scalar; what no rule of YAML 1.2 makes a number is text."""
    digits = text.replace("_", "").lower()
    try:
        match tag.removeprefix(_TAG):
            case "null":
                return None
            case "bool":
                return _TRUTH.get(digits, text)
            case "int":
                return int(digits, 0 if digits.lstrip("+-")[:2] in ("0x", "0o", "0b") else 10)
            case "float":
                return float(_SPECIAL.get(digits, digits))
    except ValueError:
        pass  # a number of YAML 1.1, such as 12:30:00 below a %YAML 1.1 line
    return text


def _inside(folder: Path) -> str:
    found = sorted(folder.glob("*.yaml"))[:5]
    return f"it holds {', '.join(display(file) for file in found)}" if found else ""


def _refused(where: str, why: str, *, hint: str = "") -> RecipeError:
    problem = Problem(where, "", why)
    return RecipeError(str(problem), hint=hint, problems=[problem])


def _yaml_problem(error: Any) -> str:
    if "'\\t'" in str(error.problem):
        return "a tab; YAML indents with spaces"
    return " ".join(str(error.problem or error.context).split())
