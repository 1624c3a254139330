"""Aligns the connector with box annotations before stage 1.

From captions alone a connector learns slowly: a frozen language model can relate a word to a patch only once the
patch's embedding resembles the word's. Boxes provide this relation directly. Each image token is regressed on the input
embeddings of the words for its content and position. The language model isn't run, so this takes seconds.

- A connector with one token per cell is fitted to the mean over the patches of the cell (``patch_targets``).
- A connector with several is fitted to the words of the object whose center is in the cell (``word_targets``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from random import Random
from typing import TYPE_CHECKING

import torch

from llavactl.core import progress
from llavactl.core.errors import RecipeError
from llavactl.core.schema import Box, Encoded
from llavactl.data.batches import collate
from llavactl.model.build import tokens_before_cells
from llavactl.model.inputs import image_features
from llavactl.training.learning_rate import schedule

if TYPE_CHECKING:
    from llavactl.core.schema import FeatureShape, Sample
    from llavactl.data.sample_set import SampleSet
    from llavactl.model.llava import LlavaModel

BATCH_SIZE = 32
"""Images per step."""

LEARNING_RATE = 1e-3
WORDS_LEARNING_RATE = 5e-3
"""For connectors with several tokens per cell: 2e-3 and 1e-3 fit less in the same steps (docs/notes/demo.md)."""

WARMUP = 0.05

POSITION_SCALE = 1.5
"""The distance between two edges of an image, as a multiple of the distance between the words for them ("left" and
"right"). At 1.5 the position part of a target is about half as large as the part for its content.
"""

MARGIN = 5 / 224
"""Cells are larger by this fraction of the image on each side: where the center of an object is close to an edge, both
cells show the object. Otherwise the mean of object and background would be fitted there. DINOv2 ViT-S/14 locates
centers to 5 to 10 of 224 pixels (docs/notes/demo.md).
"""

EMPTY_WORD = "."
"""The word of tokens without an object."""

WordEmbedding = Callable[[str], torch.Tensor]


def align_to_boxes(
    model: LlavaModel,
    data: SampleSet,
    shape: FeatureShape,
    cells: tuple[int, int],
    steps: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """The connector's float32 state dict after ``steps`` AdamW steps on the images of ``data`` with boxes.

    ``cells`` (h, w) is the grid of the connector's tokens. The loss is the mean squared error between the tokens and
    their targets. Weights and targets are float32, matrix products are computed in ``dtype``. ``model`` isn't changed.

    Raises:
        RecipeError: no sample has boxes, or the tokens don't fill the ``cells``.
    """
    samples = [sample for sample in data.samples if len(sample.images) == 1 and _object_boxes(sample.boxes)]
    if not samples:
        raise RecipeError(
            "stage1.box_alignment_steps: no record of data.stage1 has boxes",
            hint="use a source with boxes (`coco`, `scenes`), or `-o stage1.box_alignment_steps=0`",
        )
    per_cell = tokens_per_cell(shape, cells, data.encoding.image_tokens)
    first = tokens_before_cells(data.encoding.image_tokens, shape, cells)
    embeddings = model.language.get_input_embeddings().weight.detach()

    @cache
    def word(text: str) -> torch.Tensor:
        ids = data.encoding.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return embeddings[ids].float().sum(0)

    def image_targets(boxes: Sequence[Box]) -> torch.Tensor:
        if per_cell == 1:
            return patch_targets(boxes, shape.grid, cells, word)
        return word_targets(boxes, cells, per_cell, word)

    rate = LEARNING_RATE if per_cell == 1 else WORDS_LEARNING_RATE
    # In float32 for any precision of the stage: the connector and its updates are small.
    connector = copy.deepcopy(model.connector).float()
    trainable = [weight for weight in connector.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    explained = 0.0
    with progress.bar(steps, "box alignment", "step") as bar:
        for step, batch in zip(range(steps), _batches(samples, seed), strict=False):
            target = torch.stack([image_targets(sample.boxes) for sample in batch])
            features = image_features(collate([Encoded((), (), sample.images) for sample in batch], data.features))
            assert features is not None, "every sample here has an image"
            with torch.autocast(embeddings.device.type, dtype, enabled=dtype != torch.float32):
                tokens = connector(features.to(embeddings.device).float())[:, first:]
            loss = (tokens.float() - target).square().mean()
            for group in optimizer.param_groups:
                group["lr"] = rate * schedule(step, steps, WARMUP)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            explained = 1 - float(loss.detach() / (target - target.mean((0, 1))).square().mean())
            bar.advance(1, explained=f"{explained:.3f}")
    return {name: tensor.detach() for name, tensor in connector.state_dict().items()}


def patch_targets(
    boxes: Sequence[Box], grid: tuple[int, int], cells: tuple[int, int], word: WordEmbedding
) -> torch.Tensor:
    """The targets for one token per cell, [cells, Dl], with a ``grid`` (h, w) of patches.

    A patch is in a box if its center is in the box's inscribed ellipse, as objects rarely fill the corners; if it is in
    several, the smallest counts. Its target is the embedding ``word`` [Dl] of the box's category, else of "background",
    plus its horizontal and vertical position. A token's target is the mean over the patches of its cell.
    """
    h, w = grid
    background = word("background")
    y = ((torch.arange(h, device=background.device) + 0.5) / h)[:, None].expand(h, w)
    x = ((torch.arange(w, device=background.device) + 0.5) / w)[None, :].expand(h, w)
    patches = background.repeat(h, w, 1)
    for box in _object_boxes(boxes):
        left, top, right, bottom = box.xyxy
        horizontal = (x - (left + right) / 2) / ((right - left) / 2)
        vertical = (y - (top + bottom) / 2) / ((bottom - top) / 2)
        patches[horizontal.square() + vertical.square() <= 1] = word(box.category)
    patches += _position(x, y, word)
    rows, columns = cells
    return patches.view(rows, h // rows, columns, w // columns, -1).mean((1, 3)).flatten(0, 1)


def word_targets(boxes: Sequence[Box], cells: tuple[int, int], per_cell: int, word: WordEmbedding) -> torch.Tensor:
    """The targets for ``per_cell`` tokens in each of ``cells`` (h, w), [h*w*per_cell, Dl].

    A cell shows the object whose center is in it, or closest to it within MARGIN: the last ``per_cell`` words of its
    category, such as "red" and "circle", each plus the position of the object. Tokens without a word are EMPTY_WORD.
    """
    h, w = cells
    blank = word(EMPTY_WORD).repeat(per_cell, 1)
    objects = _object_boxes(boxes)
    if not objects:
        return blank.repeat(h * w, 1)
    centers = [((left + right) / 2, (top + bottom) / 2) for left, top, right, bottom in (box.xyxy for box in objects)]
    x, y = torch.tensor(centers, device=blank.device).T
    distance = torch.maximum(_distance(y, h)[:, :, None], _distance(x, w)[:, None, :])
    nearest, index = distance.flatten(1).min(0)
    words = torch.stack([_last_words(box.category, per_cell, blank, word) for box in objects])
    words = words + _position(x, y, word)[:, None]
    return torch.where((nearest <= MARGIN)[:, None, None], words[index], blank).flatten(0, 1)


def _distance(position: torch.Tensor, cells: int) -> torch.Tensor:
    """The distance [N, ``cells``] of each position [N], from 0 to 1, to each interval of length 1/``cells``."""
    starts = torch.arange(cells, device=position.device) / cells
    return torch.maximum(starts - position[:, None], position[:, None] - starts - 1 / cells).clamp(min=0)


def _last_words(category: str, count: int, blank: torch.Tensor, word: WordEmbedding) -> torch.Tensor:
    """The embeddings of the last ``count`` words of ``category`` [count, Dl], ``blank`` before fewer words."""
    words = category.split()[-count:]
    return torch.cat([blank[: count - len(words)], *(word(each)[None] for each in words)])


def _position(x: torch.Tensor, y: torch.Tensor, word: WordEmbedding) -> torch.Tensor:
    """The embedding [..., Dl] of a position (``x``, ``y``) in the image, from 0 to 1."""
    horizontal = (x - 0.5)[..., None] * (word("right") - word("left"))
    return POSITION_SCALE * (horizontal + (y - 0.5)[..., None] * (word("below") - word("above")))


def tokens_per_cell(shape: FeatureShape, cells: tuple[int, int], tokens: int) -> int:
    """The number of a connector's ``tokens`` in each of ``cells``, without those before the first cell.

    Raises:
        RecipeError: the cells don't divide the grid of patches, or the tokens don't fill them.
    """
    (rows, columns), (h, w) = cells, shape.grid
    per_cell, rest = divmod(tokens - tokens_before_cells(tokens, shape, cells), rows * columns)
    if rest or per_cell < 1 or h % rows or w % columns:
        raise RecipeError(
            f"stage1.box_alignment_steps: {tokens} image tokens don't form {rows}x{columns} cells of {h}x{w} patches",
            hint="use the connector `linear`, `mlp2x-gelu` or `cell-words`, or `-o stage1.box_alignment_steps=0`",
        )
    return per_cell


def _object_boxes(boxes: Sequence[Box]) -> list[Box]:
    """The boxes of single objects with an area, largest first."""

    def area(box: Box) -> float:
        left, top, right, bottom = box.xyxy
        return (right - left) * (bottom - top)

    return sorted((box for box in boxes if not box.crowd and area(box) > 0), key=area, reverse=True)


def _batches(samples: Sequence[Sample], seed: int) -> Iterator[list[Sample]]:
    """Endless shuffled batches; every sample occurs once before any is repeated."""
    rng = Random(f"llavactl grounding/{seed}")  # the former name, kept for equal results
    queue: list[Sample] = []
    while True:
        while len(queue) < min(BATCH_SIZE, len(samples)):
            queue += rng.sample(samples, len(samples))
        yield queue[:BATCH_SIZE]
        del queue[:BATCH_SIZE]
