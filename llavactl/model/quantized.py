"""Language models in 4 bits, for training adapters (QLoRA, arXiv 2305.14314) and chat, or in 8 bits, for chat."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from llavactl.core.errors import RecipeError
from llavactl.core.protocols import QuantizableLanguage

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llavactl.core.protocols import Language

Bits = Literal[4, 8]


def import_bitsandbytes() -> Any:
    """The bitsandbytes module.

    Raises:
        RecipeError: it isn't installed, or doesn't work on this machine.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise RecipeError(
            "quantizing the language model (stage2.method: qlora, chat --quantize) needs bitsandbytes, which can't be "
            f"imported ({error})",
            hint="`pip install 'llavactl[qlora]'`, or train with `stage2.method: lora` and chat in full precision",
        ) from error
    return bitsandbytes


def load_quantized(component: Language, dtype: str, device: str, bits: Bits = 4) -> PreTrainedModel:
    """The language model of ``component`` in 4 or 8 bits on ``device``, computing in ``dtype``.

    Raises:
        RecipeError: it can't be loaded in so many bits.
    """
    options: dict[str, Any] = {} if bits == 4 else {"bits": bits}
    if not isinstance(component, QuantizableLanguage):
        raise _not_quantizable(component, "`load_quantized`")
    if not _accepts(component.load_quantized, options):
        raise _not_quantizable(component, f"argument `bits` of `load_quantized`, for {bits} bits")
    import_bitsandbytes()
    return component.load_quantized(dtype, device, **options)


def _not_quantizable(component: Language, missing: str) -> RecipeError:
    return RecipeError(
        f"language model {type(component).__name__} of a plugin can't be quantized: it has no {missing}",
        hint="use it in full precision: `stage2.method: lora` in training, no --quantize in chat",
    )


def _accepts(method: Callable[..., Any], options: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(method).bind("float32", "cpu", **options)
    except TypeError:
        return False
    return True
