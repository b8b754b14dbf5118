"""Ctrl-C while a library computes."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from recycle_ds.data.interruptible import call_interruptibly


def test_ctrl_c_ends_the_wait_for_a_running_call() -> None:
    """Prevents Ctrl-C from having no effect until a library call has ended, seconds later."""
    started, over = threading.Event(), threading.Event()

    def library() -> None:
        started.set()
        over.wait(60)

    def interrupt() -> None:
        started.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        call_interruptibly(library)
    assert not over.is_set(), "it was still computing"
    over.set()


def test_results_and_errors_are_those_of_the_call() -> None:
    """Prevents an error of the library from being lost in its thread."""
    assert call_interruptibly(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        call_interruptibly(lambda: 1 / 0)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(call_interruptibly(lambda: 8)))
    thread.start()
    thread.join()
    assert found == [8], "in other threads, which get no signals, the function is called directly"
