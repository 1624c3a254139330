"""``llavactl export``: a finished model as a folder that other programs load."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from llavactl.core.errors import DataError, ModelError
from llavactl.core.hashes import hash_file, hash_json
from llavactl.core.identity import component_identity
from llavactl.core.paths import read_json, write_json
from llavactl.core.registry import registry
from llavactl.evaluation.verify import VerificationResult, verify
from llavactl.images.decode import ImageError, decode
from llavactl.images.image_file import ImageFile
from llavactl.model.folder import identity, latest_model, replace_folder
from llavactl.model.imported import resolve
from llavactl.recipe.stages import STAGES
from llavactl.report.card import card

if TYPE_CHECKING:
    from llavactl.core.protocols import Format
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)

MARK = "llavactl_export.json"
"""In every export: what it was made of. A folder with another content is never written over."""

CARD = "README.md"

VERIFIED = ("verified", "verified_content")
"""Its keys: a verification's result, and the hash of the content that was verified."""

PHOTOS = 3


@dataclass(frozen=True)
class ExportReport:
    """Where the export is; ``verified``: the result of the verification, None if it wasn't run."""

    format: str
    to: str
    model: str
    files: tuple[str, ...]
    bytes: int
    verified: VerificationResult | None
    finished_before: bool = False


def export(
    recipe: Outline | None,
    spec: Mapping[str, Any],
    to: Path,
    *,
    model: str | None = None,
    check: bool | None = None,
    images: Sequence[Path] = (),
) -> ExportReport:
    """Exports ``model`` (of any format; default: the recipe's last finished stage) to ``to`` in the format ``spec``:
    ``{"name": …, its options}``.

    The export is then reloaded in a process that can't import llavactl and compared with ``model`` on ``images``, else
    on the recipe's first images, else on synthetic ones. ``check=False`` skips this, ``check=True`` refuses a format
    that can't be reloaded. An export that was verified and hasn't changed is not verified again.

    Raises:
        RecipeError: the format has no such option.
        ModelError: the format can't represent the model, ``to`` has other contents, or the two differ.
    """
    made: Format = registry().create("formats", spec, flag="-t ")
    name = str(spec["name"])
    if made.reload is None and check is not False:
        if check:
            raise ModelError(f"exports in format {name} can't be verified", hint="omit --verify")
        log.warning("exports in format %s can't be verified: skipping verification", name)
    given = _given(images)
    if model is None:
        assert recipe is not None
        source = latest_model(recipe.run_dir)
    else:
        source = resolve(model, recipe)
    to = to.absolute()
    stamp = _stamp(spec, source)
    before = _is_made_of(to, stamp)
    if not before:
        _write(made, source, to, stamp)
    verified = None
    if made.reload is not None and check is not False:
        verified = None if given else _verified_before(to)
        verified = verified or _verify(made.reload, source, to, given or _photos(recipe))
    files = sorted(file for file in to.rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files)
    names = tuple(str(file.relative_to(to)) for file in files)
    return ExportReport(name, str(to), str(source), names, size, verified, before)


