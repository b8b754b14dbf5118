"""Writes text with a model, as a job of one or many processes, until there is enough of it or the job must end."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from recycle_ds.checkpoint.loading import LoadedModel
from recycle_ds.checkpoint.provenance import provenance
from recycle_ds.config.command import INTERRUPTED
from recycle_ds.inference.batch.claims import Claim
from recycle_ds.inference.batch.parts_record import RECORD, read_record
from recycle_ds.inference.errors import DecodingError
from recycle_ds.inference.loading import load
from recycle_ds.inference.parameters import SamplingParams
from recycle_ds.inference.ranks import Ranks
from recycle_ds.inference.self_text.decoding import write_rows
from recycle_ds.inference.self_text.exclusion import Exclusion
from recycle_ds.inference.self_text.groups import Demand, Group, GroupFolder
from recycle_ds.inference.self_text.output import OutputFolder
from recycle_ds.inference.self_text.preparation import chat_frame, check_prompts, text_engine
from recycle_ds.inference.self_text.progress import TextProgress
from recycle_ds.inference.self_text.prompts import PromptSet
from recycle_ds.inference.self_text.row import Writer
from recycle_ds.inference.self_text.rows import TRAIN, VALIDATION, RowPlanner
from recycle_ds.inference.self_text.settings import SelfTextSettings
from recycle_ds.inference.self_text.takeover import Takeover
from recycle_ds.parallel.job import (
    FINISHED,
    REQUEUE_EXIT_CODE,
    SAVED_FOR_RESTART,
    errors_of_host,
    is_to_report_interruption,
    job_of,
)
from recycle_ds.training.faults.stop_requests import JOB_SIGNAL, StopRequest

_MARGIN = 15.0
"""Seconds before the end of the job at which nothing more is written."""
_PATIENCE = 64
"""Rows without enough text of the model's own, from the first, after which the job gives up."""
_LEAST_SHARE = 0.01
"""Share of rows with enough text below which it gives up too."""
_LOOK = 2.0
"""Seconds between looks at what other processes have finished."""


@dataclass(frozen=True)
class SelfText:
    """A request for self-written text. model: path of --model. prompt_file: None without one."""

    model: str
    settings: SelfTextSettings
    prompts: PromptSet
    exclusion: Exclusion
    prompt_file: Path | None
    exclude_files: tuple[Path, ...]
    output: OutputFolder
    threads: int | None = None

    @property
    def key(self) -> str:
        """SHA-256 of everything but the model that determines the text."""
        tree = {"prompts": self.prompts.digest, "exclude": self.exclusion.digest, "settings": asdict(self.settings)}
        return hashlib.sha256(json.dumps({**tree, "text": self.output.with_text}, sort_keys=True).encode()).hexdigest()

    def is_complete(self) -> bool:
        """Whether the output is. Raises DecodingError if it is that of another command."""
        return self.output.check(self.key, self.claim.model_path)

    def check_vanished(self, error: FileNotFoundError) -> None:
        """Call this when a file of the job is missing. Raises DecodingError unless the text is complete, and its parts are
        removed."""
        if not self.is_complete():
            missing = error.filename or self.output.parts
            raise DecodingError(
                f"{missing}: has been removed during the job; the same command writes what is missing"
            ) from error

    @property
    def claim(self) -> Claim:
        """The claim on the parts folder."""
        return Claim(self.output.parts, self.key, self.model)


