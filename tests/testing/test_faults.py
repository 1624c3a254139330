"""The kit describes every fault of a component in one line, and finds none in correct ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import CAPABILITIES, KINDS, BudgetedTeacher, Limits, Request, Weight
from llavactl.core.registry import registry
from llavactl.core.schema import FeatureShape, ImageSlot, Question, Sample, Text, Turn
from llavactl.testing import CHECKS


class TeacherOf:
    """A teacher that gives the same reply to every request."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer

    def reply(self, request: Request) -> Any:
        return self.answer


class PaidTeacher(TeacherOf):
    """A language teacher whose replies are stored under the ids of the requests."""

    limits = Limits(concurrency=2)

    def content(self, request: Request) -> dict[str, Any]:
        return {"id": request.id, "messages": list(request.messages)}


class ExactTeacherOf(TeacherOf):
    exact = True


@dataclasses.dataclass
class TemplateOf:
    """A template that joins the turns, with the given faults."""

    change: Callable[[str], str] = str
    target: str = "assistant"
    end: str = "</s>"
    images: int = 1
    prompt: str = ""

    def render(self, turns: Any, tokenizer: Any, *, generate: bool = False) -> list[Any]:
        segments: list[Any] = []
        for turn in turns:
            segments += [ImageSlot()] * (self.images * len(turn.images))
            text = f"{turn.text}{self.end}" if turn.role == "assistant" else f"{self.change(turn.text)}\n"
            segments.append(Text(text, turn.role == self.target))
        return [*segments, Text(self.prompt)] if generate else segments

    def stop(self, tokenizer: Any) -> Any:
        return ("</s>",)


class StringAsStop(TemplateOf):
    def stop(self, tokenizer: Any) -> Any:
        return "</s>"


class ChangingIdentity(TemplateOf):
    calls = 0

    def identity(self) -> Any:
        self.calls += 1
        return {"calls": self.calls}


class FewParameters(TemplateOf):
    def render(self, turns: Any) -> list[Any]:  # type: ignore[override]
        return []


class RaisingVision:
    """A backbone that can't be loaded because of a bug."""

    def identity(self) -> Any:
        return {}

    def load(self, device: str, dtype: str) -> Any:
        weights: dict[str, Any] = {}
        return weights["weights"]


class NoEncoder(RaisingVision):
    def load(self, device: str, dtype: str) -> Any:
        return nn.Linear(1, 1)


class OddIdentity(RaisingVision):
    def identity(self) -> Any:
        return {"folder": Path()}


class NoLanguage:
    def tokenizer(self) -> Any:
        return "tokenizer"

    def load(self, dtype: str) -> Any:
        return None


class Stateful:
    """A source whose second iteration yields other samples."""

    count = 0

    def __iter__(self) -> Iterator[Sample]:
        self.count += 1
        yield Sample(str(self.count), (Turn("user", ("?",)), Turn("assistant", ("!",))))


class OddScores:
    protocols = ("any",)
    teacher: BudgetedTeacher | None = None

    def questions(self) -> list[Question]:
        return [Question("a", (Turn("user", ("?",)),), "yes")]

    def score(self, answers: Any, protocol: str) -> Any:
        return {"accuracy": 1.0}


class FormatOf:
    """A format that writes one file and reads nothing."""

    reload: Any = None

    def recognise(self, folder: Path) -> Any:
        return (folder / "one.txt").is_file()

    def read(self, folder: Path, model: Path) -> None:
        pass

    def write(self, model: Path, to: Path) -> None:
        (to / "one.txt").write_text("1")


class RuleOf:
    """An update rule: AdamW with the given declarations, and updates that are scaled by ``scale``."""

    scope: Any = "element"
    moments: Any = ("exp_avg", "exp_avg_sq")

    def __init__(self, **members: Any) -> None:
        vars(self).update(members)

    def selects(self, weight: Weight) -> bool:
        return True

    def build(self, groups: Any) -> Any:
        return torch.optim.AdamW(groups, lr=0.0)


class Normalized(RuleOf):
    """Divides each gradient by the norm of its weight's gradient, or of all gradients."""

    moments: Any = ()

    def __init__(self, scope: str, over: str) -> None:
        self.scope, self.over = scope, over

    def build(self, groups: Any) -> Any:
        return NormalizedSgd(groups, {"lr": 0.0}, self.over)


class NormalizedSgd(torch.optim.Optimizer):
    def __init__(self, groups: Any, defaults: Any, over: str) -> None:
        super().__init__(groups, defaults)
        self.over = over

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        weights = [(weight, group) for group in self.param_groups for weight in group["params"]]
        total = torch.stack([weight.grad.norm() for weight, _ in weights]).norm()
        for weight, group in weights:
            weight.sub_(group["lr"] * weight.grad / (total if self.over == "all" else weight.grad.norm()))


class NeedsClass:
    """A connector of the class token and the mean patch."""

    def tokens(self, shape: FeatureShape) -> int:
        if shape.prefix < 1:
            raise RecipeError("no class token", hint="`vision.select: cls-patch`")
        return 2

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return ClassAndMean(shape.width, language_width)


