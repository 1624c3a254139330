"""``recipes check`` reports components that don't fit together, with the line of the key."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import llavactl
from llavactl.core.registry import Registration, registry
from llavactl.core.schema import FeatureShape
from llavactl.testing import run_cli


class Wide:
    """A connector whose embeddings are wider than the language model's."""

    def __init__(self, options: Any) -> None:
        pass

    def tokens(self, shape: FeatureShape) -> int:
        return shape.patches

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        return nn.Linear(shape.width, language_width + 1)


class Raising(Wide):
    """A connector with a bug."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        raise KeyError("depth")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "preflight_of_a_test", sys.modules[__name__])
    for name in ("Wide", "Raising"):
        entry = Registration("connectors", name.lower(), f"preflight_of_a_test:{name}", None, "", "otherplugin")
        monkeypatch.setitem(registry().entries["connectors"], name.lower(), entry)


def problems(toy: Path, *overrides: str) -> list[dict[str, str]]:
    options = [part for each in overrides for part in ("-o", each)]
    done = run_cli("recipes", "check", "recipe.yaml", *options, "--json", cwd=toy)
    found: list[dict[str, str]] = done.json()["problems"]
    assert done.exit_code == (1 if found else 0)
    assert done.json()["ok"] is not found
    return found


@pytest.mark.parametrize("section", ["vision", "language"])
def test_a_missing_model_of_an_override_names_the_override(toy: Path, section: str) -> None:
    override = f"{section}.model=./none"
    assert {each["where"] for each in problems(toy, override)} == {f"-o {override}"}


def test_a_valid_recipe_has_no_problems(toy: Path) -> None:
    assert problems(toy) == []


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("stage1.box_alignment_steps=3", "stage1.box_alignment_steps"),  # needs square images
        ("stage2.epocs=2", "stage2.epocs"),
        pytest.param("stage1.template=unknown", "stage1.template", marks=pytest.mark.slow),
        ("data.stage1=[{name: unknown}]", "data.stage1.0.name"),
        pytest.param("extra=1", "extra", marks=pytest.mark.slow),
    ],
)
def test_a_problem_of_another_section_does_not_hide_those_of_components(toy: Path, override: str, key: str) -> None:
    connector = "connector={name: cell-words, cell: 2, words: 2, hidden: 16}"
    assert problems(toy, connector) == []
    found = problems(toy, connector, "vision.select=cls-patch", override)
    assert {each["key"] for each in found} == {"connector", key}
    assert all(each["where"].startswith("-o") for each in found)


def test_components_with_invalid_options_are_not_checked_with_others(toy: Path) -> None:
    assert [each["key"] for each in problems(toy, "vision.lyer=1", "connector={name: wide}")] == ["vision.lyer"]


@pytest.mark.parametrize(
    ("override", "key", "term"),
    [
        ("connector={name: wide}", "connector", "otherplugin"),
        ("connector={name: raising}", "connector", "otherplugin"),
        ("connector.pixel_shuffle=3", "connector", "pixel_shuffle"),
        ("stage2.trainable_modules=[self_atn]", "stage2.trainable_modules", "self_atn"),
        ("vision.layer=9", "vision", "layer"),
    ],
)
def test_components_that_do_not_fit_together(toy: Path, override: str, key: str, term: str) -> None:
    (found,) = problems(toy, override)
    assert found["key"] == key
    assert term in found["why"]
    assert found["where"].startswith(("-o", "recipe.yaml:"))
    done = run_cli("run", "-r", "recipe.yaml", "-o", override, cwd=toy)
    assert done.exit_code == 1
    assert term in done.stderr
    assert not (toy / "runs").exists(), "before any work"


@pytest.mark.parametrize("kind", ["vision", "languages"])
def test_what_the_check_of_a_component_finds_is_a_problem(
    kind: str, toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(_self: Any) -> None:
        raise llavactl.ModelError("the weights are in another folder")

    name = "clip" if kind == "vision" else "hf"
    monkeypatch.setattr(registry().get(kind, name).load(), "check", check, raising=False)
    (found,) = problems(toy)
    assert (found["key"], found["why"]) == (kind.removesuffix("s"), "the weights are in another folder")


def test_run_lists_each_problem_on_its_own_line(toy: Path) -> None:
    overrides = ("connector.pixel_shuffle=3", "stage2.trainable_modules=[self_atn]")
    keys = [each["key"] for each in problems(toy, *overrides)]
    assert len(keys) == 2
    done = run_cli("run", "-r", "recipe.yaml", *(part for each in overrides for part in ("-o", each)), cwd=toy)
    *errors, hint = done.stderr.splitlines()
    assert [key in line for key, line in zip(keys, errors, strict=True)] == [True, True]
    assert "recipes check" in hint
    with pytest.raises(llavactl.RecipeError) as raised:
        llavactl.run(llavactl.load_recipe(toy / "recipe.yaml", overrides))
    assert [each.key for each in raised.value.problems] == keys


@pytest.mark.parametrize(
    ("export", "override"),
    [
        ("llava, strict: true", "connector={name: mlp2x-gelu, norm: true}"),
        ("hf", "connector={name: mlp2x-gelu, norm: true}"),
        ("llava", "vision.layer=[-2,-3]"),
        ("llava", "language.model=./qwen"),
        ("hf", "language.model=./phi"),
    ],
)
def test_unsupported_exports_are_reported_before_training(toy: Path, export: str, override: str) -> None:
    from ..components.formats.families import language_of

    for kind in ("qwen2", "phi"):
        language_of(kind, toy / "language", toy / kind.rstrip("2"))
    exports = f"export=[{{format: hf, to: a}}, {{format: {export}, to: b}}]"
    found = [each["key"] for each in problems(toy, exports, override)]
    assert "export.1.format" in found
    assert set(found) <= {"export.0.format", "export.1.format"}
    done = run_cli("run", "-r", "recipe.yaml", "-o", exports, "-o", override, cwd=toy)
    assert done.exit_code == 1
    assert not (toy / "runs").exists(), "before any work"


def test_supported_exports(toy: Path) -> None:
    exports = "export=[{format: hf, to: a}, {format: llava, to: b}, {format: llava, to: c, strict: false}]"
    assert problems(toy, exports) == []


def test_a_template_with_tokens_that_the_tokenizer_lacks(toy: Path) -> None:
    file = toy / "language" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("<|im_start|>", "<|other|>"), encoding="utf-8")
    config = toy / "language" / "tokenizer_config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("<|im_start|>", "<|other|>"), encoding="utf-8")
    (found,) = problems(toy, "language.template=chatml")
    assert (found["key"], "<|im_start|>" in found["why"]) == ("language.template", True)


def test_trainable_modules_need_full_fine_tuning(toy: Path) -> None:
    (found,) = problems(toy, "stage2.trainable_modules=[self_attn]", "stage2.method=lora")
    assert found["key"].startswith("stage2")


@pytest.mark.parametrize("kind", ["convnext", "swin", "siglip2_vision_model", "internvl_vision"])
def test_encoders_that_are_no_plain_vision_transformers_are_refused(toy: Path, kind: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind)
    (toy / "other").mkdir()
    (toy / "other" / "config.json").write_text(
        json.dumps(config.to_diff_dict() | {"model_type": kind}), encoding="utf-8"
    )
    found = problems(toy, "vision.model=./other")
    assert [each["key"] for each in found] == ["vision"]
    assert "other" in found[0]["why"]
    assert "fails" not in found[0]["why"], "an unsupported model, not a bug"


def test_a_model_that_is_not_local_is_not_checked(toy: Path) -> None:
    assert problems(toy, "vision.model=nobody/has-this", "language.model=nobody/has-this") == []
