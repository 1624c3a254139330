"""The Protocol of each kind of component.

A registered target is called with its validated options and returns an object of the kind's Protocol. The call must be
cheap: weights are read by ``load``. Protocols are structural, so the target may be a class, a function or a generator
function, and no base class is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from llavactl.core.protocols.data import (
    Finding,
    OtherFindings,
    RawRecord,
    RecordSource,
    RepairableFile,
    RepairingSource,
    Source,
)
from llavactl.core.protocols.export import CheckableFormat, Format
from llavactl.core.protocols.language import (
    ExportableTemplate,
    Language,
    QuantizableLanguage,
    SkeletonLanguage,
    Template,
)
from llavactl.core.protocols.optional import Checkable, Identifiable, check_component
from llavactl.core.protocols.tasks import AnswerChecker, AnswerMatcher, Judged, Scores, Task, TeacherScored
from llavactl.core.protocols.teachers import (
    Ask,
    BatchTeacher,
    BudgetedTeacher,
    ClosableTeacher,
    ExactTeacher,
    LanguageTeacher,
    Limits,
    Reply,
    Request,
    Teacher,
)
from llavactl.core.protocols.training import Schedule, UpdateRule, Weight
from llavactl.core.protocols.vision import Connector, Encoder, ExportableVision, GridConnector, ShapedVision, Vision
from llavactl.core.schema import Json

__all__ = [
    "ALTERNATIVES",
    "CAPABILITIES",
    "KINDS",
    "AnswerChecker",
    "AnswerMatcher",
    "Ask",
    "BatchTeacher",
    "BudgetedTeacher",
    "Checkable",
    "CheckableFormat",
    "ClosableTeacher",
    "Connector",
    "Encoder",
    "ExactTeacher",
    "ExportableTemplate",
    "ExportableVision",
    "Finding",
    "Format",
    "GridConnector",
    "Identifiable",
    "Json",
    "Judged",
    "Kind",
    "Language",
    "LanguageTeacher",
    "Limits",
    "OtherFindings",
    "QuantizableLanguage",
    "RawRecord",
    "RecordSource",
    "RepairableFile",
    "RepairingSource",
    "Reply",
    "Request",
    "Schedule",
    "Scores",
    "ShapedVision",
    "SkeletonLanguage",
    "Source",
    "Task",
    "Teacher",
    "TeacherScored",
    "Template",
    "UpdateRule",
    "Vision",
    "Weight",
    "check_component",
]

Kind = Literal[
    "sources",
    "vision",
    "connectors",
    "languages",
    "templates",
    "teachers",
    "tasks",
    "formats",
    "optimizers",
    "schedules",
]

KINDS: Mapping[str, type] = {
    "sources": Source,
    "vision": Vision,
    "connectors": Connector,
    "languages": Language,
    "templates": Template,
    "teachers": Teacher,
    "tasks": Task,
    "formats": Format,
    "optimizers": UpdateRule,
    "schedules": Schedule,
}
"""The kinds of components; folders, hooks and the command line use the same names."""

CAPABILITIES: Mapping[str, tuple[type, ...]] = {
    "sources": (RecordSource, RepairingSource, RepairableFile, OtherFindings, Checkable, Identifiable),
    "vision": (ShapedVision, ExportableVision, Checkable),
    "connectors": (GridConnector, Identifiable),
    "languages": (SkeletonLanguage, QuantizableLanguage, Checkable, Identifiable),
    "templates": (ExportableTemplate, Identifiable),
    "teachers": (LanguageTeacher, BatchTeacher, ClosableTeacher, ExactTeacher, Identifiable),
    "tasks": (Judged, TeacherScored, AnswerMatcher, AnswerChecker, Identifiable),
    "formats": (CheckableFormat, Identifiable),
    "optimizers": (Identifiable,),
    "schedules": (Identifiable,),
}
"""The optional Protocols of each kind, which llavactl asks for with ``isinstance``."""

ALTERNATIVES: Mapping[type, type] = {Task: Judged}
"""Protocols that a component of a kind may implement instead of the kind's."""
