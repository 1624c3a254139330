"""A value that a component of a plugin may not return is one line: the component, the method and its line.

The conformance check of the kind names the same method.
"""

from __future__ import annotations

import gc
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from llavactl.core.protocols import KINDS
from llavactl.core.protocols.returned import methods, returned_fault
from llavactl.testing import run_cli
from tests.hooks.test_run_time_faults import CONNECTOR, GENERATE, OPTIMIZER, TRAIN, VISION, check_line, plugin_file

HEAD = """
from llavactl import ImageSlot, Reply, Sample, Scores, Text

class Base:
    def __init__(self, options):
        pass
"""

BASES: Mapping[str, str] = {
    "templates": """
class Right(Base):
    def render(self, turns, tokenizer, *, generate=False):
        parts = [part for turn in turns for part in turn.content]
        return [Text(part, True) if isinstance(part, str) else ImageSlot() for part in parts]
    def stop(self, tokenizer):
        return ()
""",
    "languages": """
class Right(Base):
    def tokenizer(self):
        from llavactl.core.registry import registry
        return registry().create("languages", {"name": "hf", "model": MODEL}).tokenizer()
    def load(self, dtype):
        from llavactl.core.registry import registry
        return registry().create("languages", {"name": "hf", "model": MODEL}).load(dtype)
""",
    "tasks": """
class Right(Base):
    protocols = ("exact",)
    def questions(self):
        return [Question("q", (Turn("user", ("What?",)),))]
    def score(self, answers, protocol):
        return Scores({"accuracy": 1.0})
""",
    "teachers": """
class Right(Base):
    def reply(self, request):
        return "text"
""",
    "schedules": """
class Right(Base):
    def fraction(self, step, steps):
        return 1.0
""",
    "formats": """
class Right(Base):
    reload = None
    def recognise(self, folder):
        return False
    def read(self, folder, model):
        pass
    def write(self, model, to):
        pass
""",
    "vision": VISION.replace("Broken", "Right").replace("  # here", ""),
    "connectors": CONNECTOR.replace("Broken", "Right").replace("  # here", ""),
    "optimizers": OPTIMIZER.replace("Broken", "Right").replace("  # here", ""),
    "sources": "class Right(Base):\n    pass\n",
}


class Returned(NamedTuple):
    """``body`` is returned by ``method`` of a component of ``kind``, and ``words`` are in the error of ``command``."""

    kind: str
    method: str
    body: str
    words: tuple[str, ...]
    command: str


SLOTS = "[Text(turn.text, turn.role == 'assistant') for turn in turns]"
TEMPLATE = f"{TRAIN} -o stage1.template=broken"
LANGUAGE = f"{TRAIN} -o 'language={{name: broken}}'"
EVAL = "eval broken --answers answers.jsonl"
TEACHER = f"data generate -o '{GENERATE}'"
SCHEDULE = f"{TRAIN} -o stage1.schedule=broken"
EXTRACT = "extract -o 'vision={name: broken}'"
CHECK = "data check -o 'data.stage1=[{name: broken}]'"
TRAIN_DATA = f"{TRAIN} -o 'data.stage1=[{{name: broken}}]'"
CONNECT = f"{TRAIN} -o 'connector={{name: broken}}'"
QUESTION = "Question('q', (Turn('user', ('What?',)),))"
BARE = "type('Bare', ({},), {{'__init__': lambda self: None}})()"
"""An object whose class doesn't initialize its base."""

