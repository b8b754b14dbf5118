"""A server in a process of its own, for the time of a measurement."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from recycle_ds.serving.process.errors import ServingError

_ENDS_WITHIN = 60.0


@contextmanager
def own_server(model: str, *options: str) -> Iterator[str]:
    """Starts `recycle_ds.serve` on a free port of this machine and yields its address when it is ready.

    Raises ServingError with the server's own error if it does not start.
    """
    command = [sys.executable, "-m", "recycle_ds.serve", "--model", model, "--port", "0", "--no-log-requests", *options]
    with tempfile.TemporaryFile("w+b") as log, _sigterm_unwinds():
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

        def text() -> str:
            log.flush()
            log.seek(0)
            return log.read().decode(errors="replace")

        try:
            url = ""
            while not (url and _is_ready(url)):
                if process.poll() is not None:
                    lines = [line for line in text().splitlines() if line.startswith("error: ")]
                    reason = lines[-1].removeprefix("error: ") if lines else text()[-1000:]
                    raise ServingError(reason or f"the server ended with code {process.returncode}")
                found = re.search(r"^serving .* at (http://\S+?)(?: of \S+, for|$)", text(), re.MULTILINE)
                url = found[1] if found else ""
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_ENDS_WITHIN)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Lets SIGTERM end this process like Ctrl-C: else its server would stay."""

    def unwind(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, unwind)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
