"""docs/tutorials/own-data.md: its commands, in order, in a fresh folder with photos as they are found on disks.

The models are those of the demo: the commands are the same as on a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from llavactl.core.registry import registry
from llavactl.testing import run_cli

PAGE = Path(__file__).parents[2] / "docs" / "tutorials/own-data.md"
SHELL = re.compile(r"(\*Needs: [^\n]+\*\n\n)?^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TIMEOUT_S = 3600
COLORS = {"red": (210, 40, 40), "green": (50, 170, 60), "blue": (50, 70, 210), "yellow": (230, 210, 60)}
EXIF_ORIENTATION = 0x0112


def photo(rng: random.Random) -> tuple[Image.Image, str]:
    """A shape of one color, and its caption."""
    color, shape = rng.choice(list(COLORS)), rng.choice(["circle", "square"])
    image = Image.new("RGB", (rng.randint(80, 300), rng.randint(80, 300)), (235, 235, 230))
    box = (10, 10, 10 + min(image.size) // 2, 10 + min(image.size) // 2)
    (ImageDraw.Draw(image).ellipse if shape == "circle" else ImageDraw.Draw(image).rectangle)(box, fill=COLORS[color])
    return image, f"A {color} {shape} on a light background."


def write_photos(folder: Path) -> None:
    """Photos in the formats and with the defects that cameras, editors and systems produce."""
    rng = random.Random(0)
    rotated = Image.Exif()
    rotated[EXIF_ORIENTATION] = 6
    for name, mode, options in (
        ("garden.jpg", "RGB", {}),
        ("rotated.JPG", "RGB", {"exif": rotated}),
        ("print.jpg", "CMYK", {}),
        ("palette.png", "P", {}),
        ("transparent.png", "RGBA", {}),
        ("gray.jpeg", "L", {}),
        ("summer 2024/lake.webp", "RGB", {}),
        ("summer 2024/Äpfel & Birnen.jpg", "RGB", {}),
        ("summer 2024/drawing.gif", "RGB", {}),
        ("日本/写真.bmp", "RGB", {}),
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        image, caption = photo(rng)
        image.convert(mode).save(file, **options)
        file.with_suffix(".txt").write_text(f"{caption}\r\n", encoding="utf-8-sig")
    Image.new("RGB", (1, 1)).save(folder / "pixel.png")
    (folder / "pixel.txt").write_text("One black pixel.")
    data = (folder / "garden.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(data[: len(data) // 2])
    (folder / "truncated.txt").write_text("Half of a garden.")
    (folder / "without a caption.jpg").write_bytes(data)
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "Thumbs.db").write_bytes(b"\0")


def commands() -> list[str]:
    """The shell blocks of the page that need nothing else."""
    return [match[2] for match in SHELL.finditer(PAGE.read_text(encoding="utf-8")) if not match[1]]


@pytest.mark.parametrize("name", ["init", "doctor", "recipes check", "extract", "train", "run", "chat", "export"])
def test_the_page_has_the_command(name: str) -> None:
    """Otherwise the slow test below would run something else."""
    assert any(f"llavactl {name}" in block for block in commands())


def test_the_photos_are_found(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    samples = list(registry().create("sources", {"name": "image-folder", "path": tmp_path / "photos"}))
    assert len(samples) == 12
    (tmp_path / "check.yaml").write_text("name: check\ndata: {stage1: [{name: image-folder, path: photos}]}\n")
    result = run_cli("data", "check", "-r", str(tmp_path / "check.yaml"), "--json")
    found = {problem["problem"]: problem["count"] for problem in result.json()["problems"]}
    assert found == {"image-broken": 1, "no-caption": 1}


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llavactl_demo") is None, reason="needs the demo plugin")
def test_the_tutorial_works(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "LLAVACTL_HOME": str(tmp_path / "home")}
    for block in commands():
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    skipped = (tmp_path / "runs" / "photos" / "skipped.jsonl").read_text().splitlines()
    assert [json.loads(line)["image"] for line in skipped] == ["truncated.jpg"]
    metrics = (tmp_path / "runs" / "photos" / "stage2" / "metrics.jsonl").read_text().splitlines()
    assert any("val_loss" in line for line in metrics)
    assert (tmp_path / "photos-assistant" / "config.json").is_file()
