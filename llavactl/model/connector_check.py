"""Tests a connector, which may come from a plugin, on random features before training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from llavactl.core.component_calls import call_place, component_error
from llavactl.core.errors import LlavactlError
from llavactl.core.library_errors import out_of_memory
from llavactl.core.plugin_code import fault_text
from llavactl.core.plugin_faults import plugin_fault
from llavactl.core.protocols import GridConnector
from llavactl.core.protocols.returned import returned_fault
from llavactl.core.registry import registry
from llavactl.model.build import embeddings_fault, grid_fault

if TYPE_CHECKING:
    from llavactl.core.protocols import Connector
    from llavactl.core.schema import FeatureShape


def validate_connector(
    spec: Mapping[str, Any], shape: FeatureShape, width: int, precisions: Iterable[str] = (), device: str = "cpu"
) -> None:
    """Tests the connector ``spec`` on features of ``shape`` for a language model of ``width`` Dl.

    Raises:
        PluginError: it violates a rule of ``Connector``; the message states the first one.
        RecipeError: it doesn't fit features of this ``shape``.
    """
    connector = registry().create("connectors", spec)
    if why := connector_fault(connector, shape, width, precisions, device):
        raise component_error(registry().get("connectors", spec["name"]), why)


def connector_fault(
    connector: Connector, shape: FeatureShape, width: int, precisions: Iterable[str] = (), device: str = "cpu"
) -> str:
    """The first rule of ``Connector`` that ``connector`` violates; "" if none.

    It is tested in float32, then in each of ``precisions``. Random states are restored.
    """
    check = _ConnectorCheck(connector, shape, width, device)
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            why = check.fault(precisions)
        return f"{check.place}: {why}" if why else ""
    except _BrokenRuleError as rule:
        return f"{check.place}: {rule}"
    except Exception as error:
        if isinstance(error, LlavactlError) or out_of_memory(error):
            raise
        fault = plugin_fault(error)
        return f"{fault.place if fault else check.place}: {fault_text(error)}"


class _BrokenRuleError(Exception):
    """The message states the rule."""


class _ConnectorCheck:
    """Tests the modules that ``connector`` builds for features of ``shape`` and embeddings of ``width`` Dl."""

    def __init__(self, connector: Connector, shape: FeatureShape, width: int, device: str) -> None:
        self.connector, self.shape, self.width, self.device = connector, shape, width, device
        self.tokens = 0
        self.place = call_place(connector, "build")
        """Where the code that is tested is."""

    def fault(self, precisions: Iterable[str]) -> str:
        features = self._features(2)
        module = self._built()
        self.tokens = self._tokens()
        if isinstance(self.connector, GridConnector) and (why := grid_fault(self.connector, self.shape)):
            self.place = call_place(self.connector, "grid")
            return why
        if not type(module).__module__.startswith("torch."):  # otherwise `build` is the connector's own code
            self.place = call_place(module, "forward")
        batched = self._run(module, features)
        if not torch.isfinite(batched).all():
            return "its embeddings are not finite"
        single = torch.cat([self._run(module, image[None]) for image in features])
        if not _close(batched, single):
            return "an image's embeddings depend on the other images of its batch"
        layout = _layout(module)
        module.train()
        for images in (1, 2, 1):  # the last micro-batch of an epoch may have one image
            self._train(module, self._features(images))
        if _layout(module) != layout:
            return "names or shapes of its state dict change during training"
        if non_tensors := [name for name, value in module.state_dict().items() if not isinstance(value, torch.Tensor)]:
            return f"{non_tensors[0]} of its state dict is not a tensor"
        copy = self._built()
        self._run(copy, features)
        copy.load_state_dict(module.state_dict())
        for mode in (True, False):
            if not _close(*(self._seeded(each.train(mode), features) for each in (module, copy))):
                return "its state dict is incomplete: another module that loads it computes different embeddings"
        for precision in precisions:
            dtype = getattr(torch, precision)
            self._train(module.to(dtype).train(), features.to(dtype))
        return ""

    def _built(self) -> nn.Module:
        module = self.connector.build(self.shape, self.width)
        if why := returned_fault("connectors", "build", module, self.shape, self.width):
            raise _BrokenRuleError(why)
        # Once on the CPU, because lazy modules create their weights in the first forward pass.
        with torch.no_grad():
            module.eval()(self._features(2).cpu())
        return module.to(self.device)

    def _tokens(self) -> int:
        tokens = self.connector.tokens(self.shape)
        if why := returned_fault("connectors", "tokens", tokens, self.shape):
            self.place = call_place(self.connector, "tokens")
            raise _BrokenRuleError(why)
        return int(tokens)

    def _features(self, images: int) -> torch.Tensor:
        return torch.randn(images, self.shape.patches, self.shape.width).to(self.device) + 1

    def _seeded(self, module: nn.Module, features: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(0)
        return self._run(module, features, module.training)

    def _run(self, module: nn.Module, features: torch.Tensor, training: bool = False) -> torch.Tensor:
        """Embeddings [I, Q, Dl] of ``features``; raises _BrokenRuleError for anything else."""
        inputs = features.clone()
        output = module.train(training)(inputs)
        if why := embeddings_fault(output, features, (self.tokens, self.width)):
            raise _BrokenRuleError(why)
        embeddings: torch.Tensor = output
        if embeddings.device != features.device:
            raise _BrokenRuleError(f"its embeddings are on {embeddings.device}, the features on {features.device}")
        if not torch.equal(inputs, features):
            raise _BrokenRuleError("it changes its input features in place")
        return embeddings

    def _train(self, module: nn.Module, features: torch.Tensor) -> None:
        """Runs a backward pass if there are trainable parameters."""
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        embeddings = self._run(module, features, training=True)
        if trainable and not embeddings.requires_grad:
            raise _BrokenRuleError("no gradient reaches its parameters")
        if embeddings.requires_grad:
            embeddings.float().square().sum().backward()
            if trainable and all(parameter.grad is None for parameter in trainable):
                raise _BrokenRuleError("no gradient reaches its parameters")
        module.zero_grad()


def _layout(module: nn.Module) -> dict[str, Any]:
    """Names and shapes of the state dict."""
    return {
        name: value.shape if isinstance(value, torch.Tensor) else None for name, value in module.state_dict().items()
    }


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the tensors are equal up to the order of floating-point summation."""
    return torch.allclose(one, other, rtol=0, atol=1e-4 * float(other.detach().abs().max()))
