"""Formats of a model on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@runtime_checkable
class Format(Protocol):
    """A format of a model folder. Implement ``CheckableFormat`` as well if it can be checked before training."""

    reload: Path | None
    """A script that reloads an export without llavactl, to verify it (input and output: docs/reference/export.md);
    None: exports in this format are not verified."""

    def recognise(self, folder: Path) -> bool:
        """Whether ``folder`` is in this format, determined from its files, not from its name."""

    def read(self, folder: Path, model: Path) -> None:
        """Converts the checkpoint in ``folder`` to llavactl's model folder ``model``.

        Small weights are copied, large ones are referenced. ``sources`` in ``llavactl.json`` lists the ids and folders
        outside ``folder`` that the model depends on; if their contents change, ``folder`` is converted again.
        """

    def write(self, model: Path, to: Path) -> None:
        """Exports llavactl's model folder ``model`` to the folder ``to``.

        ``to`` is renamed when the export is complete; paths into it in its ``config.json`` are adjusted.
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
