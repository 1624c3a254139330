"""The Protocol of each kind of component.

A registered target is called with its validated options and returns an object of the kind's Protocol. The call must be
cheap: weights are read by ``load``. Protocols are structural, so the target may be a class, a function or a generator
function, and no base class is needed.
"""

from __future__ import annotations

from collections.abc import Mapping

from llavactl.core.protocols.data import Finding, RawRecord, RecordSource, RepairingSource, Source
from llavactl.core.protocols.export import CheckableFormat, Format
from llavactl.core.protocols.language import Language, QuantizableLanguage, SkeletonLanguage, Template
from llavactl.core.protocols.tasks import AnswerChecker, AnswerMatcher, Judged, Scores, Task, TeacherScored
from llavactl.core.protocols.teachers import (
    Ask,
    BatchTeacher,
    BudgetedTeacher,
    LanguageTeacher,
    Limits,
    Reply,
    Request,
    Teacher,
)
from llavactl.core.protocols.vision import Connector, Encoder, GridConnector, ShapedVision, Vision
from llavactl.core.schema import Json

__all__ = [
    "KINDS",
    "AnswerChecker",
    "AnswerMatcher",
    "Ask",
    "BatchTeacher",
    "BudgetedTeacher",
    "CheckableFormat",
    "Connector",
    "Encoder",
    "Finding",
    "Format",
    "GridConnector",
    "Json",
    "Judged",
    "Language",
    "LanguageTeacher",
    "Limits",
    "QuantizableLanguage",
    "RawRecord",
    "RecordSource",
    "RepairingSource",
    "Reply",
    "Request",
    "Scores",
    "ShapedVision",
    "SkeletonLanguage",
    "Source",
    "Task",
    "Teacher",
    "TeacherScored",
    "Template",
    "Vision",
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
}
"""The kinds of components; folders, hooks and the command line use the same names."""
