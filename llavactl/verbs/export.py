"""``llavactl export``: exports a model to a folder that other programs load, and verifies the export."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError
from llavactl.core.identity import component_identity
from llavactl.core.registry import registry
from llavactl.evaluation.verification.compare import VerificationResult
from llavactl.evaluation.verification.images import default_images, image_files
from llavactl.evaluation.verification.verify import verify
from llavactl.model.export_folder import ExportFolder
from llavactl.model.folder import identity, latest_model
from llavactl.model.imported import resolve
from llavactl.report.card import card

if TYPE_CHECKING:
    from llavactl.core.protocols import Format
    from llavactl.images.image_file import ImageFile
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """An export in the folder ``to``; ``verified`` is None if it wasn't verified."""

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

    The export is verified with ``images`` (default: the first images of the recipe's data, else synthetic ones): it is
    loaded in a process that can't import llavactl and compared with ``model``. ``check=False`` skips this,
    ``check=True`` refuses a format that can't be verified. A verified export that hasn't changed is not verified again.

    Raises:
        RecipeError: the format doesn't have an option of ``spec``.
        ModelError: the format can't represent the model, ``to`` contains other files, or the export differs from the
            model.
        DataError: a file in ``images`` is not an image.
    """
    export_format = registry().create("formats", spec, flag="-t ")
    script = _verification_script(export_format, spec["name"], check)
    given_images = image_files(images)
    source = _source_model(recipe, model)
    folder = ExportFolder(to.absolute())
    origin = _origin(spec, source)
    finished_before = folder.is_current(origin)
    if not finished_before:
        folder.write(export_format, source, origin, partial(card, source, origin["format"]))
    result = None
    if script is not None:
        result = None if given_images else VerificationResult.from_json(folder.verification())
        result = result or _verify(folder, source, script, given_images or default_images(recipe))
    files = folder.files()
    return ExportReport(
        format=str(spec["name"]),
        to=str(folder.path),
        model=str(source),
        files=tuple(str(file.relative_to(folder.path)) for file in files),
        bytes=sum(file.stat().st_size for file in files),
        verified=result,
        finished_before=finished_before,
    )


def _verification_script(export_format: Format, name: str, check: bool | None) -> Path | None:
    """The script to verify the export with; None if it is not verified.

    Raises:
        ModelError: the format can't be verified, but ``check`` requires it.
    """
    if check is False:
        return None
    if export_format.reload is None:
        if check:
            raise ModelError(f"exports in format {name} can't be verified", hint="omit --verify")
        log.warning("exports in format %s can't be verified: skipping verification", name)
    return export_format.reload


def _source_model(recipe: Outline | None, model: str | None) -> Path:
    """The model folder of ``model``, else of the recipe's last finished stage."""
    if model is not None:
        return resolve(model, recipe)
    assert recipe is not None
    return latest_model(recipe.run_dir)


def _origin(spec: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Everything that the export of the model folder ``source`` in format ``spec`` depends on."""
    component = component_identity("formats", spec)
    return {
        "format": component["name"],
        "version": component["version"],
        "options": component["options"],
        "model": identity(source),
    }


def _verify(folder: ExportFolder, source: Path, script: Path, images: Sequence[ImageFile]) -> VerificationResult:
    """Compares the export with ``source`` and stores the result.

    Raises:
        ModelError: the export differs from ``source``, or can't be loaded.
    """
    log.info("verifying %s in a separate process, in float32 on the CPU (--no-verify skips this)", folder.path)
    content = folder.content()
    folder.remove_verification()
    result = verify(source, folder.path, script, images)
    folder.store_verification(asdict(result), content)
    if not result.sound:
        raise ModelError(
            f"{folder.path}: the export differs from the model: {'; '.join(result.faults)}",
            hint="don't use this export; it is kept for inspection, and the next export to this folder replaces it",
        )
    return result
