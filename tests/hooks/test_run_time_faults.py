"""An exception of a plugin's component or command is one line: its name, the plugin, the method and the line."""

from __future__ import annotations

import multiprocessing
import shlex
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from llavactl.core import plugins
from llavactl.core.errors import PluginError
from llavactl.core.protocols import KINDS
from llavactl.core.registry import kind_label, registry
from llavactl.data.token_lengths import _inherit, _run_inherited
from llavactl.testing import run_cli
from llavactl.testing.runner import Result
from llavactl.testing.toys import toy_model

IMPORTS = "import click, torch\nfrom llavactl import FeatureShape, Question, Turn, hookimpl\n"

HOOK = """
@hookimpl
def register_{kind}(register):
"""

SOURCE = """
def samples(options):
    yield 1 // 0  # here
"""

VISION = """
class Loaded:
    shape = FeatureShape((2, 2), 12)
    def preprocess(self, image):
        return torch.zeros(3, 4, 4).numpy()
    def encode(self, pixels):
        return [{}["layer"] for _ in pixels]  # here

class Broken:
    def __init__(self, options):
        pass
    def identity(self):
        return {}
    def load(self, device, dtype):
        return Loaded()
"""

CONNECTOR = """
class Layer(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(width))
    def forward(self, features):
        return features @ torch.zeros(1, 1)  # here

class Broken:
    def __init__(self, options):
        pass
    def tokens(self, shape):
        return 1
    def build(self, shape, language_width):
        return Layer(language_width)
"""

LANGUAGE = """
class Broken:
    def __init__(self, options):
        pass
    def tokenizer(self):
        raise RuntimeError  # here
    def load(self, dtype):
        pass
"""

TEMPLATE = """
class Broken:
    def __init__(self, options):
        pass
    def render(self, turns, tokenizer, *, generate=False):
        return [turn.missing for turn in turns]  # here
    def stop(self, tokenizer):
        return ()
"""

TEACHER = """
class Broken:
    def __init__(self, options):
        pass
    def reply(self, request):
        assert not request  # here
"""

TASK = """
class Broken:
    protocols = ("exact",)
    def __init__(self, options):
        pass
    def questions(self):
        return [Question("q", (Turn("user", ("What?",)),))]
    def score(self, answers, protocol):
        raise ValueError("two\\nlines")  # here
"""

FORMAT = """
class Broken:
    reload = None
    def __init__(self, options):
        pass
    def recognise(self, folder):
        return False
    def read(self, folder, model):
        pass
    def write(self, model, to):
        (to / "missing" / "file").read_text()  # here
"""

OPTIMIZER = """
class Rule(torch.optim.SGD):
    def step(self, closure=None):
        raise SystemExit(3)  # here

class Broken:
    scope = "element"
    moments = ()
    def __init__(self, options):
        pass
    def selects(self, weight):
        return True
    def build(self, groups):
        return Rule(groups, lr=0.1)
"""

SCHEDULE = """
class Broken:
    def __init__(self, options):
        pass
    def fraction(self, step, steps):
        return 1 / step  # here
"""

COMMAND = """
def run():
    None.run()  # here

command = click.Command("broken", callback=run)
"""

TRAIN = "train --stage 1 -o features.mode=live -o stage1.max_steps=1 -o stage1.warmup=0"
SOURCE_SPEC = "{name: llava-json, path: records.json, images: images}"
GENERATE = f"generate={{source: {SOURCE_SPEC}, teacher: {{name: broken}}, kinds: {{detail: 1}}, out: out.jsonl}}"

CASES = {
    "sources": (SOURCE, "samples", "samples", "ZeroDivisionError", f"{TRAIN} -o 'data.stage1=[{{name: broken}}]'"),
    "vision": (VISION, "Broken", "encode", "KeyError: 'layer'", "extract -o 'vision={name: broken}'"),
    "connectors": (CONNECTOR, "Broken", "forward", "cannot be multiplied", f"{TRAIN} -o 'connector={{name: broken}}'"),
    "languages": (LANGUAGE, "Broken", "tokenizer", "RuntimeError", f"{TRAIN} -o 'language={{name: broken}}'"),
    "templates": (TEMPLATE, "Broken", "render", "AttributeError", f"{TRAIN} -o stage1.template=broken"),
    "teachers": (TEACHER, "Broken", "reply", "AssertionError", f"data generate -o '{GENERATE}'"),
    "tasks": (TASK, "Broken", "score", "ValueError: two lines", "eval broken --answers answers.jsonl"),
    "formats": (FORMAT, "Broken", "write", "missing/file", "export --format broken --to out --model model"),
    "optimizers": (OPTIMIZER, "Broken", "step", "SystemExit: 3", f"{TRAIN} -o stage1.optimizer=broken"),
    "schedules": (SCHEDULE, "Broken", "fraction", "ZeroDivisionError", f"{TRAIN} -o stage1.schedule=broken"),
    "commands": (COMMAND, "command", "run", "AttributeError", "broken"),
}
"""By kind: the code of a plugin, the target that it registers, the function that fails, what it raises, and a command
that calls it.
"""


def test_every_kind_has_a_case() -> None:
    assert set(CASES) == {*KINDS, "commands"}


@pytest.fixture
def folder(toy: Path) -> Path:
    (toy / "answers.jsonl").write_text('{"question_id": "q", "text": "a"}\n', encoding="utf-8")
    return toy


