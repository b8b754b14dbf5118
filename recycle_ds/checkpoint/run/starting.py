"""The start of a run, once its ranks have met: missing data are prepared and the run folder is locked."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from recycle_ds.checkpoint.portable.folders import make_run_dir, remove_unfinished
from recycle_ds.checkpoint.run.lock import RunLock
from recycle_ds.config import RunConfig
from recycle_ds.data.prepare import prepare_if_missing
from recycle_ds.parallel.agree import on_first_rank
from recycle_ds.parallel.job import Job, job_of
from recycle_ds.parallel.mesh import Mesh
from recycle_ds.parallel.rendezvous import shorten_timeouts
from recycle_ds.training.faults.job_end import STOP
from recycle_ds.training.run_context import RunContext


@contextmanager
def started_run(
    config: RunConfig, deepspeed_config: Mapping[str, Any], mesh: Mesh, started: float
) -> Iterator[RunContext]:
    """The context of a run whose folder this start holds until the block ends. Collective.

    started: Unix time. Raises the same SharedError, or MachineFault, on all ranks: another run holds the folder, or the missing
    data cannot be prepared."""
    job = job_of(os.environ) if mesh.is_first else Job()
    lock = on_first_rank(lambda: _prepare(config, job), mesh)
    if config.faults.hang_timeout:  # data are there; the first step may take four times as long as others
        shorten_timeouts(5 * config.faults.hang_timeout + 60)
    taken_by = (lambda: None) if lock is None else lock.taken_by
    try:
        yield RunContext(config, deepspeed_config, mesh, job, taken_by, started)
    finally:
        if lock is not None:
            lock.release()


def _prepare(config: RunConfig, job: Job) -> RunLock:
    """On rank 0: prepares missing token files, locks the run folder and removes what an earlier start left unfinished."""
    report = prepare_if_missing(config.data, progress=sys.stderr.isatty())
    for line in report.lines(read=False) if report is not None else ():
        print(f"data: {line}", flush=True)
    run_dir = make_run_dir(config.run_dir)
    lock = RunLock(run_dir, job)
    remove_unfinished(run_dir)
    (run_dir / STOP).unlink(missing_ok=True)
    job.write_note("run_dir", str(run_dir.resolve()))
    return lock
