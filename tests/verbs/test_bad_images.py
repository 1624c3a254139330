"""An exception of a plugin's image or backbone makes the image unreadable, in extract and train."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llavactl import ImageFile, Sample, Turn
from llavactl.components.vision.encoder import Preprocess
from llavactl.core.registry import Registration, registry
from llavactl.testing import run_cli

FOLDER = ""


@dataclass(frozen=True)
class Row:
    """An image in a table, two of whose rows can't be read."""

    number: int

    @property
    def name(self) -> str:
        return f"row {self.number}"

    def read(self) -> bytes:
        if self.number == 3:
            raise ValueError("bad row group")
        return ImageFile(FOLDER, f"photo-{self.number:03d}.jpg").read()

    def stamp(self) -> str | None:
        if self.number == 4:
            raise KeyError("no such column")
        return None


def table(_options: Any) -> Iterator[Sample]:
    for number in range(12):
        yield Sample(f"r{number}", (Turn("user", (Row(number), "\nWhat?")), Turn("assistant", ("A photo.",))))


@pytest.fixture
def recipe(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys.modules[__name__], "FOLDER", str(toy / "images"))
    monkeypatch.setitem(sys.modules, "a_table", sys.modules[__name__])
    entry = Registration("sources", "table", "a_table:table", None, "", "x")
    monkeypatch.setitem(registry().entries["sources"], "table", entry)
    return toy / "recipe.yaml"


def too_small(image: Image.Image) -> bool:
    return image.width < 30 and image.size != (28, 28)  # the backbone is measured with a blank image of that size


@pytest.mark.parametrize("mode", ["cached", "live"])
def test_extract_and_train_skip_the_same_images(recipe: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Preprocess.__call__

    def refuses(self: Preprocess, image: Image.Image) -> Any:
        if too_small(image):
            raise TypeError("too small")
        return original(self, image)

    monkeypatch.setattr(Preprocess, "__call__", refuses)
    photos = [Image.open(recipe.parent / "images" / f"photo-{at:03d}.jpg") for at in range(12)]
    broken = {f"row {at}" for at, photo in enumerate(photos) if at in (3, 4) or too_small(photo)}
    assert 2 < len(broken) < 10
    options = (
        "-r",
        str(recipe),
        "-o",
        "data.stage1=[{name: table}]",
        "-o",
        "data.stage2=[]",
        "-o",
        f"features.mode={mode}",
    )
    if mode == "cached":
        done = run_cli("extract", *options, "--json")
        assert done.exit_code == 0, done.stderr
        lines = Path(done.json()["skipped_file"]).read_text(encoding="utf-8").splitlines()
        assert {json.loads(line)["image"] for line in lines} == broken
        assert run_cli("extract", *options, "--max-skipped", "1").exit_code == 1
        assert run_cli("extract", *options, "--json").json()["encoded"] == 0
    done = run_cli("train", "--stage", "1", *options, "-o", "stage1.max_steps=1", "--json")
    assert done.exit_code == 0, done.stderr
    assert done.json()["skipped_samples"] == len(broken)


def test_a_string_as_turn_content_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Turn\("):
        Turn("user", "hi")  # type: ignore[arg-type]
