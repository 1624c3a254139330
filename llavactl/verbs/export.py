"""``llavactl export``: exports a model to a folder that other programs load, and verifies the export."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavactl.core.errors import ModelError, ProgramMissingError
from llavactl.core.identity import component_identity
from llavactl.core.program import command_line
from llavactl.core.registry import registry
from llavactl.evaluation.verification.images import default_images, image_files
from llavactl.evaluation.verification.result import VerificationResult
from llavactl.evaluation.verification.table import markdown
from llavactl.evaluation.verification.verify import verify
from llavactl.model.export_folder import ExportFolder
from llavactl.model.folder import identity, latest_model
from llavactl.model.imported import resolve
from llavactl.report.card import card, with_verification

if TYPE_CHECKING:
    from llavactl.images.image_file import ImageFile
    from llavactl.recipe.frame import Outline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportReport:
    """An export in the folder ``to``; ``verified`` is None if it wasn't verified, ``not_verified`` the reason."""

    format: str
    to: str
    model: str
    files: tuple[str, ...]
    bytes: int
    verified: VerificationResult | None
    not_verified: str | None = None
    finished_before: bool = False


def export(
    recipe: Outline | None,
    spec: Mapping[str, Any],
    to: Path,
    *,
    model: str | None = None,
    check: bool | None = None,
    allow_different: bool = False,
    images: Sequence[Path] = (),
) -> ExportReport:
    """Exports ``model`` (of any format; default: the recipe's last finished stage) to ``to`` in the format ``spec``:
    ``{"name": …, its options}``.

    The export is verified with ``images`` (default: the first images of the recipe's data, else synthetic ones): it is
    loaded in a process that can't import llavactl and compared with ``model``. ``check=False`` skips this,
    ``check=True`` refuses an export that can't be verified, because of its format or because the program that loads it
    isn't installed. A verified export that hasn't changed is not verified again. With ``allow_different``, an export
    that differs from the model is kept.

    Raises:
        RecipeError: the format doesn't have an option of ``spec``.
        ProgramMissingError: ``check=True``, and the program that loads the export isn't installed.
        ModelError: the format can't represent the model, ``to`` contains other files, or the export differs from the
            model.
        DataError: a file in ``images`` is not an image.
    """
    export_format = registry().create("formats", spec, flag="-t ")
    script = export_format.reload
    if script is None and check:
        raise ModelError(f"exports in format {spec['name']} can't be verified", hint="omit --verify")
    given_images = image_files(images)
    source = _source_model(recipe, model)
    folder = ExportFolder(to.absolute())
    origin = _origin(spec, source)
    finished_before = folder.is_current(origin) and (allow_different or not folder.differs())
    if not finished_before:
        model_card = partial(card, source, origin["format"], model or str(source), _options(spec))
        folder.write(export_format, source, origin, model_card)
    result, reason = None, None
    if check is False:
        reason = "verification was skipped"
    elif script is None:
        reason = "its format has no verification script"
        log.warning("exports in format %s can't be verified: skipping verification", spec["name"])
    else:
        result = None if given_images else VerificationResult.from_json(folder.verification())
        try:
            result = result or _verify(folder, source, script, origin, given_images or default_images(recipe))
        except ProgramMissingError as error:
            if check:
                raise
            reason = error.message
            later = _command(model or str(source), spec, folder.path)
            log.warning("%s: not verified: %s; `%s` verifies it later", folder.path, reason, later)
    if result is not None:
        _refuse_different(folder, result, allow_different)
    files = folder.files()
    return ExportReport(
        format=str(spec["name"]),
        to=str(folder.path),
        model=str(source),
        files=tuple(str(file.relative_to(folder.path)) for file in files),
        bytes=sum(file.stat().st_size for file in files),
        verified=result,
        not_verified=reason,
        finished_before=finished_before,
    )


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


def _command(model: str, spec: Mapping[str, Any], to: Path) -> str:
    """The command that verifies the export of ``model`` in the folder ``to``."""
    arguments = ("--model", model, "--format", spec["name"], "--to", str(to))
    return command_line("export", *arguments, *_options(spec), "--verify")


def _options(spec: Mapping[str, Any]) -> list[str]:
    """The options of the format ``spec`` as arguments of the command."""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in spec.items()}
    return [part for key, value in texts.items() if key != "name" for part in ("-t", f"{key}={value}")]


def _verify(
    folder: ExportFolder, source: Path, script: Path, origin: Mapping[str, Any], images: Sequence[ImageFile]
) -> VerificationResult:
    """Compares the export with ``source`` and stores the result, also in its model card.

    Raises:
        ModelError: the export can't be loaded.
    """
    log.info("verifying %s in a separate process, in float32 on the CPU (--no-verify skips this)", folder.path)
    content = folder.content()
    try:
        result = verify(source, folder.path, script, images)
    except ProgramMissingError:
        raise  # an earlier result is still that of these files, as after an interrupt
    except ModelError:
        folder.remove_verification()
        folder.update_card(partial(with_verification, verification="Not verified."))
        raise
    folder.update_card(partial(with_verification, verification=markdown(origin["format"], result)))
    folder.store_verification(asdict(result), content)
    return result


def _refuse_different(folder: ExportFolder, result: VerificationResult, allow_different: bool) -> None:
    """Raises ModelError if the export differs from its model, unless this is allowed."""
    if result.verdict != "different":
        return
    message = f"{folder.path}: the export differs from the model: {'; '.join(result.faults)}"
    if not allow_different:
        hint = "don't use this export; it is kept for inspection, and the next export to this folder replaces it"
        raise ModelError(message, hint=hint)
    log.warning("%s", message)
