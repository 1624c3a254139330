"""Box alignment: targets, and the connector that is fitted to them before stage 1."""

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
from llavactl.training.box_alignment import (
    EMPTY_WORD,
    MARGIN,
    POSITION_SCALE,
    align_to_boxes,
    patch_targets,
    tokens_per_cell,
    word_targets,
)

WORDS = ("background", "left", "right", "above", "below", "red circle", "blue square")
SCENES = ["-o", "data.stage1=[{name: scenes, content: descriptions, scenes: 8}]", "-o", "vision.image=square"]


def word(text: str) -> torch.Tensor:
    """A one-hot embedding."""
    return torch.nn.functional.one_hot(torch.tensor(WORDS.index(text)), len(WORDS)).float()


def content(boxes: list[Box], grid: tuple[int, int], factor: int) -> list[list[float]]:
    """The components of each token's target for background, circle and square."""
    return patch_targets(boxes, grid, (grid[0] // factor, grid[1] // factor), word)[:, [0, 5, 6]].tolist()


def test_the_smallest_box_around_a_patch_determines_its_target() -> None:
    large, small = Box("red circle", (0, 0, 1, 1)), Box("blue square", (0, 0, 0.5, 0.5))
    background, circle, square = [1, 0, 0], [0, 1, 0], [0, 0, 1]
    for boxes in ([large, small], [small, large]):
        assert content(boxes, (2, 2), 1) == [square, circle, circle, circle]
    assert content([large], (4, 4), 1)[:2] == [background, circle], "the corner is outside the ellipse"
    assert content([small], (2, 2), 2) == [[0.75, 0, 0.25]], "a token is the mean of its patches"
    crowd, flat = Box("red circle", (0, 0, 1, 1), crowd=True), Box("red circle", (0.2, 0.2, 0.2, 0.9))
    assert content([crowd, flat], (2, 2), 1) == [background] * 4


def test_positions_are_linear() -> None:
    target = patch_targets([], (2, 4), (2, 4), word)
    assert target[:, 2].tolist() == pytest.approx([POSITION_SCALE * x for x in (-0.375, -0.125, 0.125, 0.375)] * 2)
    assert target[:, 4].tolist() == pytest.approx([-POSITION_SCALE / 4] * 4 + [POSITION_SCALE / 4] * 4)
    assert torch.equal(target[:, 1], -target[:, 2])
    assert torch.equal(target[:, 3], -target[:, 4])


def test_cells_without_a_common_number_of_tokens_are_refused() -> None:
    shape = FeatureShape((4, 6), 8)
    assert tokens_per_cell(shape, (4, 6), 24) == 1
    assert tokens_per_cell(shape, (2, 3), 12) == 2
    for tokens in (25, 24):  # the connector keeps or drops the class token
        assert tokens_per_cell(FeatureShape((4, 6), 8, prefix=1), (4, 6), tokens) == 1
    for cells, tokens in (((4, 6), 12), ((2, 3), 13), ((3, 3), 18), ((2, 4), 8)):
        with pytest.raises(RecipeError, match="4x6 patches"):
            tokens_per_cell(shape, cells, tokens)


CORNERS = [Box("red circle", (0.0, 0.0, 0.2, 0.2)), Box("blue square", (0.8, 0.6, 1.0, 1.0))]
COMPASS = ("left", "right", "above", "below")
VOCABULARY = (EMPTY_WORD, *COMPASS, "red", "blue", "circle", "square", "dog")


def single_word(text: str) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(VOCABULARY.index(text)), len(VOCABULARY)).float()


def named(target: torch.Tensor) -> list[str]:
    """The word of each token; a position has no influence on it."""
    words = [0, *range(5, len(VOCABULARY))]
    return [VOCABULARY[words[index]] for index in target[:, words].argmax(1).tolist()]


def test_each_token_of_a_cell_has_one_word() -> None:
    target = word_targets(CORNERS, (2, 2), 2, single_word)
    assert named(target) == ["red", "circle", EMPTY_WORD, EMPTY_WORD, EMPTY_WORD, EMPTY_WORD, "blue", "square"]
    assert named(word_targets([Box("dog", (0, 0, 1, 1))], (1, 1), 3, single_word)) == [EMPTY_WORD, EMPTY_WORD, "dog"]
    assert named(word_targets([Box("big red circle", (0, 0, 1, 1))], (1, 1), 2, single_word)) == ["red", "circle"]
    assert named(word_targets([], (1, 2), 2, single_word)) == [EMPTY_WORD] * 4


def test_each_word_has_the_position_of_its_object() -> None:
    target = word_targets(CORNERS, (2, 2), 2, single_word)
    right, below = (VOCABULARY.index(name) for name in ("right", "below"))
    for token, (x, y) in {0: (0.1, 0.1), 1: (0.1, 0.1), 7: (0.9, 0.8)}.items():
        assert target[token, right].item() == pytest.approx(POSITION_SCALE * (x - 0.5))
        assert target[token, below].item() == pytest.approx(POSITION_SCALE * (y - 0.5))
    assert not target[2:6, 1:5].any(), "tokens without an object have no position"


@pytest.mark.parametrize(("x", "shown"), [(0.5 - 1.5 * MARGIN, [0]), (0.5 - MARGIN / 2, [0, 1]), (0.5, [0, 1])])
def test_an_object_close_to_an_edge_is_in_both_cells(x: float, shown: list[int]) -> None:
    words = named(word_targets([Box("dog", (x - 0.1, 0, x + 0.1, 1))], (1, 2), 1, single_word))
    assert [index for index, name in enumerate(words) if name == "dog"] == shown


def test_the_closest_object_is_in_a_cell() -> None:
    inside, outside = Box("dog", (0.2, 0, 0.4, 1)), Box("circle", (0.4, 0, 0.61, 1))
    for boxes in ([inside, outside], [outside, inside]):
        assert named(word_targets(boxes, (1, 2), 1, single_word)) == ["dog", "circle"]


class FeaturesFromBoxes:
    """Features from which ``targets`` can be computed linearly."""

    def __init__(self, boxes: dict[str, list[Box]], grid: tuple[int, int], prefix: int) -> None:
        self.boxes, self.grid, self.prefix = boxes, grid, prefix

    def arrays(self, image: ImageRef) -> tuple[np.ndarray]:
        patches = patch_targets(self.boxes[image.name], self.grid, self.grid, word).numpy()
        return (np.pad(patches, ((self.prefix, 0), (0, 0))).astype(np.float16),)


class WithoutFirst(torch.nn.Linear):
    """Drops the class token."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features[:, 1:])


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [
        (torch.nn.Linear, 0),
        pytest.param(torch.nn.Linear, 1, marks=pytest.mark.slow),
        pytest.param(WithoutFirst, 1, marks=pytest.mark.slow),
    ],
)
def test_the_fitted_connector_predicts_the_targets(kind: type[torch.nn.Linear], prefix: int) -> None:
    rng, grid = Random(0), (4, 4)
    boxes = {}
    for index in range(12):
        x, y = rng.random() / 2, rng.random() / 2
        boxes[str(index)] = [Box(rng.choice(WORDS[5:]), (x, y, x + 0.5, y + 0.5))]
    samples = [Sample(name, (Turn("user", (ImageFile("", name),)),), boxes=tuple(boxes[name])) for name in boxes]
    torch.manual_seed(0)
    embeddings, connector = torch.nn.Embedding(len(WORDS), 16), kind(len(WORDS), 16)
    torch.nn.init.normal_(embeddings.weight, std=0.2)
    numbers = {f" {text}": number for number, text in enumerate(WORDS)}
    image_tokens = 16 + prefix * (kind is not WithoutFirst)
    encoding = SimpleNamespace(image_tokens=image_tokens, tokenizer=lambda text, **_: {"input_ids": [numbers[text]]})
    data: Any = SimpleNamespace(samples=samples, encoding=encoding, features=FeaturesFromBoxes(boxes, grid, prefix))
    language = SimpleNamespace(get_input_embeddings=lambda: embeddings)
    model: Any = SimpleNamespace(connector=connector, language=language, frozen=frozenset())
    initial = connector.weight.clone()
    fitted = align_to_boxes(model, data, FeatureShape(grid, len(WORDS), prefix), grid, 1500, 0)
    assert torch.equal(connector.weight, initial), "the model is not changed"
    for name, image_boxes in boxes.items():
        features = torch.from_numpy(data.features.arrays(ImageFile("", name))[0]).float()[prefix:]
        target = patch_targets(image_boxes, grid, grid, lambda text: embeddings.weight.detach()[WORDS.index(text)])
        tokens = torch.nn.functional.linear(features, fitted["weight"], fitted["bias"])
        assert (tokens - target).square().mean() < 0.05 * target.var()


def train(toy: Path, steps: int, name: str, *settings: str) -> dict[str, torch.Tensor]:
    options = [*SCENES, "-o", f"stage1.box_alignment_steps={steps}", "-o", f"run_dir={toy}/{name}", *settings]
    words = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), *options, "-o", "features.mode=live"]
    result = run_cli(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return load_file(toy / name / "stage1/model/connector.safetensors")


def test_the_connector_is_aligned_before_the_first_step(toy: Path) -> None:
    # With this learning rate training changes nothing: the weights are those of the alignment.
    settings = ["-o", "stage1.max_steps=1", "-o", "stage1.learning_rate=1e-12"]
    start, fitted, longer = (train(toy, steps, f"s{steps}", *settings) for steps in (0, 1, 10))
    assert start.keys() == fitted.keys()
    assert any(not torch.allclose(start[name], longer[name], atol=1e-4) for name in start)
    repeated = train(toy, 10, "again", *settings)
    assert all(torch.equal(longer[name], repeated[name]) for name in repeated)


def test_weights_that_the_stage_does_not_train_are_not_aligned(toy: Path) -> None:
    settings = ["-o", "stage1.max_steps=1", "-o", "stage1.learning_rate=1e-12", "-o", "stage1.train_connector=['2.']"]
    start, fitted = (train(toy, steps, f"part{steps}", *settings) for steps in (0, 5))
    changed = {name for name in start if not torch.allclose(start[name], fitted[name], atol=1e-6)}
    assert changed == {"2.weight", "2.bias"}


def test_a_connector_with_several_tokens_per_cell_learns_the_words(toy: Path) -> None:
    settings = ["-o", "connector={name: cell-words, cell: 2, words: 2, hidden: 16}"]
    settings += ["-o", "stage1.max_steps=1", "-o", "stage1.learning_rate=1e-12"]
    start, fitted = (train(toy, steps, f"words{steps}", *settings) for steps in (0, 5))
    assert start.keys() == fitted.keys()
    assert any(not torch.allclose(start[name], fitted[name], atol=1e-4) for name in start)


def test_without_boxes_or_with_padded_images_it_is_refused(toy: Path) -> None:
    words = ["train", "--stage", "1", "-r", str(toy / "recipe.yaml"), "-o", "stage1.box_alignment_steps=5"]
    padded = run_cli(*words)
    assert padded.exit_code == 1
    assert "vision.image: square" in padded.stderr
    without_boxes = run_cli(*words, "-o", "vision.image=square", "-o", "features.mode=live")
    assert without_boxes.exit_code == 1
    assert "stage1.box_alignment_steps" in without_boxes.stderr
    assert "data.stage1" in without_boxes.stderr
