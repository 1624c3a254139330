"""The options of plugins: a recipe's section ``plugins``, validated by the model of the hook ``plugin_options``."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from llavactl.core import plugins
from llavactl.core.errors import LlavactlError, PluginError
from llavactl.core.plugin_code import location
from llavactl.core.registry import Options, import_target

if TYPE_CHECKING:
    from pydantic import BaseModel


def options_model(plugin: str) -> type[BaseModel] | None:
    """The options model that ``plugin`` declares (hook ``plugin_options``), or None.

    Raises:
        PluginError: it can't be imported or is not an options model.
    """
    for name, implementation in plugins.implementations("plugin_options"):
        if name == plugin:
            with _raised_as_plugin_error(plugin, "plugin_options"):
                target = implementation()
                if not (target is None or (isinstance(target, str) and ":" in target)):
                    hook = f"plugin_options ({location(implementation)})"
                    raise PluginError(f"plugin {plugin}: {hook} returned {target!r:.60}, expected module:attr")
                model = None if target is None else import_target(target)
            if model is None:
                continue
            if not (isinstance(model, type) and issubclass(model, Options)):
                hook = f"plugin_options ({location(implementation)})"
                raise PluginError(
                    f"plugin {plugin}: {hook}: {target} is not a subclass of llavactl.Options",
                    hint=f"`{plugins.check_command(plugin)}` shows details",
                )
            return model
    return None


@contextlib.contextmanager
def _raised_as_plugin_error(plugin: str, hook: str) -> Iterator[None]:
    """Raises any exception of the plugin's ``hook`` as a PluginError with its location."""
    try:
        yield
    except (LlavactlError, KeyboardInterrupt):
        raise
    except BaseException as error:
        hint = f"`{plugins.check_command(plugin)}` shows details"
        raise PluginError(plugins.fault(plugin, hook, error), hint=hint) from error


def parse(plugin: str, section: Mapping[str, Any]) -> BaseModel | None:
    """The validated options in ``section``, with defaults; None if ``plugin`` declares no options.

    Raises:
        ValidationError: an unknown key or an invalid value.
        PluginError: the options model can't be imported.
    """
    model = options_model(plugin)
    return None if model is None else model.model_validate(dict(section))


def parsed(plugin: str, section: Mapping[str, Any]) -> BaseModel | None:
    """As ``parse``, of a section of a resolved recipe, validated once: observers are called at every logged step."""
    return _parsed(plugins.manager(), plugin, json.dumps(section, sort_keys=True))


@cache
def _parsed(_manager: object, plugin: str, section: str) -> BaseModel | None:
    return parse(plugin, json.loads(section))
