"""Error of the data package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from recycle_ds.config.errors import RecycleError


class DataError(RecycleError):
    """A corpus, tokenizer or token file that cannot be used."""


@contextlib.contextmanager
def encoding_errors(name: str) -> Iterator[None]:
    """Turns the errors of the tokenizers library, plain Exceptions, into DataErrors about the tokenizer `name`."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{name} cannot encode a text: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The message of an error without line ends; its type if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
