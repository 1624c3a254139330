"""llavactl: build LLaVA-type vision-language assistants.

These names are the public API for plugins and scripts, together with ``llavactl.testing``. They are imported lazily
(PEP 562). ``llavactl.api`` has the commands as functions.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "Answer": "llavactl.core.schema",
    "AnswerChecker": "llavactl.core.protocols",
    "AnswerMatcher": "llavactl.core.protocols",
    "Ask": "llavactl.core.protocols.teachers",
    "Assistant": "llavactl.chat.assistant",
    "BatchTeacher": "llavactl.core.protocols",
    "Box": "llavactl.core.schema",
    "BudgetedTeacher": "llavactl.core.protocols",
    "Chat": "llavactl.api",
    "Checkable": "llavactl.core.protocols",
    "CheckableFormat": "llavactl.core.protocols",
    "ClosableTeacher": "llavactl.core.protocols",
    "Connector": "llavactl.core.protocols",
    "Content": "llavactl.core.schema",
    "ConversationError": "llavactl.core.errors",
    "DataError": "llavactl.core.errors",
    "Encoder": "llavactl.core.protocols",
    "ExactTeacher": "llavactl.core.protocols",
    "ExportableTemplate": "llavactl.core.protocols",
    "ExportableVision": "llavactl.core.protocols",
    "FeatureShape": "llavactl.core.schema",
    "Finding": "llavactl.core.protocols",
    "FollowLinks": "llavactl.core.options",
    "Format": "llavactl.core.protocols",
    "GridConnector": "llavactl.core.protocols",
    "Identifiable": "llavactl.core.protocols",
    "ImageBytes": "llavactl.images.references",
    "ImageFile": "llavactl.images.image_file",
    "ImageLocation": "llavactl.images.references",
    "ImageRef": "llavactl.core.schema",
    "ImageRoot": "llavactl.images.references",
    "ImageSlot": "llavactl.core.schema",
    "Json": "llavactl.core.schema",
    "Judged": "llavactl.core.protocols",
    "Language": "llavactl.core.protocols",
    "LanguageTeacher": "llavactl.core.protocols",
    "Likelihood": "llavactl.model.likelihood",
    "Limits": "llavactl.core.protocols",
    "LlavactlError": "llavactl.core.errors",
    "ModelDescription": "llavactl.core.model_description",
    "ModelError": "llavactl.core.errors",
    "ModelId": "llavactl.core.options",
    "Options": "llavactl.core.registry",
    "OtherFindings": "llavactl.core.protocols",
    "PluginError": "llavactl.core.errors",
    "Problem": "llavactl.core.errors",
    "Progress": "llavactl.core.progress",
    "QuantizableLanguage": "llavactl.core.protocols",
    "Question": "llavactl.core.schema",
    "RawRecord": "llavactl.core.protocols",
    "RecipeError": "llavactl.core.errors",
    "RecipePath": "llavactl.core.options",
    "RecipePaths": "llavactl.core.options",
    "RecipePlace": "llavactl.core.options",
    "RecordSource": "llavactl.core.protocols",
    "Register": "llavactl.core.hookspecs",
    "RepairableFile": "llavactl.core.protocols",
    "RepairingSource": "llavactl.core.protocols",
    "Reply": "llavactl.core.protocols",
    "Request": "llavactl.core.protocols",
    "Role": "llavactl.core.schema",
    "Sample": "llavactl.core.schema",
    "Sampling": "llavactl.model.generate",
    "SavedModel": "llavactl.components.formats.native",
    "Schedule": "llavactl.core.protocols",
    "Scores": "llavactl.core.protocols",
    "Segment": "llavactl.core.schema",
    "ShapedVision": "llavactl.core.protocols",
    "SkeletonLanguage": "llavactl.core.protocols",
    "Source": "llavactl.core.protocols",
    "StoreError": "llavactl.core.errors",
    "Task": "llavactl.core.protocols",
    "Teacher": "llavactl.core.protocols",
    "TeacherError": "llavactl.core.errors",
    "TeacherScored": "llavactl.core.protocols",
    "Template": "llavactl.core.protocols",
    "Text": "llavactl.core.schema",
    "TransformersLanguage": "llavactl.components.languages.causal_lm",
    "TransformersLanguageOptions": "llavactl.components.languages.causal_lm",
    "TransformersVision": "llavactl.components.vision.pretrained",
    "TransformersVisionOptions": "llavactl.components.vision.pretrained",
    "Turn": "llavactl.core.schema",
    "UpdateRule": "llavactl.core.protocols",
    "Vision": "llavactl.core.protocols",
    "Weight": "llavactl.core.protocols",
    "cache_dir": "llavactl.core.paths",
    "check": "llavactl.api",
    "check_component": "llavactl.core.protocols",
    "check_image_root": "llavactl.images.references",
    "component_identity": "llavactl.core.identity",
    "evaluate": "llavactl.api",
    "export": "llavactl.api",
    "extract": "llavactl.api",
    "generate": "llavactl.api",
    "hookimpl": "llavactl.core.hookspecs",
    "image_in": "llavactl.images.references",
    "image_in_memory": "llavactl.images.references",
    "llava_findings": "llavactl.components.sources.llava_checks",
    "llava_sample": "llavactl.components.sources.llava_json",
    "load_model": "llavactl.api",
    "load_recipe": "llavactl.api",
    "open_model": "llavactl.components.formats.native",
    "pad_to_square": "llavactl.components.vision.encoder",
    "registry": "llavactl.core.registry",
    "run": "llavactl.api",
    "save_model": "llavactl.components.formats.native",
    "train": "llavactl.api",
}

__all__ = sorted(_MODULES)
__version__ = "0.4.0"


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'llavactl' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
