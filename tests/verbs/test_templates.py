"""Templates in commands and recipes: refused records, arguments and the date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from llavactl.core.errors import RecipeError
from llavactl.recipe.load import dump, load_recipe
from llavactl.recipe.schema import schema
from llavactl.testing import run_cli

ONE_TURN = "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}"
DATED = "{{ strftime_now('%Y-%m-%d') }}"
OWN = ["-o", "language.template=tokenizer"]
SCRATCH = [*OWN, "-o", "stage2.init=scratch", "-o", "stage2.epochs=1", "-o", "features.mode=live"]


def chat_template(toy: Path, before: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(toy / "language")
    tokenizer.chat_template = before + tokenizer.chat_template
    tokenizer.save_pretrained(toy / "language")


def cut_to_one_turn_except_the_last(toy: Path) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((toy / "records.json").read_text())
    for each in records[:-1]:
        each["conversations"] = each["conversations"][:2]
    (toy / "records.json").write_text(json.dumps(records))
    return records


def test_refused_records_are_listed_and_left_out(toy: Path) -> None:
    chat_template(toy, ONE_TURN)
    last = cut_to_one_turn_except_the_last(toy)[-1]["id"]
    checked = run_cli("data", "check", "--stage", "2", "--json", *OWN, cwd=toy)
    assert checked.exit_code == 1
    (found,) = checked.json()["problems"]
    assert (found["problem"], found["effect"], found["count"]) == ("template", "lost", 1)
    assert "one turn only" in found["locations"][0]
    shown = run_cli("data", "show", "--sample", last, "--json", *OWN, cwd=toy).json()["shown"][0]
    assert "one turn only" in shown["left_out"]
    assert (shown["tokens"], shown["pieces"]) == (0, [])
    assert run_cli("data", "stats", "--stage", "2", "--json", *OWN, cwd=toy).json()["measures"]["tokens"]["n"] == 11
    trained = run_cli("train", "--stage", "2", "--json", *SCRATCH, cwd=toy)
    assert trained.exit_code == 0, trained.stderr
    assert trained.json()["skipped_samples"] == 1
    (line,) = (toy / "runs/toy/stage2/left_out.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == last
    assert "one turn only" in json.loads(line)["reason"]


def test_a_template_that_refuses_all_records_stops_the_run(toy: Path) -> None:
    chat_template(toy, "{{ raise_exception('never') }}")
    result = run_cli("train", "--stage", "2", *SCRATCH, cwd=toy)
    assert result.exit_code == 1
    assert "never" in result.stderr
    assert "chatml" in result.stderr
    assert not list((toy / "runs").rglob("metrics.jsonl"))


@pytest.mark.slow
def test_date_and_arguments_are_stored_and_used_by_chat_and_exports(toy: Path) -> None:
    chat_template(toy, DATED + "{{ tone | default('') }}")
    spec = ["-o", "stage2.template={name: tokenizer, date: 2025-03-04, tone: kind}"]
    trained = run_cli("train", "--stage", "2", *SCRATCH, *spec, cwd=toy)
    assert trained.exit_code == 0, trained.stderr
    assert "2025-03-04" in trained.stderr
    model = toy / "runs/toy/stage2/model"
    stored = json.loads((model / "llavactl.json").read_text())["template"]
    assert stored == {"name": "tokenizer", "date": "2025-03-04", "tone": "kind"}
    photo = ["--image", str(toy / "images/photo-000.jpg"), "--prompt", "What?", "--max-new-tokens", "6", "--json"]
    chat = run_cli("chat", "--model", str(model), *photo, cwd=toy)
    assert chat.exit_code == 0, chat.stderr
    for form in ("hf", "llava"):
        done = run_cli("export", "--model", str(model), "--format", form, "--to", str(toy / form), cwd=toy)
        assert done.exit_code == 0, done.stderr
        jinja = (toy / form / "chat_template.jinja").read_text()
        own = AutoTokenizer.from_pretrained(toy / form)
        own.chat_template = jinja
        text = own.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert text.startswith("2025-03-04kind<|im_start|>user")
        again = run_cli("chat", "--model", str(toy / form), *photo, cwd=toy)
        assert again.json()["answer"] == chat.json()["answer"]


class TestRecipe:
    def test_a_template_with_options_gets_its_defaults(self, toy: Path) -> None:
        recipe = load_recipe(toy / "recipe.yaml", ["language.template=tokenizer", "stage1.template=plain"])
        assert recipe.stage(2).template == {"name": "tokenizer", "date": "2024-07-26"}
        assert recipe.stage(1).template == "plain"
        (toy / "again.yaml").write_text(dump(recipe))
        assert load_recipe(toy / "again.yaml") == recipe

    @pytest.mark.parametrize(
        ("template", "key"),
        [
            ("{name: nope}", "language.template.name"),
            ("{name: tokenizer, date: soon}", "language.template.date"),
            ("{name: tokenizer, messages: 1}", "language.template"),
            ("{name: vicuna-v1, date: 2025-01-01}", "language.template.date"),
            ("{think: false}", "language.template.name"),
            ("3", "language.template"),
        ],
    )
    def test_a_problem_of_a_template_names_its_key(self, toy: Path, template: str, key: str) -> None:
        with pytest.raises(RecipeError) as raised:
            load_recipe(toy / "recipe.yaml", [f"language.template={template}"])
        assert key in {problem.key for problem in raised.value.problems}

    def test_the_json_schema_has_options_of_templates(self) -> None:
        by_title = {entry.get("title"): entry for entry in schema()["$defs"]["TemplateSpec"]["oneOf"]}
        assert "date" in by_title["tokenizer"]["properties"]
        assert by_title["tokenizer"]["additionalProperties"] is not False
        assert by_title["vicuna-v1"]["additionalProperties"] is False