def run_self_text(request: SelfText, ranks: Ranks) -> dict[str, Any] | None:
    """Writes this process's share of the rows. Returns the manifest on rank 0 when the text is complete, else None.

    Raises RecycleError. Exits with REQUEUE_EXIT_CODE if the job must end first and its shell cannot be informed.
    """
    job = job_of(os.environ)
    with StopRequest({job.stop_file: JOB_SIGNAL} if job.stop_file else {}, job.end) as stopping:
        with errors_of_host():
            loaded = _settle(request, ranks)
            work = None if loaded is None else _Work(request, loaded, ranks, stopping)
        if work is not None and not work.run():
            name = f"rank {ranks.rank}"
            print(f"{name}: stopped ({stopping.reason}); the same command resumes", file=sys.stderr, flush=True)
            if not job.write_note("outcome", SAVED_FOR_RESTART):
                sys.exit(REQUEUE_EXIT_CODE)
            if is_to_report_interruption(stopping.reason, os.environ):
                sys.exit(INTERRUPTED)
            return None
        if ranks.rank == 0:
            manifest = _publish(request, work)
        if ranks.rank == 0 or request.is_complete():
            request.output.tidy()  # every rank: one that starts late may have created the parts again
        if ranks.rank:
            return None
        job.write_note("outcome", FINISHED)
        return manifest


def _publish(request: SelfText, work: _Work | None) -> dict[str, Any]:
    """Writes the output, unless it is complete, and returns the manifest."""
    try:
        if work is not None and not request.is_complete():
            return work.write()
    except FileNotFoundError as error:  # a start of the same command beside this one has removed the parts?
        request.check_vanished(error)
    return request.output.manifest()


def _settle(request: SelfText, ranks: Ranks) -> LoadedModel | None:
    """Loads the model, unless the text is complete."""
    if request.is_complete():
        return None

    def load_own(path: str) -> LoadedModel:
        loaded = load(path, request.settings.dtype, request.threads, ranks.device_index)
        rows, context = request.settings.row_tokens, loaded.model.max_positions
        if rows > context:  # before the folder is claimed, or the corrected command would be another one's
            raise DecodingError(f"--row-tokens {rows}: the model's context holds {context} tokens; lower it")
        return loaded

    return request.claim.settle(load_own, request.is_complete, lambda: None)


