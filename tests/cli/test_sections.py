"""Commands require only the sections of a recipe that they need."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavactl.testing import run_cli, toy_recipe

SECTIONS = {
    "vision": "vision: {name: clip, model: clip}",
    "data": "data: {stage1: [{name: llava-json, path: records.json, images: images/}]}",
    "generate": "generate: {kinds: {conversation: 1}, source: {name: scenes, scenes: 2, content: captions}, "
    "teacher: {name: rules}, out: made.jsonl}",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = toy_recipe(tmp_path_factory.mktemp("trained"), photos=4)
    done = run_cli("train", "--stage", "1", "-r", str(recipe), "-o", "features.mode=live", "-o", "stage1.max_steps=1")
    assert done.exit_code == 0, done.stderr
    return recipe.parent


def run(folder: Path, sections: str, command: str) -> tuple[int, str]:
    recipe = folder / "part.yaml"
    recipe.write_text("\n".join(["name: toy", *(SECTIONS[name] for name in sections.split())]))
    done = run_cli(*command.split(), "-r", str(recipe), cwd=folder)
    return done.exit_code, done.stderr


@pytest.mark.parametrize(
    ("sections", "command"),
    [
        ("generate", "data generate"),
        ("data", "data check"),
        ("data", "data stats"),
        ("vision data", "extract"),
        ("vision data", "cache info"),
        ("vision data", "cache verify"),
        ("vision data", "cache prune --dry-run"),
        ("", "chat --prompt What?"),
        ("", "eval scenes -t scenes=2 --limit 2"),
        ("", "export --format hf --to out --no-verify"),
    ],
)
def test_sufficient_sections(trained: Path, sections: str, command: str) -> None:
    code, stderr = run(trained, sections, command)
    assert code == 0, stderr


@pytest.mark.parametrize(
    ("sections", "command", "missing"),
    [
        ("data", "extract", "vision"),
        ("data", "cache info", "vision"),
        ("vision data", "train --stage 1", "connector"),
        ("vision data", "train --stage 1", "language"),
        ("", "data generate", "generate"),
    ],
)
def test_a_missing_section_is_named(trained: Path, sections: str, command: str, missing: str) -> None:
    code, stderr = run(trained, sections, command)
    assert code == 1
    assert missing in stderr
    assert "Traceback" not in stderr
