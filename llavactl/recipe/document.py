"""A recipe file as a tree of nodes with file and line: reading, merging, setting one value.

YAML 1.2, parsed with ruamel.yaml's composer: ``1e-3`` is a number, ``on`` and ``no`` are strings, ``<<`` is an ordinary
key. Values are built from the composed nodes, not by tag constructors, so a file can't create Python objects.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavactl.core.errors import Problem, RecipeError
from llavactl.core.locations import shown_path
from llavactl.core.options import Located
from llavactl.core.validation import Key

MAX_BYTES = 1_000_000
"""Larger files are refused, such as weights passed by mistake."""

MAX_VALUES = 100_000
"""Nested aliases can expand a small file to any size."""

_TAG = "tag:yaml.org,2002:"
_TRUTH = {"true": True, "false": False}
_SPECIAL = {".inf": "inf", "+.inf": "inf", "-.inf": "-inf", ".nan": "nan"}


@dataclass
class Node:
    """A value (scalar, mapping or list of nodes) and its origin ``where``: ``file:line`` or ``-o key=value``."""

    value: Any
    where: str

    def plain(self) -> Any:
        """The value, without origins."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def copy(self) -> Node:
        """A copy that shares no mapping or list with this node, for ``put``."""
        if isinstance(self.value, dict):
            return Node({key: node.copy() for key, node in self.value.items()}, self.where)
        if isinstance(self.value, list):
            return Node([node.copy() for node in self.value], self.where)
        return Node(self.value, self.where)

    def get(self, key: Key) -> Node | None:
        """The node at ``key``; None if it doesn't exist."""
        if isinstance(self.value, dict):
            return self.value.get(key)
        if isinstance(self.value, list) and isinstance(key, int) and key < len(self.value):
            return self.value[key]
        return None

    def origin(self, path: Sequence[Key]) -> str:
        """The origin of the value at ``path``, or of the innermost existing value that contains it."""
        inner = self.get(path[0]) if path else None
        return self.where if inner is None else inner.origin(path[1:])


_KEYS = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*")


def origin_of(root: Node, path: Sequence[Key], why: str) -> str:
    """The origin of the value at ``path``, which ``why`` says is invalid; that of an override if ``why`` names its key.

    Validators of a section check several of its keys together, so the section itself may be in a file although an
    override made it invalid.
    """
    named = [words.split(".") for words in _KEYS.findall(why)]
    paths = [*((*path, *keys) for keys in named), *(keys for keys in named if len(keys) > 1)]
    return next(filter(is_override, map(root.origin, paths)), root.origin(path))


def is_override(where: str) -> bool:
    """Whether ``where`` is the origin of an override."""
    return where.startswith(("-o ", "--axis "))


