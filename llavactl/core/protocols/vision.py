"""Vision backbones and connectors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.schema import FeatureShape, Json

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image
    from torch import nn
    from transformers import PreTrainedModel


@runtime_checkable
class Encoder(Protocol):
    """A frozen vision backbone with loaded weights."""

    @property
    def shape(self) -> FeatureShape:
        """The shape of the features of one image."""

    @property
    def preprocess(self) -> Callable[[Image.Image], np.ndarray]:
        """A function from an RGB image to pixels [3, H, W] float32; picklable, thread-safe, without weights.

        If it raises any exception, the image is skipped and listed with the reason.
        """

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encodes pixels [I, 3, H, W] to features [I, P, Dv], on the device of the weights.

        The features of an image must not depend on the other images of the batch. An exception stops the run.
        """


@runtime_checkable
class Vision(Protocol):
    """A frozen vision backbone.

    Implement ``ShapedVision`` as well if the feature shape is known without weights, ``ExportableVision`` if other
    programs can load the backbone, and ``Checkable`` if it can be checked without weights.
    """

    def identity(self) -> Mapping[str, Json]:
        """Everything that affects the feature values, as JSON; must not load weights into memory.

        At least: the backbone's id, a hash of its weights, layer, token selection, image size, ``square`` or ``pad``,
        and the class of the image processor. It is part of the feature store's fingerprint.
        """

    def load(self, device: str, dtype: str) -> Encoder:
        """Loads the backbone on ``device``, computing in ``dtype`` (``float32``, ``bfloat16`` or ``float16``)."""


@runtime_checkable
class ShapedVision(Protocol):
    """A vision backbone whose feature shape is known without reading weights."""

    def shape(self) -> FeatureShape:
        """The ``shape`` of the encoder that ``load`` returns, determined from the configuration."""


@runtime_checkable
class ExportableVision(ShapedVision, Protocol):
    """A vision backbone of transformers, or with the same interface, that exports can include.

    Its options have the keys ``layer`` (an index of hidden states, or several), ``select`` (``patch`` or ``cls-patch``)
    and ``image`` (``square`` or ``pad``) of ``TransformersVisionOptions``. Only ``whole`` reads weights.
    """

    @property
    def config(self) -> Mapping[str, Any]:
        """The vision part of config.json: ``model_type``, ``patch_size`` and the other keys of its class."""

    @property
    def processor(self) -> Any:
        """The image processor: a ``BaseImageProcessor`` of transformers."""

    @property
    def inside(self) -> bool:
        """Whether the backbone is stored inside a larger model and has no id or folder that another program can load.

        If it is False, the option ``model`` is that id or folder.
        """

    def whole(self) -> PreTrainedModel:
        """The complete model on the CPU, in its stored precision."""


@runtime_checkable
class Connector(Protocol):
    """Maps vision features to embeddings of the language model.

    Implement ``GridConnector`` as well if the tokens belong to cells of the image.

    Requirements for the module, tested on random features by ``recipes check`` and ``train``:

    - It maps features [I, P, Dv], for any I ≥ 1, to finite embeddings [I, Q, Dl], also in training mode, and does not
      modify the features in place.
    - In evaluation mode, the embeddings of an image don't depend on the other images of the batch.
    - The state dict contains only tensors, with constant names and shapes, and the complete state: a module that
      loads it computes the same embeddings. Random numbers come from torch's global generator.
    - The complete state dict is saved. Parameters that don't require gradients after ``build`` are never trained.
    """

    def tokens(self, shape: FeatureShape) -> int:
        """Q, the number of embeddings per image."""

    def build(self, shape: FeatureShape, language_width: int) -> nn.Module:
        """A module from features [I, P, Dv] to embeddings [I, Q, Dl], where Dl is ``language_width``."""


@runtime_checkable
class GridConnector(Protocol):
    """A connector whose tokens belong to the cells of a grid over the image; box alignment needs it."""

    def tokens(self, shape: FeatureShape) -> int:
        """As in ``Connector``."""

    def grid(self, shape: FeatureShape) -> tuple[int, int]:
        """The cells (h, w). All cells have the same number of tokens, which are consecutive; cells follow row by row,
        after one token for each of ``shape.prefix`` if the connector keeps these.
        """