class _Work:
    """One process's part of the job."""

    def __init__(self, request: SelfText, loaded: LoadedModel, ranks: Ranks, stopping: StopRequest) -> None:
        """Raises DecodingError or DataError for settings and prompts that do not fit the model."""
        self._request, self._loaded, self._ranks, self._stopping = request, loaded, ranks, stopping
        settings = request.settings
        chat = None if settings.raw else chat_frame(loaded)
        self._refused = check_prompts(request.prompts, settings, chat, loaded.tokenizer, warn=ranks.rank == 0)
        self._writer = Writer(settings, loaded.tokenizer, chat, request.exclusion)
        self._planner = RowPlanner(settings, request.prompts)
        self._engine = text_engine(loaded, settings, ranks)
        self._engine.check([0], SamplingParams(max_new_tokens=1), settings.mode)
        self._groups = GroupFolder(request.output.parts)
        self._demand = self._make_demand()

    def _make_demand(self) -> Demand:
        settings, rows = self._request.settings, self._planner.rows(TRAIN)
        size = settings.group_rows
        if rows is not None and rows * (settings.row_tokens + 1) < settings.tokens:
            raise DecodingError(
                f"--tokens {settings.tokens}: {rows} prompts, answered greedily in rows of {settings.row_tokens} tokens, "
                "cannot give so many; give more prompts, or --temperatures above 0"
            )
        held_out, limit = -(-settings.held_out // size), None if rows is None else -(-rows // size)
        patience = -(-_PATIENCE // size)
        least = _LEAST_SHARE * size * settings.min_tokens  # a row that is kept has as many
        demand = Demand(held_out, settings.tokens, size * (settings.row_tokens + 1), limit, patience, least)
        groups, processes = held_out + demand.needed({}), self._ranks.world_size
        if processes > groups and self._ranks.rank == 0:
            print(
                f"note: {processes} processes for about {groups} groups of {size} rows: the others wait, in case one is lost; "
                "start fewer processes, or lower --max-batch",
                file=sys.stderr,
                flush=True,
            )
        return demand

    def run(self) -> bool:
        """Writes groups until all are finished. Returns False if the job must end before."""
        name, settings = f"rank {self._ranks.rank}", self._request.settings
        progress, takeover = TextProgress(name, settings.tokens), Takeover()
        try:
            while True:
                finished = self._finished()
                if finished is None:  # rank 0 has written the output
                    return True
                progress.finished(sum(tokens for group, tokens in finished.items() if group.side == TRAIN))
                chosen = self._demand.next_group(finished, self._ranks.rank, self._ranks.world_size)
                if chosen is None:
                    break
                if not chosen.own and not takeover.is_due(len(finished)):
                    if self._stopping.poll(_MARGIN) is not None:
                        return False
                    time.sleep(takeover.pause)
                    continue
                start = time.monotonic()
                published = self._write_group(chosen.group, progress)
                if published is None:
                    return False
                takeover.wrote(time.monotonic() - start, own=chosen.own, published=published)
        finally:
            progress.close()
        if progress.written:
            text = f"{progress.written:,} tokens written, {progress.speed:,.1f} tokens/s"
            print(f"{name}: {text}", file=sys.stderr, flush=True)
        return True

    def _write_group(self, group: Group, progress: TextProgress) -> bool | None:
        """Writes one group. Returns False if another process finishes it first, None if the job must end."""
        settings, looked, taken = self._request.settings, time.monotonic(), False
        rows = self._planner.rows(group.side)
        first = group.number * settings.group_rows
        last = first + settings.group_rows if rows is None else min(first + settings.group_rows, rows)

        def stop() -> bool:
            nonlocal looked, taken
            if time.monotonic() - looked > _LOOK:
                finished, looked = self._finished(), time.monotonic()
                taken = finished is None or group in finished
            return taken or self._stopping.poll(_MARGIN) is not None

        plans = (self._planner.row(group.side, number) for number in range(first, last))
        progress.counts = group.side == TRAIN
        written = write_rows(self._engine, plans, self._writer, stop, progress.add)
        if written is None:
            return False if taken else None
        try:
            self._groups.publish(group, written)
        except FileNotFoundError as error:
            self._request.check_vanished(error)
            return False
        return True

    def _finished(self) -> dict[Group, int] | None:
        """The finished groups; None if the text is complete, and its parts are removed."""
        try:
            return self._groups.finished()
        except FileNotFoundError as error:
            self._request.check_vanished(error)
            return None

    def write(self) -> dict[str, Any]:
        """Writes the output from the finished groups, and returns its manifest. Raises FileNotFoundError without parts."""
        request, settings, tokenizer = self._request, self._request.settings, self._loaded.tokenizer
        record = read_record(request.output.parts / RECORD)
        if record is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(request.output.parts))
        recipe = {**asdict(settings), "model_digest": record.digest, "prompts": request.prompts.digest}
        exclude = {
            "files": [str(path) for path in request.exclude_files],
            "texts": request.exclusion.texts,
            "prompts": request.prompts.excluded,
            "rows": 0,
        }
        prompts = {
            "file": None if request.prompt_file is None else str(request.prompt_file),
            "sha256": request.prompts.digest,
            "train": len(request.prompts.train),
            "validation": len(request.prompts.held_out),
            "repeated": request.prompts.repeated,
            "beside_held_out": request.prompts.beside_held_out,
            "refused_by_the_chat_template": self._refused,
        }
        manifest = {
            "model": str(self._loaded.path),
            "model_digest": record.digest,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "settings": asdict(settings),
            "prompts": prompts,
            "exclude": exclude,
            "generated_by": asdict(record),
            "provenance": provenance(),
        }
        sides = [TRAIN, VALIDATION] if settings.held_out else [TRAIN]
        rows = {side: self._groups.rows(side) for side in sides}
        source = f"text that {self._loaded.path} wrote"
        return request.output.write(rows, settings.tokens, tokenizer, source, recipe, manifest)