RETURNED = [
    Returned("templates", "stop", "None", ("None", "tuple[str, ...]"), TEMPLATE),
    Returned("templates", "stop", "('a', 1)", ("int, str",), TEMPLATE),
    Returned("templates", "stop", "('',)", ("empty",), TEMPLATE),
    Returned("templates", "render", SLOTS, ("0 image slots for 1 images",), TEMPLATE),
    Returned("templates", "render", "['text']", ("list of str", "list[Segment]"), TEMPLATE),
    Returned("languages", "load", "None", ("None", "PreTrainedModel"), LANGUAGE),
    Returned(
        "languages",
        "load",
        BARE.format("__import__('transformers').PreTrainedModel"),
        ("Bare", "super().__init__()"),
        LANGUAGE,
    ),
    Returned("languages", "tokenizer", "{}", ("dict", "PreTrainedTokenizerBase"), LANGUAGE),
    Returned("tasks", "score", "None", ("None", "Scores"), EVAL),
    Returned("tasks", "score", "{'accuracy': 1.0}", ("dict", "Scores"), EVAL),
    Returned("tasks", "score", "Scores({'accuracy': float('nan')})", ("JSON",), EVAL),
    Returned("tasks", "score", "Scores({'accuracy': 1.0}, right={'other': True})", ("'other'",), EVAL),
    Returned("tasks", "score", "Scores({}, grades={'q': 2})", ("2", "0 to 1"), EVAL),
    Returned("tasks", "questions", f"[{QUESTION}] * 2", ("duplicate", "'q'"), EVAL),
    Returned("tasks", "questions", "[Question('q', (Turn('assistant', ('No.',)),))]", ("user turn",), EVAL),
    Returned("tasks", "questions", "None", ("None", "Question"), EVAL),
    Returned("teachers", "reply", "None", ("None", "str | Reply"), TEACHER),
    Returned("teachers", "reply", "__import__('asyncio').sleep(0)", ("coroutine", "str | Reply"), TEACHER),
    Returned("schedules", "fraction", "-0.5", ("-0.5", "step 0 of 1"), SCHEDULE),
    Returned("schedules", "fraction", "'1'", ("'1'", "float"), SCHEDULE),
    Returned("vision", "identity", "{'a': float('nan')}", ("JSON",), EXTRACT),
    Returned("vision", "load", "None", ("None", "Encoder"), EXTRACT),
    Returned("vision", "load", "object()", ("no shape, preprocess, encode",), EXTRACT),
    Returned("connectors", "build", "None", ("None", "nn.Module"), CONNECT),
    Returned("connectors", "build", BARE.format("torch.nn.Module"), ("Bare", "super().__init__()"), CONNECT),
    Returned(
        "connectors",
        "build",
        f"torch.nn.Sequential({BARE.format('torch.nn.Module')})",
        ("Bare", "super().__init__()"),
        CONNECT,
    ),
    Returned("connectors", "tokens", "0", ("0", "1 or more"), CONNECT),
    Returned("optimizers", "build", "None", ("None", "Optimizer"), f"{TRAIN} -o stage1.optimizer=broken"),
    Returned(
        "optimizers",
        "build",
        BARE.format("torch.optim.SGD"),
        ("Bare", "super().__init__("),
        f"{TRAIN} -o stage1.optimizer=broken",
    ),
    Returned(
        "optimizers",
        "build",
        "torch.optim.SGD([group['params'][0] for group in groups], lr=0.1)",
        ("other parameter groups",),
        f"{TRAIN} -o stage1.optimizer=broken",
    ),
    Returned("optimizers", "selects", "1", ("1", "bool"), f"{TRAIN} -o stage1.optimizer=broken"),
    Returned(
        "sources", "__iter__", "iter(['text'])", ("'text'", "Sample"), "data check -o 'data.stage1=[{name: broken}]'"
    ),
    Returned("sources", "__iter__", "[]", ("list of nothing", "Iterator[Sample]"), TRAIN_DATA),
    Returned("sources", "__iter__", "iter([None])", ("None", "Sample"), TRAIN_DATA),
]


def test_every_kind_has_a_value() -> None:
    """A format returns files, which the conformance check reads."""
    assert {each.kind for each in RETURNED} == set(KINDS) - {"formats"}


def hostile(folder: Path, number: int, case: Returned) -> Path:
    """A plugin whose component ``broken`` is right except for one method; others of its kind are in use, too."""
    signature = {
        "stop": "tokenizer",
        "render": "turns, tokenizer, *, generate=False",
        "load": "device, dtype" if case.kind == "vision" else "dtype",
        "score": "answers, protocol",
        "reply": "request",
        "fraction": "step, steps",
        "build": "groups" if case.kind == "optimizers" else "shape, language_width",
        "tokens": "shape",
        "selects": "weight",
    }.get(case.method, "")
    method = (
        f"    def {case.method}({', '.join(filter(None, ('self', signature)))}):  # here\n        return {case.body}\n"
    )
    model = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["language"]["model"]
    code = f"{HEAD}\nMODEL = {model!r}\n{BASES[case.kind]}\nclass Broken(Right):\n{method}"
    components = [(case.kind, "broken", "Broken"), (case.kind, "other", "Right")]
    return plugin_file(folder, f"hostile_{case.kind}_{number}", *components, code=code)


@pytest.mark.parametrize(
    ("number", "case"), [*enumerate(RETURNED)], ids=[f"{each.kind}-{each.method}-{each.body:.20}" for each in RETURNED]
)
def test_a_wrong_value_is_one_line(toy: Path, number: int, case: Returned, recwarn: pytest.WarningsRecorder) -> None:
    (toy / "answers.jsonl").write_text('{"question_id": "q", "text": "a"}\n', encoding="utf-8")
    file = hostile(toy, number, case)
    result = run_cli("--plugin", file.name, *shlex.split(case.command), cwd=toy)
    assert "Traceback" not in result.stderr
    error = check_line(result, case.kind, file, case.method)
    assert all(word in error for word in case.words)
    gc.collect()
    assert [str(each.message) for each in recwarn if "never awaited" in str(each.message)] == []


