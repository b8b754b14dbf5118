"""Values of a run's files as text of bounded length. A value that is absent or not of the expected kind is NONE."""

from __future__ import annotations

import time
from typing import Any, TypeGuard

NONE = "–"
_MAX_LENGTH = 400
# From here on a number is written with an exponent.
_LARGE = 1e12


def plain(value: Any) -> str:
    """Any value as its own text."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    return bounded(own_text(value))


def own_text(value: Any) -> str:
    """`str(value)`, also of a value with an integer that has more digits than Python writes."""
    try:
        return str(value)
    except ValueError:
        return "a number with thousands of digits"


def encodable(text: str) -> str:
    """A text as UTF-8 can hold it: a lone surrogate, also of a file name that is not UTF-8, is replaced by its number."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def bounded(text: str) -> str:
    """A text cut to a length that a table can show."""
    return text if len(text) <= _MAX_LENGTH else f"{text[:_MAX_LENGTH]} …"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether a value is a finite number of a size that occurs."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18


def integer(value: Any) -> str:
    """With separators of thousands: 12,345."""
    return f"{value:,.0f}" if is_number(value) else NONE


def decimals(value: Any, digits: int) -> str:
    """With a fixed number of decimals."""
    return f"{value:,.{digits}f}" if is_number(value) else NONE


def loss_text(value: Any) -> str:
    """A loss, in nats per token."""
    return decimals(value, 4)


def percent(value: Any) -> str:
    """A fraction as percentage."""
    return f"{100 * value:.1f} %" if is_number(value) else NONE


def gib(value: Any) -> str:
    """An amount of memory in GiB."""
    return f"{value:.3g} GiB" if is_number(value) else NONE


def number_range(values: Any) -> str:
    """The least and the greatest number of a list, or the one that all are."""
    numbers = [value for value in values if is_number(value)] if isinstance(values, list) else []
    if not numbers:
        return NONE
    low, high = min(numbers), max(numbers)
    return integer(low) if low == high else f"{integer(low)} to {integer(high)}"


def duration(seconds: Any) -> str:
    """Seconds in the unit that suits them."""
    if not is_number(seconds):
        return NONE
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"


def moment(seconds: Any) -> str:
    """Unix seconds as date and time in UTC."""
    if not is_number(seconds):
        return NONE
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):  # no date of this calendar
        return NONE


def reading(value: float, unit: str = "") -> str:
    """A value of a curve. unit: "%" for fractions. The page's script has the same rule."""
    if unit == "%":
        return percent(value)
    return f"{value:,.0f}" if 1000 <= abs(value) < _LARGE else f"{value:.4g}"


def tick(value: float, unit: str = "") -> str:
    """A number of an axis, as short as possible."""
    if unit == "%":
        return f"{100 * value:.4g} %"
    for least, factor, suffix in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / factor:.4g}{suffix}"
    return f"{value:.4g}"
