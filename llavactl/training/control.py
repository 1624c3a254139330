"""What plugins request of a running stage (hook ``control_training``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llavactl.core import plugins
from llavactl.core.hookspecs import TrainingRequest
from llavactl.training.collective import on_main

HOOK = "control_training"


class Control:
    """Collects the requests of plugins in the main process; ``requests`` returns them in all processes.

    Plugins get all lines so far, those before a resume included. Their requests depend on nothing else, so a resumed
    run ends after the same step as an uninterrupted one.
    """

    def __init__(self, arguments: Mapping[str, Any], earlier_lines: Sequence[Mapping[str, Any]]) -> None:
        """``arguments`` are those that all hooks of training get: ``stage`` and ``recipe``."""
        self.arguments = arguments
        self.active = on_main(lambda: any(True for _ in plugins.implementations(HOOK)))
        self.lines: list[Mapping[str, Any]] = []
        self.requested: dict[TrainingRequest, list[str]] = {}
        resumed_step = earlier_lines[-1]["step"] if earlier_lines else 0
        for line in earlier_lines if self.active else ():
            self.lines.append(line)
            if line["step"] == resumed_step:  # the earlier run may have been killed before it could act
                self._call_plugins()

    def line_written(self, line: Mapping[str, Any]) -> None:
        """Calls the plugins after a ``line`` of metrics.jsonl; called in the main process."""
        if self.active:
            self.lines.append(line)
            self._call_plugins()

    def _call_plugins(self) -> None:
        for plugin, implementation in plugins.implementations(HOOK):
            with plugins.isolated(plugin, HOOK, once=True):
                requests: Any = implementation(**self.arguments, lines=tuple(self.lines)) or ()
                for request in requests if isinstance(requests, list | tuple) else [requests]:
                    self.requested.setdefault(request, []).append(plugin)

    def requests(self) -> Mapping[TrainingRequest, Sequence[str]]:
        """The requests since the last call, each with its plugins; all processes must call this together."""
        if not self.active:
            return {}
        requested, self.requested = self.requested, {}
        return on_main(lambda: requested)
