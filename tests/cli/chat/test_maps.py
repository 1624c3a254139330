"""Maps of an answer's words as grids of characters, and ``chat --explain``."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.cells import cell_len

from llavactl.chat.explain import Explanation, Word
from llavactl.cli.chat.maps import ASCII_SHADES, map_lines
from llavactl.images.decode import size
from llavactl.testing import run_cli, toy_model, toy_photos


def word(text: str, at: tuple[int, int]) -> Word:
    occlusion, attention = np.full((3, 3), -1.0), np.full((6, 6), 0.01)
    occlusion[at] = 2.0
    attention[2 * at[0], 2 * at[1]] = 1.0
    return Word(text, (attention,), (occlusion,))


def test_the_darkest_cell_is_the_largest_value() -> None:
    lines = map_lines(Explanation((word("red", (0, 2)), word("一只\x1b[2J", (2, 0))), (), ()), ASCII_SHADES)
    assert len({cell_len(line) for line in lines if line}) == 1
    assert not any("\x1b" in line for line in lines)
    header, *grids = [line for line in lines if line]
    assert "red" in header
    for grid in (grids[:3], grids[3:]):
        cells = [line[10:].split("│")[1::2] for line in grid]
        assert [row[0].endswith("##") for row in cells] == [True, False, False]
        assert [row[1].startswith("##") for row in cells] == [False, False, True]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explain")
    toy_model(folder)
    toy_photos(folder, 1)
    return folder


CHAT = ("chat", "--model", "model", "--max-new-tokens", "6")


def test_an_explained_answer(folder: Path) -> None:
    asked = ("--image", "photo-000.jpg", "--prompt", "What?")
    plain = run_cli(*CHAT, *asked, cwd=folder)
    explained = run_cli(*CHAT, *asked, "--explain", cwd=folder)
    assert explained.stdout == plain.stdout
    assert "occlusion" in explained.stderr
    assert "attention" in explained.stderr
    document = run_cli(*CHAT, *asked, "--explain", "--json", cwd=folder).json()
    assert document["answer"] == plain.stdout.strip()
    assert document["explanation"]["images"] == ["photo-000.jpg"]
    assert np.array(document["explanation"]["words"][0]["occlusion"]).shape == (1, 2, 2)
    conversation = run_cli(*CHAT, "--explain", cwd=folder, stdin="Hello?\n/image photo-000.jpg\nWhat?\n")
    assert conversation.exit_code == 0
    assert conversation.stderr.count("occlusion │") == 1


def test_without_an_image_there_is_nothing_to_explain(folder: Path) -> None:
    failed = run_cli(*CHAT, "--prompt", "What?", "--explain", "--json", cwd=folder)
    assert (failed.exit_code, failed.stdout) == (1, "")
    assert run_cli(*CHAT, "--batch", "x", "--explain", cwd=folder).exit_code == 2


@pytest.mark.parametrize("option", [("--dtype", "bfloat16"), ("--quantize", "8"), ("--dtype", "int3")])
def test_precisions(folder: Path, option: tuple[str, str]) -> None:
    if option[0] == "--quantize":
        pytest.importorskip("bitsandbytes")
    result = run_cli(*CHAT, "--prompt", "What?", *option, cwd=folder)
    assert result.exit_code == (2 if "int3" in option else 0), result.stderr


def test_the_size_is_that_of_the_upright_image() -> None:
    for orientation, expected in ((1, (40, 20)), (6, (20, 40))):
        file, exif = io.BytesIO(), Image.Exif()
        exif[274] = orientation
        Image.new("RGB", (40, 20)).save(file, "JPEG", exif=exif)
        assert size(file.getvalue()) == expected
