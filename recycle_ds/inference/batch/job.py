"""Continues a file of prompts as a job of one or many ranks, until all are done or the job must end."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.config.command import tell_torchrun
from recycle_ds.inference.batch.progress import Progress
from recycle_ds.inference.batch.prompt_file import PromptFile
from recycle_ds.inference.engine.engine import DecodingEngine
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import engine_of_ranks, load
from recycle_ds.inference.ranks import Ranks
from recycle_ds.inference.request import Request
from recycle_ds.parallel.job import (
    FINISHED,
    REQUEUE_EXIT_CODE,
    SAVED_FOR_RESTART,
    Job,
    code_of_unfinished,
    errors_of_host,
    is_error_reporter,
    job_of,
)
from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, StopRequest

FAILED_PROMPTS = 1
"""Exit code of a complete job of which some prompts could not be continued."""
# No prompt is started this many seconds before the end of the job, plus twice the longest time that a prompt took.
_MARGIN = 10.0
# Seconds from which a further SIGINT is another one of the user's: launchers pass on the one that the terminal has sent, too.
_SECOND = 1.0


class _Stopping(StopRequest):
    """A second Ctrl-C does not wait for the answers that are being decoded, of which there may be thousands to one prompt: what
    is completed is in the parts."""

    _interrupted: float | None = None
    """When the first SIGINT came."""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        super()._handle(number, frame)
        if number != signal.SIGINT or not is_error_reporter(os.environ) or job_of(os.environ).folder is not None:
            return
        if self._interrupted is None:
            self._interrupted = time.monotonic()
            os.write(2, b"stopping when the answers under way are complete; Ctrl-C again stops at once\n")
        elif time.monotonic() > self._interrupted + _SECOND:
            raise KeyboardInterrupt


@dataclass(frozen=True)
class BatchSettings:
    """prompts, output: jsonl files. max_batch: prompts decoded at once. kv_memory_gib: memory of the KV cache of a rank;
    None: see `Engine.from_folder`. explain: print how the draft budget was chosen."""

    prompts: Path
    output: Path
    max_batch: int
    kv_memory_gib: float | None
    explain: bool = False


def run_batch(request: Request, settings: BatchSettings, ranks: Ranks) -> None:
    """Continues this team's share of the prompts. Ranks of one team (tensor x pipeline) hold one model together.

    Raises RecycleError. Exits with code FAILED_PROMPTS, on the rank that finds all prompts completed, if some of them could
    not be continued.
    """
    job = job_of(os.environ)
    files = (settings.prompts, settings.output)
    share = PromptFile(*files, ranks.team_rank, ranks.teams, request.model, request.settings)
    files_to_stop = {job.stop_file: JOB_SIGNAL} if job.stop_file else {}
    with _Stopping(files_to_stop, job.end) as stopping, ExitStack() as stack:
        with errors_of_host():
            loaded = _settle(share, request, ranks)
        engine = None if loaded is None else _engine(loaded, settings, ranks, stack)
        if not ranks.owns:
            return
        if engine is not None:
            with errors_of_host():  # what no prompt can be continued with is an error of the job
                engine.check([0], request.params, request.mode)
        name = f"rank {ranks.rank}"
        progress = Progress(name, lambda text: job.write_note("progress", text))
        started: dict[int, float] = {}
        longest = 0.0

        def generate(prompts: Iterator[tuple[int, str]]) -> Iterator[tuple[int, dict[str, object] | DecodingError]]:
            nonlocal longest
            assert engine is not None and loaded is not None

            def timed() -> Iterator[tuple[int, str]]:
                for index, text in prompts:
                    started[index] = time.monotonic()
                    yield index, text

            for index, record in request.records(engine, loaded.tokenizer, timed()):
                longest = max(longest, time.monotonic() - started.pop(index))
                if not isinstance(record, DecodingError):
                    progress.add(record)
                yield index, record

        try:
            complete = engine is None or share.work(
                generate, lambda: stopping.poll(_MARGIN + 2 * longest) is not None, progress.show
            )
        finally:
            progress.close()
        if settings.explain and engine is not None:
            print(f"{name}: {engine.explanation()}", file=sys.stderr)
        if complete:
            if _report(share, job):
                sys.exit(FAILED_PROMPTS)
        elif stopping.reason:
            print(f"{name}: stopped ({stopping.reason}); the same command resumes", file=sys.stderr)
            if not job.write_note("outcome", SAVED_FOR_RESTART):
                stack.close()  # the other ranks of the team end too
                sys.exit(REQUEUE_EXIT_CODE)
            if code := code_of_unfinished(stopping.reason, os.environ):
                stack.close()
                sys.exit(code)


def _report(share: PromptFile, job: Job) -> int:
    """Reports a complete output to the user and to the job's shell. Returns the number of failed prompts."""
    failed = share.failures()
    if failed:
        text = f"{failed} of {share.count} prompts failed and are listed in {share.failures_path}"
        job.write_note("error", text)  # first: the shell ends a finished job with an error by exit code 1
        tell_torchrun(text)
    else:
        text = "all prompts are done"
    job.write_note("outcome", FINISHED)
    print(f"{share.output}: {text}", file=sys.stderr, flush=True)
    return failed


def _settle(share: PromptFile, request: Request, ranks: Ranks) -> LoadedModel | None:
    """Loads this rank's part of the model that the share is decoded with; None if the output is complete.

    The owner of a team decides which checkpoint that is; the others wait for it.
    """

    def load_part(path: str) -> LoadedModel:
        return load(path, request.dtype, request.threads, ranks.device_index, ranks.mesh)

    if not ranks.owns:
        path = ranks.hear()
        return None if path is None else load_part(path)
    loaded = None
    try:
        loaded = share.settle(load_part)
    finally:
        ranks.tell(None if loaded is None else str(loaded.path))
    return loaded


def _engine(loaded: LoadedModel, settings: BatchSettings, ranks: Ranks, stack: ExitStack) -> DecodingEngine | None:
    """This rank's engine; None on a rank that has followed the owner of its team to the end."""
    engine = engine_of_ranks(loaded, ranks, settings.max_batch, settings.kv_memory_gib)
    if engine is not None:
        stack.callback(engine.close)
    return engine
