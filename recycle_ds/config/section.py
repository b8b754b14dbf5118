"""Base class and field types of all configuration sections."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


def no_bool(value: object) -> object:
    """Rejects YAML's yes, on and true, which Python would accept as the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a number")
    return value


def not_empty(value: str) -> str:
    """Rejects the empty path, which Python's pathlib would take for the current folder."""
    if not value.strip():
        raise ValueError(f"{value!r} is empty: give a path or a name")
    return value


Text = Annotated[str, AfterValidator(not_empty)]
"""A path or a name."""
Positive = Annotated[int, BeforeValidator(no_bool), Field(gt=0)]
NonNegative = Annotated[int, BeforeValidator(no_bool), Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class OnResume(Enum):
    """Whether a setting may change when a run is resumed. It stands in the field's `Annotated`; that of a section holds for
    all fields in it that have none."""

    FIXED = "another value makes it another run: refused"
    REPORTED = "may change, with a note"
    FREE = "may change"


class Section(BaseModel):
    """One mapping of the YAML file. Immutable; unknown keys are errors; the string below a field is its description."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        coerce_numbers_to_str=False,
    )
