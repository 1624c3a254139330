"""The options of plugins: a recipe's section ``plugins``, validated by the model of the hook ``plugin_options``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from llavactl.core import plugins, stopping
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.plugin_code import located_fault, location, root_package
from llavactl.core.registry import Options, import_target
from llavactl.core.validation import explain

if TYPE_CHECKING:
    from pydantic import BaseModel


def options_model(plugin: str) -> type[BaseModel] | None:
    """The options model that ``plugin`` declares (hook ``plugin_options``), or None.

    Raises:
        PluginError: it can't be imported or is not an options model.
    """
    for name, implementation in plugins.implementations("plugin_options"):
        if name == plugin and (target := _target(plugin, implementation)) is not None:
            return _imported_model(plugin, target, f"plugin {plugin}: plugin_options ({location(implementation)})")
    return None


def _target(plugin: str, implementation: Callable[[], str | None]) -> str | None:
    try:
        return implementation()
    except LlavactlError:
        raise
    except BaseException as error:  # a plugin may call sys.exit
        if stopping.interrupted(error):
            raise
        raise PluginError(plugins.fault(plugin, "plugin_options", error), hint=_hint(plugin)) from error


def _imported_model(plugin: str, target: str, hook: str) -> type[BaseModel]:
    """The model ``target``; ``hook`` is where it was returned."""
    if ":" not in target:
        raise PluginError(f"{hook}: returned {target!r:.60}, expected module:attr", hint=_hint(plugin))
    try:
        model = import_target(target)
    except BaseException as error:  # a plugin may call sys.exit at import
        if stopping.interrupted(error):
            raise
        why = located_fault(error, [root_package(target)])
        raise PluginError(f"{hook}: {target!r} can't be imported: {why}", hint=_hint(plugin)) from error
    if not (isinstance(model, type) and issubclass(model, Options)):
        raise PluginError(f"{hook}: {target} is not a subclass of llavactl.Options", hint=_hint(plugin))
    return model


def _hint(plugin: str) -> str:
    return f"`{plugins.check_command(plugin)}` shows details"


def parse(plugin: str, section: Mapping[str, Any]) -> BaseModel | None:
    """The validated options in ``section``, with defaults; None if ``plugin`` declares no options.

    Raises:
        ValidationError: an unknown key or an invalid value.
        PluginError: the options model can't be imported.
    """
    model = options_model(plugin)
    return None if model is None else model.model_validate(dict(section))


def missing_section(plugin: str) -> str:
    """Why a recipe without a section for ``plugin`` has no options for it; "" if its defaults are valid.

    Raises:
        PluginError: the options model can't be imported.
    """
    return _missing_section(plugins.manager(), plugin)


@cache
def _missing_section(_manager: object, plugin: str) -> str:
    try:
        parse(plugin, {})
    except ValidationError as error:
        model = options_model(plugin)
        assert model is not None
        reasons = [(".".join(map(str, path)), why) for path, why in explain(error, model, {})]
        section = ", ".join(f"{key.partition('.')[0]}: …" for key, _ in reasons if key) or "…"
        problems = "; ".join(f"{key}: {why}" if key else why for key, why in reasons)
        missing = f"`plugins: {{{plugin}: {{{section}}}}}`"
        return f"{problems}; without {missing} in the recipe, its hooks that take options aren't called"
    return ""


def parsed(plugin: str, section: Mapping[str, Any]) -> BaseModel | None:
    """As ``parse``, of a section of a resolved recipe, validated once: observers are called at every logged step."""
    return _parsed(plugins.manager(), plugin, json.dumps(section, sort_keys=True))


@cache
def _parsed(_manager: object, plugin: str, section: str) -> BaseModel | None:
    return parse(plugin, json.loads(section))
