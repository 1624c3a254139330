"""Which parts of the images the words of an answer depend on: attention and occlusion maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from llavactl.chat.context import without_oldest
from llavactl.chat.detokenizer import Detokenizer, Stops
from llavactl.chat.overlay import overlay
from llavactl.core import progress
from llavactl.core.errors import DataError, unexpected
from llavactl.core.schema import IGNORE, IMAGE_TOKEN, Encoded, ImageRef, Turn
from llavactl.data.batches import collate
from llavactl.features import LiveFeatures
from llavactl.features.prepare import Failure, prepare
from llavactl.model.attribution import attention, occlusion
from llavactl.model.inputs import to_device

if TYPE_CHECKING:
    from PIL import Image

    from llavactl.chat.assistant import Assistant
    from llavactl.chat.conversation import Conversation
    from llavactl.core.schema import FeatureShape
    from llavactl.data.batches import FeatureLookup

MAX_BLOCKS = 7
"""Occlusion hides one of at most 7 x 7 blocks of patches at a time; each costs a forward pass of the conversation."""

LIMITS = (
    "Attention shows where the model reads, not what it uses. Occlusion shows which blocks a word depends on, one at a "
    "time, and misses information that two blocks share."
)
"""The limits of these maps, printed with them."""


@dataclass(frozen=True)
class Word:
    """The maps of one word of an answer, one of each kind per image.

    ``attention``: the attention to each cell [h, w] of the connector's grid, as a share of the attention to the tokens
    of all images, averaged over heads, layers and the word's tokens; None if the connector's tokens belong to no cell.
    ``occlusion``: the decrease of the word's log-probability (in nats) if a block [h, w] of the image's features is
    replaced by their mean.
    """

    text: str
    attention: tuple[np.ndarray, ...] | None
    occlusion: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Explanation:
    """The words of an answer with their maps, and the images of the conversation.

    ``seen`` are the images as the vision encoder sees them: padded or cropped, in its resolution. The maps cover
    exactly these.
    """

    words: tuple[Word, ...]
    images: tuple[ImageRef, ...]
    seen: tuple[Image.Image, ...]

    limits: ClassVar[str] = LIMITS

    def most_visual(self, count: int) -> list[Word]:
        """The ``count`` words that depend most on a block of an image, in the order of the answer."""
        by_peak = sorted(self.words, key=lambda word: -max(each.max() for each in word.occlusion))
        chosen = {id(word) for word in by_peak[:count]}
        return [word for word in self.words if id(word) in chosen]

    def overlay(self, word: Word, kind: Literal["attention", "occlusion"], image: int = -1) -> Image.Image | None:
        """The map of ``word`` over the image with this index, by default the last one; None without attention maps.

        Raises:
            RecipeError: another kind, or no image with this index.
        """
        if kind not in ("attention", "occlusion"):
            raise unexpected("kind", "'attention' or 'occlusion'", kind)
        if not -len(self.seen) <= image < len(self.seen):
            raise unexpected("image", f"the index of one of {len(self.seen)} images", image)
        maps = word.attention if kind == "attention" else word.occlusion
        return None if maps is None else overlay(self.seen[image], maps[image])

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "images": [image.name for image in self.images],
            "words": [
                {
                    "word": word.text,
                    "attention": None if word.attention is None else [_rounded(each) for each in word.attention],
                    "occlusion": [_rounded(each) for each in word.occlusion],
                }
                for word in self.words
            ],
            "limits": self.limits,
        }


def explain(assistant: Assistant, turns: Sequence[Turn], features: FeatureLookup | None = None) -> Explanation:
    """The maps of the last answer of ``turns``.

    Raises:
        DataError: there is no image, or no answer.
        ModelError: the language model has no attention weights.
    """
    encoded = assistant.encode_answer(turns) if turns and turns[-1].role == "assistant" else Encoded((), ())
    words = _words(assistant, encoded)
    if not encoded.images or not words:
        raise DataError("nothing to explain: no image or no answer", hint="ask a question about an image")
    shape, device = assistant.shape, assistant.model.device
    assert shape is not None, "explanations need the shape of the features"
    batch = to_device(collate([encoded], features or assistant.features), device)
    looked = attention(assistant.model, batch).cpu().numpy()
    masks = [mask.to(device) for mask in _masks(shape)]
    with progress.bar(len(masks) * len(encoded.images), "explain", "block") as bar:
        shown = [
            occlusion(assistant.model, batch, index, masks, bar.advance).cpu().numpy()
            for index in range(len(encoded.images))
        ]
    height, width = _block_grid(shape)
    return Explanation(
        tuple(
            Word(
                text,
                _attention_maps(assistant, encoded, looked[tokens].mean(0)),
                tuple(each[:, tokens].sum(1).reshape(height, width) for each in shown),
            )
            for text, tokens in words
        ),
        encoded.images,
        tuple(_as_seen(assistant, image) for image in encoded.images),
    )


def explain_last(conversation: Conversation) -> Explanation:
    """The maps of the last answer of ``conversation``.

    Raises:
        DataError: there is no image, or no answer.
        ModelError: the language model has no attention weights.
    """
    turns = without_oldest(conversation.turns, conversation.left_out)
    return explain(conversation.assistant, turns, conversation)


def _words(assistant: Assistant, encoded: Encoded) -> list[tuple[str, list[int]]]:
    """The words of the targets of ``encoded``, each with the indices of its tokens among the targets."""
    output = Detokenizer(assistant.encoding.tokenizer, Stops(frozenset(), ()))
    words: list[tuple[str, list[int]]] = []
    pending: list[int] = []
    is_open = False
    for index, token in enumerate(label for label in encoded.labels if label != IGNORE):
        pending.append(index)
        piece = output.add(token)
        for text, is_space in _runs(piece):
            if is_space:
                is_open = False
            elif is_open:
                words[-1] = (words[-1][0] + text, sorted({*words[-1][1], *pending}))
            else:
                words.append((text, list(pending)))
                is_open = True
        if piece:
            pending = []
    return words


def _runs(text: str) -> list[tuple[str, bool]]:
    """``text`` as runs of whitespace (True) and other characters."""
    runs: list[tuple[str, bool]] = []
    for character in text:
        if runs and runs[-1][1] == character.isspace():
            runs[-1] = (runs[-1][0] + character, runs[-1][1])
        else:
            runs.append((character, character.isspace()))
    return runs


def _attention_maps(assistant: Assistant, encoded: Encoded, weights: np.ndarray) -> tuple[np.ndarray, ...] | None:
    """Attention [T] to the cells of each image, as shares of the attention to all images."""
    if assistant.token_grid is None:
        return None
    height, width = assistant.token_grid
    per_image = assistant.encoding.image_tokens
    at_images = weights[[index for index, token in enumerate(encoded.ids) if token == IMAGE_TOKEN]]
    at_images = at_images / max(at_images.sum(), 1e-12)
    # Tokens of the prefix (CLS) come first, if the connector keeps them.
    cells = at_images.reshape(-1, per_image)[:, per_image % (height * width) :]
    return tuple(cells.reshape(len(cells), height, width, -1).sum(-1))


def _block_grid(shape: FeatureShape) -> tuple[int, int]:
    height, width = shape.grid
    return min(height, MAX_BLOCKS), min(width, MAX_BLOCKS)


def _masks(shape: FeatureShape) -> list[torch.Tensor]:
    """One mask [P] per block, row by row."""
    rows, columns = _block_grid(shape)
    masks = []
    for vertical in np.array_split(np.arange(shape.grid[0]), rows):
        for horizontal in np.array_split(np.arange(shape.grid[1]), columns):
            cells = np.zeros(shape.grid, dtype=bool)
            cells[np.ix_(vertical, horizontal)] = True
            masks.append(torch.from_numpy(np.concatenate([np.zeros(shape.prefix, dtype=bool), cells.ravel()])))
    return masks


def _rounded(values: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.4g}") for value in row] for row in values.tolist()]


def _as_seen(assistant: Assistant, image: ImageRef) -> Image.Image:
    """``image`` as the vision encoder sees it.

    Raises:
        DataError: it can't be read.
    """
    from PIL import Image

    assert isinstance(assistant.features, LiveFeatures)
    pixels = prepare(assistant.features.encoder, image)
    if isinstance(pixels, Failure):
        raise DataError(f"image {image.name} can't be read: {pixels.reason}")
    low, high = float(pixels.min()), float(pixels.max())
    scaled = (pixels - low) / max(high - low, 1e-12)  # undoes the normalization, up to contrast
    return Image.fromarray((255 * scaled.transpose(1, 2, 0)).astype(np.uint8))