def plugin_file(folder: Path, name: str, *registrations: tuple[str, str, str], code: str) -> Path:
    """A plugin with ``code`` that registers ``(kind, name, target)``."""
    calls: dict[str, list[str]] = {}
    for kind, each, target in registrations:
        calls.setdefault(kind, []).append(f'    register("{each}", "{name}:{target}")\n')
    hooks = (HOOK.format(kind=kind) + "".join(lines) for kind, lines in calls.items())
    file = folder / f"{name}.py"
    file.write_text("".join([IMPORTS, code, *hooks]), encoding="utf-8")
    return file


def line_of(file: Path) -> int:
    """The line that fails."""
    (line,) = (number for number, text in enumerate(file.read_text().splitlines(), 1) if text.endswith("# here"))
    return line


def check_line(result: Result, kind: str, file: Path, function: str) -> str:
    """Checks that ``result`` is an error of the component ``broken`` of the plugin ``file``; returns the error."""
    assert (result.exit_code, result.stdout) == (1, "")
    error, hint = result.stderr.splitlines()[-2:]
    place = f"{function} ({file.name}:{line_of(file)})"
    assert error.startswith(f"error: {kind_label(kind)} broken of plugin {file.stem}: {place}: ")
    assert f"llavactl plugins check {file.name}" in hint
    return error


@pytest.mark.parametrize("kind", CASES)
def test_an_exception_is_one_line(folder: Path, kind: str) -> None:
    code, target, function, exception, command = CASES[kind]
    if kind == "formats":
        toy_model(folder / "model")
    file = plugin_file(folder, f"faulty_{kind}", (kind, "broken", target), code=code)
    result = run_cli("--plugin", file.name, *shlex.split(command), cwd=folder)
    assert "Traceback" not in result.stderr
    assert exception in check_line(result, kind, file, function)


def test_json_and_the_traceback_on_request(folder: Path) -> None:
    file = plugin_file(folder, "faulty_json", ("sources", "broken", "samples"), code=SOURCE)
    command = [*shlex.split(CASES["sources"][-1]), "--json"]
    result = run_cli("--plugin", file.name, *command, "--verbose", cwd=folder)
    check_line(result, "sources", file, "samples")
    assert result.stderr.count("Traceback") == 1
    assert "yield 1 // 0" in result.stderr


def test_of_several_components_in_one_file_the_right_one_is_named(folder: Path) -> None:
    """The connector that is used; a vision backbone and a task are registered only, and another name is not used."""
    code = f"{CONNECTOR}\n{SCHEDULE.replace('Broken', 'Other').replace('  # here', '')}"
    components = [("connectors", "another", "Broken"), ("connectors", "broken", "Broken"), ("schedules", "s", "Other")]
    file = plugin_file(folder, "faulty_several", *components, code=code)
    result = run_cli("--plugin", file.name, *shlex.split(CASES["connectors"][-1]), cwd=folder)
    check_line(result, "connectors", file, "forward")


STOPPED = """
def inner():
    raise StopIteration  # here

def samples(options):
    yield inner()
"""


def test_the_line_that_raises_is_named(folder: Path) -> None:
    """Python replaces the exception, and its traceback has only the generator's caller."""
    file = plugin_file(folder, "faulty_stop", ("sources", "broken", "samples"), code=STOPPED)
    result = run_cli("--plugin", file.name, *shlex.split(CASES["sources"][-1]), cwd=folder)
    check_line(result, "sources", file, "inner")


def test_an_exception_in_a_worker_process_keeps_its_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The traceback isn't sent to the process that started it."""
    file = plugin_file(folder, "faulty_worker", ("templates", "broken", "Broken"), code=TEMPLATE)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LLAVACTL_PLUGIN_FILES", str(file))
    plugins.reload()
    try:
        render = partial(registry().create("templates", "broken").render, tokenizer=None)
        with ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _inherit, (render,)) as pool:
            error = pool.submit(_run_inherited, [None]).exception()
    finally:
        monkeypatch.undo()
        plugins.reload()
    assert isinstance(error, PluginError)
    assert (
        f"template broken of plugin faulty_worker: render ({file.name}:{line_of(file)}): AttributeError"
        in error.message
    )


def test_a_command_whose_body_never_runs_is_refused(tmp_path: Path) -> None:
    code = "\ndef run():  # here\n    yield 1\n\ncommand = click.Command('broken', callback=run)\n"
    file = plugin_file(tmp_path, "lazy_command", ("commands", "broken", "command"), code=code)
    result = run_cli("--plugin", file.name, "broken", cwd=tmp_path)
    assert "generator" in check_line(result, "commands", file, f"{file.stem}:command")


def test_an_export_without_files_is_refused(folder: Path) -> None:
    toy_model(folder / "model")
    code = FORMAT.replace("# here", "").replace('(to / "missing" / "file").read_text()', "pass")
    code = code.replace("def write(self, model, to):", "def write(self, model, to):  # here")
    file = plugin_file(folder, "writes_nothing", ("formats", "broken", "Broken"), code=code)
    result = run_cli("--plugin", file.name, *shlex.split(CASES["formats"][-1]), cwd=folder)
    check_line(result, "formats", file, "write")
    assert not (folder / "out").exists()


def test_a_registration_that_exits_is_one_line(tmp_path: Path) -> None:
    code = "import sys\nfrom llavactl import hookimpl\n@hookimpl\ndef register_tasks(register):\n    sys.exit(3)\n"
    (tmp_path / "exits.py").write_text(code, encoding="utf-8")
    result = run_cli("--plugin", "exits.py", "components", "schedules", cwd=tmp_path)
    assert result.exit_code == 0
    (line,) = result.stderr.splitlines()
    assert "plugin exits: register_tasks (exits.py:5): SystemExit: 3" in line
