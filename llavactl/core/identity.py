"""The identity of a component as JSON: everything that determines its results.

Files and models in options are identified by their contents, not by path: renaming a model folder doesn't change the
identity, changing its weights, tokenizer or chat template does.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llavactl.core.errors import ModelError, PluginError
from llavactl.core.hashes import hash_file, hash_folder
from llavactl.core.model_files import local_folder
from llavactl.core.protocols import Identifiable, Json
from llavactl.core.registry import Registration, kind_label, registry

_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "llavactl.json")
"""A folder that contains one of these files is a model."""


def component_identity(kind: str, spec: str | Mapping[str, Any]) -> dict[str, Json]:
    """The identity of the component ``spec`` ({"name": …, options} or a name) of ``kind``.

    Consists of its name, the version of its plugin, its options with defaults, and the component's own ``identity()``
    if it has one. Files and models in options are replaced by hashes of their contents.

    Raises:
        ModelError: a file in an option can't be read.
        PluginError: ``identity()`` is not JSON or differs between calls.
    """
    spec = {"name": spec} if isinstance(spec, str) else spec
    entry = registry().get(kind, spec["name"])
    options = registry().options(kind, spec)
    contents = {key: content_of(value) for key, value in options.model_dump(mode="json").items()}
    identity: dict[str, Json] = {"name": spec["name"], "version": entry.version, "options": contents}
    component = registry().create(kind, spec)
    return {**identity, "identity": _identity(component, entry)} if isinstance(component, Identifiable) else identity


def _identity(component: Identifiable, entry: Registration) -> dict[str, Json]:
    identity, why = examined_identity(component)
    if why:
        raise PluginError(f"{kind_label(entry.kind)} {entry.name!r} of plugin {entry.plugin}: {why}")
    return dict(identity)


def examined_identity(component: Identifiable) -> tuple[Mapping[str, Json], str]:
    """``component.identity()``, and why it can't be used: it must be JSON and equal on every call. "" if it is."""
    first, second = component.identity(), component.identity()
    try:
        texts = [json.dumps(dict(each), sort_keys=True, allow_nan=False) for each in (first, second)]
    except (TypeError, ValueError) as error:
        return first, f"identity() is not JSON: {error}"
    return first, "" if texts[0] == texts[1] else "identity() differs between calls"


def content_of(value: Any) -> Json:
    """``value`` with files and models, given by path or id, replaced by hashes of their contents.

    Other folders, such as image folders, keep their path.
    """
    if isinstance(value, Mapping):
        return {str(key): content_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [content_of(item) for item in value]
    if not isinstance(value, str):
        json_value: Json = value
        return json_value
    try:
        return _content(value)
    except OSError as error:
        raise ModelError(f"{error.filename or value}: {error.strerror or error}") from error


def _moved_paths(value: Any, old: Path, new: Path) -> Json:
    """``value`` with absolute paths replaced by paths at the same relative position to ``new`` as before to ``old``.

    A path is replaced only if the new one exists: files of a moved project are found again, others keep their path.
    """
    if isinstance(value, Mapping):
        return {str(key): _moved_paths(item, old, new) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_moved_paths(item, old, new) for item in value]
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).drive == old.drive:
        moved = Path(os.path.normpath(new / os.path.relpath(value, old)))
        return str(moved) if moved.exists() else value
    json_value: Json = value
    return json_value


def with_moved_paths(description: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A model's ``description``, read from ``folder``, with current paths if the project of ``folder`` was moved.

    Options of earlier versions are renamed to their current names.
    """
    description = _with_current_names(description)
    location = description.get("location")
    if location is None or Path(location) == folder.absolute():
        return dict(description)
    specs = {key: description[key] for key in ("vision", "connector", "language") if key in description}
    moved = {key: _moved_paths(spec, Path(location), folder.absolute()) for key, spec in specs.items()}
    return {**description, **moved}


def _with_current_names(description: Mapping[str, Any]) -> Mapping[str, Any]:
    connector = description.get("connector")
    if not isinstance(connector, Mapping) or "fold" not in connector:
        return description
    others = {key: value for key, value in connector.items() if key != "fold"}
    return {**description, "connector": {**others, "pixel_shuffle": connector["fold"]}}


def without_models(content: Any) -> Json:
    """``content``, the result of ``content_of`` for options, without the values that refer to a file or a model."""
    if isinstance(content, Mapping):
        return {str(key): without_models(value) for key, value in content.items() if not _refers_to_model(value)}
    if isinstance(content, list | tuple):
        return [without_models(value) for value in content if not _refers_to_model(value)]
    json_value: Json = content
    return json_value


def _refers_to_model(content: Any) -> bool:
    if isinstance(content, Mapping):
        return bool({"sha256", "commit"} & content.keys())
    return isinstance(content, str) and "/" in content


def _content(text: str) -> Json:
    if Path(text).is_absolute():
        path = Path(text)
        if path.is_file():
            return {"sha256": hash_file(path)}
        if path.is_dir() and any((path / name).is_file() for name in _MODEL):
            return {"sha256": hash_folder(path)}
    elif _ID.fullmatch(text) and (snapshot := local_folder(text)):
        return {"id": text, "commit": snapshot.name}
    return text


def is_local(spec: Mapping[str, Any]) -> bool:
    """Whether the models that ``spec`` names, also in nested options, are on this machine."""
    names = [text for text in _strings(spec) if "/" in text]
    ids = [name for name in names if not Path(name).is_absolute()]  # ``content_of`` would hash a folder's weights
    return not any(content_of(name) == name for name in ids)


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, except keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(item)
