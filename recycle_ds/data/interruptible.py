"""Calls into libraries that run for long without looking at signals."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def call_interruptibly(function: Callable[[], T]) -> T:
    """Calls `function` so that Ctrl-C, or a signal whose handler raises, ends the wait at once.

    Python runs signal handlers in the main thread, between two of its own instructions: a library that computes for seconds
    delays them. Here it computes in a thread of its own, where it must release the GIL, and the main thread waits. That thread
    is a daemon and still computes afterwards: the caller must end the process by `os._exit`. Raises what `function` raises.
    """
    if threading.current_thread() is not threading.main_thread():
        return function()
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            result.append(function())
        except BaseException as error:  # raised in the main thread
            failure.append(error)

    thread = threading.Thread(target=work, name="interruptible call", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
    if failure:
        raise failure[0]
    return result[0]


def exit_on_sigterm() -> None:
    """Makes SIGTERM unwind like Ctrl-C, so that unfinished files are removed."""
    import signal
    import sys

    def leave(number: int, _frame: Any) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
