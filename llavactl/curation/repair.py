"""Writing repaired records, with a log of the changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavactl.curation.problems import KINDS

if TYPE_CHECKING:
    from llavactl.core.protocols import Finding, RawRecord, RepairingSource

DROPPED = frozenset({"json", "image-missing", "image-broken", "template", "untrained"})
"""Problems for which a record is dropped, even if all others can be repaired."""


@dataclass
class RepairWriter:
    """Writes every record, repaired by ``source`` if it has a problem that affects training, and logs the changes."""

    source: RepairingSource
    write: Callable[[Mapping[str, Any]], None]
    log: Callable[[Mapping[str, Any]], None]
    written: int = 0
    changed: int = 0
    dropped: int = 0

    def add(self, record: RawRecord, findings: Sequence[Finding]) -> None:
        """Writes or drops ``record``, given its ``findings``."""
        errors = [finding for finding in findings if KINDS[finding.kind].effect != "noted"]
        changes = [f"dropped: {each.kind}: {each.detail}".removesuffix(": ") for each in errors if each.kind in DROPPED]
        value = None if changes else record.value
        if errors and not changes:
            value, changes = self.source.repair(record)
        if value is not None:
            self.write(value)
            self.written += 1
        if changes:
            id_ = record.value.get("id") if isinstance(record.value, Mapping) else None
            self.log({"where": record.where, "id": id_, "changes": changes})
            self.changed += value is not None
            self.dropped += value is None
