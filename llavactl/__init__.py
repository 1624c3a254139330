"""llavactl: build LLaVA-type vision-language assistants.

These names are the public API for plugins and scripts, together with ``llavactl.testing``. They are imported lazily
(PEP 562). ``llavactl.api`` has the commands as functions.
"""

from __future__ import annotations

import importlib
from typing import Any

_MODULES = {
    "Answer": "llavactl.core.schema",
    "BatchTeacher": "llavactl.core.protocols",
    "Box": "llavactl.core.schema",
    "Chat": "llavactl.api",
    "Connector": "llavactl.core.protocols",
    "DataError": "llavactl.core.errors",
    "Encoder": "llavactl.core.protocols",
    "FeatureShape": "llavactl.core.schema",
    "Finding": "llavactl.core.protocols",
    "Format": "llavactl.core.protocols",
    "ImageFile": "llavactl.images.image_file",
    "ImageRef": "llavactl.core.schema",
    "ImageSlot": "llavactl.core.schema",
    "Judged": "llavactl.core.protocols",
    "Language": "llavactl.core.protocols",
    "LanguageTeacher": "llavactl.core.protocols",
    "Limits": "llavactl.core.protocols",
    "LlavactlError": "llavactl.core.errors",
    "ModelError": "llavactl.core.errors",
    "ModelId": "llavactl.core.options",
    "Options": "llavactl.core.registry",
    "PluginError": "llavactl.core.errors",
    "Problem": "llavactl.core.errors",
    "Progress": "llavactl.core.progress",
    "Question": "llavactl.core.schema",
    "RawRecord": "llavactl.core.protocols",
    "RecipeError": "llavactl.core.errors",
    "RecipePath": "llavactl.core.options",
    "RecipePaths": "llavactl.core.options",
    "RecordSource": "llavactl.core.protocols",
    "RepairingSource": "llavactl.core.protocols",
    "Reply": "llavactl.core.protocols",
    "Request": "llavactl.core.protocols",
    "Sample": "llavactl.core.schema",
    "Scores": "llavactl.core.protocols",
    "Source": "llavactl.core.protocols",
    "StoreError": "llavactl.core.errors",
    "Task": "llavactl.core.protocols",
    "Teacher": "llavactl.core.protocols",
    "TeacherError": "llavactl.core.errors",
    "Template": "llavactl.core.protocols",
    "Text": "llavactl.core.schema",
    "TransformersLanguage": "llavactl.components.languages.causal_lm",
    "TransformersLanguageOptions": "llavactl.components.languages.causal_lm",
    "TransformersVision": "llavactl.components.vision.pretrained",
    "TransformersVisionOptions": "llavactl.components.vision.pretrained",
    "Turn": "llavactl.core.schema",
    "Vision": "llavactl.core.protocols",
    "cache_dir": "llavactl.core.paths",
    "check": "llavactl.api",
    "component_identity": "llavactl.core.identity",
    "evaluate": "llavactl.api",
    "export": "llavactl.api",
    "extract": "llavactl.api",
    "generate": "llavactl.api",
    "hookimpl": "llavactl.core.hookspecs",
    "load_model": "llavactl.api",
    "load_recipe": "llavactl.api",
    "pad_to_square": "llavactl.components.vision.encoder",
    "registry": "llavactl.core.registry",
    "run": "llavactl.api",
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
