"""The identity of a component as JSON: everything that determines its results.

Files and models that options name count by content, not by path: a model folder under another name is the same model,
and one whose weights, tokenizer or chat template changed is another.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavactl.core.errors import ModelError, PluginError
from llavactl.core.hashes import hash_file, hash_folder
from llavactl.core.model_files import local_folder
from llavactl.core.protocols import Json
from llavactl.core.registry import Registration, kind_label, registry

_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
_MODEL = ("config.json", "tokenizer.json", "tokenizer_config.json", "adapter_config.json", "llavactl.json")
"""A folder with one of these files is a model."""


def component_identity(kind: str, spec: str | Mapping[str, Any]) -> dict[str, Json]:
    """The identity of the component ``spec`` ({"name", options}, or a name alone) of ``kind``.

    It has its name, the version of the plugin that registered it, its options with their defaults, and what the
    component adds in ``identity()``. Files and models that options name are replaced by hashes of their contents.

    Raises:
        ModelError: a file that an option names can't be read.
        PluginError: ``identity()`` is not JSON, or changes from call to call.
    """
    spec = {"name": spec} if isinstance(spec, str) else spec
    entry = registry().get(kind, spec["name"])
    options = registry().options(kind, spec)
    contents = {key: content_of(value) for key, value in options.model_dump(mode="json").items()}
    found: dict[str, Json] = {"name": spec["name"], "version": entry.version, "options": contents}
    made = entry.load()(options)
    return {**found, "identity": _identity(made, entry)} if hasattr(made, "identity") else found


def _identity(component: Any, entry: Registration) -> dict[str, Json]:
    """``component.identity()``, checked: JSON, and the same on every call."""
    identities = [component.identity() for _ in range(2)]
    try:
        first, second = (json.dumps(dict(each), sort_keys=True, allow_nan=False) for each in identities)
        why = "" if first == second else "changes from call to call"
    except (TypeError, ValueError) as error:
        why = f"is not JSON: {error}"
    if why:
        raise PluginError(f"{kind_label(entry.kind)} {entry.name!r} of plugin {entry.plugin}: its identity() {why}")
    return dict(identities[0])


def content_of(value: Any) -> Json:
    """``value`` with paths and ids of files and models replaced by hashes of their contents.

    Folders without a model, such as one of images, are kept by name.
    """
    if isinstance(value, Mapping):
        return {str(key): content_of(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [content_of(each) for each in value]
    if not isinstance(value, str):
        found: Json = value
        return found
    try:
        return _content(value)
    except OSError as error:
        raise ModelError(f"{error.filename or value}: {error.strerror or error}") from error


def relocated(value: Any, old: Path, new: Path) -> Json:
    """``value`` with absolute paths that ``old`` could reach by ``..`` replaced by those that ``new`` reaches so.

    A path is replaced only if something is there: a project moves with what is in it, and models elsewhere stay.
    """
    if isinstance(value, Mapping):
        return {str(key): relocated(each, old, new) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [relocated(each, old, new) for each in value]
    if isinstance(value, str) and Path(value).is_absolute() and Path(value).drive == old.drive:
        there = Path(os.path.normpath(new / os.path.relpath(value, old)))
        return str(there) if there.exists() else value
    found: Json = value
    return found


def with_moved_paths(description: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A model's ``description``, read in ``folder``, with the paths to what has moved together with ``folder``.

    Options of earlier versions have their names now.
    """
    description = _with_new_names(description)
    where = description.get("location")
    if where is None or Path(where) == folder.absolute():
        return dict(description)
    components = {key: description[key] for key in ("vision", "connector", "language") if key in description}
    return {**description, **{key: relocated(each, Path(where), folder.absolute()) for key, each in components.items()}}


def _with_new_names(description: Mapping[str, Any]) -> Mapping[str, Any]:
    connector = description.get("connector")
    if not isinstance(connector, Mapping) or "fold" not in connector:
        return description
    kept = {key: value for key, value in connector.items() if key != "fold"}
    return {**description, "connector": {**kept, "pixel_shuffle": connector["fold"]}}


def refers_to_model(content: Any) -> bool:
    """Whether ``content``, an option's value after ``content_of``, stands for a file or a model."""
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
