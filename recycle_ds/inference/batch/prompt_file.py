"""Continues all prompts of a file, split over processes that share only a folder.

Process r of n takes prompts r, r + n, r + 2n, ... and appends each continuation to its own part file, flushed line by
line, so that completed prompts survive a kill. A later start, with any number of processes, continues the missing
prompts with the checkpoint that the parts were created with. A prompt that cannot be continued completes with an error.
The process that finds all prompts completed writes the output atomically, and before it the list of failed prompts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from recycle_ds.config import RecycleError
from recycle_ds.config.atomic_files import write_atomically
from recycle_ds.inference.batch.claims import Claim, Loaded
from recycle_ds.inference.batch.failures import (
    ERROR,
    check_list,
    failures_of,
    failures_path,
    has_failed,
    list_failures,
    output_line,
    remove_list,
)
from recycle_ds.inference.batch.parts import (
    completed_lines,
    drop_partial_line,
    part_of,
    remove_parts,
    remove_unfinished,
)
from recycle_ds.inference.batch.parts_record import RECORD, PartsRecord, read_record
from recycle_ds.inference.batch.prompts import read_lines
from recycle_ds.inference.errors import DecodingError

GENERATED_BY = "generated_by"
"""Key of every output line: which prompts and settings (as a hash), which --model and which checkpoint it comes
from."""

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

    @property
    def failures_path(self) -> Path:
        """The list of prompts that could not be continued, written with the output."""
        return failures_path(self.output)

    @cached_property
    def _lines(self) -> dict[int, dict[str, Any]]:
        return read_lines(self.prompts)

    @cached_property
    def _key(self) -> str:
        tree = {"prompts": [record["prompt"] for record in self._lines.values()], "settings": self.settings}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()

    @property
    def _claim(self) -> Claim:
        return Claim(self.parts, self._key, self.model)

    def settle(self, load: Callable[[str], _L]) -> _L | None:
        """Loads the model and claims the parts folder, see `Claim.settle`. Returns None if the output is already complete.

        Prompts, output and parts are checked before the model is loaded, which may take long. Raises DecodingError for
        files that cannot be used, and for parts created with other prompts, other settings or a checkpoint that no
        longer exists.
        """
        self._check_output()
        if self._is_complete():
            return None
        # the list may be that of an output that has been removed
        return self._claim.settle(load, self._is_complete, lambda: remove_list(self.failures_path))

    def work(
        self,
        generate: Callable[[Iterator[tuple[int, str]]], Iterator[tuple[int, dict[str, Any] | RecycleError]]],
        stop: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> bool:
        """Continues this process's missing prompts, until `stop`, which is called before each prompt, returns True.

        generate: maps prompts (index and text), read as needed, to the fields of their output lines or to errors, in
        any order. progress: called with the number of this process's completed prompts, those of earlier starts among
        them, and their total. Returns whether
        all prompts, including those of other processes, are completed; the output is then written and the parts are
        removed. A prompt that cannot be continued is completed by its error.
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
        completed, records = completed_lines(self.parts), list(self._lines.values())
        share = range(self.rank, len(records), self.world_size)
        missing = [index for index in share if index not in completed]
        if not missing:
            return

        def wanted() -> Iterator[tuple[int, str]]:
            for index in missing:
                if text := records[index]["prompt"]:
                    if stop():
                        return
                    yield index, text

        empty = [index for index in missing if not records[index]["prompt"]]
        refused = ((index, DecodingError("the prompt is empty: give at least one character")) for index in empty)
        part = part_of(self.parts, self.rank, self.world_size)
        drop_partial_line(part)
        with part.open("a", encoding="utf-8") as file:
            for count, (index, answer) in enumerate(chain(refused, generate(wanted())), 1):
                file.write(json.dumps(output_line(records[index], index, answer), ensure_ascii=False) + "\n")
                file.flush()
                progress(len(share) - len(missing) + count, len(share))

    def failures(self) -> int:
        """Number of prompts of the finished output that could not be continued. Writes the list of them if it is missing
        or stale."""
        errors = failures_of(self.output)
        list_failures(self.failures_path, self._lines, errors)
        return len(errors)

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self._lines)

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
        check_list(self.failures_path, self.prompts)

    def _is_complete(self) -> bool:
        """Whether another process or an earlier start has written the output. Raises DecodingError for an unrelated file."""
        if not self.output.exists():
            return False
        record = self._record_of_output()
        if record is None or not record.matches(self._key, self._claim.model_path):
            raise DecodingError(f"{self.output}: already exists; name another --output, or remove it")
        self._tidy()
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

    def _merge(self) -> bool:
        """Writes the output if all prompts are completed. Returns whether the output exists."""
        record, completed, count = read_record(self.parts / RECORD), completed_lines(self.parts), self.count
        if record is None or len(completed) < count:
            return self._is_complete()
        by = {GENERATED_BY: asdict(record)}
        lines = [json.dumps(completed[index] | by, ensure_ascii=False) + "\n" for index in range(count)]
        errors = {index: line[ERROR] for index, line in completed.items() if has_failed(line)}
        list_failures(self.failures_path, self._lines, errors)  # first: the output vouches for it
        write_atomically(self.output, "".join(lines))
        self._tidy()
        return True

    def _tidy(self) -> None:
        """Removes the parts, and what processes that were killed or that started late have left."""
        remove_parts(self.parts)
        remove_unfinished(self.output, self.failures_path, self.parts)
