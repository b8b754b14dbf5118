"""Servers that the documents start: started, waited for, and ended, so that the commands after them have one to ask."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from tests.distributed import free_port

SHOWN = "127.0.0.1:8000"
"""Address in the documents."""


class DocumentServer:
    """At most one running server, on a free port."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._process: subprocess.Popen[bytes] | None = None
        self._command = ""
        self.port = 0

    def start(self, command: str) -> str | None:
        """Starts a server when the one before has ended, and waits until it is ready. Returns what was wrong, or None."""
        problem = self.stop()
        self._command, self.port = command, free_port()
        with open(self._folder / ".tmp-served", "wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-c", f"exec {command} --port {self.port}"],
                cwd=self._folder,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + 120
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                return f"{command}: is not ready\n{self._log()}\n{self.stop() or ''}"
            time.sleep(0.1)
        return problem

    def stop(self) -> str | None:
        """Ends the server as a user does. Returns what was wrong, or None."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(signal.SIGTERM)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
        launched = self._command.startswith(("torchrun", "deepspeed", "mpirun", "python -m deepspeed"))
        # a launcher prints a trace of its own, and ends with a code of its own
        if "drained in" in self._log() and (launched or (code == 0 and "Traceback" not in self._log())):
            return None
        return f"{self._command}: exit code {code} after SIGTERM\n{self._log()}"

    def asked(self, command: str) -> str:
        """A command of the documents, for the running server."""
        return command.replace(SHOWN, f"127.0.0.1:{self.port}")

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ready", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _log(self) -> str:
        return (self._folder / ".tmp-served").read_text(errors="replace")[-9000:]
