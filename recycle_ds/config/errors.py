"""Errors meant for the person at the terminal: one line, with the value, the limit and the fix."""


class RecycleError(ValueError):
    """Base of every error a user can cause. Entry points print it without a traceback and exit 2."""


class ConfigError(RecycleError):
    """A configuration that cannot be run as written."""
