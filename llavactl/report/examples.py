"""Sample questions with images and answers, stored in the run folder for the report and for ``llavactl chat``."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from llavactl.core.paths import write_atomic
from llavactl.report.thumbnails import thumbnail

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef, Turn


def example(folder: Path, turns: tuple[Turn, ...], reference: str, answer: str) -> dict[str, str]:
    """One row of the report: the last question of ``turns``, the reference answer and the model's answer.

    The first image of the conversation is copied into ``folder``; ``file`` is the path of the copy. An image that can't
    be read is left out.
    """
    images = [image for turn in turns for image in turn.images]
    row = {"question": turns[-1].text.strip(), "reference": reference, "answer": answer}
    return row | (_copy(folder, images[0]) if images else {"image": "", "thumbnail": "", "file": ""})


def _copy(folder: Path, image: ImageRef) -> dict[str, str]:
    try:
        data = image.read()
    except OSError:
        return {"image": image.name, "thumbnail": "", "file": ""}
    file = folder / PurePosixPath(image.name.replace("\\", "/")).name
    write_atomic(file, data)
    return {"image": image.name, "thumbnail": thumbnail(data), "file": str(file)}
