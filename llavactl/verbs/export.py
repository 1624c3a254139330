"""``llavactl export``: a finished model as a folder that other programs load."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from llavactl.core.errors import DataError, ModelError
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import registry
from llavactl.core.schema import ImageFile
from llavactl.data.images import ImageError, decode
from llavactl.evaluation.verify import Verified, verify
from llavactl.model.folder import describe, of_run, replace_folder
from llavactl.model.foreign import resolve
from llavactl.report.card import card

if TYPE_CHECKING:
    from llavactl.core.protocols import Format
    from llavactl.recipe.frame import Recipe

MARK = "llavactl_export.json"
"""In every export: what it was made of. A folder with another content is never written over."""

PHOTOS = 3


@dataclass(frozen=True)
class ExportReport:
    """Where the export is; ``verified``: what another program made of it, where that was asked for."""

    format: str
    to: str
    model: str
    files: tuple[str, ...]
    bytes: int
    verified: Verified | None
    finished_before: bool = False


def export(
    recipe: Recipe | None,
    form: str,
    to: Path,
    *,
    model: str | None = None,
    check: bool = False,
    images: Sequence[Path] = (),
) -> ExportReport:
    """Writes ``model`` (of any format; default: the recipe's last finished stage) to ``to`` in format ``form``.

    ``check`` reloads it in a process that can't import llavactl and compares the two about ``images``, else about
    the recipe's first photos, else about drawn ones.

    Raises:
        ModelError: the format has no place for the model, ``to`` holds something else, or the two differ.
    """
    made: Format = registry().create("formats", {"name": form})
    if model is None:
        assert recipe is not None
        source = of_run(recipe.run_dir)
    else:
        source = resolve(model, recipe)
    to = to.absolute()
    stamp = {"format": form, "digest": describe(source)["digest"]}
    before = _made_of(to) == stamp and _files(to) == read_json(to / MARK).get("files")
    if not before:
        _write(made, source, to, stamp)
    verified = _verified(made, form, source, to, _photos(recipe, images)) if check else None
    files = sorted(file for file in to.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    names = tuple(str(file.relative_to(to)) for file in files)
    report = ExportReport(form, str(to), str(source), names, size, verified, before)
    if verified is not None and not verified.sound:
        raise ModelError(f"{to}: not the same model: {'; '.join(verified.faults)}", hint="the folder is kept as it is")
    return report


def _write(made: Format, source: Path, to: Path, stamp: dict[str, str]) -> None:
    others = sorted(_files(to).keys() - read_json(to / MARK).get("files", {}).keys()) if to.is_dir() else [to.name]
    if to.exists() and others:
        raise ModelError(
            f"{to}: holds something that is no export of llavactl's, such as {others[0]}", hint="`--to` another folder"
        )
    temporary = to.with_name(f".{to.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary.mkdir()
    try:
        made.write(source, temporary)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ModelError(f"{to}: can't be written: {error}", hint="free some disk, or mend its permissions") from error
    (temporary / "README.md").write_text(card(source, stamp["format"]), encoding="utf-8")
    write_json(temporary / MARK, {**read_json(temporary / MARK), **stamp, "files": _files(temporary)})
    replace_folder(temporary, to)


def _verified(made: Format, form: str, source: Path, to: Path, photos: Sequence[ImageFile]) -> Verified:
    if made.reload is None:
        raise ModelError(f"format {form} has no program that loads it: --verify can't be done")
    found = verify(source, to, made.reload, photos)
    write_json(to / MARK, {**read_json(to / MARK), "verified": asdict(found)})
    return found


def _files(folder: Path) -> dict[str, int]:
    """The files in ``folder`` but the mark itself, with their sizes."""
    found = {str(file.relative_to(folder)): file for file in folder.rglob("*") if file.is_file()}
    return {name: file.stat().st_size for name, file in sorted(found.items()) if name != MARK}


def _made_of(to: Path) -> dict[str, Any]:
    found = read_json(to / MARK)
    return {key: found.get(key) for key in ("format", "digest")}


def _photos(recipe: Recipe | None, images: Sequence[Path]) -> list[ImageFile]:
    """The files of ``images``, else photos of the recipe's data, else drawn ones (kept in the cache)."""
    if images:
        chosen = [ImageFile(str(image.absolute().parent), image.name, follow_links=True) for image in images]
        for image in chosen:
            if why := _unreadable(image):
                raise DataError(f"image {image.file}: {why}", hint="--image takes an image file")
        return chosen
    return list(islice(_of_recipe(recipe), PHOTOS)) or _drawn()


def _of_recipe(recipe: Recipe | None) -> Iterator[ImageFile]:
    seen: set[ImageFile] = set()
    for spec in (*recipe.data.stage2, *recipe.data.stage1) if recipe is not None else ():
        for sample in islice(registry().create("sources", spec.spec()), 200):
            for image in sample.images:
                if isinstance(image, ImageFile) and image not in seen and not _unreadable(image):
                    seen.add(image)
                    yield image


def _unreadable(image: ImageFile) -> str:
    try:
        decode(image.read())
    except OSError as error:
        return str(error.strerror or error)
    except DataError as error:
        return error.reason if isinstance(error, ImageError) else error.message
    return ""


def _drawn() -> list[ImageFile]:
    """Pictures of smooth colours in odd sizes, where there are no photos."""
    import numpy as np
    from PIL import Image

    from llavactl.core.paths import cache_dir

    folder = cache_dir() / "verify"
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for index, (width, height) in enumerate(((320, 213), (201, 300), (256, 256))):
        y, x = np.mgrid[0:height, 0:width]
        waves = [np.sin(x / (9 + 5 * index + c)) + np.cos(y / (7 + 3 * c)) for c in range(3)]
        file = folder / f"waves-{index}.png"
        Image.fromarray(np.stack([(w + 2) * 63 for w in waves], -1).astype(np.uint8)).save(file)
        made.append(ImageFile(str(folder), file.name))
    return made
