"""Commands that call a verb: the arguments they pass, when they need a recipe, the output they print."""

from __future__ import annotations

import importlib
import json
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, create_autospec

import click
import pytest

from llavactl.chat.conversation import AnswerStream
from llavactl.core import plugin_commands
from llavactl.core.options import Located
from llavactl.model.generate import GREEDY, Sampling
from llavactl.testing import run_cli

SMALL = """\
name: small
vision: {name: clip, model: a/b}
connector: {name: linear}
language: {name: hf, model: c/d}
"""


@dataclass(frozen=True)
class Report:
    name: str = "x"
    where: Path = Path("/somewhere")
    loss: float = 0.5
    steps: tuple[int, ...] = (1, 2)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replaces ``llavactl.verbs.<module>.<name>`` by a mock with its signature."""

    def replace_(module: str, name: str, answer: Any) -> MagicMock:
        real = importlib.import_module(f"llavactl.verbs.{module}")
        mock: MagicMock = create_autospec(getattr(real, name), return_value=answer)
        monkeypatch.setattr(real, name, mock)
        return mock

    return replace_


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder


@pytest.fixture
def here(empty: Path) -> Path:
    (empty / "recipe.yaml").write_text(SMALL)
    return empty


def test_a_report_is_yaml_or_json(verb: Any, here: Path) -> None:
    verb("train", "train", Report())
    train = ("train", "--stage", "1")
    assert run_cli(*train, cwd=here).stdout == "name: x\nwhere: /somewhere\nloss: 0.5\nsteps:\n- 1\n- 2\n"
    document = run_cli(*train, "--json", cwd=here).json()
    assert document == {"name": "x", "where": "/somewhere", "loss": 0.5, "steps": [1, 2]}


EXTRACTED: dict[str, Any] = {
    "images": 1200, "unique": 1100, "stored_before": 100, "to_encode": 1000, "skipped": 0, "free_bytes": 5 * 10**9,
    "device": "cpu", "bytes": 2_500_000, "seconds": 95.0, "images_per_s": 20.5,
}  # fmt: skip


@pytest.mark.parametrize("dry_run", [True, False])
def test_extract_prints_counts_disk_and_time(verb: Any, here: Path, dry_run: bool) -> None:
    from llavactl.verbs.extract import ExtractReport, StoreReport

    stores = tuple(
        StoreReport("f", f"/store/{stage}", image, (stage,), 600, 550, 50, 500)
        for stage, image in ((1, "square"), (2, "pad"))
    )
    report = ExtractReport(**EXTRACTED, stores=stores, dry_run=dry_run)
    finished = replace(report, encoded=998, skipped=2, skipped_file="/run/skipped.jsonl")
    mock = verb("extract", "extract", replace(report, estimated_seconds=48.8) if dry_run else finished)
    arguments = ("extract", *(["--dry-run"] if dry_run else []))
    lines = [line.split(maxsplit=1) for line in run_cli(*arguments, cwd=here).stdout.splitlines()]
    shown = {label: text for label, text in lines if label != "store"}
    assert shown["images"] == "1,200, 1,100 distinct"
    if dry_run:
        assert "1,000" in shown["to"]
        assert shown["disk"] == "2.5 MB of 5.0 GB free"
        assert shown["time"].startswith("49 s")
    else:
        assert "998" in shown["encoded"]
        assert "/run/skipped.jsonl" in shown["skipped"]
        assert shown["time"].startswith("1 min 35 s")
    assert [text.split()[0] for label, text in lines if label == "store"] == ["/store/1", "/store/2"]
    assert not any("_" in label for label, _ in lines)
    assert run_cli(*arguments, "--json", cwd=here).json() == json.loads(json.dumps(asdict(mock.return_value)))


def test_run_prints_scores_an_example_and_a_chat_command(verb: Any, here: Path) -> None:
    from llavactl.evaluation.results import EvalReport
    from llavactl.verbs.run import RunReport

    scores = {"accuracy": 81.25, "chance": {"accuracy": 25.0}, "by kind": {"colour": 90.0, "count": 72.5}}
    scored = EvalReport("scenes", "exact", "m", 16, scores, 1)
    example = {"question": "What?", "answer": "red", "reference": "red", "file": "a b.png"}
    made: dict[str, Any] = dict.fromkeys(field.name for field in fields(RunReport))
    made |= {"name": "small", "run_dir": "runs/small", "model": "m", "report": "r.html"}
    verb("run", "run", RunReport(**made | {"eval": (scored,), "export": (), "example": example}))
    shown = run_cli("run", cwd=here).stdout.splitlines()
    assert shown[0] == "small in runs/small"
    assert any(line.split()[:4] == ["eval", "scenes,", "16", "questions,"] for line in shown)
    assert any("accuracy" in line and "81.2" in line and "chance 25.0" in line for line in shown)
    assert any("colour 90.0  count 72.5" in line for line in shown)
    assert shown[-1].endswith("llavactl chat --model m --image 'a b.png'")
    assert run_cli("run", "--json", cwd=here).json()["eval"][0]["scores"] == scores


@pytest.mark.parametrize("command", [["run"], ["extract"], ["train", "--stage", "1"], ["chat"], ["eval", "scenes"]])
def test_without_a_recipe_the_hint_lists_recipes(command: list[str], empty: Path) -> None:
    result = run_cli(*command, cwd=empty)
    assert (result.exit_code, result.stdout) == (1, "")
    assert "recipe.yaml" in result.stderr.splitlines()[0]
    assert "llava-v1-7b" in result.stderr


def test_the_recipe_is_loaded_with_its_overrides(verb: Any, here: Path) -> None:
    extract = verb("extract", "extract", Report())
    run_cli("extract", "-o", "seed=3", "-o", "stage1.epochs=2", cwd=here)
    (recipe,) = extract.call_args.args
    assert (recipe.seed, recipe.stage1.epochs) == (3, 2)


def test_extract(verb: Any, here: Path) -> None:
    extract = verb("extract", "extract", Report())
    run_cli("extract", cwd=here)
    assert extract.call_args.kwargs == {"dry_run": False, "max_skipped": None, "part": None}
    run_cli("extract", "--dry-run", "--max-skipped", "0", cwd=here)
    assert extract.call_args.kwargs == {"dry_run": True, "max_skipped": 0, "part": None}
    assert run_cli("extract", "--max-skipped", "-1", cwd=here).exit_code == 2


def test_train(verb: Any, here: Path) -> None:
    train = verb("train", "train", Report())
    run_cli("train", "--stage", "2", cwd=here)
    assert train.call_args.args[1:] == (2, "auto")
    run_cli("train", "--stage", "1", "--resume", "never", cwd=here)
    assert train.call_args.args[1:] == (1, "never")
    assert run_cli("train", "--stage", "3", cwd=here).exit_code == 2
    assert run_cli("train", cwd=here).exit_code == 2


class TestEval:
    def test_options(self, verb: Any, here: Path) -> None:
        evaluate = verb("evaluate", "evaluate", Report())
        run_cli("eval", "scenes", "-t", "a=1", "-t", "reviews=x", "-t", "reviews=y=z", "--protocol", "exact", cwd=here)
        recipe, task, options = evaluate.call_args.args
        assert (recipe.name, task) == ("small", "scenes")
        assert options == {"a": "1", "reviews": ["x", "y=z"]}
        assert isinstance(options["a"], Located)
        assert options["a"].base == here
        others = dict.fromkeys(("answers", "model", "limit", "cases"))
        assert evaluate.call_args.kwargs == {**others, "protocol": "exact"}

    @pytest.mark.parametrize("option", ["a", "=1"])
    def test_an_option_is_key_and_value(self, option: str, here: Path) -> None:
        result = run_cli("eval", "scenes", "-t", option, cwd=here)
        assert result.exit_code == 2
        assert "KEY=VALUE" in result.stderr

    @pytest.mark.parametrize("alone", [["--answers", "a.jsonl"], ["--model", "m"], ["-t", "reviews=r.jsonl"]])
    def test_options_that_make_the_recipe_optional(self, verb: Any, alone: list[str], empty: Path) -> None:
        evaluate = verb("evaluate", "evaluate", Report())
        assert run_cli("eval", "scenes", *alone, cwd=empty).exit_code == 0
        assert evaluate.call_args.args[0] is None

    def test_stored_answers_are_scored_with_recipe_yaml(self, verb: Any, here: Path) -> None:
        evaluate = verb("evaluate", "evaluate", Report())
        run_cli("eval", "scenes", "--answers", "a.jsonl", cwd=here)
        assert evaluate.call_args.args[0].name == "small"
        assert evaluate.call_args.kwargs["answers"] == Path("a.jsonl")

    def test_another_model_is_not_the_recipes(self, verb: Any, here: Path) -> None:
        evaluate = verb("evaluate", "evaluate", Report())
        run_cli("eval", "scenes", "--model", "m", cwd=here)
        assert evaluate.call_args.args[0] is None
        run_cli("eval", "scenes", "--model", "m", "-r", "recipe.yaml", cwd=here)
        assert evaluate.call_args.args[0].name == "small"


@dataclass(frozen=True)
class Verified(Report):
    sound: bool = True
    damaged: tuple[str, ...] = ()
    unchecked: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pruned:
    stores: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    bytes: int = 0
    dry_run: bool = False


class TestCache:
    def test_without_a_recipe_it_applies_to_all_stores(self, verb: Any, here: Path) -> None:
        info = verb("cache", "info", Report())
        assert run_cli("cache", "info", cwd=here).exit_code == 0
        assert info.call_args.args == (None,)
        run_cli("cache", "info", "-r", "recipe.yaml", cwd=here)
        assert info.call_args.args[0].name == "small"

    def test_verify_exits_1_when_something_is_damaged(self, verb: Any, empty: Path) -> None:
        verify = verb("cache", "verify", Verified())
        assert run_cli("cache", "verify", cwd=empty).exit_code == 0
        verify.return_value = Verified(sound=False, damaged=("a.h5",))
        result = run_cli("cache", "verify", "--json", cwd=empty)
        assert result.exit_code == 1
        assert result.json()["damaged"] == ["a.h5"]
        error, hint = result.stderr.splitlines()
        assert "1 damaged" in error
        assert "`llavactl extract`" in hint

    def prune(self, verb: Any, found: Pruned) -> MagicMock:
        mock: MagicMock = verb("cache", "prune", None)
        mock.side_effect = lambda *recipes, dry_run=False: replace(found, dry_run=dry_run)
        return mock

    def test_prune_needs_no_confirmation_to_remove_nothing(self, verb: Any, empty: Path) -> None:
        self.prune(verb, Pruned())
        result = run_cli("cache", "prune", "--json", cwd=empty)
        assert (result.exit_code, result.json()["dry_run"]) == (0, False)

    def test_prune_without_a_terminal_needs_a_flag(self, verb: Any, empty: Path) -> None:
        prune = self.prune(verb, Pruned(stores=("s",)))
        result = run_cli("cache", "prune", cwd=empty)
        assert (result.exit_code, result.stdout) == (2, "")
        assert all(call.kwargs == {"dry_run": True} for call in prune.call_args_list)
        assert run_cli("cache", "prune", "--dry-run", "--json", cwd=empty).json()["dry_run"] is True
        assert run_cli("cache", "prune", "--yes", "--json", cwd=empty).json()["dry_run"] is False

    @pytest.mark.parametrize(("answer", "code"), [(True, 0), (False, 1)])
    def test_prune_asks_for_confirmation(
        self, verb: Any, empty: Path, answer: bool, code: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prune = self.prune(verb, Pruned(stores=("s",), bytes=2_000_000_000))
        questions = []
        terminal = SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
        monkeypatch.setattr("llavactl.cli.cache.sys", terminal)
        monkeypatch.setattr("llavactl.cli.cache.confirm", lambda question: questions.append(question) or answer)
        assert run_cli("cache", "prune", cwd=empty).exit_code == code
        (question,) = questions
        assert "1 stores" in question
        assert "2.0 GB" in question
        assert any(call.kwargs == {} for call in prune.call_args_list) == answer

    def test_prune_keeps_the_stores_of_all_named_recipes(self, verb: Any, here: Path) -> None:
        prune = self.prune(verb, Pruned())
        run_cli("cache", "prune", "llava-v1-7b", "llava-v1.5-7b", "-r", "recipe.yaml", cwd=here)
        assert [recipe.name for recipe in prune.call_args.args] == ["small", "llava-v1-7b", "llava-v1.5-7b"]


class Talker:
    """A conversation that repeats the prompt."""

    assistant = SimpleNamespace(name="m", sampling=GREEDY)
    system = ""

    def ask(self, *content: Any, sampling: Any) -> AnswerStream:
        self.sampling = sampling
        return AnswerStream(piece for piece in (f" {len(content) // 2} images, ", str(content[-1]), "\n"))


class TestChat:
    @pytest.fixture
    def opened(self, verb: Any) -> MagicMock:
        mock: MagicMock = verb("chat", "open_chat", Talker())
        return mock

    @pytest.mark.parametrize(
        "arguments",
        [["--json"], ["--batch", "b", "--prompt", "p"], ["--batch", "b", "--image", "i"], ["--max-new-tokens", "0"]],
    )
    def test_what_does_not_go_together(self, arguments: list[str], here: Path) -> None:
        result = run_cli("chat", *arguments, cwd=here)
        assert (result.exit_code, result.stdout) == (2, "")

    def test_one_answer(self, opened: MagicMock, toys: Path, here: Path) -> None:
        photo = str(toys / "images/photo-000.jpg")
        result = run_cli("chat", "--prompt", "hello", "--image", photo, "--image", photo, cwd=here)
        assert result.stdout == "2 images, hello\n"
        assert opened.call_args.args[0].name == "small"

    def test_one_answer_as_json(self, opened: MagicMock, here: Path) -> None:
        answered = run_cli("chat", "--prompt", "hello", "--json", cwd=here).json()
        assert answered == {"answer": "0 images, hello", "prompt": "hello", "images": [], "model": "m"}

    def test_a_model_needs_no_recipe(self, opened: MagicMock, empty: Path) -> None:
        assert run_cli("chat", "--model", "m", "--prompt", "x", cwd=empty).exit_code == 0
        assert opened.call_args.args == (None, "m", None)

    def test_a_missing_image_is_told_before_the_model_is_read(self, opened: MagicMock, here: Path) -> None:
        result = run_cli("chat", "--prompt", "x", "--image", "none.jpg", cwd=here)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: image none.jpg: ")
        opened.assert_not_called()

    def test_a_batch(self, opened: MagicMock, verb: Any, here: Path) -> None:
        (here / "b.jsonl").write_text('{"prompt": "p"}\n', encoding="utf-8")
        answers = [{"image": "i", "prompt": "p", "answer": "ä"}] * 2
        batch = verb("chat", "answer_batch", answers)
        result = run_cli("chat", "--batch", "b.jsonl", "--max-new-tokens", "7", cwd=here)
        assert [json.loads(line) for line in result.stdout.splitlines()] == answers
        assert batch.call_args.args[1] == [({"prompt": "p"}, ("p",))]
        assert batch.call_args.args[2].max_new_tokens == 7
        assert run_cli("chat", "--batch", "b.jsonl", "--json", cwd=here).json() == answers

    def test_a_wrong_record_is_told_before_the_model_is_read(self, opened: MagicMock, here: Path) -> None:
        lines = '{"prompt": "p"}\n{"image": "none.jpg", "prompt": "p"}\n'
        (here / "b.jsonl").write_text(lines, encoding="utf-8")
        result = run_cli("chat", "--batch", "b.jsonl", cwd=here)
        assert result.exit_code == 1
        assert result.stderr.startswith("error: b.jsonl:2: image none.jpg: ")
        opened.assert_not_called()

    def test_sampling_defaults_to_that_of_the_model(self, verb: Any, here: Path) -> None:
        talker = Talker()
        verb("chat", "open_chat", talker)
        for options, expected in (
            ("", GREEDY),
            ("--temperature 0.5 --seed 3", Sampling(temperature=0.5, seed=3)),
            ("--top-p 0.9 --max-new-tokens 7", Sampling(7, top_p=0.9)),
        ):
            assert run_cli("chat", "--prompt", "x", *options.split(), cwd=here).exit_code == 0
            assert talker.sampling == expected

    @pytest.mark.parametrize("option", ["--temperature=nan", "--top-p=nan", f"--seed={2**63}"])
    def test_invalid_sampling_is_found_before_the_model_is_read(
        self, option: str, opened: MagicMock, here: Path
    ) -> None:
        assert run_cli("chat", "--prompt", "x", option, cwd=here).exit_code == 1
        opened.assert_not_called()

    def test_a_prompt_from_stdin(self, opened: MagicMock, here: Path) -> None:
        assert run_cli("chat", "--prompt", "-", cwd=here, stdin="a\nb\n").stdout == "0 images, a\nb\n"
        assert run_cli("chat", "--prompt", "-", cwd=here, stdin=" \n").exit_code == 2

    def test_the_system_prompt(self, verb: Any, here: Path) -> None:
        talker = Talker()
        verb("chat", "open_chat", talker)
        assert run_cli("chat", "--prompt", "x", "--system", "Be brief.", cwd=here).exit_code == 0
        assert talker.system == "Be brief."

    def test_code_is_saved(self, opened: MagicMock, here: Path) -> None:
        result = run_cli("chat", "--prompt", "\n```html\n<p>\n```", "--save-code", "pages", cwd=here)
        assert (here / "pages/index.html").read_text() == "<p>\n"
        assert "pages/index.html" in result.stderr

    def test_saved_code_replaces_files_only_if_told(self, opened: MagicMock, here: Path) -> None:
        for number, options in enumerate(((), (), ("--force",))):
            prompt = f"\n```html\n{number}\n```"
            run_cli("chat", "--prompt", prompt, "--save-code", "pages", *options, cwd=here)
        texts = {file.name: file.read_text() for file in (here / "pages").iterdir()}
        assert texts == {"index.html": "2\n", "index-2.html": "1\n"}
        assert run_cli("chat", "--prompt", "x", "--force", cwd=here).exit_code == 2

    def test_the_browser_needs_a_plugin(self, opened: MagicMock, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        called: list[Any] = []

        @click.command()
        @click.option("-r", "source")
        @click.option("--model")
        @click.option("-o", "overrides", multiple=True)
        @click.option("--template")
        def web(**options: Any) -> None:
            called.append(options)

        monkeypatch.setattr(importlib.import_module("llavactl.cli.root"), "_from_plugin", lambda _name: web)
        monkeypatch.setattr(plugin_commands, "commands", dict)
        result = run_cli("chat", "--web", cwd=here)
        assert (result.exit_code, result.stdout) == (1, "")
        monkeypatch.setattr(plugin_commands, "commands", lambda: {"web": ""})
        result = run_cli("chat", "--web", "-o", "a=1", "-o", "b=2", "--template", "t", "--model", "m", cwd=here)
        assert result.exit_code == 0
        assert called == [{"source": None, "model": "m", "overrides": ("a=1", "b=2"), "template": "t"}]
        assert run_cli("chat", "--web", "--seed", "3", cwd=here).exit_code == 2
        opened.assert_not_called()
