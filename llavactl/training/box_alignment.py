"""Fitting the connector to boxes before stage 1: each image token to the words for what it shows, and where it is.

From captions alone a connector learns slowly: before a frozen language model can tell which patch a word is about,
the patch must resemble the word. Boxes say outright which patches a word is about. What is fitted is a regression
on the language model's input embeddings, without the language model: seconds, where its forwards take minutes.
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
    from llavactl.data.training_set import TrainingSet
    from llavactl.model.llava import LlavaModel

IMAGES = 32
"""Images a step."""

LEARNING_RATE = 1e-3
WARMUP = 0.05

PLACE = 1.5
"""How much of the way between two words of place ("left" and "right") lies between the edges of a picture.

With 1.5 what says where a token is is about half as large as what says which thing it shows.
"""

Word = Callable[[str], torch.Tensor]


def ground(model: LlavaModel, data: TrainingSet, shape: FeatureShape, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """The connector's state, by name and in float32, after ``steps`` of AdamW on the images of ``data`` with boxes.

    The loss is the mean squared error between its tokens and ``targets``.

    Raises:
        RecipeError: no sample has boxes, or the connector's tokens don't form a grid.
    """
    samples = [sample for sample in data.samples if len(sample.images) == 1 and _things(sample.boxes)]
    if not samples:
        raise RecipeError(
            "stage1.box_alignment_steps: no record of data.stage1 has boxes",
            hint="the sources `coco` and `scenes` have; `-o stage1.box_alignment_steps=0` goes without",
        )
    factor = shuffle_factor(shape, data.encoding.image_tokens)
    embeddings = model.language.get_input_embeddings().weight.detach()

    @cache
    def word(text: str) -> torch.Tensor:
        ids = data.encoding.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
        return embeddings[ids].float().sum(0)

    # In float32 whatever the stage computes in: it is small, and its updates are.
    connector = copy.deepcopy(model.connector).float()
    trained = [each for name, each in connector.named_parameters() if name not in model.frozen]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
    explained = 0.0
    with progress.bar(steps, "fitting to boxes", "step") as bar:
        for step, batch in zip(range(steps), _batches(samples, seed), strict=False):
            wanted = torch.stack([targets(sample.boxes, shape.grid, factor, word) for sample in batch])
            features = image_features(collate([Encoded((), (), sample.images) for sample in batch], data.features))
            assert features is not None, "every sample here has an image"
            made = connector(features.to(embeddings.device).float())[:, shape.prefix :]
            loss = (made - wanted).square().mean()
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * schedule(step, steps, WARMUP)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            explained = 1 - float(loss.detach() / (wanted - wanted.mean((0, 1))).square().mean())
            bar.advance(1, explained=f"{explained:.3f}")
    return {name: tensor.detach() for name, tensor in connector.state_dict().items()}


def targets(boxes: Sequence[Box], grid: tuple[int, int], factor: int, word: Word) -> torch.Tensor:
    """The targets for the tokens of an image, [h/factor * w/factor, Dl], for a ``grid`` (h, w) of patches.

    A patch is in a box where its center is in the largest ellipse there, as few things fill their corners; in the
    smallest of several. It is its name's ``word`` [Dl], else that for background, with how far it is from left to
    right and from above to below. A token is the mean of its ``factor`` x ``factor`` patches.
    """
    h, w = grid
    ground = word("background")
    y = ((torch.arange(h, device=ground.device) + 0.5) / h)[:, None].expand(h, w)
    x = ((torch.arange(w, device=ground.device) + 0.5) / w)[None, :].expand(h, w)
    patches = ground.repeat(h, w, 1)
    for box in _things(boxes):
        left, top, right, bottom = box.xyxy
        across = (x - (left + right) / 2) / ((right - left) / 2)
        upright = (y - (top + bottom) / 2) / ((bottom - top) / 2)
        patches[across.square() + upright.square() <= 1] = word(box.category)
    patches += PLACE * (x - 0.5)[..., None] * (word("right") - word("left"))
    patches += PLACE * (y - 0.5)[..., None] * (word("below") - word("above"))
    return patches.view(h // factor, factor, w // factor, factor, -1).mean((1, 3)).flatten(0, 1)


def shuffle_factor(shape: FeatureShape, tokens: int) -> int:
    """How many patches a side make one of a connector's ``tokens``, which are taken to be in the order of the patches.

    Raises:
        RecipeError: so many tokens can't lie over the patches as a grid.
    """
    h, w = shape.grid
    if tokens == shape.patches:
        return 1
    factor = math.isqrt(h * w // tokens)
    if shape.prefix or not factor or h % factor or w % factor or h * w != tokens * factor**2:
        raise RecipeError(
            f"stage1.box_alignment_steps: {tokens} image tokens don't lie as a grid over {h}x{w} patches",
            hint="the connectors `linear` and `mlp2x-gelu` make such; `-o stage1.box_alignment_steps=0` goes without",
        )
    return factor


def _things(boxes: Sequence[Box]) -> list[Box]:
    """Those that one thing fills, the largest first."""

    def area(box: Box) -> float:
        left, top, right, bottom = box.xyxy
        return (right - left) * (bottom - top)

    return sorted((box for box in boxes if not box.crowd and area(box) > 0), key=area, reverse=True)


def _batches(samples: Sequence[Sample], seed: int) -> Iterator[list[Sample]]:
    """Endlessly, each sample once before any comes again."""
    rng = Random(f"llavactl grounding/{seed}")
    waiting: list[Sample] = []
    while True:
        while len(waiting) < min(IMAGES, len(samples)):
            waiting += rng.sample(samples, len(samples))
        yield waiting[:IMAGES]
        del waiting[:IMAGES]
