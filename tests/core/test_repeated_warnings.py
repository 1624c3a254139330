"""A command prints each warning once, however many of its steps cause it."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
import yaml

from llavactl.core.repeated_warnings import without_repeated_warnings
from llavactl.testing import run_cli


def test_only_a_warning_with_the_same_text_is_a_repetition() -> None:
    is_new = without_repeated_warnings()

    def printed(level: int, text: str, *arguments: object) -> bool:
        return is_new(logging.LogRecord("llavactl", level, "", 0, text, arguments, None))

    assert printed(logging.WARNING, "skipped %d images", 2)
    assert not printed(logging.WARNING, "skipped %s images", "2"), "the same text"
    assert printed(logging.WARNING, "skipped %d images", 3)
    assert all(printed(logging.INFO, "finished") for _ in range(2))
    assert all(printed(logging.ERROR, "failed") for _ in range(2))
    assert without_repeated_warnings()(logging.LogRecord("x", logging.WARNING, "", 0, "skipped 2 images", (), None)), (
        "the next command prints it again"
    )


@pytest.fixture
def untidy(toy: Path) -> Path:
    """A folder of images with a caption for each but one, a caption without an image, and one in Windows-1252."""
    images = sorted((toy / "images").glob("*.jpg"))
    for image in images[1:]:
        image.with_suffix(".txt").write_text("A photo.")
    images[1].with_suffix(".txt").write_bytes("A café.".encode("cp1252"))
    (toy / "images" / "orphan.txt").write_text("Nothing.")
    recipe = yaml.safe_load((toy / "recipe.yaml").read_text())
    recipe["data"] = {stage: [{"name": "image-folder", "path": "images"}] for stage in ("stage1", "stage2")}
    (toy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return toy


@pytest.mark.parametrize(
    "command", [("extract", "--dry-run"), ("run", "-o", "stage1.max_steps=1", "-o", "stage2.max_steps=1")]
)
def test_steps_that_read_the_same_data_do_not_repeat_its_warnings(untidy: Path, command: tuple[str, ...]) -> None:
    for _ in range(2):
        done = run_cli(*command, "-q", cwd=untidy)
        assert done.exit_code == 0, done.stderr
        lines = Counter(done.stderr.splitlines())
        assert [line for line, count in lines.items() if count > 1] == []
        for fault in ("without a caption", "orphan.txt", "Windows-1252"):
            assert sum(fault in line for line in lines) == 1
