"""Value types of recipe keys, and the base class of recipe sections."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# Strict: otherwise pydantic accepts `true` as 1 and the string "on" as true.
Boolean = Annotated[bool, Field(strict=True)]
Integer = Annotated[int, Field(strict=True)]
PositiveInteger = Annotated[int, Field(strict=True, ge=1)]
NonNegativeInteger = Annotated[int, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, lt=1)]
PositiveNumber = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegativeNumber = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="letters, digits, '.', '_', '-'")]
Precision = Literal["float32", "bfloat16", "float16"]
ImageOrder = Literal["first", "random", "as-data"]


class Section(BaseModel):
    """A mapping in a recipe. Frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")
