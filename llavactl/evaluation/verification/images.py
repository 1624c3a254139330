"""The images that an export is verified with: given files, images of the recipe's data, or synthetic ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import DataError
from llavactl.core.paths import cache_dir
from llavactl.data.records import source_samples
from llavactl.images.decode import ImageError, decode
from llavactl.images.image_file import ImageFile
from llavactl.recipe.stages import STAGES

if TYPE_CHECKING:
    from llavactl.recipe.frame import Outline

MAX_IMAGES = 3
MAX_SAMPLES = 200
"""Samples per source that are searched for a readable image."""

SYNTHETIC_SIZES = ((320, 213), (201, 300), (256, 256))
"""(width, height): wide, tall and square, so that cropping and padding are compared as well."""


def image_files(paths: Sequence[Path]) -> list[ImageFile]:
    """The image files at ``paths``.

    Raises:
        DataError: a file can't be decoded as an image.
    """
    images = [ImageFile(str(path.absolute().parent), path.name, follow_links=True) for path in paths]
    for image in images:
        if reason := _decoding_error(image):
            raise DataError(f"image {image.file}: {reason}", hint="--image takes an image file")
    return images


def default_images(recipe: Outline | None) -> list[ImageFile]:
    """The first readable images of the recipe's data; synthetic images if it has none."""
    return list(islice(_recipe_images(recipe), MAX_IMAGES)) or _synthetic_images()


def _recipe_images(recipe: Outline | None) -> Iterator[ImageFile]:
    yielded: set[ImageFile] = set()
    specs = [spec for number in reversed(STAGES) for spec in recipe.sources(number)] if recipe is not None else []
    for spec in specs:
        for sample in islice(source_samples(spec.spec()), MAX_SAMPLES):
            for image in sample.images:
                if isinstance(image, ImageFile) and image not in yielded and not _decoding_error(image):
                    yielded.add(image)
                    yield image


def _decoding_error(image: ImageFile) -> str:
    """Why ``image`` can't be decoded; "" if it can."""
    try:
        decode(image.read())
    except OSError as error:
        return str(error.strerror or error)
    except DataError as error:
        return error.reason if isinstance(error, ImageError) else error.message
    return ""


def _synthetic_images() -> list[ImageFile]:
    """Smooth color gradients, written to the cache folder."""
    import numpy as np
    from PIL import Image

    folder = cache_dir() / "verify"
    folder.mkdir(parents=True, exist_ok=True)
    images = []
    for index, (width, height) in enumerate(SYNTHETIC_SIZES):
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x / (9 + 5 * index + channel)) + np.cos(y / (7 + 3 * channel)) for channel in range(3)]
        file = folder / f"waves-{index}.png"
        Image.fromarray(np.stack([(wave + 2) * 63 for wave in waves], -1).astype(np.uint8)).save(file)
        images.append(ImageFile(str(folder), file.name))
    return images
