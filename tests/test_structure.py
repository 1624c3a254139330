"""Rules of the source tree: class names, module names and imports of ``llavactl.core``."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

import llavactl
from llavactl.core import protocols
from llavactl.core.protocols.members import members

PACKAGE = Path(llavactl.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "numpy", "PIL", "transformers", "h5py"}

OTHER_LIBRARIES = {"datasets", "deepspeed", "gguf", "onnx", "openai", "trl"}
"""Libraries of the field that llavactl does not import."""


def _tree(module: Path) -> ast.Module:
    return ast.parse(module.read_text(encoding="utf-8"))


def _duplicate_classes(trees: dict[str, ast.Module]) -> dict[str, list[str]]:
    modules = defaultdict(list)
    for name, tree in trees.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                modules[node.name].append(name)
    return {name: where for name, where in modules.items() if len(where) > 1}


def _imported_packages(node: ast.AST) -> Iterator[str]:
    """The top-level packages that the import statement ``node`` imports."""
    if isinstance(node, ast.Import):
        yield from (alias.name.partition(".")[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        yield (node.module or "").partition(".")[0]


def _imports_at_import_time(tree: ast.Module) -> set[str]:
    """Packages imported when the module is imported: outside functions and ``if TYPE_CHECKING``."""
    packages: set[str] = set()
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            todo += node.orelse
            continue
        packages |= set(_imported_packages(node))
        todo += ast.iter_child_nodes(node)
    return packages


def _imported_libraries() -> set[str]:
    """Third-party packages that llavactl imports anywhere."""
    nodes = (node for module in MODULES for node in ast.walk(_tree(module)))
    packages = {package for node in nodes for package in _imported_packages(node)}
    return packages - {"llavactl"} - set(sys.stdlib_module_names)


def test_every_class_name_is_defined_once() -> None:
    assert _duplicate_classes({str(module.relative_to(PACKAGE)): _tree(module) for module in MODULES}) == {}


def test_no_module_is_named_like_an_imported_library() -> None:
    libraries = _imported_libraries() | OTHER_LIBRARIES
    assert {"torch", "transformers", "peft", "tokenizers"} <= libraries
    assert [str(module) for module in MODULES if module.stem in libraries or module.parent.name in libraries] == []


def test_no_module_is_named_like_a_module_of_the_standard_library() -> None:
    assert [str(module) for module in MODULES if module.stem in sys.stdlib_module_names - {"__main__"}] == []


@pytest.mark.parametrize("module", sorted((PACKAGE / "core").rglob("*.py")), ids=lambda module: module.stem)
def test_core_imports_heavy_libraries_on_first_use(module: Path) -> None:
    assert _imports_at_import_time(_tree(module)) & HEAVY == set()


def test_only_core_hub_downloads_from_the_model_hub() -> None:
    downloads = {"snapshot_download", "hf_hub_download", "cached_file", "cached_files", "get_config_dict"}
    users = {
        module.relative_to(PACKAGE).as_posix()
        for module in MODULES
        for node in ast.walk(_tree(module))
        if (isinstance(node, ast.ImportFrom) and downloads & {alias.name for alias in node.names})
        or (isinstance(node, ast.Attribute) and node.attr in downloads)
    }
    assert users == {"core/hub.py"}


PLUGIN_MODULES = sorted((PACKAGE.parent / "plugins").glob("*/**/*.py"))


def _private_names(tree: ast.AST) -> Iterator[str]:
    """The names of llavactl that ``tree`` imports or refers to and that aren't public."""
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] == "llavactl":
                if module == "llavactl":
                    yield from (each.name for each in names if each.name not in llavactl.__all__)
                elif not f"{module}.".startswith("llavactl.testing."):
                    yield module
            case ast.Import(names=names):
                yield from (
                    each.name for each in names if each.name.startswith("llavactl.") and each.name != "llavactl.testing"
                )
            case ast.Attribute(value=ast.Name(id="llavactl"), attr=name) if name not in llavactl.__all__:
                yield name


@pytest.mark.parametrize("module", PLUGIN_MODULES, ids=lambda module: f"{module.parent.name}-{module.stem}")
def test_plugins_use_public_names_only(module: Path) -> None:
    assert set(_private_names(_tree(module))) <= {"__version__", "testing"}


@pytest.mark.parametrize(
    "code",
    [
        "from llavactl.core.registry import Options",
        "from llavactl import NoSuchName",
        "import llavactl.api",
        "import llavactl\nllavactl.core.errors",
    ],
)
def test_a_private_name_is_detected(code: str) -> None:
    assert list(_private_names(ast.parse(code)))


COMPONENT_NAMES = {"component", "source", "vision", "backbone", "encoder", "connector", "template", "teacher", "task"}
"""Names of variables that are components of plugins."""

DECLARED = {
    name
    for kind, protocol in protocols.KINDS.items()
    for each in (protocol, protocols.ALTERNATIVES.get(protocol, protocol), *protocols.CAPABILITIES[kind])
    for name in members(each)
} | {*members(protocols.Encoder)}

OTHER_OBJECTS = {
    ("chat/transformers_model.py", "hasattr(processor, 'tokenizer')"),  # a processor of transformers
    ("core/processes.py", "getattr(record, 'scope', '')"),  # a log record
}


def _dynamic_attributes(tree: ast.AST) -> Iterator[str]:
    """Calls of ``getattr`` and ``hasattr`` with the name of a member of a component, or on a component."""
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[of, ast.Constant(value=str(name)), *_]):
                if name in DECLARED or ast.unparse(of).rpartition(".")[2] in COMPONENT_NAMES:
                    yield ast.unparse(node)


def test_components_are_asked_for_protocols_not_for_attributes() -> None:
    calls = ((module, call) for module in MODULES for call in _dynamic_attributes(_tree(module)))
    found = {(module.relative_to(PACKAGE).as_posix(), call) for module, call in calls}
    assert found == OTHER_OBJECTS


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("hasattr(anything, 'check')", True),
        ("getattr(self.teacher, 'delay', None)", True),
        ("x = getattr(task, 'scores')", True),
        ("isinstance(source, Checkable) and source.check()", False),
        ("getattr(config, 'hidden_size', None)", False),
        ("getattr(torch, precision)", False),
    ],
)
def test_dynamic_attributes_are_found(code: str, found: bool) -> None:
    assert bool(list(_dynamic_attributes(ast.parse(code)))) is found


@pytest.mark.parametrize(
    ("code", "packages"),
    [
        ("import torch.nn", {"torch"}),
        ("from PIL import Image", {"PIL"}),
        ("class A:\n    import numpy", {"numpy"}),
        ("try:\n    import torch\nexcept ImportError:\n    pass", {"torch"}),
        ("if TYPE_CHECKING:\n    import torch\nelse:\n    import h5py", {"h5py"}),
        ("def f():\n    import torch", set()),
        ("from . import torch", set()),
    ],
)
def test_imports_at_import_time(code: str, packages: set[str]) -> None:
    assert _imports_at_import_time(ast.parse(code)) == packages


def test_a_duplicate_class_is_detected() -> None:
    trees = {"a": ast.parse("class A: pass\nclass B: pass"), "b": ast.parse("class A: pass")}
    assert _duplicate_classes(trees) == {"A": ["a", "b"]}
