"""Language models and conversation templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from typing_extensions import Protocol, runtime_checkable

from llavactl.core.schema import Segment, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@runtime_checkable
class Language(Protocol):
    """A causal language model and its tokenizer.

    Implement ``SkeletonLanguage`` as well if it can be inspected without weights, ``QuantizableLanguage`` for
    ``method: qlora`` and quantized chat, and ``Checkable`` if it can be checked without weights.
    """

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """A fast tokenizer (labels are located by character offsets)."""

    def load(self, dtype: str) -> PreTrainedModel:
        """Loads the model on the CPU with weights in ``dtype``."""


@runtime_checkable
class QuantizableLanguage(Protocol):
    """A language model that ``stage2.method: qlora`` can train, and that chat can load in 4 or 8 bits."""

    def load_quantized(self, dtype: str, device: str, bits: Literal[4, 8] = 4) -> PreTrainedModel:
        """Loads the model on ``device`` with its linear layers, except the head, quantized by bitsandbytes.

        ``bits`` is 4 (nf4, computing in ``dtype``) or 8 (LLM.int8(), arXiv 2208.07339); it is passed only if it is 8,
        and a component without it is used in 4 bits only. ``dtype`` is the dtype of all other weights.
        """


@runtime_checkable
class SkeletonLanguage(Protocol):
    """A language model that can be inspected without its weights."""

    def skeleton(self) -> PreTrainedModel:
        """The model on torch's meta device, from the configuration: parameter names and shapes without values."""


@runtime_checkable
class Template(Protocol):
    """A conversation template: formats conversations for a language model and marks the target text.

    Implement ``ExportableTemplate`` as well if the template renders with a Jinja chat template. Otherwise exports
    derive one from what it renders.
    """

    def render(
        self, turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, *, generate: bool = False
    ) -> list[Segment]:
        """The conversation as text and image slots; answers and their end tokens are ``trained`` text.

        With ``generate``, the last turn is the user's and the text ends with the prompt for the answer. Names of
        special tokens in ``turns`` are interrupted by a noncharacter, so only the template produces special tokens;
        the text of the turns must be copied unchanged.

        Raises:
            ConversationError: the template can't render these turns; their record is skipped in training.
            ModelError: the template doesn't work with this tokenizer.
        """

    def stop(self, tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
        """Stop strings besides the tokenizer's end-of-sequence token. Added tokens they contain stop as well."""


@runtime_checkable
class ExportableTemplate(Protocol):
    """A template that renders with a chat template of transformers (Jinja), which exports include."""

    def supports_images(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Whether the chat template renders images in the content of messages."""

    def exported_chat_template(self, tokenizer: PreTrainedTokenizerBase) -> str:
        """The chat template as other programs need it: what the options determine is fixed in its text."""
