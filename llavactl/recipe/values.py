"""Value types of recipe keys, and the base class of recipe sections."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

# Strict: otherwise pydantic accepts `true` as 1 and the string "on" as true.
Boolean = Annotated[bool, Field(strict=True)]
Integer = Annotated[int, Field(strict=True)]
PositiveInteger = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInteger = Annotated[int, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
PositiveNumber = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeNumber = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
FileName = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="a letter or digit, then letters, digits, '.', '_', '-'"
    ),
]
ComputeType = Literal["float32", "bfloat16", "float16"]
ImageOrder = Literal["first", "random", "as-data"]


def _no_float16(value: Any) -> Any:
    if value == "float16":
        raise ValueError(
            "training in float16 is not supported: small gradients would become 0 without loss scaling; use bfloat16, "
            "or float32 on a GPU without bfloat16 (T4, V100)"
        )
    return value


Precision = Annotated[Literal["float32", "bfloat16"], BeforeValidator(_no_float16)]


class Section(BaseModel):
    """A mapping in a recipe. Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
