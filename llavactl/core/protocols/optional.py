"""Optional capabilities of components of several kinds."""

from __future__ import annotations

from collections.abc import Mapping

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.schema import Json


@runtime_checkable
class Checkable(Protocol):
    """A source, vision backbone or language model that can be checked before it is used."""

    def check(self) -> None:
        """Raises an error if the component can't be used, as far as this can be determined quickly.

        A source is checked before its first record is read; a vision backbone or a language model before the first
        step of ``llavactl run``, without reading weights.

        Raises:
            DataError: of a source, for example because the image folder is missing.
            ModelError: of a vision backbone or a language model, because ``load`` would fail.
        """


def check_component(component: object) -> None:
    """Calls ``check`` of a component that has one: it raises an error if the component can't be used."""
    if isinstance(component, Checkable):
        component.check()


@runtime_checkable
class Identifiable(Protocol):
    """A component of any kind whose results depend on more than its options and its plugin's version.

    Files and models that its options name need no ``identity``: their contents are part of a component's options. Every
    vision backbone has one.
    """

    def identity(self) -> Mapping[str, Json]:
        """Everything else that the results depend on, as JSON; equal on every call.

        Samples of a source that has one are cached: a start of training reads no record again until the identity, an
        option or the plugin's version changes. It must then cover the contents of the source's files.
        """
