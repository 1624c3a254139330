"""The list of images without features, written to the run folder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavactl.core.errors import StoreError
from llavactl.core.paths import json_text, write_atomic
from llavactl.core.processes import PER_PROCESS
from llavactl.core.quantities import quantity
from llavactl.features.parts import Part
from llavactl.features.plan import ExtractionPlan

if TYPE_CHECKING:
    from llavactl.core.schema import ImageRef

log = logging.getLogger(__name__)


def skipped_images(plans: Sequence[ExtractionPlan], failures: Mapping[str, Mapping[str, str]]) -> dict[ImageRef, str]:
    """Every image without features and the reason, once even if two stores need it.

    ``failures`` are the reasons by content key, for each fingerprint id.
    """
    reasons: dict[ImageRef, str] = {}
    for plan in plans:
        reasons |= plan.skipped(failures.get(plan.target.fingerprint.id, {}))
    return reasons


def write_skipped(run_dir: Path, part: Part, skipped: Mapping[ImageRef, str]) -> Path:
    """Writes one line of JSON per skipped image and returns the file; it is empty if no image was skipped.

    Raises:
        StoreError: the file can't be written.
    """
    file = run_dir / ("skipped.jsonl" if part.whole else f"skipped-{part.index}-of-{part.count}.jsonl")
    lines = (json_text({"image": image.name, "reason": reason}) for image, reason in skipped.items())
    try:
        write_atomic(file, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise StoreError(
            f"{file} can't be written: {error.strerror or error}",
            hint="the features are stored; set `run_dir` to a writable folder",
        ) from error
    if skipped:
        number = quantity(len(skipped), "image")
        log.warning("skipped %s, listed with reasons in %s", number, file, extra=PER_PROCESS)
    return file