def _stamp(spec: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Everything that the export of the model folder ``source`` in format ``spec`` depends on."""
    made = component_identity("formats", spec)
    return {"format": made["name"], "version": made["version"], "options": made["options"], "model": identity(source)}


def _is_made_of(to: Path, stamp: Mapping[str, Any]) -> bool:
    """Whether ``to`` is an export with this ``stamp`` and the contents that were written.

    Its model card may have been edited. Not so for an export that failed verification, or that was moved and
    contains absolute paths.
    """
    found = read_json(to / MARK)
    if found.get("location", str(to)) != str(to):
        return False
    if {key: found.get(key) for key in stamp} != stamp or (found.get("verified") or {}).get("faults"):
        return False
    here, written = _files(to), found.get("files", {})
    return {**here, CARD: None} == {**written, CARD: None}


def _write(made: Format, source: Path, to: Path, stamp: Mapping[str, Any]) -> None:
    """Writes ``to`` atomically; an existing export is kept until the new one is complete."""
    others = sorted(_names(to) - read_json(to / MARK).get("files", {}).keys()) if to.is_dir() else [to.name]
    if to.exists() and others:
        raise ModelError(
            f"{to}: holds something that is no export of llavactl's, such as {others[0]}", hint="`--to` another folder"
        )
    temporary = to.with_name(f".{to.name}.partial")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        made.write(source, temporary)
        stop_strings = [read_json(file).get("stop_strings", []) for file in sorted(temporary.rglob(MARK))]
        (temporary / CARD).write_text(card(source, stamp["format"], [*chain(*stop_strings)]), encoding="utf-8")
        location = {"location": str(to)} if _relocate(temporary, to) else {}
        mark = {**read_json(temporary / MARK), **stamp, **location, "files": _files(temporary)}
        write_json(temporary / MARK, mark)
        replace_folder(temporary, to)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{to}: can't be written: {' '.join(str(error).split())}", hint="free disk space, or check its permissions"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _relocate(temporary: Path, to: Path) -> bool:
    """Replaces paths into ``temporary`` in its config.json by those into ``to``; returns whether there were any."""
    config = read_json(temporary / "config.json")
    named = {key: each for key, each in config.items() if isinstance(each, str) and each.startswith(str(temporary))}
    if named:
        final = {key: str(to / Path(each).relative_to(temporary)) for key, each in named.items()}
        write_json(temporary / "config.json", {**config, **final})
    return bool(named)


def _verify(script: Path, source: Path, to: Path, photos: Sequence[ImageFile]) -> VerificationResult:
    """Compares ``to`` with ``source`` and stores the result in ``to``, with a hash of the verified content.

    Raises:
        ModelError: they differ, or ``to`` can't be loaded.
    """
    log.info("verifying %s in a separate process, in float32 on the CPU (--no-verify skips this)", to)
    content = _content(to)
    mark = {key: value for key, value in read_json(to / MARK).items() if key not in VERIFIED}
    write_json(to / MARK, mark)
    found = verify(source, to, script, photos)
    write_json(to / MARK, {**mark, "verified": asdict(found), "verified_content": content})
    if not found.sound:
        raise ModelError(
            f"{to}: the export differs from the model: {'; '.join(found.faults)}",
            hint="don't use this export; it is kept for inspection, and the next export to this folder replaces it",
        )
    return found


def _verified_before(to: Path) -> VerificationResult | None:
    """The result of the last verification of ``to``, if it passed and no file has changed since."""
    mark = read_json(to / MARK)
    kept = mark.get("verified")
    if (
        not isinstance(kept, dict)
        or kept.keys() != {each.name for each in fields(VerificationResult)}
        or kept["faults"]
    ):
        return None
    return VerificationResult(**{**kept, "faults": ()}) if mark.get("verified_content") == _content(to) else None


def _content(to: Path) -> str:
    """A hash of the names and contents of all files of the export in ``to``."""
    return hash_json(_files(to))


def _files(folder: Path) -> dict[str, str]:
    """The files in ``folder`` but the mark itself, with the sha256 of their contents."""
    return {name: hash_file(folder / name) for name in sorted(_names(folder))}


def _names(folder: Path) -> set[str]:
    found = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    return {name for name in found if name != MARK}


def _given(images: Sequence[Path]) -> list[ImageFile]:
    """The files of ``images``.

    Raises:
        DataError: one is not an image.
    """
    chosen = [ImageFile(str(image.absolute().parent), image.name, follow_links=True) for image in images]
    for image in chosen:
        if why := _unreadable(image):
            raise DataError(f"image {image.file}: {why}", hint="--image takes an image file")
    return chosen


def _photos(recipe: Outline | None) -> list[ImageFile]:
    """Images of the recipe's data, else synthetic ones (cached)."""
    return list(islice(_of_recipe(recipe), PHOTOS)) or _drawn()


def _of_recipe(recipe: Outline | None) -> Iterator[ImageFile]:
    seen: set[ImageFile] = set()
    specs = [spec for number in reversed(STAGES) for spec in recipe.sources(number)] if recipe is not None else []
    for spec in specs:
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
    """Synthetic images: smooth colour gradients in unusual sizes."""
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
