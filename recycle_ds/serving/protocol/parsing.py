"""Bodies of requests: JSON to checked fields. Every error names the field and what to do."""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import from_json

from recycle_ds.serving.protocol.errors import ApiError, invalid
from recycle_ds.serving.protocol.unsupported import UNSUPPORTED, is_neutral

_SHOWN = 60  # characters of a value in a message


class Body(BaseModel):
    """Base of all bodies: no unknown fields, no conversion between types."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


Model = TypeVar("Model", bound=Body)


def parse(model: type[Model], body: bytes) -> Model:
    """The fields of a body. Raises ApiError (400), naming the first field that is wrong."""
    try:
        tree = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(tree, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    for name in tree:
        if name not in model.model_fields and not is_neutral(name, tree[name]):
            raise _unknown(name, tree[name], model)
    known = {name: value for name, value in tree.items() if name in model.model_fields}
    try:
        return model.model_validate(known)
    except ValidationError as error:
        raise _refused(error) from None


def _unknown(name: str, value: Any, model: type[Body]) -> ApiError:
    if name in UNSUPPORTED:
        return invalid(f"{name}: {UNSUPPORTED[name]}", name, "unsupported_parameter")
    near = difflib.get_close_matches(name[:_SHOWN], model.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the fields are {', '.join(sorted(model.model_fields))}"
    return invalid(f"unknown field {shown(name)}: {hint}", name[:_SHOWN], "unknown_parameter")


def _refused(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_context=False)[0]
    # tags of unions are no part of the path
    path = [part for part in first["loc"] if isinstance(part, int) or not part.startswith("=")]
    param = ".".join(str(part) for part in path) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return invalid(f"{param}: is required", param, "missing_parameter")
    if first["type"] == "extra_forbidden":
        return invalid(f"unknown field {param}: leave it out", param, "unknown_parameter")
    if first["type"] == "value_error":  # of a check of ours: its message starts with the field
        named = re.match(r"[a-z_]+(\.\w+)*", message)
        return invalid(message, named[0] if named else param, "invalid_value")
    message = message[:1].lower() + message[1:]
    if first["type"] in ("too_short", "too_long"):  # its message ends with the length
        return invalid(f"{param}: {message.replace(' after validation', '')}", param, "invalid_value")
    return invalid(f"{param}: {message}, not {shown(first['input'])}", param, "invalid_value")


def shown(value: Any) -> str:
    """A value for a message: short, printable, on one line."""
    text = repr(value if not isinstance(value, (str, bytes)) else value[: _SHOWN + 1])
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
