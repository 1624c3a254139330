"""Formats of a model on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typing_extensions import Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@runtime_checkable
class Format(Protocol):
    """A format of a model folder. Implement ``CheckableFormat`` as well if it can be checked before training.

    The files of llavactl's own model folder are read with ``llavactl.open_model`` and written with
    ``llavactl.save_model``.
    """

    reload: Path | None
    """A script that loads an export without llavactl, to verify it
    (docs/reference/export.md#verification-script); None: exports in this format are not verified."""

    def recognise(self, folder: Path) -> bool:
        """Whether ``folder`` is in this format, determined from its files, not from its name.

        Called for every folder that isn't llavactl's own, also for those of other formats. False for every folder: the
        format only writes.
        """

    def read(self, folder: Path, model: Path) -> None:
        """Converts the checkpoint in ``folder`` to llavactl's model folder ``model``, an empty folder.

        ``save_model`` writes it: small weights are copied, large ones are referenced.

        Raises:
            ModelError: the checkpoint is incomplete, or not one that llavactl supports; or the format only writes.
        """

    def write(self, model: Path, to: Path) -> None:
        """Exports llavactl's model folder ``model`` to the empty folder ``to``.

        ``open_model`` reads it. ``to`` is renamed when the export is complete; paths into it in its ``config.json`` are
        adjusted. The file ``llavactl_export.json``, to which llavactl adds the origin of the export, may have lists
        ``stop_strings``, ``limitations`` (sentences) and ``usage`` (lines of Markdown) for the model card, and the
        model's ``SavedModel.settings``.

        Raises:
            ModelError: the format can't represent the model.
        """


@runtime_checkable
class CheckableFormat(Protocol):
    """A format that can be checked against the components of a recipe before training."""

    def check(
        self,
        vision: Mapping[str, Any],
        connector: Mapping[str, Any],
        language: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
    ) -> None:
        """Raises ModelError if the format can't represent a model of these components.

        ``vision`` and ``connector`` are component specs ({"name": …, options}); ``language`` has no weights (meta
        device).
        """
