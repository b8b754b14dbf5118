"""Continues all prompts of a file, split over processes that share only a folder.

Process r of n takes prompts r, r + n, r + 2n, ... and appends each continuation to its own part file, flushed line by
line, so that completed prompts survive a kill. A later start, with any number of processes, continues the missing
prompts with the checkpoint that the parts were created with. The process that finds all prompts completed writes the
output atomically.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from recycle_ds.config import RecycleError
from recycle_ds.config.atomic_files import temporary_name, write_atomically
from recycle_ds.inference.batch.parts_record import (
    RECORD,
    PartsRecord,
    checkpoint_digest,
    claim,
    read_record,
)
from recycle_ds.inference.batch.prompts import read_lines
from recycle_ds.inference.errors import DecodingError

GENERATED_BY = "generated_by"
"""Key of every output line: which prompts and settings (as a hash), which --model and which checkpoint it comes
from."""


class PromptError(DecodingError):
    """A prompt that cannot be continued, with its file and line. Only the process that decodes the prompt raises it."""


class Loaded(Protocol):
    """A loaded model."""

    @property
    def path(self) -> Path:
        """The checkpoint that it was loaded from."""


_L = TypeVar("_L", bound=Loaded)


@dataclass(frozen=True)
class PromptFile:
    """One process's share of a file of prompts. Call `settle` first, then `work`."""

    prompts: Path
    output: Path
    rank: int
    world_size: int
    model: str
    """Path of --model. It may be a run folder, whose newest checkpoint changes."""
    settings: dict[str, Any]
    """Everything that determines a continuation, apart from prompt and model."""

    @property
    def parts(self) -> Path:
        """Folder of the partial outputs of all processes."""
        return self.output.with_name(f"{self.output.name}.parts")

    @cached_property
    def _lines(self) -> dict[int, dict[str, Any]]:
        return read_lines(self.prompts)

    @cached_property
    def _key(self) -> str:
        tree = {"prompts": [record["prompt"] for record in self._lines.values()], "settings": self.settings}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    @property
    def _model_path(self) -> str:
        return os.path.abspath(self.model)

    def settle(self, load: Callable[[str], _L]) -> _L | None:
        """Loads the model and claims the parts folder. Returns None if the output is already complete.

        If the parts exist, from an earlier start or a faster process, the checkpoint that they were created with is
        loaded; otherwise the one that --model names now, and the parts folder is created.

        Prompts, output and parts are checked before the model is loaded, which may take long. Raises DecodingError for
        files that cannot be used, and for parts created with other prompts, other settings or a checkpoint that no
        longer exists.
        """
        self._check_output()
        if self._is_complete():
            return None
        record = self._parts_record()
        loaded = load(record.checkpoint if record and record.portable else self.model)
        own = self._record_of(loaded)
        if record is None:
            claim(self.parts, own)
            record = self._parts_record()
        if self._is_complete():  # checked last: the output exists before its parts are removed
            return None
        if record is None:
            raise DecodingError(f"{self.parts}: not a folder of partial outputs; remove it, or name another --output")
        if record.digest != own.digest and record.checkpoint != own.checkpoint and record.portable:
            del loaded  # memory may not suffice for two models
            loaded = load(record.checkpoint)
            own = self._record_of(loaded)
        if record.digest != own.digest:
            raise DecodingError(
                f"{self.parts}: created with the checkpoint {record.checkpoint}, {self._mismatch(record, own)}"
            )
        return loaded

    def _record_of(self, loaded: Loaded) -> PartsRecord:
        return PartsRecord(self._key, self._model_path, os.path.abspath(loaded.path), checkpoint_digest(loaded.path))

    def _mismatch(self, record: PartsRecord, own: PartsRecord) -> str:
        if own.checkpoint == record.checkpoint:
            return (
                f"whose files have changed since, or differ on this host: restore them, or remove {self.parts} to "
                "start over"
            )
        return f"but {self.model} is now {own.checkpoint}: use --model {record.checkpoint}, or name another --output"

    def work(
        self,
        generate: Callable[[Iterator[tuple[int, str]]], Iterator[tuple[int, dict[str, Any] | RecycleError]]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> bool:
        """Continues this process's missing prompts, until `stop`, which is called before each prompt, returns True.

        generate: maps prompts (index and text), read as needed, to the fields of their output lines or to errors, in
        any order. progress: called with the number of this process's completed prompts and their total. Returns whether
        all prompts, including those of other processes, are completed; the output is then written and the parts are
        removed. Raises PromptError for a prompt that cannot be continued, after the prompts that were begun before it.
        """
        try:
            self._continue_missing(generate, stop, progress)
            return self._merge()
        except FileNotFoundError:  # another process has written the output and removed the parts
            if self._is_complete():
                return True
            raise

    def _continue_missing(
        self,
        generate: Callable[[Iterator[tuple[int, str]]], Iterator[tuple[int, dict[str, Any] | RecycleError]]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> None:
        completed, lines = self._completed(), list(self._lines.items())
        missing = [index for index in range(self.rank, len(lines), self.world_size) if index not in completed]
        part = self.parts / f"part-{self.rank:05d}-of-{self.world_size:05d}.jsonl"
        if not missing:
            return
        failed: tuple[int, RecycleError] | None = None

        def wanted() -> Iterator[tuple[int, str]]:
            for index in missing:
                if failed is not None or stop():
                    return
                yield index, lines[index][1]["prompt"]

        _drop_partial_line(part)
        with part.open("a", encoding="utf-8") as file:
            count = 0
            for index, continuation in generate(wanted()):
                if isinstance(continuation, RecycleError):
                    failed = (
                        min(failed, (index, continuation), key=lambda one: one[0]) if failed else (index, continuation)
                    )
                    continue
                file.write(json.dumps(lines[index][1] | continuation | {"index": index}, ensure_ascii=False) + "\n")
                file.flush()
                count += 1
                progress(count, len(missing))
        if failed is not None:
            raise PromptError(f"{self.prompts}:{lines[failed[0]][0]}: {failed[1]}")

    def _check_output(self) -> None:
        """Creates the output's folder. Raises DecodingError if it is not writable, before any prompt is decoded."""
        folder = self.output.parent
        if self.output.is_dir():
            raise DecodingError(f"{self.output}: is a folder; name a file in it as --output")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DecodingError(
                f"{self.output}: its folder cannot be created ({error.strerror}); name a writable --output"
            ) from None
        for path in (folder, self.parts):
            if path.exists() and not (path.is_dir() and os.access(path, os.W_OK | os.X_OK)):
                raise DecodingError(f"{path}: not a writable folder; name another --output")

    def _is_complete(self) -> bool:
        """Whether another process or an earlier start has written the output. Raises DecodingError for an unrelated file."""
        if not self.output.exists():
            return False
        record = self._record_of_output()
        if record is None or not record.matches(self._key, self._model_path):
            raise DecodingError(f"{self.output}: already exists; name another --output, or remove it")
        self._remove_parts()  # left by a process that was killed, or created by one that started late
        return True

    def _record_of_output(self) -> PartsRecord | None:
        """The record in the first line of a finished output: a process that starts late recognises the output by it."""
        try:
            with self.output.open(encoding="utf-8") as file:
                return PartsRecord(**json.loads(file.readline())[GENERATED_BY])
        except OSError as error:
            raise DecodingError(f"{self.output}: cannot be read ({error.strerror or error})") from None
        except (ValueError, TypeError, KeyError):  # another kind of file
            return None

    def _parts_record(self) -> PartsRecord | None:
        """The record of the parts, None without parts. Raises DecodingError if the parts do not match this request."""
        record = read_record(self.parts / RECORD)
        if record is None:
            return None
        if record.key != self._key:
            raise DecodingError(
                f"{self.parts}: created with other prompts or settings; remove it, or name another --output"
            )
        if not record.matches(self._key, self._model_path):
            raise DecodingError(
                f"{self.parts}: created with the checkpoint {record.checkpoint}, not with {self.model}: use --model "
                f"{record.checkpoint}, or name another --output"
            )
        if not Path(record.checkpoint).is_dir():
            raise DecodingError(
                f"{self.parts}: created with the checkpoint {record.checkpoint}, which no longer exists: restore it, or "
                f"remove {self.parts} to start over"
            )
        return record

    def _completed(self) -> dict[int, dict[str, Any]]:
        """Completed lines of all parts, by prompt index. Skips lines that a kill has cut off."""
        found: dict[int, dict[str, Any]] = {}
        for part in sorted(self.parts.glob("part-*.jsonl")):
            for line in part.read_bytes().decode("utf-8", errors="replace").split("\n")[:-1]:
                try:
                    record = json.loads(line)
                except json.JSONDecodeError:  # damaged by a crash of the machine
                    continue
                if isinstance(record, dict) and isinstance(record.get("index"), int):
                    found[record["index"]] = record
        return found

    def _merge(self) -> bool:
        """Writes the output if all prompts are completed. Returns whether the output exists."""
        record, completed, count = read_record(self.parts / RECORD), self._completed(), len(self._lines)
        if record is None or len(completed) < count:
            return self._is_complete()
        by = {GENERATED_BY: asdict(record)}
        lines = [json.dumps(completed[index] | by, ensure_ascii=False) + "\n" for index in range(count)]
        write_atomically(self.output, "".join(lines))
        self._remove_parts()
        return True

    def _remove_parts(self) -> None:
        """Renames the folder first: other processes would mistake a partly deleted folder for valid parts."""
        aside = temporary_name(self.parts)
        try:
            os.rename(self.parts, aside)
        except FileNotFoundError:
            return
        shutil.rmtree(aside, ignore_errors=True)


def _drop_partial_line(part: Path) -> None:
    """Removes an incomplete last line left by a kill: the next line would be appended to it."""
    if part.is_file():
        content = part.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:
            with part.open("r+b") as file:
                file.truncate(len(complete))
