"""The processes that encode documents: signals, kills and their end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from recycle_ds.data.encoding import encode_in_order
from recycle_ds.data.errors import DataError
from recycle_ds.data.tokenizer import Tokenizer
from tests.runs import ROOT


def test_a_worker_that_is_killed(tokenizer: Tokenizer) -> None:
    """Prevents a hang after the kernel has killed a worker that ran out of memory."""
    texts = ("the people of the states " * 8000 for _ in range(1000))
    with contextlib.closing(encode_in_order(texts, tokenizer, 2)) as encoded:
        next(encoded)
        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(DataError, match="died unexpectedly, possibly out of memory; try fewer workers than 2"):
            list(encoded)


_MASKS = """
import multiprocessing, sys
from recycle_ds.data.encoding import encode_in_order
from recycle_ds.data.tokenizer import Tokenizer
encoded = encode_in_order(("the people of the states " * 8000 for _ in range(100)), Tokenizer.load(sys.argv[1]), 3)
next(encoded)
for worker in multiprocessing.active_children():
    lines = open(f"/proc/{worker.pid}/status").read().splitlines()
    print(*(line.split()[1] for line in lines if line.startswith("SigBlk")))
encoded.close()
"""


def test_workers_leave_stop_signals_to_the_first_process(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Prevents Ctrl-C, which the terminal sends to all processes, from ending in a traceback of each worker."""
    tokenizer.save(tmp_path)
    # in a new process: if multiprocessing's resource tracker starts late, it unblocks the signals
    done = subprocess.run(
        [sys.executable, "-c", _MASKS, str(tmp_path)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    masks = [int(line, 16) for line in done.stdout.split()]
    assert len(masks) == 3, done.stderr
    for mask in masks:
        assert all(mask >> (number - 1) & 1 for number in (signal.SIGINT, signal.SIGTERM))


def test_closing_the_generator_terminates_the_workers(tokenizer: Tokenizer) -> None:
    """Prevents orphaned processes when the results are no longer needed."""
    texts = ("the people of the states " * 8000 for _ in range(1000))
    with contextlib.closing(encode_in_order(texts, tokenizer, 2)) as encoded:
        next(encoded)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()
