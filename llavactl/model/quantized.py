"""Language models in 4 bits for training adapters (QLoRA, arXiv 2305.14314)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import QuantizableLanguage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llavactl.core.protocols import Language


def import_bitsandbytes() -> Any:
    """The bitsandbytes module.

    Raises:
        RecipeError: it isn't installed, or doesn't work on this machine.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise RecipeError(
            f"stage2.method: qlora needs bitsandbytes, which can't be imported ({error})",
            hint="`pip install 'llavactl[qlora]'`, or `-o stage2.method=lora`, which needs more memory",
        ) from error
    return bitsandbytes


def load_quantized(component: Language, dtype: str, device: str) -> PreTrainedModel:
    """The language model of ``component`` in 4 bits on ``device``, computing in ``dtype``.

    Raises:
        RecipeError: it can't be loaded in 4 bits.
    """
    if not isinstance(component, QuantizableLanguage):
        raise RecipeError(
            f"stage2.method: qlora, but language model {type(component).__name__} of a plugin has no `load_quantized`",
            hint="`-o stage2.method=lora` trains adapters on the language model in full precision",
        )
    import_bitsandbytes()
    return component.load_quantized(dtype, device)