def parse(text: str, base: Path, where: Callable[[int], str], problems: list[Problem]) -> Node:
    """Parses ``text``. Relative paths are relative to ``base``; ``where`` returns the origin of a line.

    Duplicate keys and unknown tags are appended to ``problems``.

    Raises:
        RecipeError: ``text`` is not YAML.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    yaml = YAML(typ="safe", pure=True)
    yaml.composer.warn_double_anchors = False  # as in YAML, the second anchor replaces the first
    try:
        root = yaml.compose(text)
        return _Builder(base, where, problems).build(root)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise _refused(where(line), f"invalid YAML: {_yaml_problem(error)}") from error
    except YAMLError as error:
        raise _refused(where(1), "not a text file") from error
    except RecursionError as error:
        raise _refused(where(1), "nested too deeply, or an alias contains itself") from error


def read(file: Path, base: Path, problems: list[Problem]) -> Node:
    """Parses the recipe ``file``.

    Raises:
        RecipeError: the file can't be read or is not a mapping.
    """
    shown = shown_path(file)
    root = parse(content(file), base, lambda line: f"{shown}:{line}", problems)
    if root.value is None:
        raise _refused(shown, "the file is empty")
    if not isinstance(root.value, dict):
        raise _refused(root.where, "expected a mapping (`key: value` lines)")
    return root


def content(file: Path) -> str:
    """The text of a recipe file.

    Raises:
        RecipeError: the file can't be read, is too large or is not text.
    """
    shown = shown_path(file)
    try:
        if file.is_dir():
            raise _refused(shown, "expected a file, got a folder", hint=_recipes_in(file))
        if file.stat().st_size > MAX_BYTES:
            raise _refused(shown, f"too large for a recipe: {file.stat().st_size} bytes, limit {MAX_BYTES}")
        return file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise _refused(shown, "no such file") from error
    except UnicodeDecodeError as error:
        raise _refused(shown, "not a text file (UTF-8)") from error
    except (OSError, ValueError) as error:
        raise _refused(shown, f"can't be read: {getattr(error, 'strerror', None) or error}") from error


def merge(parent: Node, child: Node, *, top: bool = True) -> Node:
    """``parent`` with the values of ``child``: mappings are merged, other values are replaced.

    A component with another ``name`` replaces the component of the parent, as options differ between components.
    ``run_dir`` is not inherited by a recipe with another ``name``, so that runs don't share a folder by accident.
    """
    if not isinstance(parent.value, dict) or not isinstance(child.value, dict):
        return child
    name = child.get("name")
    parent_name = parent.get("name")
    renamed = name is not None and parent_name is not None and parent_name.value != name.value
    if renamed and not top:
        return child
    merged = {key: node for key, node in parent.value.items() if not (renamed and key == "run_dir")}
    for key, node in child.value.items():
        merged[key] = merge(merged[key], node, top=False) if key in merged else node
    return Node(merged, child.where)


def put(node: Node, path: Sequence[str], new: Node, parents: str = "") -> str:
    """Sets the value at ``path`` below ``node`` (whose dotted path is ``parents``); missing mappings are created.

    An index one past the end of a list appends an item. Returns a problem, or "" on success.
    """
    key, rest = path[0], path[1:]
    index: Any = key
    if isinstance(node.value, list):
        if not key.isdecimal() or int(key) > len(node.value):
            return f"{parents} is a list of {len(node.value)} items: expected an index from 0, got {key!r}"
        index = int(key)
        if index == len(node.value):
            node.value.append(Node(None, new.where))
    elif isinstance(node.value, dict):
        node.value.setdefault(index, Node(None, new.where))
    else:
        return f"{parents} is {node.value!r}, which has no keys"
    if not rest:
        node.value[index] = new
        return ""
    if node.value[index].value is None:
        node.value[index] = Node([] if rest[0].isdecimal() else {}, new.where)
    return put(node.value[index], rest, new, f"{parents}.{key}".lstrip("."))


def write(data: Any) -> str:
    """``data`` as YAML. Numbers are written so that YAML 1.1 readers (PyYAML) agree: ``2.0e-05``, not ``2e-05``."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    class Representer(SafeRepresenter):
        """Writes floats with a decimal point."""

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


@dataclass
class _Builder:
    base: Path
    where: Callable[[int], str]
    problems: list[Problem]
    values: int = field(default=0)

    def build(self, node: Any, path: tuple[str, ...] = (), line: int = 0) -> Node:
        """The tree of a composed ``node``; ``line`` is the line of its key, which may be above the value."""
        if node is None:
            return Node(None, self.where(1))
        where = self.where(line or node.start_mark.line + 1)
        self.values += 1
        if self.values > MAX_VALUES:
            raise _refused(where, f"more than {MAX_VALUES} values")
        if not str(node.tag).startswith(_TAG):
            self.problems.append(Problem(where, ".".join(path), f"unsupported tag {node.tag}"))
        if node.id == "mapping":
            return Node(self._mapping(node, path), where)
        if node.id == "sequence":
            return Node([self.build(item, (*path, str(index))) for index, item in enumerate(node.value)], where)
        value = _scalar(str(node.tag), node.value)
        return Node(Located(value, self.base) if isinstance(value, str) else value, where)

    def _mapping(self, node: Any, path: tuple[str, ...]) -> dict[str, Node]:
        mapping: dict[str, Node] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            key_path = (*path, str(key.value))
            if key.id != "scalar":
                self.problems.append(Problem(self.where(line), ".".join(path), "expected a string as key"))
            elif key.value in mapping:
                first = mapping[key.value].where
                self.problems.append(Problem(self.where(line), ".".join(key_path), f"duplicate key; first at {first}"))
            else:
                mapping[key.value] = self.build(value, key_path, line)
        return mapping


def _scalar(tag: str, text: str) -> str | float | bool | None:
    """The value of a scalar: a string unless YAML 1.2 defines it as null, a boolean or a number."""
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
        pass  # a YAML 1.1 number, such as 12:30:00 after a %YAML 1.1 directive
    return text


def _recipes_in(folder: Path) -> str:
    files = sorted(folder.glob("*.yaml"))[:5]
    return f"pass a file in it: {', '.join(shown_path(file) for file in files)}" if files else ""


def _refused(where: str, why: str, *, hint: str = "") -> RecipeError:
    problem = Problem(where, "", why)
    return RecipeError(str(problem), hint=hint, problems=[problem])


def _yaml_problem(error: Any) -> str:
    if "'\\t'" in str(error.problem):
        return "a tab; indent with spaces"
    return " ".join(str(error.problem or error.context).split())