CHECKED = sorted({each.kind for each in RETURNED} - {"languages"})
FAST = ("connectors", "tasks", "vision")


@pytest.mark.parametrize(
    "kind", [pytest.param(each, marks=() if each in FAST else pytest.mark.slow) for each in CHECKED]
)
def test_the_conformance_check_agrees(toy: Path, kind: str) -> None:
    number, case = next((number, each) for number, each in enumerate(RETURNED) if each.kind == kind)
    file = hostile(toy, number, case)
    report = json.loads(run_cli("plugins", "check", file.name, "--json", cwd=toy).stdout)
    failed = [each for each in report["checks"] if each["name"] == "broken" and each["check"] == "conformance"]
    assert [each["ok"] for each in failed] == [False]
    assert case.words[0] in failed[0]["problem"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_of_every_kind_has_a_rule(kind: str) -> None:
    """``object()`` is no result of any method, except of those that return nothing."""
    for method, protocol in methods(kind).items():
        nothing = getattr(protocol, method).__annotations__["return"] == "None"
        assert bool(returned_fault(kind, method, object())) is not nothing


@pytest.mark.parametrize("keys", ["('params',)", pytest.param("('params', 'weight_decay')", marks=pytest.mark.slow)])
def test_an_optimizer_needs_only_the_keys_of_its_groups_that_it_uses(toy: Path, keys: str) -> None:
    build = f"torch.optim.SGD([{{key: group[key] for key in {keys}}} for group in groups], lr=0.1)"
    case = Returned("optimizers", "build", build, (), f"{TRAIN} -o stage1.optimizer=broken")
    file = hostile(toy, len(RETURNED) + len(keys), case)
    result = run_cli("--plugin", file.name, *shlex.split(case.command), cwd=toy)
    assert result.exit_code == 0, result.stderr
    checks = run_cli("plugins", "check", file.name, "--json", cwd=toy).json()["checks"]
    problems = [each["problem"] for each in checks if (each["name"], each["check"]) == ("broken", "conformance")]
    assert problems == [""]


SEQUENTIAL = """
class Broken(Base):
    def tokens(self, shape):
        return 1
    def build(self, shape, language_width):  # here
        return torch.nn.Sequential(torch.nn.Linear(shape.width + 1, language_width))
"""


def test_a_module_of_torch_belongs_to_the_connector_that_built_it(toy: Path) -> None:
    file = plugin_file(toy, "sequential", ("connectors", "broken", "Broken"), code=f"{HEAD}{SEQUENTIAL}")
    result = run_cli("--plugin", file.name, *shlex.split(CONNECT), cwd=toy)
    assert "cannot be multiplied" in check_line(result, "connectors", file, "build")


NOT_FINITE = """
class Encoder:
    shape = FeatureShape((2, 2), 12)
    def preprocess(self, image):
        return torch.full((3, 4, 4), float(sum(image.resize((1, 1)).getpixel((0, 0))))).numpy()
    def encode(self, pixels):  # here
        features = torch.zeros(len(pixels), 4, 12)
        features[SELECTED] = float("nan")
        return features

class Broken(Base):
    def identity(self):
        return {}
    def load(self, device, dtype):
        return Encoder()
"""


def test_an_encoder_without_finite_features_is_an_error(toy: Path) -> None:
    """No image is stored as skipped, so a corrected encoder encodes them all."""
    code = NOT_FINITE.replace("SELECTED", ":")
    file = plugin_file(toy, "no_features", ("vision", "broken", "Broken"), code=f"{HEAD}{code}")
    result = run_cli("--plugin", file.name, *shlex.split(EXTRACT), cwd=toy)
    assert "12 images" in check_line(result, "vision", file, "encode")
    again = run_cli("--plugin", file.name, *shlex.split(EXTRACT), cwd=toy)
    check_line(again, "vision", file, "encode")


def test_live_features_that_are_not_finite_name_the_encoder(toy: Path) -> None:
    code = NOT_FINITE.replace("SELECTED", ":")
    file = plugin_file(toy, "no_live_features", ("vision", "broken", "Broken"), code=f"{HEAD}{code}")
    result = run_cli("--plugin", file.name, *shlex.split(f"{TRAIN} -o vision=broken"), cwd=toy)
    assert "photo-0" in check_line(result, "vision", file, "encode")


def test_single_images_without_finite_features_are_skipped(toy: Path) -> None:
    code = NOT_FINITE.replace("SELECTED", "pixels[:, 0, 0, 0] > 300")
    file = plugin_file(toy, "few_features", ("vision", "broken", "Broken"), code=f"{HEAD}{code}")
    result = run_cli("--plugin", file.name, *shlex.split(EXTRACT), "--json", cwd=toy)
    assert result.exit_code == 0, result.stderr
    assert 0 < len((toy / "runs/toy/skipped.jsonl").read_text().splitlines()) < 12
