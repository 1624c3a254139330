"""Fingerprints of feature sets: the same fingerprint means bit-identical features."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llavactl.core.identity import component_identity, without_models

if TYPE_CHECKING:
    from llavactl.core.protocols import Json
    from llavactl.recipe.sections import Features

FORMAT = 1
"""Version of the store's layout. It is part of every fingerprint, so stores of other versions are never read."""


@dataclass(frozen=True)
class Fingerprint:
    """Everything that affects the values of the features, as plain JSON ``fields``."""

    fields: Mapping[str, Json]

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Parses the output of ``json``.

        Raises:
            ValueError: ``text`` is not a JSON object.
        """
        try:
            fields = json.loads(text)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
        if not isinstance(fields, dict):
            raise ValueError("expected a JSON object")
        return cls(fields)

    @cached_property
    def json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(self.fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)

    @cached_property
    def id(self) -> str:
        """The first 16 hex digits of the sha256 of ``json``; also the name of the store's folder."""
        return hashlib.sha256(self.json.encode()).hexdigest()[:16]

    @property
    def dtype(self) -> str:
        """The dtype of the stored features."""
        return str(self.fields.get("dtype", "float16"))

    def differences(self, other: Fingerprint) -> list[str]:
        """``field: expected A, got B`` for every field whose value A differs from the value B in ``other``."""
        expected, actual = json.loads(self.json), json.loads(other.json)
        differences = []
        for field in sorted(expected.keys() | actual.keys()):
            ours, theirs = (_value_text(fields, field) for fields in (expected, actual))
            if ours != theirs:
                differences.append(f"{field}: expected {ours}, got {theirs}")
        return differences


def _value_text(fields: Mapping[str, Json], field: str) -> str:
    return json.dumps(fields[field], sort_keys=True) if field in fields else "unset"


def fingerprint(vision: Mapping[str, Any], features: Features) -> Fingerprint:
    """The fingerprint of the backbone ``vision`` ({"name", options}) with the settings ``features``.

    Raises:
        ModelError: the backbone's files can't be read.
    """
    return identity_fingerprint(component_identity("vision", vision), features)


def identity_fingerprint(component: Mapping[str, Any], features: Features) -> Fingerprint:
    """The fingerprint of a backbone from its identity ``component`` (see ``component_identity``).

    It contains the fields of the backbone's own ``identity()`` and its name, version and options, so two backbones
    never share features because one of them omits a field. Options that name a model are left out if the identity has
    ``weights``.
    """
    identity = component.get("identity", {})
    options: Json = {key: value for key, value in component.get("options", {}).items() if identity.get(key) != value}
    if "weights" in identity:
        options = without_models(options)
    own = {"name": component.get("name"), "version": component.get("version"), "options": options}
    reserved = {"component": own, "dtype": features.dtype, "compute": features.compute, "format": FORMAT}
    if clashing := {key: identity[key] for key in reserved if key in identity}:
        own["identity"] = clashing
    fields = {**identity, **reserved}
    # The round trip through JSON converts tuples to lists, as they are read back.
    return Fingerprint(json.loads(Fingerprint(fields).json))
