"""Aligns the connector with box annotations before stage 1.

From captions alone a connector learns slowly: a frozen language model can relate a word to a patch only once the
patch's embedding resembles the word's. Boxes provide this relation directly. Each image token is regressed on the input
embeddings of the words for its content and position. The language model isn't run, so this takes seconds.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from random import Random
from typing import TYPE_CHECKING

import torch

from llavactl.core import progress
from llavactl.core.errors import RecipeError
from llavactl.core.schema import Box, Encoded
from llavactl.data.batches import collate
from llavactl.model.inputs import image_features
from llavactl.training.optimizer import schedule

if TYPE_CHECKING:
    from llavactl.core.schema import FeatureShape, Sample
    from llavactl.data.sample_set import SampleSet
    from llavactl.model.llava import LlavaModel

BATCH_SIZE = 32
"""Images per step."""

LEARNING_RATE = 1e-3
WARMUP = 0.05

POSITION_SCALE = 1.5
"""The distance between two edges of an image, as a multiple of the distance between the words for them ("left" and
"right"). At 1.5 the position part of a target is about half as large as the part for its content.
"""

WordEmbedding = Callable[[str], torch.Tensor]


def align_to_boxes(
    model: LlavaModel, data: SampleSet, shape: FeatureShape, steps: int, seed: int
) -> dict[str, torch.Tensor]:
    """The connector's float32 state dict after ``steps`` AdamW steps on the images of ``data`` with boxes.

    The loss is the mean squared error between the connector's tokens and ``targets``. ``model`` isn't changed.

    Raises:
        RecipeError: no sample has boxes, or the connector's tokens don't form a grid.
    """
    samples = [sample for sample in data.samples if len(sample.images) == 1 and _object_boxes(sample.boxes)]
    if not samples:
        raise RecipeError(
            "stage1.box_alignment_steps: no record of data.stage1 has boxes",
            hint="use a source with boxes (`coco`, `scenes`), or `-o stage1.box_alignment_steps=0`",
        )
    factor = patches_per_side(shape, data.encoding.image_tokens)
    embeddings = model.language.get_input_embeddings().weight.detach()

    @cache
    def word(text: str) -> torch.Tensor:
        ids = data.encoding.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return embeddings[ids].float().sum(0)

    # In float32 for any precision of the stage: the connector and its updates are small.
    connector = copy.deepcopy(model.connector).float()
    trainable = [weight for name, weight in connector.named_parameters() if name not in model.frozen]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    explained = 0.0
    with progress.bar(steps, "box alignment", "step") as bar:
        for step, batch in zip(range(steps), _batches(samples, seed), strict=False):
            target = torch.stack([targets(sample.boxes, shape.grid, factor, word) for sample in batch])
            features = image_features(collate([Encoded((), (), sample.images) for sample in batch], data.features))
            assert features is not None, "every sample here has an image"
            tokens = connector(features.to(embeddings.device).float())[:, shape.prefix :]
            loss = (tokens - target).square().mean()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(step, steps, WARMUP)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            explained = 1 - float(loss.detach() / (target - target.mean((0, 1))).square().mean())
            bar.advance(1, explained=f"{explained:.3f}")
    return {name: tensor.detach() for name, tensor in connector.state_dict().items()}


def targets(boxes: Sequence[Box], grid: tuple[int, int], factor: int, word: WordEmbedding) -> torch.Tensor:
    """The targets for the tokens of an image, [h/factor * w/factor, Dl], with a ``grid`` (h, w) of patches.

    A patch is in a box if its center is in the box's inscribed ellipse, as objects rarely fill the corners; if it is in
    several, the smallest counts. Its target is the embedding ``word`` [Dl] of the box's category, else of "background",
    plus its horizontal and vertical position. A token's target is the mean over its ``factor`` x ``factor`` patches.
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
    patches += POSITION_SCALE * (x - 0.5)[..., None] * (word("right") - word("left"))
    patches += POSITION_SCALE * (y - 0.5)[..., None] * (word("below") - word("above"))
    return patches.view(h // factor, factor, w // factor, factor, -1).mean((1, 3)).flatten(0, 1)


def patches_per_side(shape: FeatureShape, tokens: int) -> int:
    """The side length in patches of each of a connector's ``tokens``, which must be in the order of the patches.

    Raises:
        RecipeError: the tokens can't form a grid over the patches.
    """
    h, w = shape.grid
    if tokens == shape.patches:
        return 1
    factor = math.isqrt(h * w // tokens)
    if shape.prefix or not factor or h % factor or w % factor or h * w != tokens * factor**2:
        raise RecipeError(
            f"stage1.box_alignment_steps: {tokens} image tokens don't form a grid over {h}x{w} patches",
            hint="use the connector `linear` or `mlp2x-gelu`, or `-o stage1.box_alignment_steps=0`",
        )
    return factor


def _object_boxes(boxes: Sequence[Box]) -> list[Box]:
    """The boxes of single objects with an area, largest first."""

    def area(box: Box) -> float:
        left, top, right, bottom = box.xyxy
        return (right - left) * (bottom - top)

    return sorted((box for box in boxes if not box.crowd and area(box) > 0), key=area, reverse=True)


def _batches(samples: Sequence[Sample], seed: int) -> Iterator[list[Sample]]:
    """Endless shuffled batches; every sample occurs once before any is repeated."""
    rng = Random(f"llavactl grounding/{seed}")
    queue: list[Sample] = []
    while True:
        while len(queue) < min(BATCH_SIZE, len(samples)):
            queue += rng.sample(samples, len(samples))
        yield queue[:BATCH_SIZE]
        del queue[:BATCH_SIZE]
