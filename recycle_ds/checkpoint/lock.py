"""One run at a time in a run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from recycle_ds.checkpoint.errors import CheckpointError


class RunLock:
    """Held from construction to `release`, or to the end of the process however it ends: the kernel keeps it.

    Raises CheckpointError while another process holds it. Where the file system knows no locks, says so and goes on.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / ".lock").open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise CheckpointError(f"{run_dir} is in use by {holder}: wait for it, or use another run_dir") from None
        except OSError as error:
            print(
                f"warning: {run_dir}: no lock on this file system ({error.strerror}); start only one run here",
                flush=True,
            )
            return
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
        self._file.flush()

    def release(self) -> None:
        """Lets the next run in."""
        self._file.close()