class ClassAndMean(nn.Linear):
    def forward(self, features: torch.Tensor) -> torch.Tensor:
        parts = features[:, :1], features[:, 1:].mean(1, keepdim=True)
        return super().forward(torch.cat(parts, dim=1))


class ScheduleOf:
    def __init__(self, *values: Any) -> None:
        self.values, self.calls = values, 0

    def fraction(self, step: int, steps: int) -> Any:
        self.calls += 1
        return self.values[self.calls % len(self.values)]


class ReloadsNothing(FormatOf):
    reload = "script.py"


class RecognisesAll(FormatOf):
    def recognise(self, folder: Path) -> Any:
        return True


class ChangesModel(FormatOf):
    def write(self, model: Path, to: Path) -> None:
        (model / "one.txt").write_text("1")


FAULTS: list[tuple[str, Any, tuple[str, ...]]] = [
    *((kind, None, ("NoneType", protocol.__name__)) for kind, protocol in KINDS.items()),
    ("vision", registry().create("connectors", "linear"), ("Vision", "identity, load")),
    ("vision", RaisingVision(), ("load() failed", "test_faults.py:", "KeyError: 'weights'")),
    ("vision", NoEncoder(), ("Linear", "Encoder", "encode")),
    ("vision", OddIdentity(), ("identity()", "JSON")),
    ("languages", NoLanguage(), ("tokenizer()", "PreTrainedTokenizerBase")),
    ("sources", [], ("no samples",)),
    ("sources", Stateful(), ("iterating again",)),
    ("templates", FewParameters(), ("render(turns)", "render(turns, tokenizer, *, generate=False)")),
    ("templates", ChangingIdentity(), ("identity()", "differs")),
    ("templates", StringAsStop(), ("stop()", "str")),
    ("templates", TemplateOf(change=str.lower), ("changed",)),
    ("templates", TemplateOf(target="user"), ("not target text",)),
    ("templates", TemplateOf(end="\n"), ("ends generation",)),
    ("templates", TemplateOf(images=0), ("0 image slots for 1 images",)),
    ("templates", TemplateOf(prompt="Answer:"), ("Answer:", "precede")),
    ("teachers", TeacherOf(None), ("reply()", "None")),
    ("teachers", TeacherOf("  "), ("empty",)),
    ("teachers", PaidTeacher("yes"), ("depends on the id",)),
    ("teachers", ExactTeacherOf("no question"), ("-conversation: ",)),
    ("tasks", OddScores(), ("score()", "dict", "Scores")),
    ("formats", FormatOf(), ("read() writes no model folder",)),
    ("formats", ReloadsNothing(), ("reload", "script.py")),
    ("formats", RecognisesAll(), ("recognise()", "an empty folder")),
    ("formats", ChangesModel(), ("changes the model's folder",)),
    ("optimizers", RuleOf(scope="row"), ("scope = 'row'",)),
    ("optimizers", RuleOf(moments=("exp_avg",)), ("exp_avg_sq", "moments")),
    ("optimizers", RuleOf(selects=lambda weight: False), ("every kind",)),
    ("optimizers", RuleOf(build=lambda groups: None), ("None", "Optimizer")),
    ("optimizers", RuleOf(build=lambda groups: torch.optim.SGD(groups, lr=0.0, momentum=0.9)), ("momentum_buffer",)),
    ("optimizers", Normalized("weight", "all"), ("scope is weight", "other weights")),
    ("optimizers", Normalized("element", "weight"), ("scope is element", "rest of it")),
    ("schedules", ScheduleOf("1"), ("fraction(0, 1)", "'1'")),
    ("schedules", ScheduleOf(-1.0), ("-1.0", "at least 0")),
    ("schedules", ScheduleOf(0.0), ("0 in every step",)),
    ("schedules", ScheduleOf(1.0, 0.5), ("earlier calls",)),
]


def test_every_kind_has_a_check() -> None:
    assert CHECKS.keys() == KINDS.keys() == CAPABILITIES.keys()
    assert {kind for kind, component, _ in FAULTS if component is None} == set(KINDS)


@pytest.mark.parametrize(
    ("kind", "component", "parts"), FAULTS, ids=[f"{kind}-{type(each).__name__}" for kind, each, _ in FAULTS]
)
def test_a_fault_is_one_line(kind: str, component: Any, parts: Sequence[str]) -> None:
    problems = CHECKS[kind](component)
    assert any(all(part in problem for part in parts) for problem in problems), problems
    assert all(len(problem.splitlines()) == 1 for problem in problems)


@pytest.mark.parametrize(
    ("kind", "component"),
    [
        ("templates", TemplateOf()),
        ("teachers", TeacherOf("A dog.")),
        ("connectors", NeedsClass()),
        ("schedules", ScheduleOf(np.float32(0.5))),
        ("optimizers", RuleOf()),
        ("optimizers", Normalized("weight", "weight")),
        ("optimizers", Normalized("all", "all")),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_components_without_faults(kind: str, component: Any) -> None:
    assert CHECKS[kind](component) == []
