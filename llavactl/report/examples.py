"""Questions with their pictures and answers, kept in a run: as files to try again, and small ones for the page."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from llavactl.core.paths import write_atomic
from llavactl.report.thumbnails import thumbnail

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef, Turn


def example(folder: Path, turns: tuple[Turn, ...], reference: str, answer: str) -> dict[str, str]:
    """One row for the page: the last question of ``turns``, what is right and what was said.

    The first image of the conversation is copied into ``folder``, whose ``file`` another command can be given;
    one that can't be read is left out.
    """
    images = [image for turn in turns for image in turn.images]
    row = {"question": turns[-1].text.strip(), "reference": reference, "answer": answer}
    return row | (_picture(folder, images[0]) if images else {"image": "", "thumbnail": "", "file": ""})


def _picture(folder: Path, image: ImageRef) -> dict[str, str]:
    try:
        data = image.read()
    except OSError:
        return {"image": image.name, "thumbnail": "", "file": ""}
    file = folder / PurePosixPath(image.name.replace("\\", "/")).name
    write_atomic(file, data)
    return {"image": image.name, "thumbnail": thumbnail(data), "file": str(file)}
