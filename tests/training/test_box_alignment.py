"""Before stage 1 the connector can be fitted to boxes: each token to the words for what it shows, and where."""

from __future__ import annotations

from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llavactl.core.errors import RecipeError
from llavactl.core.schema import Box, FeatureShape, ImageRef, Sample, Turn
from llavactl.images.image_file import ImageFile
from llavactl.testing import run_cli
from llavactl.training.box_alignment import POSITION_SCALE, align_to_boxes, patches_per_side, targets

WORDS = ("background", "left", "right", "above", "below", "red circle", "blue square")
SCENES = ["-o", "data.stage1=[{name: scenes, content: descriptions, scenes: 40}]", "-o", "vision.image=square"]


def word(text: str) -> torch.Tensor:
    """An axis of its own for every word."""
    return torch.nn.functional.one_hot(torch.tensor(WORDS.index(text)), len(WORDS)).float()


def shown(boxes: list[Box], grid: tuple[int, int], factor: int) -> list[list[float]]:
    """How much of each token is background, the circle and the square."""
    made = targets(boxes, grid, factor, word)
    return made[:, [0, 5, 6]].tolist()


def test_a_patch_is_what_the_smallest_box_around_its_center_holds() -> None:
    large, small = Box("red circle", (0, 0, 1, 1)), Box("blue square", (0, 0, 0.5, 0.5))
    nothing, circle, square = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    for boxes in ([large, small], [small, large]):
        assert shown(boxes, (2, 2), 1) == [square, circle, circle, circle]
    assert shown([large], (4, 4), 1)[:2] == [nothing, circle], "the corner is outside the ellipse"
    assert shown([small], (2, 2), 2) == [[0.75, 0, 0.25]], "a token is the mean of its patches"
    crowd, flat = Box("red circle", (0, 0, 1, 1), crowd=True), Box("red circle", (0.2, 0.2, 0.2, 0.9))
    assert shown([crowd, flat], (2, 2), 1) == [nothing] * 4


def test_what_says_where_grows_evenly_from_left_to_right_and_downwards() -> None:
    made = targets([], (2, 4), 1, word)
    assert made[:, 2].tolist() == pytest.approx([POSITION_SCALE * x for x in (-0.375, -0.125, 0.125, 0.375)] * 2)
    assert made[:, 4].tolist() == pytest.approx([-POSITION_SCALE / 4] * 4 + [POSITION_SCALE / 4] * 4)
    assert torch.equal(made[:, 1], -made[:, 2])
    assert torch.equal(made[:, 3], -made[:, 4])


def test_how_many_patches_make_a_token() -> None:
    shape = FeatureShape((4, 6), 8)
    assert [patches_per_side(shape, tokens) for tokens in (24, 6)] == [1, 2]
    assert patches_per_side(FeatureShape((4, 6), 8, prefix=1), 25) == 1
    for wrong, tokens in ((shape, 12), (shape, 5), (shape, 30), (FeatureShape((4, 6), 8, prefix=1), 6)):
        with pytest.raises(RecipeError, match="4x6 patches"):
            patches_per_side(wrong, tokens)


class Pictures:
    """Each patch has the number of what it shows, and where it is: what ``targets`` asks for can be made of that."""

    def __init__(self, boxes: dict[str, list[Box]], grid: tuple[int, int]) -> None:
        self.boxes, self.grid = boxes, grid

    def stored(self, image: ImageRef) -> tuple[np.ndarray]:
        return (targets(self.boxes[image.name], self.grid, 1, word).numpy().astype(np.float16),)


def test_the_fit_finds_what_the_features_tell() -> None:
    rng, grid = Random(0), (4, 4)
    boxes = {}
    for at in range(12):
        x, y = rng.random() / 2, rng.random() / 2
        boxes[str(at)] = [Box(rng.choice(WORDS[5:]), (x, y, x + 0.5, y + 0.5))]
    samples = [Sample(name, (Turn("user", (ImageFile("", name),)),), boxes=tuple(boxes[name])) for name in boxes]
    torch.manual_seed(0)
    embeddings, connector = torch.nn.Embedding(len(WORDS), 16), torch.nn.Linear(len(WORDS), 16)
    torch.nn.init.normal_(embeddings.weight, std=0.2)
    numbers = {f" {text}": number for number, text in enumerate(WORDS)}
    encoding = SimpleNamespace(image_tokens=16, tokenizer=lambda text, **_: {"input_ids": [numbers[text]]})
    data: Any = SimpleNamespace(samples=samples, encoding=encoding, features=Pictures(boxes, grid))
    language = SimpleNamespace(get_input_embeddings=lambda: embeddings)
    model: Any = SimpleNamespace(connector=connector, language=language, frozen=frozenset())
    before = connector.weight.clone()
    fitted = align_to_boxes(model, data, FeatureShape(grid, len(WORDS)), 1500, 0)
    assert torch.equal(connector.weight, before), "the caller decides what becomes of the weights"
    for name, given in boxes.items():
        shown = torch.from_numpy(data.features.stored(ImageFile("", name))[0]).float()
        wanted = targets(given, grid, 1, lambda text: embeddings.weight.detach()[WORDS.index(text)])
        made = torch.nn.functional.linear(shown, fitted["weight"], fitted["bias"])
        assert (made - wanted).square().mean() < 0.05 * wanted.var()


def train(toy: Path, steps: int, name: str, *more: str) -> dict[str, torch.Tensor]:
    options = [*SCENES, "-o", f"stage1.box_alignment_steps={steps}", "-o", f"run_dir={toy}/{name}", *more]
    words = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *options, "-o", "features.mode=live"]
    result = run_cli(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return load_file(toy / name / "stage1/model/connector.safetensors")


def test_the_connector_is_fitted_before_the_first_step(toy: Path) -> None:
    # A learning rate that moves nothing: what the model has is what the fit gave it.
    still = ["-o", "stage1.max_steps=1", "-o", "stage1.learning_rate=1e-12"]
    start, fitted, longer = (train(toy, steps, f"s{steps}", *still) for steps in (0, 1, 40))
    assert start.keys() == fitted.keys()
    assert any(not torch.allclose(start[name], longer[name], atol=1e-4) for name in start)
    same = train(toy, 40, "again", *still)
    assert all(torch.equal(longer[name], same[name]) for name in same)


def test_without_boxes_or_with_padded_pictures_it_says_so(toy: Path) -> None:
    words = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), "-o", "stage1.box_alignment_steps=5"]
    padded = run_cli(*words)
    assert padded.exit_code == 1
    assert "vision.image: square" in padded.stderr
    bare = run_cli(*words, "-o", "vision.image=square", "-o", "features.mode=live")
    assert bare.exit_code == 1
    assert "no record of data.stage1 has boxes" in bare.stderr
