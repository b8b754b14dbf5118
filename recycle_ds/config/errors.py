"""Errors meant for the person at the terminal: one line, with the value, the limit and the fix."""


class RecycleError(ValueError):
    """Base of every error a user can cause. Entry points print it without a traceback and exit 2.

    Its text is one line whatever it quotes: line ends and control characters, of a key or a file's name, are escaped.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


class ConfigError(RecycleError):
    """A configuration that cannot be run as written."""
