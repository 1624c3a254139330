"""What a set of features was made with: two with the same fingerprint hold the same numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llavactl.core.identity import component_identity, refers_to_model

if TYPE_CHECKING:
    from llavactl.core.protocols import Json
    from llavactl.recipe.sections import Features

FORMAT = 1
"""Version of the store's layout; part of every fingerprint, so an older store is never misread."""

_ABSENT = "nothing"


@dataclass(frozen=True)
class Fingerprint:
    """All that changes a number of the features, as plain JSON ``fields``."""

    fields: Mapping[str, Json]

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """The fingerprint that ``json`` wrote.

        Raises:
            ValueError: ``text`` is not a JSON object.
        """
        fields = json.loads(text)
        if not isinstance(fields, dict):
            raise ValueError("a fingerprint is a JSON object")
        return cls(fields)

    @cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @cached_property
    def id(self) -> str:
        """The first 16 hex digits of the sha256 of ``json``: the store's folder."""
        return hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @property
    def dtype(self) -> str:
        """What the features are stored as."""
        return str(self.fields.get("dtype", "float16"))

    def differences(self, other: Fingerprint) -> list[str]:
        """One ``field: ours, not theirs`` for each field that is not the same in ``other``."""
        ours, theirs = json.loads(self.json), json.loads(other.json)
        found = []
        for field in sorted(ours.keys() | theirs.keys()):
            here, there = (_show(fields, field) for fields in (ours, theirs))
            if here != there:
                found.append(f"{field}: {here}, not {there}")
        return found


def _show(fields: Mapping[str, Json], field: str) -> str:
    return json.dumps(fields[field], sort_keys=True) if field in fields else _ABSENT


def fingerprint(vision: Mapping[str, Any], features: Features) -> Fingerprint:
    """The fingerprint of the features of backbone ``vision`` ({"name", options}), computed and stored as ``features``
    says.

    Raises:
        ModelError: the backbone's files can't be read.
    """
    return of_identity(component_identity("vision", vision), features)


def of_identity(component: Mapping[str, Any], features: Features) -> Fingerprint:
    """The fingerprint of the backbone with identity ``component`` (see ``component_identity``).

    It has the fields of the backbone's own ``identity()``, its name, its version and its options, so that two backbones
    never share features because one omits a field. Models in options are left out if the identity has ``weights``.
    """
    identity = component.get("identity", {})
    options = {key: value for key, value in component.get("options", {}).items() if identity.get(key) != value}
    if "weights" in identity:
        options = {key: value for key, value in options.items() if not refers_to_model(value)}
    own = {"name": component.get("name"), "version": component.get("version"), "options": options}
    ours = {"component": own, "dtype": features.dtype, "compute": features.compute, "format": FORMAT}
    if clashing := {key: identity[key] for key in ours if key in identity}:
        own["identity"] = clashing
    fields = {**identity, **ours}
    # Through JSON once, so that a tuple and the list it is read back as are the same field.
    return Fingerprint(json.loads(Fingerprint(fields).json))
